"""Clocks and gauges of one process: medians, CUDA-graph replay, peak memory. Without a GPU they run once, to try a script."""

import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

MIB = 2**20
Work = Callable[[], Any]
# what CUDA says when a kernel has gone astray; nothing runs in this process after it
LOST = (
    "illegal memory access", "illegal address", "misaligned address", "unspecified launch failure", "device-side assert",
    "illegal instruction", "invalid program counter", "launch timed out", "hardware stack error",
)  # fmt: skip


def go_dry() -> None:
    """Kernels by the interpreter and no GPU in sight, whatever the machine has; before triton is imported."""
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def on_gpu() -> bool:
    """Whether there is a GPU to time."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where benchmarks run."""
    return torch.device("cuda" if on_gpu() else "cpu")


def median_ms(work: Work, *, rep_ms: float = 30, least: int = 5) -> float:
    """Median milliseconds by events on the stream, with a cold L2 before each call, as triton.testing.do_bench does."""
    if not on_gpu():
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    cold = torch.empty(256 * MIB, dtype=torch.int8, device="cuda")
    work()
    torch.cuda.synchronize()

    def timed(times: int) -> list[float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for before, after in marks:
            cold.zero_()
            before.record()
            work()
            after.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in marks]

    one = max(statistics.median(timed(3)), 1e-3)
    # the first third warms clocks and caches up
    timed(max(1, min(200, int(rep_ms / one) // 3)))
    return statistics.median(timed(max(least, min(400, int(rep_ms / one)))))


def peak_mib(work: Work) -> float | None:
    """MiB that work adds at its peak to what is held before it."""
    if not on_gpu():
        work()
        return None
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def captured(work: Work) -> Work:
    """work as the replay of a CUDA graph: no launches between kernels count. Raises what capture raises."""
    if not on_gpu():
        raise RuntimeError("needs a CUDA GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay() -> None:
        graph.replay()

    # the outputs live in the graph's pool as long as the replay does
    replay.kept = kept
    return replay


def forget() -> None:
    """Gives back what the last case held, compiled code included."""
    torch._dynamo.reset()
    gc.collect()
    if on_gpu():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """An error as one short line of a row."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def out_of_memory(error: BaseException) -> bool:
    """Whether the device had too little memory, which is a result and not a mistake."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def is_lost(error: BaseException) -> bool:
    """Whether the device is of no more use to this process."""
    text = str(error).lower()
    return any(word in text for word in LOST)
