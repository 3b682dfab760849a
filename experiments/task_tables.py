"""The tables of a study on a task: answers right by length, by number of pairs, and by how far back what decides them stands."""

from collections.abc import Callable, Sequence

from xattn.experiments.gather import Row, estimate
from xattn.experiments.judge import AS_TRAINED
from xattn.experiments.tables import Table, by_length_table, lengths_of, show

NONE = "-"
# of one run, at distances in one span: fewer say nothing
_LEAST_ANSWERS = 10


def task_tables(rows: Sequence[Row]) -> list[Table]:
    """Every one of them that the rows have numbers for; none where the data is no task."""
    asked = [row for row in rows if row.done and row.first.get("task")]
    if not asked:
        return []
    made = (accuracy_table(asked), pairs_table(asked), distance_table(asked))
    return [table for table in made if table is not None]


def accuracy_table(rows: Sequence[Row]) -> Table:
    """One line a variant and extension, one column a length."""
    several = any(len(row.done) > 1 for row in rows)
    title = f"Answers right{' ± sd' if several else ''} (sequences wholly right), of 1"
    return by_length_table(rows, "val_by_length", _accuracy_cell, title=title)


def _accuracy_cell(row: Row, extension: str, length: int) -> str:
    place = ("val_by_length", extension, str(length))
    if "error" in row.first["val_by_length"].get(extension, {}).get(str(length), {}):
        return "not possible"
    accuracy, exact = (estimate(row.values(*place, name).values()) for name in ("accuracy", "exact"))
    return NONE if accuracy is None else f"{show(accuracy, '{:.3f}')} ({exact.mean:.2f})"


def pairs_table(rows: Sequence[Row]) -> Table | None:
    """One line a variant and extension, one column a number of pairs, at the longest length."""
    length = max(lengths_of(rows))
    counts = sorted({int(n) for row in rows for by in _tasks(row, length).values() for n in by.get("by_pairs", {})})
    if not counts:
        return None

    def cell(row: Row, extension: str, place: int) -> str:
        path = ("task", extension, str(length), "by_pairs", str(counts[place]), "accuracy")
        return show(estimate(row.values(*path).values()), "{:.3f}")

    return _table(rows, [f"{n} pairs" for n in counts], cell, title=f"Answers right among more pairs, at {length} tokens")


def distance_table(rows: Sequence[Row]) -> Table | None:
    """One line a variant and extension, one column a span of distances, at the longest length; None where there is one span."""
    length = max(lengths_of(rows))
    found = sorted({(b["first"], b["last"]) for row in rows for by in _tasks(row, length).values() for b in spans(by)})
    if len(found) < 2:
        return None

    def cell(row: Row, extension: str, place: int) -> str:
        return show(estimate(distance_accuracies(row, extension, length, found[place]).values()), "{:.3f}")

    title = f"Answers right by how many tokens back what decides them stands, at {length} tokens"
    return _table(rows, [f"{low}-{high}" for low, high in found], cell, title=title)


def distance_accuracies(row: Row, extension: str, length: int, span: tuple[int, int]) -> dict[int, float]:
    """seed -> accuracy at these distances."""
    found = {}
    for run in row.done:
        by = run.result["task"].get(extension, {}).get(str(length), {})
        for bucket in spans(by):
            if (bucket["first"], bucket["last"]) == span:
                found[run.config.seed] = bucket["accuracy"]
    return found


def _tasks(row: Row, length: int) -> dict[str, dict]:
    return {name: by.get(str(length), {}) for name, by in row.first["task"].items()}


def spans(by: dict) -> list[dict]:
    """Of one length's scores, those by distance that enough answers stand behind."""
    return [span for span in by.get("by_distance", []) if span["answers"] >= _LEAST_ANSWERS]


def _table(rows: Sequence[Row], columns: list[str], cell: Callable[[Row, str, int], str], *, title: str) -> Table:
    cells = [
        [row.name, "as trained" if name == AS_TRAINED else name, *[cell(row, name, place) for place in range(len(columns))]]
        for row in rows
        for name in row.first["task"]
    ]
    return Table(title=title, header=["variant", "evaluated with", *columns], cells=cells, left=("evaluated with",))
