"""How pictures look: a colour and a marker a variant, panels of one size, spreads over seeds, one legend beside them."""

from collections.abc import Iterable, Sequence
from typing import Any

from xattn.experiments.gather import Estimate

# Okabe and Ito's colours, told apart by colour-blind readers too; their yellow is too light for lines.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00")
MARKERS = "osD^vPX*<>hd"
_PANEL, _LEGEND, _TITLE = (4.4, 3.3), 1.7, 0.4  # inches


class Looks:
    """The look of each variant, the same in every picture. From the ninth on colours come again, broken and hollow."""

    def __init__(self, names: Iterable[str]) -> None:
        self._looks = {}
        for place, name in enumerate(names):
            colour, again = COLOURS[place % len(COLOURS)], place // len(COLOURS) % 2
            self._looks[name] = {
                "color": colour,
                "marker": MARKERS[place % len(MARKERS)],
                "mfc": "white" if again else colour,
                "ls": (0, (5, 1.5)) if again else "-",
            }

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._looks[name]

    def line(self, name: str, *, marker: bool = True) -> dict[str, Any]:
        """Arguments of matplotlib's `plot`."""
        look = self._looks[name] | {"label": name, "lw": 1.4, "ms": 4.5}
        return look if marker else {key: value for key, value in look.items() if key not in ("marker", "ms", "mfc")}


def panels(figure: Any, titles: Sequence[str]) -> list[Any]:
    """One panel a title, two side by side; the figure grows with them and leaves room for a legend: beside them, or, where
    their number is odd, in the place of the next one.
    """
    columns = max(min(len(titles), 2), 1)
    lines = max(-(-len(titles) // columns), 1)
    beside = _LEGEND if len(titles) == columns * lines else 0.0
    figure.set_size_inches(columns * _PANEL[0] + beside, lines * _PANEL[1] + _TITLE)
    axes = [figure.add_subplot(lines, columns, place + 1) for place in range(len(titles))]
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, loc="left", fontsize=9.5, color="#444444")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.tick_params(labelsize=8.5)
    return axes


def band(ax: Any, places: Sequence[float], values: Sequence[Estimate], **style: Any) -> None:
    """A line through the means, and a band of one standard deviation to each side where there are several seeds."""
    means = [value.mean for value in values]
    ax.plot(places, means, **{"lw": 1.4} | style)
    if any(value.spread is not None for value in values):
        spreads = [value.spread or 0.0 for value in values]
        low, high = zip(*((m - s, m + s) for m, s in zip(means, spreads, strict=True)), strict=True)
        ax.fill_between(places, low, high, color=style["color"], alpha=0.12, lw=0)


def variant_legend(
    figure: Any,
    looks: Looks,
    names: Sequence[str],
    *,
    marker: bool = True,
    line: bool = True,
    rule: str | None = None,
    marks: Sequence[tuple[str, str]] = (),
) -> None:
    """The legend of all panels, where `panels` left room.

    Args:
        rule: names the broken vertical line. marks: (marker, meaning).
    """
    from matplotlib.lines import Line2D

    handles = []
    for name in names:
        style = looks.line(name, marker=marker)
        handles.append(Line2D([], [], **style | ({} if line else {"ls": "none", "ms": 7})))
    if rule is not None:
        handles.append(Line2D([], [], color="#888888", lw=0.8, ls=(0, (2, 2)), label=rule))
    handles += [Line2D([], [], color="#444444", ls="none", marker=m, ms=8, mew=1.8, mfc="none", label=text) for m, text in marks]
    look = {"handles": handles, "frameon": False, "fontsize": 8.5}
    if len(figure.axes) > 1 and len(figure.axes) % 2:
        empty = figure.add_subplot(len(figure.axes) // 2 + 1, 2, len(figure.axes) + 1)
        empty.set_axis_off()
        empty.legend(**look, loc="upper left")
    else:
        figure.legend(**look, loc="outside right upper")
