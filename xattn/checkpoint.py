"""Checkpoints: one safetensors file holding the weights and, in its header, the flags as JSON. Never pickle."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from xattn.errors import CheckpointError, ConfigError
from xattn.nn.wrapper import TransformerWrapper, adopt
from xattn.spec.flags import merge, parse, to_flags

FILE = "model.safetensors"
FORMAT = "1"


def file_of(path: str | Path) -> Path:
    """The checkpoint file that a path means: itself, or model.safetensors in a directory."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE


def save(model: TransformerWrapper, path: str | Path) -> Path:
    """Writes weights and flags to PATH/model.safetensors (or to PATH itself, when it ends in .safetensors).

    The file appears whole or not at all. Returns where it is.
    """
    file = file_of(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    flags = to_flags(model.spec)
    unfinished = file.with_suffix(".unfinished")
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, unfinished, metadata={"format": "pt", "xattn": FORMAT, "flags": json.dumps(flags)})
    os.replace(unfinished, file)
    return file


def load(
    path: str | Path, *, device: torch.device | str = "cpu", attn_backend: str = "auto", **overrides: Any
) -> TransformerWrapper:
    """The model saved at path, in eval mode, under its own flags or some of them overridden (None takes one away).

    Warns, by name, about flags that the weights were not trained with unless they are meant for inference.

    Raises:
        CheckpointError: no file there, corrupt, or not from xattn. ConfigError: an override that needs other weights.
    """
    file = file_of(path)
    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {file}; xattn.save(model, path) writes one")
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            header = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}); it may be cut short") from error
    if header.get("xattn") != FORMAT or "flags" not in header:
        raise CheckpointError(
            f"{file} holds no xattn flags (format {header.get('xattn')}, this version reads {FORMAT}); "
            "build the model yourself and use load_state_dict"
        )
    try:
        spec = parse(json.loads(header["flags"]))
    except (json.JSONDecodeError, ConfigError) as error:
        raise CheckpointError(f"the flags in {file} are not readable by this version: {error}") from error
    with torch.device("meta"):
        model = TransformerWrapper.from_spec(parse(merge(spec, overrides)), attn_backend=attn_backend)
    adopt(model, weights, overrides)
    return model.eval()
