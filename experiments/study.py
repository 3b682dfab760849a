"""The page of the study: small files of finished studies are kept, and the tables and pictures of docs/study.md are made of them.

    python -m xattn.experiments.study keep [NAME ...]   # runs/study/NAME -> benchmarks/results/study/NAME, without weights
    python -m xattn.experiments.study page               # benchmarks/results/study -> docs/study.md and docs/images/study

Both are started in a checkout. The page's text is written by hand; what lies between its markers, <!-- table NAME TITLE -->,
<!-- notes NAME --> or <!-- plot NAME FILE --> and <!-- end -->, is made.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

from xattn import ConfigError
from xattn.experiments import compare, record
from xattn.experiments.compose import command_line
from xattn.experiments.gather import Row, find_runs, gather
from xattn.experiments.plots import draw
from xattn.experiments.record import say
from xattn.experiments.report import markdown, notes
from xattn.experiments.tables import NONE, Table, tables
from xattn.experiments.task_tables import task_tables

FINISHED, KEPT = Path("runs/study"), Path("benchmarks/results/study")
PAGE, IMAGES = Path("docs/study.md"), Path("docs/images/study")
_SMALL = (record.CONFIG, record.SEARCH, record.MEMORY, record.DECODE)
_ROWS = 20  # of a curve
_BLOCK = re.compile(r"(<!-- (table|notes|plot) (\S+)(?: ([^\n]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def keep(source: Path, target: Path) -> int:
    """Copy what a report needs of a study's runs. Returns how many bytes that is."""
    if not (source / compare.STUDY).is_file():
        raise ConfigError(f"{source} is no study: it has no {compare.STUDY}; use the directory that xattn-compare wrote")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copy(source / compare.STUDY, target)
    for run_dir in sorted(path.parent for path in source.glob(f"*/{record.RESULT}")):
        kept = target / run_dir.name
        kept.mkdir()
        for name in _SMALL:
            if (run_dir / name).is_file():
                shutil.copy(run_dir / name, kept)
        result = record.read_json(run_dir / record.RESULT)
        thin = [{"backend": row["backend"]} for row in result.get("backends", [])]
        text = json.dumps(result | ({"backends": thin} if thin else {}), separators=(",", ":"))
        record.write_text(kept / record.RESULT, _rounded(text) + "\n")
        rows = record.read_metrics(run_dir)
        every = max(len(rows) // _ROWS, 1)
        thin = [row for number, row in enumerate(rows) if (number + 1) % every == 0 or number + 1 == len(rows)]
        record.write_text(kept / record.METRICS, "".join(_rounded(json.dumps(row)) + "\n" for row in thin))
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _rounded(text: str) -> str:
    """Numbers with seven digits: what a report shows has five."""
    return re.sub(r"-?\d+\.\d{8,}(e-?\d+)?", lambda found: f"{float(found[0]):.7g}", text)


def page(text: str, *, kept: Path, images: Path) -> str:
    """The page with its blocks made anew; what has no results yet says so."""
    found = {name: rows_of(kept / name) for name in {match[3] for match in _BLOCK.finditer(text)} if (kept / name).is_dir()}
    shown = {(match[3], match[4]) for match in _BLOCK.finditer(text) if match[2] == "plot"}
    for name, (rows, _) in found.items():
        (images / name).mkdir(parents=True, exist_ok=True)
        for file, _ in draw(rows, images / name):
            if (name, file) not in shown:
                (images / name / file).unlink()

    def block(match: re.Match[str]) -> str:
        kind, name, what = match[2], match[3], match[4] or ""
        made = _block(kind, what, *found[name], images / name) if name in found else None
        return match[1] + (made or "_No results yet._") + "\n" + match[5]

    return _BLOCK.sub(block, text)


def rows_of(folder: Path) -> tuple[list[Row], float]:
    """The rows of a kept study, as the study judged them, and its tolerance of parameters."""
    study = compare.study_of(folder)
    tolerance = study["param_tolerance"]
    how = {"baseline": study["baseline"], "order": study["order"], "varied": study["varied"]}
    return gather(find_runs(folder), param_tolerance=tolerance, **how), tolerance


def _block(kind: str, what: str, rows: list[Row], tolerance: float, images: Path) -> str | None:
    if kind == "notes":
        return "\n".join(f"- {line}" for line in notes(rows, param_tolerance=tolerance, anywhere=True))
    if kind == "plot":
        return f"![{what}](images/study/{images.name}/{what})" if (images / what).is_file() else None
    table = next((table for table in [*tables(rows), *task_tables(rows)] if table.title.startswith(what)), None)
    return None if table is None else markdown(_told(table), title=False)


def _told(table: Table) -> Table:
    """The table without columns in which no row has anything to say."""
    kept = [at for at in range(len(table.header)) if any(row[at] != NONE for row in table.cells)]
    return replace(
        table, header=[table.header[at] for at in kept], cells=[[row[at] for at in kept] for row in table.cells]
    )


def main() -> None:
    """Console entry."""
    command_line(_body)


def _body(argv: list[str]) -> int:
    if argv[:1] == ["keep"]:
        names = argv[1:] or sorted(path.parent.name for path in FINISHED.glob(f"*/{compare.STUDY}"))
        for name in names:
            say(f"{KEPT / name}: {keep(FINISHED / name, KEPT / name):,} bytes")
    elif argv == ["page"]:
        record.write_text(PAGE, page(PAGE.read_text(encoding="utf-8"), kept=KEPT, images=IMAGES))
        say(f"written: {PAGE}")
    else:
        raise ConfigError(f"{' '.join(argv) or 'nothing'} was asked; use keep [NAME ...] or page")
    return 0


if __name__ == "__main__":
    main()
