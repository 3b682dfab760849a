"""True peak memory of one training step and of one evaluation, each measured in a fresh process.

    python -m xattn.experiments.memory RUN_DIR train|infer

What is counted. On CUDA: torch's max_memory_allocated. On the CPU: the growth of the process's resident set, from
just before the model is built to the peak (VmHWM, reset through /proc/self/clear_refs; where the kernel does not allow
it, the lifetime peak ru_maxrss). So it holds weights, gradients, optimiser state, activations, temporaries and
allocator slack, and not the interpreter, torch's own code, or the corpus. `train`: two optimiser steps of the run's
micro-batch, so that the optimiser's state exists beside the activations. `infer`: one token_nll of that shape.
"""

import ctypes
import gc
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import xattn
from xattn.experiments.configfile import load_config
from xattn.experiments.device import autocast, loss_module, pick_device, pick_precision
from xattn.experiments.ema import build_ema
from xattn.experiments.optim import build_optimiser
from xattn.experiments.record import CONFIG, write_json
from xattn.experiments.schema import PROBES, RunConfig, TrainerConfig

KINDS = PROBES
# Freed tensors must go back to the system at once, or the heap keeps what a step gave up and hides the true peak.
PROBE_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measure(config: RunConfig, kind: str) -> dict[str, Any]:
    """Bytes at the peak of one step.

    Returns: `{kind}_peak_bytes`, and for `train` also `state_bytes` (weights, gradients and optimiser state, exact) and
    `activation_bytes` (the rest of the peak).
    """
    device = pick_device(replace(config.trainer, strategy="none", processes=1))
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    rows, length = config.trainer.forward_rows, config.trainer.seq_len
    warm_up(config, kind, device)
    peak, state_bytes = peak_of(config, kind, device, rows=rows, length=length)
    measured = {f"{kind}_peak_bytes": peak, f"{kind}_method": method(device, config.trainer, kind)}
    if kind == "train":
        measured |= {"state_bytes": state_bytes, "activation_bytes": max(peak - state_bytes, 0)}
    return measured


def warm_up(config: RunConfig, kind: str, device: torch.device) -> None:
    """The step once at a tiny shape: libraries, thread pools and kernels stay resident for ever and belong to no variant."""
    if kind == "train" and _compiles(config.trainer, device):
        return  # peak_of compiles the shape itself
    _STEPS[kind](config, device, rows=1, length=min(config.trainer.seq_len, 16))


def peak_of(config: RunConfig, kind: str, device: torch.device, *, rows: int, length: int) -> tuple[int, int]:
    """Bytes at the peak of one step of `rows` sequences of `length` tokens, and those of them that are the step's state."""
    if kind == "train" and _compiles(config.trainer, device):
        # A second shape would make the compiler take sizes as unknowns and build other code, or fail.
        torch._dynamo.reset()
        _STEPS[kind](config, device, rows=rows, length=length)
    give_back(device)
    baseline = reset_peak(device)
    state_bytes = _STEPS[kind](config, device, rows=rows, length=length)
    return max(peak_bytes(device) - baseline, 0), state_bytes


def _train_steps(config: RunConfig, device: torch.device, *, rows: int, length: int) -> int:
    model = xattn.build(config.model).to(device)
    ema = build_ema(model, config.trainer.ema_decay)
    ar = loss_module(model, replace(config.trainer, compile=_compiles(config.trainer, device)))
    optimiser = build_optimiser(model, config.optim)
    ids_bn = torch.zeros(rows, length + 1, dtype=torch.int64, device=device)
    for _ in range(2):
        with autocast(device, pick_precision(config.trainer, device)):
            loss = ar(ids_bn)
        loss.backward()
        optimiser.step()
        if ema is not None:
            ema.update_parameters(model)
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimiser.zero_grad(set_to_none=True)
    states = [t for state in optimiser.state.values() for t in state.values() if torch.is_tensor(t)]
    averages = [] if ema is None else list(ema.parameters())
    return gradients + sum(t.nbytes for t in (*model.parameters(), *states, *averages))


def _compiles(trainer: TrainerConfig, device: torch.device) -> bool:
    """Whether the measured step is compiled. On the CPU a compiler's own memory would drown the step's."""
    return trainer.compile and device.type == "cuda"


def _infer_step(config: RunConfig, device: torch.device, *, rows: int, length: int) -> int:
    model = xattn.build(config.model).to(device).eval()
    ids_bn = torch.zeros(rows, length + 1, dtype=torch.int64, device=device)
    with autocast(device, pick_precision(config.trainer, device)):
        xattn.AutoregressiveWrapper(model).token_nll(ids_bn)
    return sum(p.nbytes for p in model.parameters())


_STEPS = {"train": _train_steps, "infer": _infer_step}


def give_back(device: torch.device) -> None:
    """Freed memory goes back to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            pass  # another C library: a little slack stays in the baseline


def reset_peak(device: torch.device) -> int:
    """The peak counts from now on; returns the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
    return status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Bytes at the peak since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.access("/proc/self/clear_refs", os.W_OK):
        return status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


def method(device: torch.device, trainer: TrainerConfig, kind: str) -> str:
    """How a peak is measured there, in words."""
    if device.type == "cuda":
        text = "cuda max_memory_allocated"
    else:
        text = "VmHWM growth" if os.access("/proc/self/clear_refs", os.W_OK) else "ru_maxrss growth"
        text += ", not compiled" if trainer.compile and kind == "train" else ""
    return text + (", one process with everything" if trainer.strategy != "none" else "")


MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes, e.g. VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def main(argv: list[str]) -> int:
    """Measure one kind and write `memory-KIND.json` into the run directory."""
    run_dir, kind = Path(argv[0]), argv[1]
    write_json(run_dir / f"memory-{kind}.json", measure(load_config(run_dir / CONFIG), kind))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
