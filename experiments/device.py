"""Where and in which precision a run computes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

import xattn
from xattn import ConfigError
from xattn.experiments.distributed import local_rank
from xattn.experiments.schema import TrainerConfig

# Dense peak FLOPs a second by vendor data sheet; fp32 without TensorFloat-32, which torch leaves off. Longest name first.
PEAK_FLOPS = {
    "H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp32": 91.6e12},
    "L4": {"bf16": 121e12, "fp32": 30.3e12},
    "A10G": {"bf16": 70e12, "fp32": 35e12},
    "RTX 4090": {"bf16": 165e12, "fp32": 82.6e12},
    "RTX 3090": {"bf16": 71e12, "fp32": 35.6e12},
}


def check_device(trainer: TrainerConfig) -> None:
    """Raise ConfigError where CUDA was named and there is none, or more processes than CUDA devices."""
    if trainer.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda, but torch sees no CUDA device; use trainer.device=cpu or auto")
    if trainer.device == "cpu" or not torch.cuda.is_available() or trainer.strategy == "none":
        return
    if trainer.processes > torch.cuda.device_count():
        raise ConfigError(
            f"trainer.processes={trainer.processes}, but torch sees {torch.cuda.device_count()} CUDA devices; "
            f"use trainer.processes={torch.cuda.device_count()} or trainer.device=cpu"
        )


def pick_device(trainer: TrainerConfig) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: as check_device.
    """
    check_device(trainer)
    kind = trainer.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and trainer.strategy != "none":
        torch.cuda.set_device(local_rank())
        return torch.device("cuda", local_rank())
    return torch.device(kind)


def pick_precision(trainer: TrainerConfig, device: torch.device) -> str:
    """`auto` is bf16 autocast on CUDA and fp32 on the CPU; weights and optimiser state are fp32 either way."""
    if trainer.precision != "auto":
        return trainer.precision
    return "bf16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def evaluating(model: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Within: no gradients, no dropout, the precision of the run. The model's mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, precision):
            yield
    finally:
        model.train(was_training)


def loss_module(model: Any, trainer: TrainerConfig) -> nn.Module:
    """The module that a training step calls, with activation checkpointing and compilation as the config says.

    The model itself stays as it is, so its weights keep their names.
    """
    model.attn_layers.checkpoint_blocks = trainer.activation_checkpointing == "full"
    ar = xattn.AutoregressiveWrapper(model)
    # fullgraph: a model that compiles only in part fails instead of running slowly without a word
    return torch.compile(ar, fullgraph=True) if trainer.compile else ar


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What the device could do in a second at this precision; None for a device not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = (peaks[precision] for part, peaks in PEAK_FLOPS.items() if f" {part}" in f" {name}".replace("-", " "))
    return next(known, None)


def synchronise(device: torch.device) -> None:
    """Wait for queued kernels, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
