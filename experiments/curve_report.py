"""Memory curves as a reader sees them: tables, memory_curve.csv and the picture; with the KV cache predicted beside them."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xattn
from xattn.experiments.curve import DIED, FAILED, OUT_OF_MEMORY, REFUSED, TIME_LIMIT, Curve, read_curves
from xattn.experiments.figure import Looks, panels, variant_legend
from xattn.experiments.gather import Row
from xattn.experiments.tables import MIB, Table

CSV = "memory_curve.csv"
_KINDS = {
    "train": "Peak of a training step, one sequence",
    "infer": "Peak of one evaluation, one sequence",
}
_MARKS = {OUT_OF_MEMORY: "x", REFUSED: "s", TIME_LIMIT: "|", FAILED: "1", DIED: "1"}
_MARKED = {
    OUT_OF_MEMORY: "out of memory\nat the next length",
    REFUSED: "refused at the\nnext length",
    TIME_LIMIT: "out of time at\nthe next length",
    FAILED: "failed at the\nnext length",
    DIED: "process died at\nthe next length",
}

Curves = dict[str, dict[str, Curve]]


def curves_of(rows: Sequence[Row], folder: Path) -> Curves:
    """name -> kind -> curve, for the rows whose curves `folder` holds."""
    found = {row.name: read_curves(folder, row.runs[0].config) for row in rows}
    return {name: by_kind for name, by_kind in found.items() if by_kind}


def kv_bytes(row: Row, length: int) -> int:
    """Predicted bytes of a 16-bit cache after `length` tokens of one sequence."""
    return xattn.accounting.kv_bytes(xattn.parse(row.runs[0].config.model), length)


def curve_tables(rows: Sequence[Row], curves: Curves) -> list[Table]:
    """One table a kind, and one of the predicted cache: a line a variant, a column a length; empty without curves."""
    rows = [row for row in rows if row.name in curves]
    lengths = _lengths(curves)
    header = ["variant", *[f"{n:,}" for n in lengths]]
    tables = [
        Table(
            title=f"{title}, MiB, against its length in tokens",
            header=header,
            cells=[[row.name, *[_cell(curves[row.name][kind], n) for n in lengths]] for row in rows if kind in curves[row.name]],
        )
        for kind, title in _KINDS.items()
        if any(kind in by_kind for by_kind in curves.values())
    ]
    if rows:
        cells = [[row.name, *[f"{kv_bytes(row, n) / MIB:,.2f}" for n in lengths]] for row in rows]
        tables.append(Table(title="KV cache of one sequence, predicted, MiB, against its length", header=header, cells=cells))
    return tables


def _cell(curve: Curve, length: int) -> str:
    if length in curve.points:
        return f"{curve.points[length] / MIB:,.1f}"
    return curve.end["reason"] if curve.end is not None and curve.end["length"] == length else "-"


def curve_notes(rows: Sequence[Row], curves: Curves) -> list[str]:
    """What was measured and how, and why a curve ends; empty without curves."""
    found = [(row.name, kind, curve) for row in rows for kind, curve in curves.get(row.name, {}).items()]
    if not found:
        return []
    methods = ", ".join(sorted({curve.method for _, _, curve in found}))
    lines = [
        "Memory against length: one sequence, with each length's own max_seq_len; a fresh process for each variant and kind, "
        f"lengths ascending in it ({methods}). Training: weights, gradients, optimiser state and activations of one step; "
        "evaluation: one forward with its loss, no cache. The KV cache is predicted, in 16 bits."
    ]
    for name, kind, curve in found:
        if curve.end is not None:
            lines.append(f"{name}, {kind} at {curve.end['length']:,} tokens: {curve.end['reason']}: {curve.end['error']}")
    return lines


def curve_csv(rows: Sequence[Row], curves: Curves) -> str:
    """One line a variant, kind and length: bytes measured, or why there are none; bytes predicted of the KV cache."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "kind", "length", "peak_bytes", "end", "kv_cache_bytes_predicted"])
    for row, kind, curve in _lines(rows, curves):
        for length, peak in curve.points.items():
            writer.writerow([row.name, kind, length, peak, "", kv_bytes(row, length)])
        if curve.end is not None:
            length = curve.end["length"]
            writer.writerow([row.name, kind, length, "", f"{curve.end['reason']}: {curve.end['error']}", kv_bytes(row, length)])
    return text.getvalue()


def _lines(rows: Sequence[Row], curves: Curves) -> Iterator[tuple[Row, str, Curve]]:
    for row in rows:
        for kind, curve in curves.get(row.name, {}).items():
            yield row, kind, curve


def _lengths(curves: Curves) -> list[int]:
    found = [curve for by_kind in curves.values() for curve in by_kind.values()]
    return sorted({n for c in found for n in c.points} | {c.end["length"] for c in found if c.end is not None})


def paint_curves(figure: Any, rows: Sequence[Row], curves: Curves, looks: Looks) -> bool:
    """Bytes against length on logarithmic axes, a line a variant; a mark at its last point says why it ends there."""
    rows, lengths = [row for row in rows if row.name in curves], _lengths(curves)
    kinds = [kind for kind in _KINDS if any(kind in by_kind for by_kind in curves.values())]
    if not rows or len(lengths) < 2:
        return False
    titles = [_KINDS[kind] for kind in kinds] + ["KV cache of one sequence, predicted (16 bit)"]
    ends: dict[str, str] = {}
    axes = panels(figure, titles)
    for kind, ax in zip(kinds, axes, strict=False):
        for row, _, curve in (line for line in _lines(rows, curves) if line[1] == kind and line[2].points):
            ax.plot(list(curve.points), [peak / MIB for peak in curve.points.values()], **looks.line(row.name))
            if curve.end is not None:
                ends[curve.end["reason"]] = _MARKS[curve.end["reason"]]
                last = max(curve.points)
                mark = {"marker": _MARKS[curve.end["reason"]], "ms": 10, "mew": 1.8, "mfc": "none"}
                ax.plot([last], [curve.points[last] / MIB], color=looks[row.name]["color"], ls="none", **mark)
    for row in rows:
        axes[-1].plot(lengths, [kv_bytes(row, n) / MIB for n in lengths], **looks.line(row.name))
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xticks(lengths, [_short(n) for n in lengths])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(lambda mib, _: _size(mib))
        ax.set(xlabel="length (tokens)", ylabel="memory")
    marks = [(mark, _MARKED[reason]) for reason, mark in ends.items()]
    variant_legend(figure, looks, [row.name for row in rows], marks=marks)
    return True


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{length}"


def _size(mib: float) -> str:
    for unit, factor in (("GiB", 1024), ("MiB", 1)):
        if mib >= factor:
            return f"{mib / factor:g} {unit}"
    return f"{mib * 1024:g} KiB"
