"""Optimisers and learning-rate schedules, both in tokens."""

import math

import torch
from torch import nn

from xattn import ConfigError
from xattn.experiments.schema import OptimConfig, ScheduleConfig


def build_optimiser(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over two groups: matrices decay, vectors (norm gains, biases) do not."""
    if optim.name != "adamw":
        raise ConfigError(f"optim.name={optim.name} is not built in yet; use optim.name=adamw")
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=all(p.is_floating_point() for p in parameters),
    )


def lr_factor(tokens_seen: int, *, total: int, schedule: ScheduleConfig) -> float:
    """The learning rate at `tokens_seen`, as a factor of optim.lr.

    Linear warm-up to 1, then cosine | linear to final_factor, or wsd: 1 until the last decay_fraction of the run, then
    linear to final_factor; constant stays at 1.
    """
    warmup = schedule.warmup_tokens if schedule.warmup_tokens is not None else total // 20
    if tokens_seen < warmup:
        return (tokens_seen + 1) / (warmup + 1)
    start = max(warmup, round(total * (1.0 - schedule.decay_fraction))) if schedule.name == "wsd" else warmup
    if schedule.name == "constant" or tokens_seen <= start:
        return 1.0
    progress = min((tokens_seen - start) / max(total - start, 1), 1.0)
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1.0 - progress
    return schedule.final_factor + (1.0 - schedule.final_factor) * left
