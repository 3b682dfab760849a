"""Start a run in processes of its own, pass its lines on, and record how it ended, whatever the end was."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from xattn import ConfigError
from xattn.experiments import record
from xattn.experiments.configfile import differences, load_config, save_config
from xattn.experiments.memory import KINDS, PROBE_ENVIRONMENT
from xattn.experiments.progress import ASKED, following, on_terminal
from xattn.experiments.record import CONFIG, DECODE, MEMORY, say
from xattn.experiments.schema import RunConfig

# What may change between a broken run and its continuation, because no number of the result depends on it by more than
# the order of float additions (and, with dropout, on which rank draws which mask).
_MAY_CHANGE = ("tracking.", "isolate", "trainer.log_every", "trainer.save_every", "trainer.keep_checkpoints",
               "trainer.threads", "trainer.strategy", "trainer.processes", "trainer.sample", "eval.batch_tokens",
               "eval.decode")  # fmt: skip

# Threads that spin for long while they wait take the cores from every other program, and where cores are shared from
# each other: a step then takes up to ten times as long. Not spinning at all costs a third; this short spin costs nothing.
_WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}

# What launchers of torch and of clusters send to every process of a job, and what would end those that do not listen.
_USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)

_stopped = threading.Event()
_running: set[subprocess.Popen] = set()


def stopped() -> bool:
    """Whether a signal asked this process to stop; no further run should be started."""
    return _stopped.is_set()


def stop_all(number: int) -> None:
    """A stop request reaches every process that runs: it saves its state and ends. No further one should be started."""
    _stopped.set()
    for process in tuple(_running):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM if number in _USER_SIGNALS else number)


def prepare(config: RunConfig, run_dir: Path) -> None:
    """Make the run directory hold this config; a directory that holds another run is refused, not overwritten.

    Raises:
        ConfigError: the directory's config.yaml differs in something a result depends on.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / CONFIG
    if path.exists():
        changed = {k: v for k, v in differences(load_config(path), config).items() if not k.startswith(_MAY_CHANGE)}
        if changed:
            shown = "; ".join(f"{key}: {old} there, {new} now" for key, (old, new) in changed.items())
            raise ConfigError(f"{run_dir} holds a run of another config ({shown}); use another directory for this one")
    save_config(config, path)


def launch(
    config: RunConfig, run_dir: Path, *, prefix: str = "", quiet: bool = False, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Train one run and return its result; one that was already completed there is returned as it stands.

    Args:
        environment: of its processes, on top of this one's.
    """
    prepare(config, run_dir)
    result = record.read_result(run_dir)
    if result["status"] == record.COMPLETED:
        say(f"{prefix}finished before; its result stands ({run_dir})")
        return result
    (run_dir / record.RESULT).unlink(missing_ok=True)
    if not config.isolate:
        from xattn.experiments.worker import run

        # As a worker would: from the file, which holds no secret of the environment.
        return run(load_config(run_dir / CONFIG), run_dir, quiet=quiet)
    for what, wanted, file, measure in (
        ("peak memory", config.trainer.memory, MEMORY, probe_memory),
        ("decoding", config.eval.decode.tokens, DECODE, probe_decode),
    ):
        if not wanted or (run_dir / file).exists():
            continue
        say(f"{prefix}measuring {what}")
        measured = measure(run_dir, environment)
        if stopped():
            stop = (record.INTERRUPTED, f"stopped before the first step, while {what.split()[-1]} was measured")
            return record.write_failure(run_dir, *stop, name=config.name, seed=config.seed, flags=config.model)
        record.write_json(run_dir / file, measured)
    arguments = ["xattn.experiments.worker", str(run_dir), *(["--quiet"] if quiet else [])]
    if config.trainer.strategy != "none":
        processes = f"--nproc-per-node={config.trainer.processes}"
        arguments = ["torch.distributed.run", "--standalone", processes, "-m", *arguments]
    code, tail = _process(arguments, log=run_dir / record.LOG, prefix=prefix, environment=environment)
    result = record.read_result(run_dir)
    if result["status"] == record.UNFINISHED:
        result = record.write_failure(run_dir, *_how_it_ended(code, tail), name=config.name, seed=config.seed, flags=config.model)
        say(f"{prefix}{result['status']}: {result['error']}")
    return result


def probe_memory(run_dir: Path, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Peak bytes of a training step and of an evaluation; a probe that dies leaves its reason instead of a number."""
    measured: dict[str, Any] = {}
    for kind in KINDS:
        arguments = ["xattn.experiments.memory", str(run_dir), kind]
        found, error = _found(arguments, run_dir / f"memory-{kind}.json", environment)
        measured |= {f"{kind}_peak_bytes": None, f"{kind}_error": error} if found is None else found
    return measured


def probe_decode(run_dir: Path, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Memory and speed of decoding with the model and eval.decode of RUN_DIR/config.yaml; `error` where the probe died."""
    path = run_dir / "decode-probe.json"
    found, error = _found(["xattn.experiments.decode", str(run_dir), str(path)], path, environment)
    return {"error": error} if found is None else found


def _found(arguments: list[str], path: Path, environment: dict[str, str] | None = None) -> tuple[dict[str, Any] | None, str]:
    """What a probe left in `path`, which is removed; None, and the reason, where it died."""
    path.unlink(missing_ok=True)
    code, (_, error) = probe(arguments, environment)
    found = record.read_json(path) if code == 0 else None
    path.unlink(missing_ok=True)
    return found, error


def probe(arguments: list[str], environment: dict[str, str] | None = None) -> tuple[int, tuple[str, str]]:
    """Run `python -m ARGUMENTS` silently, with nothing that hides its memory.

    Returns: the exit code, and for one that is not 0 the status and the reason.
    """
    code, tail = _process(arguments, environment=PROBE_ENVIRONMENT | (environment or {}), echo=False)
    return code, _how_it_ended(code, tail)


def _process(
    arguments: list[str],
    *,
    environment: dict[str, str] | None = None,
    log: Path | None = None,
    prefix: str = "",
    echo: bool = True,
) -> tuple[int, list[str]]:
    """Run `python -m ARGUMENTS`, echo its lines, keep them in `log`. Returns the exit code and the last lines."""
    # -P: a file in the user's directory must not shadow a module of the standard library.
    command = [sys.executable, "-P", "-m", *arguments]
    tail: list[str] = []
    # Only one bar can live on a terminal, and only the main thread is sure to be alone there.
    watched = echo and on_terminal() and threading.current_thread() is threading.main_thread()
    asked = {ASKED: "1"} if watched else {}
    with (
        open(log, "a", encoding="utf-8") if log is not None else nullcontext() as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=_WORKER_ENVIRONMENT | os.environ | asked | (environment or {}),
            preexec_fn=_ignore_user_signals,
        ) as process,
        _known(process),
        _forward_signals(process),
        following(prefix) as is_progress,
    ):
        for line in process.stdout or ():
            if is_progress(line):
                continue
            tail = [*tail[-19:], line.rstrip()]
            if file is not None:
                file.write(line)
            if echo:
                say(prefix + line.rstrip())
        return process.wait(), tail


@contextmanager
def _known(process: subprocess.Popen) -> Iterator[None]:
    """Among those that `stop_all` reaches."""
    _running.add(process)
    try:
        if _stopped.is_set():  # the request came while this one was being started
            process.send_signal(signal.SIGTERM)
        yield
    finally:
        _running.discard(process)


def _ignore_user_signals() -> None:
    """In the process to be: a scheduler signals all processes of a job, and one that does not listen would end there."""
    for number in _USER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _forward_signals(process: subprocess.Popen) -> Iterator[None]:
    """A stop request to this process reaches the worker, which saves its state; this process lives on to record it.

    SIGUSR1 and SIGUSR2 travel as SIGTERM. Whoever listened to them here (submitit: it puts the job back into the queue)
    hears of them once the worker has saved and ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        _stopped.set()
        asked.append(number)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM if number in _USER_SIGNALS else number)

    old = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, *_USER_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    for number in dict.fromkeys(asked):
        if number in _USER_SIGNALS and callable(old[number]):
            old[number](number, None)


def _how_it_ended(code: int, tail: list[str]) -> tuple[str, str]:
    last = next((line for line in reversed(tail) if line.strip()), "no output")
    if code == -signal.SIGKILL:
        return record.KILLED, "killed (SIGKILL): by hand, or by the system for want of memory"
    if code < 0:
        return record.KILLED, f"killed by {signal.Signals(-code).name}; last line: {last}"
    if any("(SIGKILL)" in line for line in tail):
        return record.KILLED, "a rank was killed (SIGKILL): by hand, or by the system for want of memory"
    if any("can't allocate memory" in line or "OutOfMemoryError" in line for line in tail):
        return record.OOM, last
    return record.FAILED, f"exit status {code}; last line: {last}"
