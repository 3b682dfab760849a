"""The comparison as a reader sees it: on the terminal, in report.md, results.csv and results.json."""

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xattn.experiments.gather import Estimate, Row, delta, estimate, measure
from xattn.experiments.record import provenance, say, write_json, write_text
from xattn.experiments.tables import Table


def notes(rows: Sequence[Row], *, param_tolerance: float, anywhere: bool = False) -> list[str]:
    """What every reader needs to read the tables, and what the tables left out.

    anywhere: they are read on other machines too, so how this one differs from the runs' says nothing.
    """
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
        "± sd: the standard deviation over seeds. ± 95 %: half the interval of the difference, paired by seed; one that holds "
        "zero is no difference that these seeds show. Bands of an extended variant: of the change from a seed's own score."
        if len(seeds) > 1
        else "One seed: no spread is known, so read small differences as ties.",
        f"Comparable: the same tokens in the same order, tokeniser, settings and device, and parameters within "
        f"{param_tolerance:.0%} of the baseline's.",
        "KV bytes a token: predicted; a 16-bit cache of one sequence of the trained length, over that length.",
        "Tokens/s: of the median step; whatever else ran on the machine has slowed it.",
    ]
    if "accuracy" in result["val"]:
        own = "; each length has sequences of its own" if result.get("task") else ""
        lines.append(f"Loss, perplexity and judged tokens are of the answers alone{own}.")
    if any(row.values("memory", "train_peak_bytes") for row in done):
        lines.append(
            "Train peak: one step of the run's micro-batch with optimiser state; infer peak: one evaluation of that shape; "
            "both from fresh processes."
        )
    if any(row.first.get("decode") for row in done):
        lines.append("Decoding: from a fresh process, weights and cache included, not compiled.")
    lines += [*_noise(rows), *_machines(done, None if anywhere else provenance())]
    for row in done:
        decode = row.first.get("decode") or {}
        stopped = [decode["error"]] if "error" in decode else _errors(decode.get("by_length", {}))
        lines += [f"{row.name}: not decoded: {error}" for error in stopped]
        for name, by in row.first["val_by_length"].items():
            lines += [f"{row.name}, {name}: not possible: {error}" for error in _errors(by)]
        for name, by in (row.first.get("passkey") or {}).items():
            known = _errors(row.first["val_by_length"].get(name, {}))
            lines += [f"{row.name}, {name}: no key could be asked for: {error}" for error in _errors(by) if error not in known]
    return lines


def _noise(rows: Sequence[Row]) -> list[str]:
    """What seeds alone do: the spread of the baseline, and the usual spread of a difference paired by seed."""
    name, label = measure(rows)
    own = estimate(rows[0].values("val", name).values())
    if own is None or own.spread is None:
        return []
    pairs = [found.spread for row in rows[1:] if (found := delta(row, rows[0], "val", name)) and found.spread is not None]
    paired = f"; of a difference paired by seed, the median of {len(pairs)} rows: {statistics.median(pairs):.4f}" if pairs else ""
    return [f"Noise floor ({label}): standard deviation of {rows[0].name} over {own.seeds} seeds: {own.spread:.4f}{paired}."]


def _machines(done: Sequence[Row], here: dict[str, Any] | None) -> list[str]:
    """Warnings where runs came from different machines or versions, or from others than the report's."""
    results = [run.result for row in done for run in row.done]
    lines = []
    for what, read in _ORIGINS.items():
        seen = list(dict.fromkeys(str(read(result)) for result in results))
        if len(seen) > 1:
            lines.append(f"Warning: these runs differ in {what}: {', '.join(seen)}.")
        elif here is not None and seen[0] != str(read(here)):
            lines.append(
                f"Warning: another {what} than here: the runs {seen[0]}, this report {read(here)}; times cannot be compared."
            )
    return lines


_ORIGINS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "device": lambda r: (r.get("platform") or {}).get("cuda") or (r.get("platform") or {}).get("machine"),
    "version of torch": lambda r: (r.get("versions") or {}).get("torch"),
    "version of xattn": lambda r: (r.get("versions") or {}).get("xattn"),
}


def _errors(by_length: dict[str, dict[str, Any]]) -> list[str]:
    return sorted({entry["error"] for entry in by_length.values() if "error" in entry})


def _code(done: Sequence[Row]) -> str:
    """Which commits the runs came from; more than one is said, since code may have changed between rows."""
    results = [run.result for row in done for run in row.done]
    commits = list(dict.fromkeys(result["commit"][:12] for result in results if result["commit"]))
    if not commits:  # installed, not a checkout
        return "xattn " + ", ".join(dict.fromkeys(str(result["versions"].get("xattn", "unknown")) for result in results))
    if not all(result["commit"] for result in results):
        commits.append("unknown")
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
    parts += [markdown(table) for table in shown]
    parts += ["\n".join(f"- {line}" for line in notes)]
    parts += [f"![{caption}]({name})" for name, caption in pictures]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    write_text(folder / "results.csv", _csv(rows))
    write_json(folder / "results.json", {"title": title, "rows": [_json_row(row, rows[0]) for row in rows]})


def markdown(table: Table, *, title: bool = True) -> str:
    """A table in Markdown, under its title or bare."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---" if place == 0 or name in table.left else "---:" for place, name in enumerate(table.header)]
    return "\n".join([*([f"## {table.title}", ""] if title else []), line(table.header), line(rule), *map(line, table.cells)])


def _decoded(result: dict[str, Any]) -> dict[str, Any]:
    """Decoding after a prompt of the trained length."""
    by_length = result["decode"]["by_length"]
    return by_length[min(by_length, key=int)]


_COLUMNS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "status": lambda r: r["status"],
    "val_loss_nats": lambda r: r["val"]["loss_nats"],
    "val_ppl": lambda r: r["val"]["ppl"],
    "val_bpb": lambda r: r["val"]["bpb"],
    "val_accuracy": lambda r: r["val"]["accuracy"],
    "params": lambda r: r["params"],
    "tokens": lambda r: r["tokens"],
    "train_peak_bytes": lambda r: r["memory"]["train_peak_bytes"],
    "infer_peak_bytes": lambda r: r["memory"]["infer_peak_bytes"],
    "kv_bytes_per_token": lambda r: r["memory"]["kv_bytes_per_token"],
    "prefill_peak_bytes": lambda r: _decoded(r)["prefill_peak_bytes"],
    "decode_peak_bytes": lambda r: _decoded(r)["decode_peak_bytes"],
    "decode_tokens_per_second": lambda r: _decoded(r)["tokens_per_second"],
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
    except (KeyError, TypeError, ValueError):
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
