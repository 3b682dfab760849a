"""What every benchmark needs: versions and commit for a row, medians, peak memory of a fresh process, rows as JSONL."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
# what is measured is this checkout, whatever else is installed
sys.path.insert(0, str(ROOT))


def provenance() -> dict[str, Any]:
    """Where a figure comes from: commit (XATTN_COMMIT where a copy of the code has another history), machine, versions."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        # rows of an earlier run change nothing that is measured
        status = ["status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results"]
        dirty = bool(subprocess.run([*git, *status], capture_output=True, text=True).stdout)
    except FileNotFoundError:
        commit, dirty = "", False
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": os.environ.get("XATTN_COMMIT") or commit + ("+changes" if dirty else ""),
        "device": gpu or f"cpu {platform.machine()} x{os.cpu_count()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "x-transformers")} | _driver(),
    }


def _driver() -> dict[str, str]:
    return {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())} if torch.cuda.is_available() else {}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def median_ms(steps: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Milliseconds of each step, round after round in turn, so that a slow moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """25th, 50th and 75th percentile."""
    low, mid, high = statistics.quantiles(values, n=4)
    return low, mid, high


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_over(work: Callable[[], Any]) -> int:
    """Bytes that work adds to this process at its peak (Linux; run it in a fresh process)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def in_fresh_process(script: str, *arguments: str) -> Any:
    """What a Python script prints as JSON on its last line."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def write_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    """Writes rows to results/NAME.jsonl, each with its provenance."""
    RESULTS.mkdir(exist_ok=True)
    file, source = RESULTS / f"{name}.jsonl", provenance()
    file.write_text("".join(json.dumps({**row, **source}) + "\n" for row in rows))
    return file


class Rows:
    """Rows of a run: appended to a file one by one, so that what was measured survives whatever comes next."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.rows, self.source = file, [], provenance()
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **row: Any) -> dict[str, Any]:
        """Keeps a row, with its provenance on disk."""
        self.rows.append(row)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({**row, **self.source}) + "\n")
        return row


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a file, oldest first; none where there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
