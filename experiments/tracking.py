"""The mirror: metrics go to W&B when it works, and a run never fails, waits or loses a row when it does not."""

import logging
import netrc
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from xattn.experiments.record import read_json, say, write_json
from xattn.experiments.schema import TrackingConfig

STATE = "wandb.json"
_FAILURES_ALLOWED = 3


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


class WandbMirror:
    """All calls to wandb. Falls back from online to offline to nothing, and says so once."""

    def __init__(self, run_dir: Path, tracking: TrackingConfig, *, name: str, job_type: str, config: dict[str, Any]) -> None:
        self._run = None
        self._failures = 0
        mode = wandb_mode(tracking.mode)
        if mode == "disabled":
            return
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self._run = _start(run_dir, tracking, attempt, name=name, job_type=job_type, config=config)
                return
            except Exception as error:  # wandb raises its own, pydantic's and network errors: none may end a run
                say(f"warning: W&B ({attempt}) did not start: {_first_line(error)}")
        say("warning: going on without W&B; metrics.jsonl has every row")

    def log(self, row: dict[str, Any]) -> None:
        """Mirror one row of numbers; `step` and `tokens` are ordinary columns (W&B's own step restarts on resume)."""
        self._guard(lambda run: run.log(row))

    def summary(self, values: dict[str, Any]) -> None:
        self._guard(lambda run: run.summary.update(values))

    def preempting(self) -> None:
        self._guard(lambda run: run.mark_preempting())

    def finish(self, *, failed: bool = False) -> None:
        self._guard(lambda run: run.finish(exit_code=1 if failed else 0))
        self._run = None

    def _guard(self, call: Any) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # see __init__
            self._failures += 1
            if self._failures >= _FAILURES_ALLOWED:
                say(f"warning: W&B is given up after {self._failures} failures: {_first_line(error)}")
                self._run = None


def _start(run_dir: Path, tracking: TrackingConfig, mode: str, *, name: str, job_type: str, config: dict[str, Any]) -> Any:
    logging.getLogger("wandb").setLevel(logging.ERROR)
    import wandb

    state = read_json(run_dir / STATE) or {"id": uuid.uuid4().hex[:8]}
    write_json(run_dir / STATE, state)
    settings = wandb.Settings(
        init_timeout=30,
        # The default waits for ever when the server has died.
        finish_timeout=30,
        # The default keeps 15 s of rows in memory: all of a short run is lost at a kill.
        x_transaction_log_flush_interval=1.0,
        console="off",
        silent=True,
        save_code=False,
        disable_git=True,
        x_disable_meta=True,
        x_disable_stats=True,
    )
    run = wandb.init(
        dir=str(run_dir),
        mode=mode,
        id=state["id"],
        resume="allow",
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group,
        job_type=job_type,
        tags=list(tracking.tags),
        notes=tracking.notes,
        name=name,
        config=config,
        settings=settings,
    )
    run.define_metric("tokens", hidden=True)
    for pattern in ("train/*", "val/*", "perf/*"):
        run.define_metric(pattern, step_metric="tokens")
    run.define_metric("val/ppl", step_metric="tokens", summary="min")
    return run


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
