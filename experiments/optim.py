"""Optimisers and learning-rate schedules, both in tokens."""

import math
from typing import Any

import torch
from torch import nn

from xattn import ConfigError
from xattn.experiments.schema import OptimConfig, ScheduleConfig

_MOMENTUM, _DECAY_FRACTION, _FINAL_FACTOR = 0.95, 0.2, 0.1


class Together:
    """Several optimisers over parts of one model, stepped as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:
        return {p: values for part in self.parts for p, values in part.state.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


Optimiser = torch.optim.Optimizer | Together


def build_optimiser(model: nn.Module, optim: OptimConfig) -> Optimiser:
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

    Matrices decay, vectors (norm gains, biases) do not. Muon's updates are scaled to the size of AdamW's, so that both
    take one learning rate and one weight decay. Source: arXiv 2502.16982.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if optim.name == "muon" and is_hidden_matrix(name, p)]
    taken = set(map(id, hidden))
    adamw = _adamw([p for _, p in named if id(p) not in taken], optim)
    if optim.name == "adamw":
        return adamw
    momentum = optim.momentum if optim.momentum is not None else _MOMENTUM
    muon = torch.optim.Muon(
        hidden, lr=optim.lr, weight_decay=optim.weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
    )
    return Together(muon, adamw)


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter multiplies activations inside a block: no embedding, no head, no vector."""
    return parameter.ndim == 2 and ".blocks." in f".{name}"


def _adamw(parameters: list[nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )


def state_by_name(model: nn.Module, optimiser: Optimiser) -> dict[str, dict[str, torch.Tensor]]:
    """The optimiser's tensors under the names of their parameters, so that they outlive the number of processes.

    Groups are not in it: rates and decays follow from the config and the step.
    """
    state = optimiser.state
    return {name: dict(state[p]) for name, p in model.named_parameters() if p in state}


def restore_state(model: nn.Module, optimiser: Optimiser, state: dict[str, dict[str, torch.Tensor]]) -> None:
    """Give a fresh optimiser the whole tensors of `state_by_name`; they are shared out where the model is.

    Raises:
        ConfigError: the state belongs to another optimiser or another model.
    """
    owners = {id(p): part for part in getattr(optimiser, "parts", (optimiser,)) for g in part.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        owner = owners[id(p)]
        needed = {"momentum_buffer"} if isinstance(owner, torch.optim.Muon) else {"step", "exp_avg", "exp_avg_sq"}
        found = state.get(name, {})
        if set(found) != needed:
            raise ConfigError(
                f"the checkpoint's optimiser holds {', '.join(sorted(found)) or 'nothing'} for {name}, and this run's "
                f"{type(owner).__name__} needs {', '.join(sorted(needed))}; resume with the optim it was trained with"
            )
        owner.state[p] = {key: _like(p, value) for key, value in found.items()}


def _like(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(p.device)
    if isinstance(p, DTensor) and value.shape == p.shape:
        return distribute_tensor(value, p.device_mesh, p.placements)
    return value.clone()


def lr_factor(tokens_seen: int, *, total: int, schedule: ScheduleConfig) -> float:
    """The learning rate at `tokens_seen`, as a factor of optim.lr.

    Linear warm-up to 1, then cosine | linear to final_factor, or wsd: 1 until the last decay_fraction of the run, then
    linear to final_factor; constant stays at 1.
    """
    warmup = schedule.warmup_tokens if schedule.warmup_tokens is not None else total // 20
    if tokens_seen < warmup:
        return (tokens_seen + 1) / (warmup + 1)
    fraction = schedule.decay_fraction if schedule.decay_fraction is not None else _DECAY_FRACTION
    final = schedule.final_factor if schedule.final_factor is not None else _FINAL_FACTOR
    start = max(warmup, round(total * (1.0 - fraction))) if schedule.name == "wsd" else warmup
    if schedule.name == "constant" or tokens_seen <= start:
        return 1.0
    progress = min((tokens_seen - start) / max(total - start, 1), 1.0)
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1.0 - progress
    return final + (1.0 - final) * left
