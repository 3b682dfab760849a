"""What pictures of figures against length share: their axes, and how they are kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def against_length(axes: Any, lengths: Sequence[int], *, title: str, label: str) -> None:
    """Logarithmic axes with a tick at every length, in thousands from 1,024 on."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(n) if n < 1024 else f"{n // 1024}k" for n in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.minorticks_off()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def save(figure: Any, file: Path) -> None:
    """Into the file, whose folder is made; the figure is of no more use."""
    import matplotlib.pyplot as plt

    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)
