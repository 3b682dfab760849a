"""What training starts from: weights drawn from the seed, or the newest checkpoint of the same model, ready to step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import xattn
from xattn import ConfigError
from xattn.experiments import checkpoint
from xattn.experiments.device import loss_module
from xattn.experiments.distributed import Ranks
from xattn.experiments.ema import build_ema, restore_ema
from xattn.experiments.optim import build_optimiser, restore_state
from xattn.experiments.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class Start:
    """`params`: how many the whole model has. `ema`: None where none is asked for. `loss`: ids and documents to nats."""

    model: Any
    params: int
    ema: Any | None
    optimiser: torch.optim.Optimizer
    loss: Any
    progress: checkpoint.Progress


def start(config: RunConfig, run_dir: Path, *, device: torch.device, ranks: Ranks) -> Start:
    """Build or load the model of `config`, share it out among the ranks, and give the optimiser its state.

    Raises:
        ConfigError: the checkpoint holds another model, or no average where one is asked for.
    """
    newest = checkpoint.newest_checkpoint(run_dir)
    loaded = None
    if newest is None:
        # Seeded here and nowhere before, so that variants with the same parameters start from the same weights.
        torch.manual_seed(config.seed)
        model, progress = xattn.build(config.model), checkpoint.Progress()
    else:
        loaded = checkpoint.load_checkpoint(newest, attn_backend=config.model.get("attn_backend", "auto"))
        _check_unchanged(loaded, config, newest)
        model, progress = loaded.model, loaded.progress
    model.to(device)
    params = sum(p.numel() for p in model.parameters())
    ema = build_ema(model, config.trainer.ema_decay)
    if loaded is not None and ema is not None:
        restore_ema(ema, loaded.ema)
    ranks.shard(model)
    if ema is not None:
        ranks.shard(ema.module)
    optimiser = build_optimiser(model, config.optim)
    if loaded is not None:
        restore_state(model, optimiser, loaded.optimiser)
    loss = ranks.replicate(loss_module(model, config.trainer))
    return Start(model=model, params=params, ema=ema, optimiser=optimiser, loss=loss, progress=progress)


def _check_unchanged(loaded: checkpoint.Loaded, config: RunConfig, path: Path) -> None:
    """Refuse to go on with weights of another model or without the average that the config asks for."""
    there, now = xattn.to_flags(loaded.model.spec), xattn.to_flags(xattn.parse(config.model))
    changed = [name for name in sorted(there.keys() | now.keys()) if there.get(name) != now.get(name)]
    if changed:
        shown = "; ".join(f"model.{name}: {there.get(name)} there, {now.get(name)} now" for name in changed)
        raise ConfigError(f"{path} holds another model ({shown}); use another directory for this one")
    if (loaded.ema is None) != (config.trainer.ema_decay is None):
        has = "no average" if loaded.ema is None else "an average"
        raise ConfigError(
            f"{path} holds {has} of the weights, and trainer.ema_decay={config.trainer.ema_decay}; "
            "resume with the trainer.ema_decay it was trained with"
        )
