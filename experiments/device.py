"""Where and in which precision a run computes."""

from contextlib import AbstractContextManager, nullcontext

import torch

from xattn import ConfigError
from xattn.experiments.schema import TrainerConfig


def pick_device(trainer: TrainerConfig) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: CUDA was named and there is none.
    """
    if trainer.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda, but torch sees no CUDA device; use trainer.device=cpu or auto")
    if trainer.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(trainer.device)


def pick_precision(trainer: TrainerConfig, device: torch.device) -> str:
    """`auto` is bf16 autocast on CUDA and fp32 on the CPU; weights and optimiser state are fp32 either way."""
    if trainer.precision != "auto":
        return trainer.precision
    return "bf16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def synchronise(device: torch.device) -> None:
    """Wait for queued kernels, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
