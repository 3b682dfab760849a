"""xattn-train: compose one run, or a sweep with -m, and train each in a worker process.

xattn-train +experiment=selective
xattn-train -m model.sliding_window=64,128 seed=0,1
xattn-train -m hydra/launcher=submitit_slurm run_dir=DIR seed=0,1
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

from xattn import ConfigError
from xattn.experiments import record
from xattn.experiments.compose import command_line, hydra_main, resolve
from xattn.experiments.configfile import as_run, load_config, redact
from xattn.experiments.launch import launch, stopped
from xattn.experiments.record import say


def main() -> None:
    """Console entry of xattn-train."""
    command_line(_body)


def _body(argv: list[str]) -> int:
    resume = next((arg.removeprefix("resume=") for arg in argv if arg.startswith("resume=")), None)
    if resume is not None:
        return _resume(resume, [arg for arg in argv if not arg.startswith("resume=")])
    elsewhere = _elsewhere(argv)
    results: list[dict[str, Any]] = []
    sweeps: set[str] = set()

    def task(cfg: Any) -> float:
        from hydra.core.hydra_config import HydraConfig

        sweeps.add(HydraConfig.get().sweep.dir)
        result = _one(cfg)
        results.append(result)
        if elsewhere is None and asked_to_stop():
            raise KeyboardInterrupt  # which ends a sweep
        return _objective(result)

    def asked_to_stop() -> bool:
        return stopped() or any(result["status"] == record.INTERRUPTED for result in results)

    try:
        hydra_main(task, "train", argv)
    except KeyboardInterrupt:
        if not asked_to_stop():
            raise
    if elsewhere is not None:
        runs = sorted({path.parent for name in (record.CONFIG, record.RESULT) for path in elsewhere.glob(f"*/{name}")})
        results = [record.read_result(run_dir) for run_dir in runs]
        for result, run_dir in zip(results, runs, strict=True):
            _print_result(result, run_dir)
    if len(results) > 1:
        done = sum(result["status"] == record.COMPLETED for result in results)
        folder = elsewhere or (sweeps.pop() if len(sweeps) == 1 else "DIR")
        say(f"{done} of {len(results)} runs completed; compare them: xattn-compare runs={folder}")
    return 75 if elsewhere is None and asked_to_stop() else _exit_status(results)


def _elsewhere(argv: list[str]) -> Path | None:
    """Where the runs of a sweep lie whose jobs a launcher starts in processes of its own; None where this one trains them.

    Raises:
        ConfigError: the launcher is not installed, or each job, and once more each that is queued again, would name its
            directory anew.
    """
    given = dict(arg.split("=", 1) for arg in argv if "=" in arg)
    launcher = given.get("hydra/launcher", "basic")
    if launcher == "basic" or not {"-m", "--multirun"} & set(argv):
        return None
    if launcher.startswith("submitit") and importlib.util.find_spec("submitit") is None:
        raise ConfigError(f"hydra/launcher={launcher} needs a package: pip install 'xattn[sweep]', or drop it")
    run_dir = given.get("run_dir")
    if run_dir is None or "$" in run_dir:
        raise ConfigError(f"hydra/launcher={launcher} needs a directory that stays the same: use run_dir=runs/NAME")
    return Path(run_dir)


def _one(cfg: Any) -> dict[str, Any]:
    """Train one composed job. A config that cannot be is a recorded row of the sweep, not its end."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    if hydra.mode == RunMode.MULTIRUN:
        given = [part for part in hydra.overrides.task if not part.startswith("run_dir=")]
        say(redact(f"[job {hydra.job.num}] {' '.join(given)}"))
    try:
        config = as_run(resolve(cfg))
        result = launch(config, run_dir)
    except ConfigError as error:
        if hydra.mode != RunMode.MULTIRUN:
            raise
        say(f"invalid: {error}")
        flags = {name: value for name, value in dict(cfg.model).items() if value is not None}
        result = record.write_failure(run_dir, record.INVALID, str(error), name=cfg.name, seed=cfg.seed, flags=flags)
    _print_result(result, run_dir)
    return result


def _resume(given: str, others: list[str]) -> int:
    run_dir = Path(given)
    if not (run_dir / record.CONFIG).is_file():
        raise ConfigError(f"resume={given} is no run directory: it has no {record.CONFIG}; use resume=DIR")
    if others:
        raise ConfigError(
            f"resume= takes the config saved in {run_dir} and nothing else; drop {' '.join(others)}, or start a new run"
        )
    result = launch(load_config(run_dir / record.CONFIG), run_dir)
    _print_result(result, run_dir)
    return _exit_status([result])


def _print_result(result: dict[str, Any], run_dir: Path) -> None:
    if result["status"] != record.COMPLETED:
        say(f"{result['status']}: {run_dir}")
        return
    val, bpb = result["val"], result["val"].get("bpb")
    bits = f"{bpb:.4f} bits per byte, " if bpb is not None else ""
    say(f"{bits}perplexity {val['ppl']:.3f}, {result['tokens_per_second']:,.0f} tokens/s: {run_dir}")


def _objective(result: dict[str, Any]) -> float:
    """What a Hydra sweeper minimises: nats a token, infinite for a run that failed."""
    return result["val"]["loss_nats"] if result["status"] == record.COMPLETED else math.inf


def _exit_status(results: list[dict[str, Any]]) -> int:
    if any(result["status"] == record.INTERRUPTED for result in results):
        return 75
    return int(any(result["status"] != record.COMPLETED for result in results))


if __name__ == "__main__":
    main()
