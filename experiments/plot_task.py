"""The picture of a task: answers right while training, and, as trained, against length, number of pairs and distance."""

from collections.abc import Sequence
from typing import Any

from xattn.experiments.figure import Looks, band, panels, variant_legend
from xattn.experiments.gather import Estimate, Row, estimate
from xattn.experiments.judge import AS_TRAINED
from xattn.experiments.record import read_metrics
from xattn.experiments.task_tables import distance_accuracies, spans

_Line = dict[float, Estimate]


def paint_task(figure: Any, rows: Sequence[Row], looks: Looks) -> bool:
    """A panel for each of them that has two places or more; False where the data is no task."""
    rows = [row for row in rows if row.first.get("task")]
    if not rows:
        return False
    longest = max(rows[0].first["task"][AS_TRAINED], key=int)
    wanted = (
        ("while training", "steps", _training, False),
        ("beyond the trained length", "tokens of a sequence", _lengths, True),
        (f"among more pairs, at {int(longest):,} tokens", "pairs", _pairs, True),
        (f"by distance, at {int(longest):,} tokens", "tokens back to what decides", _distances, True),
    )
    lines = [{row.name: line(row) for row in rows} for _, _, line, _ in wanted]
    kept = [(*one[:2], one[3], by) for one, by in zip(wanted, lines, strict=True) if any(len(line) > 1 for line in by.values())]
    for (_, label, doubling, by), ax in zip(kept, panels(figure, [one[0] for one in kept]), strict=True):
        for name, line in by.items():
            if line:
                band(ax, list(line), list(line.values()), **looks.line(name, marker=doubling))
        if doubling:
            places = sorted({place for line in by.values() for place in line})
            ax.set_xscale("log", base=2)
            ax.set_xticks(places, [f"{place:,}" for place in places])
            ax.minorticks_off()
        ax.set_ylim(-0.03, 1.03)
        ax.set(xlabel=label, ylabel="answers right")
    if kept:
        variant_legend(figure, looks, [row.name for row in rows])
    return bool(kept)


def _training(row: Row) -> _Line:
    by_step: dict[int, list[float]] = {}
    for run in row.done:
        for metrics in read_metrics(run.path):
            if "val/accuracy" in metrics:
                by_step.setdefault(metrics["step"], []).append(metrics["val/accuracy"])
    return _line(by_step)


def _lengths(row: Row) -> _Line:
    lengths = sorted(row.first["task"][AS_TRAINED], key=int)
    return _line({int(n): row.values("val_by_length", AS_TRAINED, n, "accuracy").values() for n in lengths})


def _pairs(row: Row) -> _Line:
    longest = max(row.first["task"][AS_TRAINED], key=int)
    counts = sorted(row.first["task"][AS_TRAINED][longest].get("by_pairs", {}), key=int)
    place = ("task", AS_TRAINED, longest, "by_pairs")
    return _line({int(n): row.values(*place, n, "accuracy").values() for n in counts})


def _distances(row: Row) -> _Line:
    longest = max(row.first["task"][AS_TRAINED], key=int)
    found = [(b["first"], b["last"]) for b in spans(row.first["task"][AS_TRAINED][longest])]
    return _line({span[0]: distance_accuracies(row, AS_TRAINED, int(longest), span).values() for span in found})


def _line(values: dict[int, Any]) -> _Line:
    return {place: found for place, by_seed in values.items() if (found := estimate(by_seed)) is not None}
