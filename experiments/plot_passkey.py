"""The picture of planted keys: a panel for each variant as trained and extended, its share found at each length and depth."""

import math
from collections.abc import Sequence
from typing import Any

from xattn.experiments.figure import Looks
from xattn.experiments.gather import Row, estimate
from xattn.experiments.judge import AS_TRAINED

_COLUMNS = 4
_PANEL, _AROUND = (2.2, 1.75), (1.5, 0.9)  # inches
_DARK = 0.55  # shares above it are written in white


def paint_passkey(figure: Any, rows: Sequence[Row], looks: Looks) -> bool:
    """False where no keys were planted."""
    rows = [row for row in rows if row.first.get("passkey")]
    found = [(row, name) for row in rows for name in row.first["passkey"]]
    lengths = sorted({int(n) for row, name in found for n in row.first["passkey"][name]})
    tried = [by for row, name in found for by in row.first["passkey"][name].values() if "error" not in by]
    depths = sorted({depth for by in tried for depth in by}, key=float)
    if not depths:
        return False
    columns = min(len(found), _COLUMNS)
    lines = -(-len(found) // columns)
    figure.set_size_inches(columns * _PANEL[0] + _AROUND[0], lines * _PANEL[1] + _AROUND[1])
    axes = []
    for at, (row, name) in enumerate(found):
        ax = figure.add_subplot(lines, columns, at + 1)
        ax.set_facecolor("#e4e4e4")  # shows where there is no share
        ax.set_title(row.name if name == AS_TRAINED else f"{row.name}, {name}", loc="left", fontsize=9, color="#444444")
        shares = [[_mean(row, name, n, depth) for n in lengths] for depth in depths]
        shown = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for y, line in enumerate(shares):
            for x, share in enumerate(line):
                text, colour = (f"{share:.2f}", "white" if share > _DARK else "black") if share == share else ("-", "#666666")
                ax.text(x, y, text, ha="center", va="center", fontsize=7.5, color=colour)
        ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths] if at + columns >= len(found) else [])
        ax.set_yticks(range(len(depths)), [f"{float(depth):g}" for depth in depths] if at % columns == 0 else [])
        ax.tick_params(labelsize=8, length=0)
        ax.axvline(lengths.index(row.runs[0].config.trainer.seq_len) + 0.5, color="#D55E00", lw=1.2)
        axes.append(ax)
    bar = figure.colorbar(shown, ax=axes, shrink=min(1.0, 1.5 / lines), aspect=18)
    bar.set_label("share of keys found", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    figure.supxlabel("tokens of the prompt (right of the line: beyond the trained length)", fontsize=9)
    figure.supylabel("depth of the key (0: the start)", fontsize=9)
    return True


def _mean(row: Row, extension: str, length: int, depth: str) -> float:
    """The mean over seeds; NaN where the model could not."""
    by_seed = row.values("passkey", extension, str(length), depth, "accuracy")
    value = estimate(by_seed.values())
    return math.nan if value is None else value.mean
