"""The worker: python -m xattn.experiments.worker RUN_DIR [--quiet]

It reads RUN_DIR/config.yaml, trains, and leaves result.json whatever happens, short of being killed.
"""

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from xattn.experiments import record
from xattn.experiments.compose import USER_ERRORS
from xattn.experiments.configfile import load_config
from xattn.experiments.distributed import end_process, local_rank
from xattn.experiments.loop import Diverged, Interrupted, Trainer
from xattn.experiments.record import say
from xattn.experiments.schema import RunConfig

EXIT = {record.COMPLETED: 0, record.FAILED: 1, record.OOM: 1, record.INVALID: 2, record.INTERRUPTED: 75}


def run(config: RunConfig, run_dir: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Train, judge and record one run; every failure becomes a recorded status.

    Returns: the result; of several ranks, those that are not the first have only a status.
    """
    try:
        with _stop_requests() as stop:
            result = Trainer(config, run_dir, quiet=quiet, stop=stop).run() or {"status": record.COMPLETED}
    except Exception as error:
        status = status_of(error)
        if config.trainer.strategy != "none" and not _speaks_first(run_dir, status):
            return {"status": status}
        if status == record.FAILED:
            (run_dir / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        expected = isinstance(error, (*USER_ERRORS, Interrupted, Diverged))
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        say(f"{status}: {text}")
        result = record.write_failure(run_dir, status, text, name=config.name, seed=config.seed, flags=config.model)
    return result


def _speaks_first(run_dir: Path, status: str) -> bool:
    """Whether this rank's end is the run's: the first recorded one is, for the others then fail for want of that rank.

    A stop ends all ranks alike, and the first rank tells.
    """
    ours = local_rank() == 0 or status != record.INTERRUPTED
    return ours and record.read_result(run_dir)["status"] == record.UNFINISHED


def status_of(error: BaseException) -> str:
    """Which status an exception is recorded as."""
    if isinstance(error, USER_ERRORS):
        return record.INVALID
    if isinstance(error, Interrupted):
        return record.INTERRUPTED
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return record.OOM
    return record.FAILED


@contextmanager
def _stop_requests() -> Iterator[dict[str, Any]]:
    """SIGTERM, SIGUSR1 (schedulers) and Ctrl-C ask for a stop after the current step instead of ending the process."""
    stop: dict[str, Any] = {"signal": None}

    def ask(number: int, _frame: Any) -> None:
        stop["signal"] = signal.Signals(number).name

    try:
        old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    except ValueError:  # not the main thread (isolate=false under somebody's server): no signals to catch
        old = {}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def main(argv: list[str]) -> int:
    """The worker's entry: exit 0 completed, 1 failed or out of memory, 2 invalid, 75 interrupted (run it again)."""
    run_dir = Path(argv[0])
    config = load_config(run_dir / record.CONFIG)
    result = run(config, run_dir, quiet="--quiet" in argv[1:])
    code = EXIT[result["status"]]
    if config.trainer.strategy != "none":
        # To torch.distributed.run a status other than 0 is a crash, at which it kills ranks that are still saving.
        end_process(0 if result["status"] == record.INTERRUPTED else code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
