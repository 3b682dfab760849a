"""Peak memory against context length: the curve of every variant of a study, from fresh processes that do nothing else.

    python -m xattn.experiments.curve RUN_DIR OUT ASK

One process measures one variant and one kind of step (`train`, `infer`), one sequence at a time, at ascending lengths;
peaks are counted as in memory.py, whose counter is reset before each length. The model is built anew for each length,
with `max_seq_len` of that length. A curve ends where the step runs out of memory, is refused, or its time is over; the
end is a result like the numbers before it.
"""

import json
import resource
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from xattn.experiments import record
from xattn.experiments.compose import USER_ERRORS
from xattn.experiments.configfile import load_config
from xattn.experiments.device import pick_device
from xattn.experiments.launch import probe, stopped
from xattn.experiments.memory import KINDS, method, peak_of, status_bytes, warm_up
from xattn.experiments.schema import CompareConfig, RunConfig
from xattn.experiments.worker import status_of

FILE = "memory_curve.json"
OUT_OF_MEMORY, REFUSED, TIME_LIMIT, FAILED, DIED = "out of memory", "refused", "time limit", "failed", "died"
GIB = 2**30
# Times the trained length, where the config names none. A GPU goes on until it is full.
CPU_FACTORS = (1, 2, 4, 8, 16)
CUDA_FACTORS = tuple(2**k for k in range(16))
# What a peak at a given length depends on, beside the model's flags.
_TRAINER = ("seq_len", "device", "precision", "compile", "activation_checkpointing", "ema_decay", "threads")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Bytes at the peak by length in tokens, and why there is no more of it.

    `end`: None where every length was measured, else `length` (the first that was not), `reason` and `error`.
    """

    points: dict[int, int]
    end: dict[str, Any] | None
    method: str


def kinds_of(config: CompareConfig) -> list[str]:
    """The kinds of step to measure; where none are named, those that runs measure in processes of their own, if they do."""
    if config.memory_curve.kinds is not None:
        return config.memory_curve.kinds
    return list(KINDS) if config.isolate and config.trainer.memory else []


def measure_curves(config: CompareConfig, runs: Iterable[tuple[str, Path]], folder: Path) -> None:
    """Measure what `folder` does not hold yet, one process after the other, and keep each as soon as it is there.

    A process that was killed is tried again by the next call; one that a signal stopped leaves nothing.

    Args:
        runs: name and run directory of each variant.
    """
    for name, run_dir in runs:
        run = load_config(run_dir / record.CONFIG)
        for kind in kinds_of(config):
            key = _decides(run) | {"kind": kind, "asked": asdict(config.memory_curve) | {"kinds": None}}
            others = [entry for entry in _read(folder) if not _same(entry["key"], key)]
            kept = next((entry for entry in _read(folder) if _same(entry["key"], key)), None)
            if stopped() or (kept is not None and (kept["end"] or {}).get("reason") != DIED):
                continue
            record.say(f"measuring memory against length: {name}, {kind}")
            curve = _probe(run, run_dir, folder, kind=kind, asked=asdict(config.memory_curve))
            if not stopped():
                record.write_json(folder / FILE, [*others, {"key": key, **asdict(curve)}])


def read_curves(folder: Path, run: RunConfig) -> dict[str, Curve]:
    """kind -> the newest curve measured with this run's model and trainer; empty where there is none."""
    found = {}
    for entry in _read(folder):
        if _same(entry["key"], entry["key"] | _decides(run)):
            points = {int(length): peak for length, peak in entry["points"].items()}
            found[entry["key"]["kind"]] = Curve(points=points, end=entry["end"], method=entry["method"])
    return found


def _read(folder: Path) -> list[dict[str, Any]]:
    entries = record.read_json(folder / FILE)
    return entries if isinstance(entries, list) else []


def _decides(run: RunConfig) -> dict[str, Any]:
    trainer = {name: getattr(run.trainer, name) for name in _TRAINER}
    return {"model": run.model, "optimiser": run.optim.name, "trainer": trainer}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _probe(run: RunConfig, run_dir: Path, folder: Path, *, kind: str, asked: dict[str, Any]) -> Curve:
    """One curve from a process of its own; how it ended is said here where it could not say so itself."""
    out = folder / f".{FILE}.lines"
    out.unlink(missing_ok=True)
    code, (status, error) = probe(["xattn.experiments.curve", str(run_dir), str(out), json.dumps(asked | {"kind": kind})])
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    out.unlink(missing_ok=True)
    head = lines[0] if lines else {"lengths": [run.trainer.seq_len], "method": "not measured"}
    points = {line["length"]: line["peak_bytes"] for line in lines[1:] if "peak_bytes" in line}
    end = next((line for line in lines[1:] if "reason" in line), None)
    left = [length for length in head["lengths"] if length not in points]
    if end is None and left:
        reason = OUT_OF_MEMORY if status == record.OOM else DIED
        if code == -signal.SIGALRM:
            reason, error = TIME_LIMIT, f"not done within the {asked['seconds']:g} s of memory_curve.seconds"
        end = {"length": left[0], "reason": reason, "error": error}
    return Curve(points=points, end=end, method=head["method"])


def measure(run: RunConfig, out: Path, *, kind: str, factors: Sequence[int] | None, seconds: float, cpu_limit_gib: float) -> None:
    """Measure one curve in this process and write it to `out`, a JSON line at a time, so that a kill loses one length.

    The first line has `lengths` and `method`; then come `length` and `peak_bytes`, at last perhaps `length`, `reason`
    and `error`. After `seconds` SIGALRM ends the process.
    """
    device = pick_device(replace(run.trainer, strategy="none", processes=1))
    if run.trainer.threads is not None:
        torch.set_num_threads(run.trainer.threads)
    factors = factors or (CUDA_FACTORS if device.type == "cuda" else CPU_FACTORS)
    lengths = [factor * run.trainer.seq_len for factor in sorted(set(factors))]
    with open(out, "w", encoding="utf-8", buffering=1) as file:

        def write(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")

        write(lengths=lengths, method=method(device, replace(run.trainer, strategy="none"), kind))
        warm_up(run, kind, device)
        if device.type == "cpu":
            _limit_memory(int(cpu_limit_gib * GIB))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        for length in lengths:
            longer = replace(run, model=run.model | {"max_seq_len": length})
            try:
                peak, _ = peak_of(longer, kind, device, rows=1, length=length)
            except Exception as error:
                reason = {record.OOM: OUT_OF_MEMORY, record.INVALID: REFUSED}.get(status_of(error), FAILED)
                text = str(error) if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {error}"
                if reason == OUT_OF_MEMORY and device.type == "cpu":
                    text = f"more than the {cpu_limit_gib:g} GiB of memory_curve.cpu_limit_gib"
                write(length=length, reason=reason, error=text.splitlines()[0])
                return
            write(length=length, peak_bytes=peak)


def _limit_memory(limit_bytes: int) -> None:
    """Let this process take no more than this beyond what it has: the system would go on until it had to kill something."""
    wanted = limit_bytes + (status_bytes("VmData") if sys.platform == "linux" else 0)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def main(argv: list[str]) -> int:
    """The probe's entry: RUN_DIR, the file to write, and what is asked as JSON."""
    asked = json.loads(argv[2])
    measure(
        load_config(Path(argv[0]) / record.CONFIG),
        Path(argv[1]),
        kind=asked["kind"],
        factors=asked["length_factors"],
        seconds=asked["seconds"],
        cpu_limit_gib=asked["cpu_limit_gib"],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
