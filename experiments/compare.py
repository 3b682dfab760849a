"""xattn-compare: train variants of one run on equal tokens, and report what each costs and buys.

xattn-compare                          the quick study: two CPU cores, or one GPU, about ten minutes
xattn-compare +sweep=NAME seed=0,1,2   a study of configs/sweep, over seeds
xattn-compare +experiment=study/NAME   a question of docs/study.md; with +size=tiny data=shakespeare in seconds
xattn-compare runs=DIR                 report on run directories that exist already
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import torch

from xattn import ConfigError
from xattn.experiments import record
from xattn.experiments.compose import check_flags, command_line, hydra_main, resolve
from xattn.experiments.configfile import as_run, differences, load_config
from xattn.experiments.curve import measure_curves
from xattn.experiments.curve_report import CSV, curve_csv, curve_notes, curve_tables, curves_of
from xattn.experiments.decode import DECODED
from xattn.experiments.gather import find_runs, gather
from xattn.experiments.launch import launch, prepare, stopped
from xattn.experiments.page import page
from xattn.experiments.plots import draw
from xattn.experiments.pool import in_turn
from xattn.experiments.record import say
from xattn.experiments.report import notes, print_report, write_report
from xattn.experiments.schema import CompareConfig, RunConfig
from xattn.experiments.search import needs_search, search_run
from xattn.experiments.tables import tables
from xattn.experiments.task_tables import task_tables

_STUDY_FILES = "experiment=study/"
DEFAULT_SWEEP, GPU_SWEEP = "quick", "quick_gpu"
STUDY = "study.json"
PARAM_TOLERANCE = 0.02
# A variant's learning rate, beside its flags.
OWN_LR = "optim.lr"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a study and its directory."""

    config: RunConfig
    run_dir: Path


def main() -> None:
    """Console entry of xattn-compare."""
    command_line(_body)


def _body(argv: list[str]) -> int:
    statuses: list[int] = []
    hydra_main(lambda cfg: statuses.append(_study(resolve(cfg))), "compare", arguments(argv))
    return max(statuses, default=0)


def arguments(argv: list[str]) -> list[str]:
    """What users type, as Hydra spells it: `+sweep=x`, `seeds=[0,1]`, `++variants.a.depth=2`; without a sweep, the quick one
    for this machine.
    """
    spelled = []
    for arg in argv:
        if arg.startswith("sweep="):
            arg = "+" + arg
        elif arg.lstrip("+").startswith(_STUDY_FILES):
            arg = "+sweep=" + arg.split("=", 1)[1]  # they lie beside the sweeps
        elif arg.startswith("size="):
            arg = "+" + arg
        elif arg.startswith("seed="):
            arg = f"seeds=[{arg.removeprefix('seed=').strip('[]')}]"
        elif arg.startswith("variants"):
            arg = "++" + arg  # a variant of one's own is a new key, which Hydra would refuse
        spelled.append(arg)
    names = [arg.split("=", 1)[0].lstrip("+") for arg in spelled]
    if not any(name in ("sweep", "runs") or name.startswith("variants") for name in names):
        on_gpu = torch.cuda.is_available() and "trainer.device=cpu" not in spelled
        spelled.append(f"+sweep={GPU_SWEEP if on_gpu else DEFAULT_SWEEP}")
    return spelled


def _study(config: CompareConfig) -> int:
    folder = Path(config.dir)
    if config.runs is not None:
        return report(config, Path(config.runs))
    jobs = plan(config, folder)
    # Every directory is checked before the first run, so that a clash is found now and not after an hour.
    for job in jobs:
        prepare(job.config, job.run_dir)
        take_over(job, config.reuse)
    record.write_json(folder / STUDY, _kept(config))
    size = f"{len(config.variants)} variants, seeds {config.seeds}, {config.trainer.tokens:,} tokens each"
    say(f"{config.study}: {size}, in {folder}")
    results = run_all(config, jobs)
    if None in results or any(result["status"] == record.INTERRUPTED for result in results):
        say(f"interrupted; the same command goes on from here ({folder})")
        return 75
    all_well = all(result["status"] == record.COMPLETED for result in results)
    search_all(config, jobs, folder)
    first = [(job.config.name, job.run_dir) for job in jobs if job.config.seed == config.seeds[0]]
    measure_curves(config, first, folder)
    if stopped():
        say(f"interrupted; the same command goes on from here ({folder})")
        return 75
    return report(config, folder) or int(not all_well)


def take_over(job: Job, studies: Iterable[str]) -> None:
    """Copy the finished run of the same config and name that another study has, unless this one is finished."""
    if record.read_result(job.run_dir)["status"] == record.COMPLETED:
        return
    for study in studies:
        theirs = Path(study) / job.run_dir.name
        if record.read_result(theirs)["status"] != record.COMPLETED:
            continue
        changed = [key for key in differences(load_config(theirs / record.CONFIG), job.config) if not key.startswith("tracking.")]
        if not changed:
            copytree(theirs, job.run_dir, dirs_exist_ok=True, ignore=ignore_patterns(record.CONFIG))
            say(f"{job.run_dir}: as in {theirs}")
            return


def run_all(config: CompareConfig, jobs: list[Job]) -> list[dict[str, Any] | None]:
    """The result of every job, `config.jobs` of them at a time; None for one that a stop request kept from starting."""
    ended: list[str] = []

    def one(job: Job, environment: dict[str, str]) -> dict[str, Any] | None:
        if record.INTERRUPTED in ended:
            return None
        prefix = f"[{jobs.index(job) + 1}/{len(jobs)} {job.run_dir.name}] "
        result = launch(job.config, job.run_dir, prefix=prefix, quiet=True, environment=environment)
        ended.append(result["status"])
        return result

    return in_turn(one, jobs, trainer=config.trainer, at_once=config.jobs)


def search_all(config: CompareConfig, jobs: list[Job], folder: Path) -> None:
    """The fewest keys for the baseline's loss of the same seed, of every selective run that is completed."""
    name = _baseline(config) or next(row for row, _, _ in rows_of(config))
    ask = config.budget_search
    wanted = [(job.run_dir, folder / f"{name}-seed{job.config.seed}") for job in jobs]
    wanted = [pair for pair in wanted if needs_search(*pair, ask)]
    in_turn(lambda pair, place: search_run(*pair, ask, place), wanted, trainer=config.trainer, at_once=config.jobs)


def _kept(config: CompareConfig) -> dict[str, Any]:
    """What study.json keeps, so that a later report names, orders and judges the runs as the study did."""
    return {
        "study": config.study,
        "description": config.description,
        "baseline": _baseline(config),
        "order": [name for name, _, _ in rows_of(config)],
        "varied": [OWN_LR] if any(lr is not None for _, _, lr in rows_of(config)) else [],
        "param_tolerance": PARAM_TOLERANCE if config.param_tolerance is None else config.param_tolerance,
    }


def study_of(folder: Path) -> dict[str, Any]:
    """What study.json kept; for runs without one, and in place of what is no such value, what a report does without it."""
    found = record.read_json(folder / STUDY)
    found = found if isinstance(found, dict) else {}
    kinds = {"study": str, "description": str, "baseline": str, "order": list, "varied": list, "param_tolerance": int | float}
    found = {key: found[key] for key, kind in kinds.items() if isinstance(found.get(key), kind)}
    without = {"study": folder.resolve().name, "description": None, "baseline": None, "order": [], "varied": []}
    return without | {"param_tolerance": PARAM_TOLERANCE} | found


def plan(config: CompareConfig, folder: Path) -> list[Job]:
    """Every run of the study, its flags checked.

    Raises:
        ConfigError: nothing to run, a baseline that is no variant, or flags that cannot be, naming the variant.
    """
    if not config.variants:
        raise ConfigError("the study has no variants; use +sweep=quick, or give variants: {name: {flag: value}}")
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise ConfigError(f"seeds={config.seeds} must name each seed once and at least one; use seed=0,1,2")
    if config.baseline is not None and config.baseline not in config.variants:
        raise ConfigError(f"baseline={config.baseline} is no variant; use one of {', '.join(config.variants)}")
    strangers = [name for name in config.extended or () if name not in config.variants]
    if strangers:
        raise ConfigError(f"extended={strangers}: no such variant; use names of {', '.join(config.variants)}")
    jobs = []
    # Seeds outermost: a study that is stopped early has every variant of the first seeds.
    for seed in config.seeds:
        for row, name, lr in rows_of(config):
            run = _variant(config, name, config.variants[name], seed)
            run.name, run.optim.lr = row, run.optim.lr if lr is None else lr
            jobs.append(Job(config=run, run_dir=folder / f"{row}-seed{seed}"))
    return jobs


def rows_of(config: CompareConfig) -> list[tuple[str, str, float | None]]:
    """Row, its variant, and its learning rate where that is not the shared one: of `lrs`, or the variant's own."""
    if config.lrs:
        return [(f"{name}-lr{lr:g}", name, lr) for name in config.variants for lr in config.lrs]
    return [(name, name, flags.get(OWN_LR) if isinstance(flags, dict) else None) for name, flags in config.variants.items()]


def _baseline(config: CompareConfig) -> str | None:
    """The row to compare with: of a grid, the baseline at the shared learning rate, or at the first one."""
    if config.baseline is None or not config.lrs:
        return config.baseline
    lr = config.optim.lr if config.optim.lr in config.lrs else config.lrs[0]
    return f"{config.baseline}-lr{lr:g}"


def _variant(config: CompareConfig, name: str, flags: Any, seed: int) -> RunConfig:
    if not isinstance(flags, dict | None):
        raise ConfigError(f"variants.{name}={flags} is not a mapping of flags; use {name}: {{sliding_window: 64}}")
    if not name or name in (".", "..") or not all(c.isalnum() or c in "-_.+" for c in name):
        raise ConfigError(f"variants.{name}: the name is a directory too; use letters, digits, - _ . and +")
    run = deepcopy(as_run(config))
    run.name, run.seed = name, seed
    flags = {key: value for key, value in (flags or {}).items() if key != OWN_LR}
    run.model = {key: value for key, value in (run.model | flags).items() if value is not None}
    if config.extended is not None and name not in config.extended:
        run.eval.extensions = {}
    if run.eval.decode.tokens is None:
        run.eval.decode.tokens = DECODED if run.isolate and run.trainer.memory else 0
    run.tracking.group = run.tracking.group or config.study
    try:
        run.check()
        check_flags(run)
    except ConfigError as error:
        raise ConfigError(f"variant {name}: {error}") from None
    return run


def report(config: CompareConfig, runs_dir: Path) -> int:
    """Print and write the report of the runs under `runs_dir`, into it. Returns 1 if no run completed.

    Beside the runs it reads only how a study named, ordered and judged them, and does without where there is no study.
    """
    runs = find_runs(runs_dir)
    study = study_of(runs_dir)
    baseline = config.baseline if config.baseline is not None and config.runs is not None else study["baseline"]
    tolerance = config.param_tolerance if config.param_tolerance is not None else study["param_tolerance"]
    rows = gather(runs, baseline=baseline, param_tolerance=tolerance, order=study["order"], varied=study["varied"])
    curves = curves_of(rows, runs_dir)
    title = f"Comparison: {study['study']}"
    shown = [*tables(rows), *task_tables(rows), *curve_tables(rows, curves)]
    remarks = [*notes(rows, param_tolerance=tolerance), *curve_notes(rows, curves)]
    pictures = draw(rows, runs_dir, curves=curves) if config.plots else []
    described = {"title": title, "description": study["description"], "notes": remarks, "pictures": pictures}
    write_report(rows, runs_dir, shown=shown, **described)
    record.write_text(runs_dir / "report.html", page(tables=shown, folder=runs_dir, **described))
    written = ["report.md", "results.csv", "results.json", *[name for name, _ in pictures]]
    if curves:
        record.write_text(runs_dir / CSV, curve_csv(rows, curves))
        written.append(CSV)
    print_report(shown, remarks, title=title)
    say(f"\nwritten: {runs_dir}/report.html, {', '.join(written)}")
    return 0 if any(row.done for row in rows) else 1


if __name__ == "__main__":
    main()
