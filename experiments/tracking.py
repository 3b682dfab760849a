"""The mirrors: metrics go to W&B and TensorBoard where wanted; a run never fails, waits long or loses a row for them.

The record is metrics.jsonl and result.json in the run directory; nothing is ever read back from a mirror.
"""

import logging
import netrc
import os
import uuid
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from xattn.experiments.configfile import redact
from xattn.experiments.record import read_json, say, write_json
from xattn.experiments.schema import TrackingConfig, check_tensorboard

STATE = "wandb.json"
_FAILURES_ALLOWED = 3


class Sink(Protocol):
    """One mirror. `log` takes a row with `step` and `tokens`; `summary` the figures of the finished run."""

    def log(self, row: dict[str, Any]) -> None: ...
    def summary(self, values: dict[str, Any]) -> None: ...
    def preempting(self) -> None: ...
    def finish(self, *, failed: bool) -> None: ...


class Mirror:
    """Every configured mirror behind one face. A mirror that fails is a warning, said once, and never an exception.

    Args:
        config: what the run is, nested; secrets of the environment are cut out of it and of the tracking fields here.
    Raises:
        ConfigError: tracking.tensorboard without its package.
    """

    def __init__(self, run_dir: Path, tracking: TrackingConfig, *, name: str, job_type: str, config: dict[str, Any]) -> None:
        self._sinks: dict[str, Sink] = {}
        self._failures: dict[str, int] = {}
        shown: dict[str, Any] = {"name": redact(name), "job_type": job_type, "config": redact(config)}
        mode = wandb_mode(tracking.mode)
        if mode != "disabled":
            for attempt in dict.fromkeys((mode, "offline")):
                if self._add("W&B", lambda mode=attempt: _Wandb(run_dir, tracking, mode, **shown), f" ({attempt})"):
                    break
            else:
                say("warning: going on without W&B; metrics.jsonl has every row")
        if tracking.tensorboard:
            check_tensorboard()
            from xattn.experiments.tensorboard import TensorBoard

            self._add("TensorBoard", lambda: TensorBoard(run_dir, **shown))

    def log(self, row: dict[str, Any]) -> None:
        """Mirror one row of numbers; `step` and `tokens` are ordinary columns (W&B's own step restarts on resume)."""
        self._each(lambda sink: sink.log(row))

    def summary(self, values: dict[str, Any]) -> None:
        """The run's final figures."""
        self._each(lambda sink: sink.summary(values))

    def preempting(self) -> None:
        """The run was asked to stop and will be started again."""
        self._each(lambda sink: sink.preempting())

    def finish(self, *, failed: bool = False) -> None:
        """Close every mirror, within tracking.timeout seconds for each."""
        self._each(lambda sink: sink.finish(failed=failed))
        self._sinks = {}

    def _add(self, label: str, start: Any, how: str = "") -> bool:
        try:
            self._sinks[label] = start()
        except Exception as error:  # wandb raises its own, pydantic's and network errors: none may end a run
            say(f"warning: {label}{how} did not start: {_first_line(error)}")
        return label in self._sinks

    def _each(self, call: Any) -> None:
        for label, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:  # see _add
                self._failures[label] = self._failures.get(label, 0) + 1
                if self._failures[label] >= _FAILURES_ALLOWED:
                    say(f"warning: {label} is given up after {_FAILURES_ALLOWED} failures: {_first_line(error)}")
                    del self._sinks[label]


def wandb_mode(mode: str) -> str:
    """What `auto` means here: WANDB_MODE if set, online only with a key, else offline."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class _Wandb:
    """All calls to wandb; an exception of any of them is the caller's to count."""

    def __init__(self, run_dir: Path, tracking: TrackingConfig, mode: str, *, name: str, job_type: str, config: Any) -> None:
        self._run = _start(run_dir, tracking, mode, name=name, job_type=job_type, config=config)
        self._model = run_dir / "model" if tracking.log_model else None

    def log(self, row: dict[str, Any]) -> None:
        self._run.log(row)

    def summary(self, values: dict[str, Any]) -> None:
        self._run.summary.update(values)

    def preempting(self) -> None:
        self._run.mark_preempting()

    def finish(self, *, failed: bool) -> None:
        if self._model is not None and self._model.is_dir() and not failed:
            import wandb

            artifact = wandb.Artifact(f"model-{self._run.id}", type="model")
            artifact.add_dir(str(self._model))
            self._run.log_artifact(artifact, aliases=["latest"])
        self._run.finish(exit_code=1 if failed else 0)


def _start(run_dir: Path, tracking: TrackingConfig, mode: str, *, name: str, job_type: str, config: dict[str, Any]) -> Any:
    logging.getLogger("wandb").setLevel(logging.ERROR)
    import wandb

    state = read_json(run_dir / STATE) or {"id": uuid.uuid4().hex[:8]}
    write_json(run_dir / STATE, state)
    settings = wandb.Settings(
        init_timeout=tracking.timeout,
        # The default waits for ever when the server has died.
        finish_timeout=tracking.timeout,
        # The default keeps 15 s of rows in memory: all of a short run is lost at a kill.
        x_transaction_log_flush_interval=1.0,
        console="off",
        silent=True,
        save_code=False,
        disable_git=True,
        x_disable_meta=True,
        x_disable_stats=True,
    )
    try:
        run = wandb.init(
            dir=str(run_dir),
            mode=mode,
            id=state["id"],
            resume="allow",
            project=redact(tracking.project),
            entity=redact(tracking.entity),
            group=redact(tracking.group),
            job_type=job_type,
            tags=redact(list(tracking.tags)),
            notes=redact(tracking.notes),
            name=name,
            config=config,
            settings=settings,
        )
    except BaseException:
        # wandb's service holds on to the id of a run that did not start: the next attempt would find it in use.
        wandb.teardown()
        raise
    run.define_metric("tokens", hidden=True)
    for pattern in ("train/*", "val/*", "perf/*"):
        run.define_metric(pattern, step_metric="tokens")
    run.define_metric("val/ppl", step_metric="tokens", summary="min")
    return run


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
