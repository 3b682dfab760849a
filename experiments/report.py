"""The comparison as a reader sees it: tables on the terminal, report.md, results.csv and results.json."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xattn.experiments.gather import Estimate, Row, delta, estimate
from xattn.experiments.judge import AS_TRAINED
from xattn.experiments.record import say, write_json, write_text

MIB = 1024**2
_NONE = "-"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text cells, ready for any output. Columns are aligned right, but for the first and those named in `left`."""

    title: str
    header: list[str]
    cells: list[list[str]]
    left: tuple[str, ...] = ()


def main_table(rows: Sequence[Row]) -> Table:
    """One line a variant: quality, its difference to the baseline, cost, and the back-end that really ran."""
    header = ["variant", "val bpb", "delta", "val ppl", "params", "train peak MiB", "infer peak MiB", "KV B/token",
              "tokens/s", "back-end", "comparable"]  # fmt: skip
    cells = []
    for row in rows:
        if not row.done:
            cells.append([row.name, *[_NONE] * (len(header) - 2), "no result: " + "; ".join(row.failures)])
            continue
        cells.append([row.name, *_quality(row, rows[0]), *_cost(row), _backend(row), _verdict(row, rows[0])])
    return Table(title="Trained on equal tokens", header=header, cells=cells, left=("back-end", "comparable"))


def _quality(row: Row, baseline: Row) -> list[str]:
    has_bytes = bool(row.values("val", "bpb"))
    measure = ("val", "bpb") if has_bytes else ("val", "loss_nats")
    difference = None if row is baseline else delta(row, baseline, *measure)
    return [
        _show(estimate(row.values("val", "bpb").values()), "{:.4f}"),
        _show(difference, "{:+.4f}", interval=True),
        _show(estimate(row.values("val", "ppl").values()), "{:.3f}"),
    ]


def _cost(row: Row) -> list[str]:
    def mean(*path: str, unit: float = 1.0, form: str = "{:,.0f}") -> str:
        found = estimate(row.values(*path).values())
        return form.format(found.mean / unit) if found else _NONE

    return [
        f"{row.first['params']:,}",
        mean("memory", "train_peak_bytes", unit=MIB, form="{:,.1f}"),
        mean("memory", "infer_peak_bytes", unit=MIB, form="{:,.1f}"),
        mean("memory", "kv_bytes_per_token"),
        mean("tokens_per_second"),
    ]


def _backend(row: Row) -> str:
    from xattn.experiments.loop import backend_summary

    return backend_summary(row.first["backends"])


def _verdict(row: Row, baseline: Row) -> str:
    text = "baseline" if row is baseline else "yes"
    if row.problems:
        text = "not comparable: " + "; ".join(row.problems)
    return "; ".join([text, *row.failures])


def length_table(rows: Sequence[Row]) -> Table | None:
    """One line a variant and extension, one column an evaluation length; None where only one length was judged."""
    done = [row for row in rows if row.done]
    lengths = sorted({int(n) for row in done for by in row.first["val_by_length"].values() for n in by})
    if len(lengths) < 2:
        return None
    trained = min(lengths)
    header = ["variant", "evaluated with", *[f"{n} ({n // trained}x)" for n in lengths]]
    cells = [
        [row.name, "as trained" if name == AS_TRAINED else name, *[_length_cell(row, name, n) for n in lengths]]
        for row in done
        for name in row.first["val_by_length"]
    ]
    title = "Beyond the trained length: bits per byte (perplexity) on the same validation tokens"
    return Table(title=title, header=header, cells=cells, left=("evaluated with",))


def _length_cell(row: Row, extension: str, length: int) -> str:
    entry = row.first["val_by_length"].get(extension, {}).get(str(length), {})
    if "error" in entry:
        return "not possible"
    place = ("val_by_length", extension, str(length))
    bpb, ppl = (estimate(row.values(*place, name).values()) for name in ("bpb", "ppl"))
    if ppl is None:
        return _NONE
    return f"{bpb.mean:.3f} ({ppl.mean:.2f})" if bpb is not None else f"({ppl.mean:.2f})"


def _show(value: Estimate | None, form: str, *, interval: bool = False) -> str:
    """`mean ± spread` over seeds, or, for a difference, `mean ± half the 95 % interval`."""
    if value is None:
        return _NONE
    text = form.format(value.mean)
    around = value.half_95 if interval else value.spread
    return text if around is None else f"{text} ± {form.format(around).lstrip('+')}"


def tables(rows: Sequence[Row]) -> list[Table]:
    """Every table that the rows have numbers for."""
    return [table for table in (main_table(rows), length_table(rows)) if table is not None]


def notes(rows: Sequence[Row]) -> list[str]:
    """What every reader needs to read the tables, and what the tables left out."""
    done = [row for row in rows if row.done]
    if not done:
        return ["No run completed."]
    result, config = done[0].first, done[0].runs[0].config
    seeds = sorted({run.config.seed for row in rows for run in row.runs})
    lines = [
        f"{result['tokens']:,} tokens a run ({result['data']['corpus']}, {result['data']['tokenizer']}), "
        f"length {config.trainer.seq_len}, {config.trainer.steps} steps of {config.trainer.batch_size} sequences; "
        f"judged on {result['val']['tokens']:,} fixed validation tokens; seeds {', '.join(map(str, seeds))}; "
        f"{result['device']} {result['precision']}, torch {result['versions']['torch']}, {_code(done)}.",
        "± is the standard deviation over seeds; for delta, half the 95 % interval of the difference paired by seed."
        if len(seeds) > 1
        else "One seed: no spread is known, so read small differences as ties.",
        "KV bytes a token: predicted; a 16-bit cache of one sequence of the trained length, over that length.",
    ]
    if any(row.values("memory", "train_peak_bytes") for row in done):
        lines.append(
            "Train peak: one step of the run's micro-batch with optimiser state; infer peak: one evaluation of that shape; "
            "both from fresh processes."
        )
    for row in done:
        for name, by in row.first["val_by_length"].items():
            errors = {entry["error"] for entry in by.values() if "error" in entry}
            lines += [f"{row.name}, {name}: not possible: {error}" for error in sorted(errors)]
    return lines


def _code(done: Sequence[Row]) -> str:
    """Which commits the runs came from; more than one is said, since code may have changed between rows."""
    results = [run.result for row in done for run in row.done]
    commits = list(dict.fromkeys((result["commit"] or "unknown")[:12] for result in results))
    dirty = " with uncommitted changes" if any(result["dirty"] for result in results) else ""
    return f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}{dirty}"


def print_report(shown: Sequence[Table], notes: Sequence[str], *, title: str) -> None:
    """The tables on the terminal, as wide as they need to be where it is no terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    if not console.is_terminal or console.width < 100:
        console = Console(width=max(200, console.width))
    say(f"\n{title}")
    for table in shown:
        say(f"\n{table.title}")
        grid = RichTable()
        for place, name in enumerate(table.header):
            left = place == 0 or name in table.left
            grid.add_column(name, justify="left" if left else "right", no_wrap=name != "comparable")
        for line in table.cells:
            grid.add_row(*line)
        console.print(grid)
    for line in notes:
        say(line)


def write_report(
    rows: Sequence[Row],
    folder: Path,
    *,
    title: str,
    description: str | None,
    shown: Sequence[Table],
    notes: Sequence[str],
    pictures: Sequence[tuple[str, str]],
) -> None:
    """Write report.md, results.csv (one line a run) and results.json (rows with means, spreads and every run's result).

    Args:
        pictures: (file name within `folder`, caption).
    """
    parts = [f"# {title}", *([description] if description else [])]
    parts += [_markdown(table) for table in shown]
    parts += ["\n".join(f"- {line}" for line in notes)]
    parts += [f"![{caption}]({name})" for name, caption in pictures]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    write_text(folder / "results.csv", _csv(rows))
    write_json(folder / "results.json", {"title": title, "rows": [_json_row(row, rows[0]) for row in rows]})


def _markdown(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---" if place == 0 or name in table.left else "---:" for place, name in enumerate(table.header)]
    return "\n".join([f"## {table.title}", "", line(table.header), line(rule), *map(line, table.cells)])


_COLUMNS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "status": lambda r: r["status"],
    "val_loss_nats": lambda r: r["val"]["loss_nats"],
    "val_ppl": lambda r: r["val"]["ppl"],
    "val_bpb": lambda r: r["val"]["bpb"],
    "params": lambda r: r["params"],
    "tokens": lambda r: r["tokens"],
    "train_peak_bytes": lambda r: r["memory"]["train_peak_bytes"],
    "infer_peak_bytes": lambda r: r["memory"]["infer_peak_bytes"],
    "kv_bytes_per_token": lambda r: r["memory"]["kv_bytes_per_token"],
    "tokens_per_second": lambda r: r["tokens_per_second"],
    "train_seconds": lambda r: r["train_seconds"],
    "commit": lambda r: r["commit"],
    "error": lambda r: r["error"],
}


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", *_COLUMNS, "not_comparable", "run"])
    for row in rows:
        for run in row.runs:
            values = [_or_empty(read, run.result) for read in _COLUMNS.values()]
            writer.writerow([row.name, run.config.seed, *values, "; ".join(row.problems), run.path.name])
    return text.getvalue()


def _or_empty(read: Callable[[dict[str, Any]], Any], result: dict[str, Any]) -> Any:
    try:
        return read(result)
    except (KeyError, TypeError):
        return ""


def _json_row(row: Row, baseline: Row) -> dict[str, Any]:
    def numbers(value: Estimate | None) -> dict[str, Any] | None:
        return asdict(value) if value is not None else None

    return {
        "variant": row.name,
        "val_bpb": numbers(estimate(row.values("val", "bpb").values())),
        "val_ppl": numbers(estimate(row.values("val", "ppl").values())),
        "delta_bpb": numbers(delta(row, baseline, "val", "bpb")) if row is not baseline else None,
        "not_comparable": row.problems,
        "failures": row.failures,
        "runs": [{"seed": run.config.seed, "run": run.path.name, "result": run.result} for run in row.runs],
    }
