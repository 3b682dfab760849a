"""What a training step costs against length: memory and time, ours beside x-transformers, until memory runs out.

    pip install x-transformers
    python benchmarks/cost.py [--budget-s 150 --out benchmarks/results/cost.jsonl]     # on one GPU
    python benchmarks/cost.py --plot docs/images/study/cost.png                        # of the rows that are there
    python benchmarks/cost.py --dry                                                    # tiny, on the CPU

A cell is one model at one length, measured in a fresh process: forward, backward and AdamW on one sequence of random bytes,
bf16, a model of 6 layers of width 256. Processes are started ahead, and one at a time holds the GPU. After a cell that ran out of
memory, a model's longer ones are not tried.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import torch
from harness import RESULTS, Rows, read_rows
from picture import against_length, save
from torch import Tensor
from train_step import VOCABULARY, ours, theirs

SIZES, DRY_SIZES = {"dim": 256, "depth": 6, "heads": 4}, {"dim": 32, "depth": 2, "heads": 2}
LENGTHS, DRY_LENGTHS = tuple(1024 * 2**k for k in range(7)), (64, 128)
WINDOW, AT_ONCE = 512, 8
# at this length kernels are compiled before a cell takes the GPU to itself
WARM_UP = 1024
# name -> model of (length, sizes), whether compiled
MODELS: dict[str, tuple[Callable[..., Callable[[Tensor], Tensor]], bool]] = {
    "xattn dense": (ours, False),
    "xattn window 512": (partial(ours, sliding_window=WINDOW), False),
    "xattn hybrid LLG 512": (partial(ours, sliding_window=WINDOW, window_pattern="LLG"), False),
    "xattn selective": (partial(ours, attn_selective=True), False),
    "xattn Self-Extend": (partial(ours, self_extend_group=8, self_extend_window=256), False),
    "x-transformers dense, flash": (partial(theirs, attn_flash=True), False),
    "x-transformers dense": (theirs, False),
    "x-transformers selective": (partial(theirs, attn_selective=True), False),
    "x-transformers dense, flash, compiled": (partial(theirs, attn_flash=True), True),
    "x-transformers selective, compiled": (partial(theirs, attn_selective=True), True),
}
COMPILED_LENGTHS = (1024, 4096, 8192)
OOM = "out of memory"


def cells(lengths: tuple[int, ...]) -> list[tuple[str, int]]:
    """Every cell, shortest first, so that a run that is cut off has whole lengths; what is compiled, which takes long, early."""
    eager = [name for name, (_, compiled) in MODELS.items() if not compiled]
    slow = [(name, n) for n in lengths for name in MODELS if name not in eager and n in COMPILED_LENGTHS]
    first, *others = ([(name, n) for name in eager] for n in lengths)
    return [*first, *slow, *(cell for length in others for cell in length)]


def step_of(name: str, n: int, *, dry: bool) -> Callable[[], Tensor]:
    """A training step on one sequence."""
    torch.manual_seed(0)
    make, compiled = MODELS[name]
    model = make(n, sizes=DRY_SIZES if dry else SIZES).to(gpu.device())
    run = torch.compile(model, dynamic=False) if compiled and not dry else model
    optim = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=gpu.on_gpu())
    ids = torch.randint(0, VOCABULARY, (1, n + 1), device=gpu.device())

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16) if gpu.on_gpu() else nullcontext():
            loss = run(ids)
        loss.backward()
        optim.step()
        optim.zero_grad(set_to_none=True)
        return loss.detach()

    return step


@contextmanager
def alone(lock: str) -> Iterator[None]:
    """Nobody else of this command uses the GPU within."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def measure(name: str, n: int, lock: str, *, dry: bool) -> dict[str, Any]:
    """A cell's numbers: step_ms, peak_mib (weights, gradients and optimiser state included), or why there are none."""
    torch.set_num_threads(1)
    try:
        # what torch.compile makes is for one length only
        step = step_of(name, n if MODELS[name][1] else min(n, WARM_UP), dry=dry)
        for _ in range(3):
            step()
        if not MODELS[name][1]:
            del step
        if gpu.on_gpu():
            torch.cuda.empty_cache()
        with alone(lock):
            if not MODELS[name][1]:
                step = step_of(name, n, dry=dry)
                step()
            return _timed(step)
    except ModuleNotFoundError as error:
        return {"note": f"skipped: package {error.name} is not installed"}
    except Exception as error:
        return {"note": OOM if gpu.out_of_memory(error) else f"failed: {gpu.reason(error)}"}


def _timed(step: Callable[[], Tensor]) -> dict[str, Any]:
    loss = float(step())
    gpu.peak_mib(step)
    peak = torch.cuda.max_memory_allocated() / gpu.MIB if gpu.on_gpu() else None
    ms = gpu.median_ms(step, rep_ms=300, least=5)
    return {"step_ms": round(ms, 3), "peak_mib": peak and round(peak, 1), "loss_nats": round(loss, 4)}


def measure_all(rows: Rows, *, budget_s: float, dry: bool) -> None:
    """A row each, as they come; a model whose memory ran out is not tried at greater lengths."""
    begun, over, running = time.monotonic(), {}, []
    waiting = cells(DRY_LENGTHS if dry else LENGTHS)
    lock = tempfile.NamedTemporaryFile(suffix=".lock")
    while waiting or running:
        late = time.monotonic() - begun > budget_s
        while waiting and len(running) < (2 if dry else AT_ONCE) and not late:
            name, n = waiting.pop(0)
            if n > over.get(name, n):
                _keep(rows, name, n, {"note": OOM})
                continue
            command = [sys.executable, __file__, "--cell", name, str(n), "--lock", lock.name, *(["--dry"] if dry else [])]
            running.append((name, n, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)))
        for name, n, process in [entry for entry in running if entry[2].poll() is not None]:
            running.remove((name, n, process))
            out, error = process.communicate()
            row = json.loads(out.splitlines()[-1]) if not process.returncode else {"note": f"died: {error.strip()[-160:]}"}
            if row.get("note") == OOM:
                over[name] = min(n, over.get(name, n))
            _keep(rows, name, n, row)
        if late:
            for _, _, process in running:
                process.kill()
                process.communicate()
            for name, n in [*[entry[:2] for entry in running], *waiting]:
                _keep(rows, name, n, {"note": f"skipped: {budget_s:.0f} s are over"})
            return
        time.sleep(0.05)


def _keep(rows: Rows, name: str, n: int, row: dict[str, Any]) -> None:
    rows.add(model=name, n=n, **(DRY_SIZES if "DRY" in os.environ else SIZES), batch=1, **row)
    print(f"{name:40} {n:7,} " + " ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def draw(rows: list[dict[str, Any]], file: Path) -> bool:
    """Memory and time of a step against length, on logarithmic axes; a cross where memory ran out. False without numbers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {name: {row["n"]: row for row in rows if row["model"] == name} for name in MODELS}
    if not any(row.get("step_ms") for row in rows):
        return False
    colours = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#8C8C00", "#E69F00", "#CC79A7", "#8C8C00", "#CC79A7")
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), dpi=200, layout="constrained")
    for axes, (field, title, unit) in zip(panels, (("peak_mib", "Peak memory of a training step (GiB)", 1024), (
        "step_ms", "Time of a training step (ms)", 1)), strict=True):  # fmt: skip
        for place, (name, line) in enumerate(lines.items()):
            found = sorted((n, row[field] / unit) for n, row in line.items() if row.get(field))
            if not found:
                continue
            dashes = "-" if name.startswith("xattn") else ":" if "compiled" in name else "--"
            marker = "osD^vPX*<>"[place]
            axes.plot(*zip(*found, strict=True), color=colours[place], ls=dashes, marker=marker, ms=4, lw=1.5, label=name)
            gone = sorted(n for n, row in line.items() if row.get("note") == OOM)
            if gone:
                axes.plot(gone[0], found[-1][1] * 2, marker="x", ms=8, mew=2, color=colours[place], ls="none")
        against_length(axes, sorted({row["n"] for row in rows}), title=title, label="tokens (x: out of memory)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    save(figure, file)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget-s", type=float, default=600)
    parser.add_argument("--out", type=Path, default=RESULTS / "cost.jsonl", help="the rows, added as they come")
    parser.add_argument("--plot", type=Path, default=None, help="draw the rows of --out, measure nothing")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU; no rows are kept")
    parser.add_argument("--cell", nargs=2, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--lock", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry:
        os.environ.update(CUDA_VISIBLE_DEVICES="", DRY="1")
    if args.cell:
        print(json.dumps(measure(args.cell[0], int(args.cell[1]), args.lock, dry=args.dry)))
    elif args.plot:
        print(args.plot if draw(read_rows(args.out), args.plot) else "no rows to draw")
    else:
        measure_all(Rows(None if args.dry else args.out), budget_s=args.budget_s, dry=args.dry)


if __name__ == "__main__":
    main()
