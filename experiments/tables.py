"""The tables of a comparison, as text cells: what each variant costs and buys, beyond its length too, and what it finds there."""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xattn.experiments.gather import Estimate, Row, delta, estimate, measure
from xattn.experiments.judge import AS_TRAINED
from xattn.experiments.outcome import backend_summary
from xattn.experiments.record import SEARCH, read_json

MIB = 1024**2
NONE = "-"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text cells, ready for any output. Columns are aligned right, but for the first and those named in `left`."""

    title: str
    header: list[str]
    cells: list[list[str]]
    left: tuple[str, ...] = ()


def main_table(rows: Sequence[Row]) -> Table:
    """One line a variant: quality, its difference to the baseline, cost, and the back-end that really ran."""
    # Two kinds of ±, so that each says which one it is.
    spread, interval = (" ± sd", " ± 95 %") if any(len(row.done) > 1 for row in rows) else ("", "")
    judged, _ = measure(rows)
    change = {"bpb": "delta bpb", "loss_nats": "delta nats"}[judged]
    header = ["variant", f"val bpb{spread}", f"{change}{interval}", f"val ppl{spread}", "params", "train peak MiB",
              "infer peak MiB", "KV B/token", "tokens/s", "back-end", "comparable"]  # fmt: skip
    answers = any(row.values("val", "accuracy") for row in rows)
    if answers:
        header.insert(4, f"answers right{spread}")
    cells = []
    for row in rows:
        if not row.done:
            cells.append([row.name, *[NONE] * (len(header) - 2), "no result: " + "; ".join(row.failures)])
            continue
        backend = backend_summary(row.first["backends"])
        right = [show(estimate(row.values("val", "accuracy").values()), "{:.3f}")] if answers else []
        cells.append([row.name, *_quality(row, rows[0], judged), *right, *_cost(row), backend, _verdict(row, rows[0])])
    return Table(title="Trained on equal tokens", header=header, cells=cells, left=("back-end", "comparable"))


def _quality(row: Row, baseline: Row, judged: str) -> list[str]:
    difference = None if row is baseline else delta(row, baseline, "val", judged)
    return [
        show(estimate(row.values("val", "bpb").values()), "{:.4f}"),
        show(difference, "{:+.4f}", interval=True),
        show(estimate(row.values("val", "ppl").values()), "{:.3f}"),
    ]


def _cost(row: Row) -> list[str]:
    def mean(*path: str, unit: float = 1.0, form: str = "{:,.0f}") -> str:
        found = estimate(row.values(*path).values())
        return form.format(found.mean / unit) if found else NONE

    return [
        f"{row.first['params']:,}",
        mean("memory", "train_peak_bytes", unit=MIB, form="{:,.1f}"),
        mean("memory", "infer_peak_bytes", unit=MIB, form="{:,.1f}"),
        mean("memory", "kv_bytes_per_token"),
        mean("tokens_per_second"),
    ]


def _verdict(row: Row, baseline: Row) -> str:
    text = "baseline" if row is baseline else "yes"
    if row.problems:
        text = "not comparable: " + "; ".join(row.problems)
    return "; ".join([text, *row.failures])


def length_table(rows: Sequence[Row]) -> Table | None:
    """One line a variant and extension, one column an evaluation length; None where only one length was judged."""
    done = [row for row in rows if row.done]
    if len(lengths_of(done)) < 2:
        return None
    unit = "bits per byte (perplexity)" if measure(rows)[0] == "bpb" else "perplexity"
    title = f"Beyond the trained length: {unit} on the same validation tokens"
    if any(row.first.get("task") for row in done):
        title = "Beyond the trained length: perplexity of the answers"
    return by_length_table(done, "val_by_length", _length_cell, title=title)


def passkey_table(rows: Sequence[Row]) -> Table | None:
    """One line a variant and extension, one column a length: the share of planted keys found; None where none was asked for."""
    asked = [row for row in rows if row.done and row.first.get("passkey")]
    if not asked:
        return None
    title = "Planted keys found: mean over depths (worst depth), of 1"
    return by_length_table(asked, "passkey", _passkey_cell, title=title)


def decode_table(rows: Sequence[Row]) -> Table | None:
    """One line a variant: what reading a prompt of the trained length and going on cost, and the cache at every length."""
    asked = [row for row in rows if row.done and (row.first.get("decode") or {}).get("by_length")]
    if not asked:
        return None
    lengths = sorted({int(n) for row in asked for n in row.first["decode"]["by_length"]})
    shown = {lengths[0], lengths[-1]}
    header = ["variant", f"prefill MiB at {lengths[0]:,}", f"decode MiB at {lengths[0]:,}"]
    header += [f"tokens/s at {n:,}" for n in sorted(shown)] + [f"KV B/token at {n:,}" for n in lengths]
    cells = []
    for row in asked:
        peaks = [_decoded(row, lengths[0], f"{name}_peak_bytes", unit=MIB, form="{:,.1f}") for name in ("prefill", "decode")]
        speeds = [_decoded(row, n, "tokens_per_second") for n in sorted(shown)]
        cells.append([row.name, *peaks, *speeds, *[_decoded(row, n, "kv_bytes_per_token") for n in lengths]])
    decode = asked[0].first["decode"]
    title = f"Decoding over a cache: the last {decode['new_tokens']} tokens of a context, batch {decode['batch']}"
    return Table(title=title, header=header, cells=cells)


def _decoded(row: Row, length: int, field: str, *, unit: float = 1.0, form: str = "{:,.0f}") -> str:
    found = estimate(row.values("decode", "by_length", str(length), field).values())
    return form.format(found.mean / unit) if found else NONE


def budget_table(rows: Sequence[Row]) -> Table | None:
    """One line a variant that was pruned, one column a budget; None where none was."""
    asked = [row for row in rows if any("error" not in entry for entry in pruned(row).values())]
    if not asked:
        return None
    names = list(dict.fromkeys(name for row in asked for name in pruned(row)))
    header = ["variant", "all keys", *[f"kv_budget {name}" for name in names]]
    judged, label = pruned_measure(asked)
    cells = [[row.name, *[_budget_cell(row, name, judged) for name in (None, *names)]] for row in asked]
    return Table(title=f"Under a key budget: {label} (KV bytes a token)", header=header, cells=cells)


def pruned(row: Row) -> dict[str, Any]:
    """budget -> score of a row's first result; empty where none was asked for."""
    return (row.first.get("kv_budgets") or {}) if row.done else {}


def pruned_measure(rows: Sequence[Row]) -> tuple[str, str]:
    """What pruned rows are told apart by: the field of a score and its label. Answers right where those were counted."""
    answers = any(row.values("val", "accuracy") for row in rows)
    return ("accuracy", "answers right") if answers else ("ppl", "perplexity")


def pruned_places(name: str | None, judged: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where in a result the score and the KV bytes a token of a budget stand; None: of all keys."""
    if name is None:
        return ("val", judged), ("memory", "kv_bytes_per_token")
    return ("kv_budgets", name, judged), ("kv_budgets", name, "kv_bytes_per_token")


def _budget_cell(row: Row, name: str | None, judged: str) -> str:
    quality, kv = (estimate(row.values(*place).values()) for place in pruned_places(name, judged))
    return f"{quality.mean:.3f} ({kv.mean:,.0f})" if quality and kv else NONE


def search_table(rows: Sequence[Row]) -> Table | None:
    """One line a variant whose fewest keys for the baseline's loss were sought; None where none were."""
    found = {row.name: [entry for run in row.done if isinstance(entry := read_json(run.path / SEARCH), dict)] for row in rows}
    if not any(found.values()):
        return None
    header = ["variant", "factor ± sd", "keys a layer", "nats: baseline", "all keys", "kept keys", "seeds", "not found"]
    cells = []
    for name, entries in found.items():
        good = [entry for entry in entries if "factor" in entry]
        if not entries:
            continue

        def mean(field: str, good: list[dict[str, Any]] = good) -> str:
            return show(estimate(entry[field] for entry in good), "{:.4f}").split(" ±")[0]

        keys = " ".join(str(key) for key in good[0]["budgets"]) if good else NONE
        losses = [mean(f"{field}_nats") for field in ("baseline", "unpruned", "val")]
        why = _causes([entry["error"] for entry in entries if "error" in entry])
        factor = show(estimate(entry["factor"] for entry in good), "{:.1f}x")
        cells.append([name, factor, keys, *losses, str(len(good)), why or NONE])
    title = "Fewest keys for the baseline's loss: how many times fewer KV bytes (keys a layer: of the first seed)"
    return Table(title=title, header=header, cells=cells, left=("keys a layer", "not found"))


def _causes(errors: Sequence[str]) -> str:
    """The first of all errors that differ in their numbers alone, and how many there were of each."""
    alike: dict[str, list[str]] = {}
    for error in errors:
        alike.setdefault(re.sub(r"\d+(\.\d+)?", "#", error), []).append(error)
    return "; ".join(same[0] + (f" (and {len(same) - 1} more like it)" if same[1:] else "") for same in alike.values())


def lr_table(rows: Sequence[Row]) -> Table | None:
    """One line a variant of a grid, one column a learning rate, the best marked; None where there is no grid."""
    grid: dict[str, dict[float, Row]] = {}
    for row in rows:
        lr = row.runs[0].config.optim.lr
        if row.name.endswith(f"-lr{lr:g}"):
            grid.setdefault(row.name.removesuffix(f"-lr{lr:g}"), {})[lr] = row
    if not grid:
        return None
    judged, label = measure(rows)
    lrs = sorted({lr for by_lr in grid.values() for lr in by_lr})
    cells = []
    for name, by_lr in grid.items():
        found = {lr: estimate(row.values("val", judged).values()) for lr, row in by_lr.items()}
        best = min((value.mean for value in found.values() if value), default=None)
        marks = {lr: " *" if value and value.mean == best else "" for lr, value in found.items()}
        cells.append([name, *[show(found.get(lr), "{:.4f}") + marks.get(lr, "") for lr in lrs]])
    return Table(
        title=f"Learning rates: {label} (*: the variant's best)", header=["variant", *[f"{lr:g}" for lr in lrs]], cells=cells
    )


def by_length_table(rows: Sequence[Row], field: str, cell: Callable[[Row, str, int], str], *, title: str) -> Table:
    lengths = lengths_of(rows)
    header = ["variant", "evaluated with", *[f"{n} ({n // min(lengths)}x)" for n in lengths]]
    cells = [
        [row.name, "as trained" if name == AS_TRAINED else name, *[cell(row, name, n) for n in lengths]]
        for row in rows
        for name in row.first[field]
    ]
    return Table(title=title, header=header, cells=cells, left=("evaluated with",))


def lengths_of(rows: Sequence[Row]) -> list[int]:
    return sorted({int(n) for row in rows for by in row.first["val_by_length"].values() for n in by})


def _length_cell(row: Row, extension: str, length: int) -> str:
    entry = row.first["val_by_length"].get(extension, {}).get(str(length), {})
    if "error" in entry:
        return "not possible"
    place = ("val_by_length", extension, str(length))
    bpb, ppl = (estimate(row.values(*place, name).values()) for name in ("bpb", "ppl"))
    if ppl is None:
        return NONE
    return f"{bpb.mean:.3f} ({ppl.mean:.2f})" if bpb is not None else f"{ppl.mean:.2f}"


def _passkey_cell(row: Row, extension: str, length: int) -> str:
    by_depth = row.first["passkey"].get(extension, {}).get(str(length), {})
    if "error" in by_depth:
        return "not possible"
    place = ("passkey", extension, str(length))
    found = [estimate(row.values(*place, depth, "accuracy").values()) for depth in by_depth]
    means = [value.mean for value in found if value is not None]
    return f"{statistics.fmean(means):.2f} ({min(means):.2f})" if means else NONE


def show(value: Estimate | None, form: str, *, interval: bool = False) -> str:
    """`mean ± spread` over seeds, or, for a difference, `mean ± half the 95 % interval`."""
    if value is None:
        return NONE
    text = form.format(value.mean)
    around = value.half_95 if interval else value.spread
    return text if around is None else f"{text} ± {form.format(around).lstrip('+')}"


def tables(rows: Sequence[Row]) -> list[Table]:
    """Every table on texts that the rows have numbers for; those on tasks are in task_tables.py."""
    made = (main_table, length_table, passkey_table, decode_table, budget_table, search_table, lr_table)
    return [table for table in (make(rows) for make in made) if table is not None]
