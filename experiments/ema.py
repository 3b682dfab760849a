"""The running average of a model's weights, kept beside them: an average over about 1 / (1 - decay) steps."""

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def build_ema(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """An average that starts as a copy of the model; None where none is asked for. Update it after every step."""
    if decay is None:
        return None
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    ema.requires_grad_(False)
    return ema


def ema_state(ema: AveragedModel | None) -> dict[str, torch.Tensor] | None:
    """The average's weights under the model's own names, and how often they were updated as `n_averaged`."""
    if ema is None:
        return None
    return {**ema.module.state_dict(), "n_averaged": ema.n_averaged}


def restore_ema(ema: AveragedModel, state: dict[str, Any]) -> None:
    """Give a fresh average the state of an older one; before the model is shared out."""
    weights = dict(state)
    ema.n_averaged.copy_(weights.pop("n_averaged"))
    ema.module.load_state_dict(weights)
