"""The pictures of evaluation: quality against length and against position, as trained and with each extension."""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from xattn.experiments.figure import COLOURS, Looks, band, panels, variant_legend
from xattn.experiments.gather import Estimate, Row, estimate, measure
from xattn.experiments.judge import AS_TRAINED

# Of an extension, beside the variant's colour.
DASHES = ("-", "--", ":", "-.")
# Extensions that one panel shows by dashes; where there are more, families of them get panels and each its own colour.
_BY_DASHES, _BY_COLOUR = 7, 7
# What a row's line is made of: place -> value of each seed.
_Points = Callable[[Row, str], dict[float, dict[int, float]]]


def paint_length(figure: Any, rows: Sequence[Row], looks: Looks) -> bool:
    """Quality against evaluation length, on the same tokens at every length."""
    name, label = measure(rows)

    def points(row: Row, extension: str) -> dict[float, dict[int, float]]:
        lengths = sorted(row.first["val_by_length"].get(extension, {}), key=int)
        found = {int(n): row.values("val_by_length", extension, n, name) for n in lengths}
        return {n: by_seed for n, by_seed in found.items() if by_seed}

    lengths = sorted({int(n) for row in rows for by in row.first["val_by_length"].values() for n in by})
    drawn = False
    for ax in _families(figure, rows, looks, points, name):
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
        ax.minorticks_off()
        ax.set(xlabel="evaluation length (tokens)", ylabel=label)
        drawn = True
    return drawn


def paint_position(figure: Any, rows: Sequence[Row], looks: Looks) -> bool:
    """Loss in each part of the longest evaluated context."""

    def points(row: Row, extension: str) -> dict[float, dict[int, float]]:
        by_seed = {run.config.seed: _buckets(run.result["val_by_position"].get(extension, {})) for run in row.done}
        middles = [middle for middle in next(iter(by_seed.values())) if all(middle in found for found in by_seed.values())]
        return {middle: {seed: found[middle] for seed, found in by_seed.items()} for middle in middles}

    drawn = False
    for ax in _families(figure, rows, looks, points, "loss_nats"):
        ax.set(xlabel="position in the context (tokens)", ylabel="loss (nats a token)")
        ax.set_xlim(left=0)
        drawn = True
    return drawn


def _buckets(by_length: dict[str, Any]) -> dict[float, float]:
    """Middle of each bucket of the longest length -> its loss."""
    if not by_length:
        return {}
    buckets = by_length[max(by_length, key=int)]
    return {(bucket["first"] + bucket["last"]) / 2: bucket["loss_nats"] for bucket in buckets}


def _families(figure: Any, rows: Sequence[Row], looks: Looks, points: _Points, measured: str) -> Iterator[Any]:
    """A panel of all rows as trained, and one or more for each row that was extended; every line is drawn. Yields the panels."""
    families = [(None, [(row, AS_TRAINED) for row in rows])]
    families += [(row, [(row, name) for name in names]) for row in rows if _extended(row) for names in _panelled(row)]
    found = [(whose, [(row, name, points(row, name)) for row, name in lines]) for whose, lines in families]
    found = [(whose, kept) for whose, lines in found if (kept := [line for line in lines if len(line[2]) > 1])]
    for (whose, lines), ax in zip(found, panels(figure, [_title(whose) for whose, _ in found]), strict=True):
        for row, extension, by_place in lines:
            style = looks.line(row.name)
            if whose is not None:
                label = "as trained" if extension == AS_TRAINED else extension
                style |= {"label": label, "ms": 3.5} | _told_apart(row, [name for _, name, _ in lines].index(extension))
                by_place = {place: _change(row, by_seed, measured) for place, by_seed in by_place.items()}
            band(ax, list(by_place), [_estimate(by_seed) for by_seed in by_place.values()], **style)
        ax.axvline(rows[0].runs[0].config.trainer.seq_len, color="#888888", lw=0.8, ls=(0, (2, 2)), zorder=0)
        if whose is not None:
            _legend_above(ax, len(lines))
        yield ax
    if found:
        variant_legend(figure, looks, [row.name for row in rows], rule="trained length")


def _panelled(row: Row) -> list[list[str]]:
    """What each panel of an extended row shows; families, whose names differ in numbers, stay together."""
    names = [name for name in row.first["val_by_length"] if name != AS_TRAINED]
    if len(names) <= _BY_DASHES:
        return [[AS_TRAINED, *names]]
    shown: list[list[str]] = []
    for _, family in groupby(names, key=lambda name: re.sub(r"_(w?\d.*|auto)$", "", name)):
        members = list(family)
        if shown and len(shown[-1]) + len(members) <= _BY_COLOUR:
            shown[-1] += members
        else:
            shown.append(members)
    return [[AS_TRAINED, *members] for members in shown]


def _told_apart(row: Row, place: int) -> dict[str, Any]:
    """The look of a panel's line; the first is the row as trained."""
    if len(row.first["val_by_length"]) <= _BY_DASHES + 1:
        return {"ls": DASHES[place % len(DASHES)]}
    if place == 0:
        return {"ls": "-", "zorder": 3}
    colour = COLOURS[1 + (place - 1) % _BY_COLOUR]
    return {"color": colour, "mfc": colour, "ls": DASHES[(place - 1) // _BY_COLOUR]}


def _legend_above(ax: Any, lines: int) -> None:
    """A legend in two columns in room of its own: in a place that seems free it would lie on a band."""
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + (high - low) * 0.1 * -(-lines // 2))
    ax.legend(loc="upper left", ncols=2, fontsize=8, handlelength=3.2, framealpha=0.0)


def _extended(row: Row) -> bool:
    return len(row.first["val_by_length"]) > 1


def _title(whose: Row | None) -> str:
    if whose is None:
        return "as trained"
    return f"{whose.name}, extended" + (" (band: of the change)" if len(whose.done) > 1 else "")


def _change(row: Row, by_seed: dict[int, float], measured: str) -> dict[int, float]:
    """The same mean, but spread as the change from the seed's own score as trained: an extension is tried on trained
    weights, and how the weights of several seeds differ says nothing about it.
    """
    scores = row.values("val", measured)
    own = {seed: scores[seed] for seed in by_seed if seed in scores}
    mean = sum(own.values()) / max(len(own), 1)
    return {seed: by_seed[seed] - score + mean for seed, score in own.items()}


def _estimate(by_seed: dict[int, float]) -> Estimate:
    found = estimate(by_seed.values())
    assert found is not None
    return found
