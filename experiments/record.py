"""What a run leaves behind: metrics.jsonl line by line, result.json at the end, both readable after any crash.

A run directory holds config.yaml (resolved), metrics.jsonl, memory.json, result.json, worker.log, model/, checkpoints/.
"""

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

COMPLETED, FAILED, OOM, KILLED = "completed", "failed", "oom", "killed"
INVALID, INTERRUPTED, UNFINISHED = "invalid", "interrupted", "unfinished"
FOREIGN = "foreign"
RESULT, METRICS, CONFIG, MEMORY, LOG = "result.json", "metrics.jsonl", "config.yaml", "memory.json", "worker.log"
DECODE = "decode.json"
SEARCH = "budget_search.json"

# What readers of a completed result rely on.
_NEEDED = {
    "seed": int, "params": int, "tokens": int, "backends": list, "val": dict, "val_by_length": dict,
    "val_by_position": dict, "memory": dict, "data": dict, "tokens_per_second": int | float,
    "passkey": dict | None,
}  # fmt: skip


def write_json(path: Path, data: Any) -> None:
    """`write_text` of the data as JSON; numbers that are not finite become their names."""
    write_text(path, json.dumps(_finite(data), indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` in one step: a reader sees the old text or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any | None:
    """The parsed file, or None where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_result(run_dir: Path) -> dict[str, Any]:
    """The run's result; a run that never got to write one has status `unfinished`, one that xattn did not write `foreign`."""
    result = read_json(run_dir / RESULT)
    if not isinstance(result, dict) or "status" not in result:
        return {"status": UNFINISHED}
    strange = [key for key, kind in _NEEDED.items() if not isinstance(result.get(key), kind)]
    if not isinstance(result["status"], str) or (result["status"] == COMPLETED and strange):
        return {"status": FOREIGN, "error": f"xattn did not write this {RESULT}: {', '.join(strange) or 'status'} missing"}
    return result


def write_failure(run_dir: Path, status: str, error: str, *, name: str, seed: int, flags: dict[str, Any]) -> dict[str, Any]:
    """Record a run that did not finish, with the reason; whatever its memory probe measured is kept."""
    result = {
        "status": status,
        "error": error,
        "name": name,
        "seed": seed,
        "flags": {"given": flags, "resolved": None},
        "memory": read_json(run_dir / MEMORY),
        **provenance(),
    }
    write_json(run_dir / RESULT, result)
    return result


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The run's rows in order; a last line cut short by a crash is left out."""
    rows = []
    try:
        lines = (run_dir / METRICS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return rows
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class MetricsFile:
    """Append-only metrics.jsonl; on resume, rows beyond the checkpoint's step are dropped first."""

    def __init__(self, run_dir: Path, *, keep_until_step: int = 0) -> None:
        path = run_dir / METRICS
        kept = [row for row in read_metrics(run_dir) if row.get("step", 0) <= keep_until_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(row)) + "\n")

    def close(self) -> None:
        self._file.close()


def provenance() -> dict[str, Any]:
    """Which code, on what: commit and dirty flag (null outside a checkout, unless XATTN_COMMIT says it), versions, devices."""
    import torch

    import xattn

    commit, dirty = _git_state(Path(xattn.__file__).resolve().parent)
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {"xattn": xattn.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "platform": {
            "system": platform.system(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _git_state(package: Path) -> tuple[str | None, bool | None]:
    def git(*args: str) -> str:
        command = ["git", "-C", str(package), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed wheel may lie inside somebody else's checkout (a virtual environment in a project).
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        commit = os.environ.get("XATTN_COMMIT") or None
        return commit, None if commit is None else False


def _finite(value: Any) -> Any:
    # JSON has no NaN: a diverged loss is written as null-with-a-name, so that every reader can parse the file.
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def say(text: str) -> None:
    """One progress line, at once: the reader may be a pipe."""
    print(text, flush=True, file=sys.stdout)
