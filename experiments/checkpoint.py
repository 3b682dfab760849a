"""Checkpoints to resume from: written beside, then renamed, so that the newest one in the folder is always whole.

RUN_DIR/checkpoints/step-00000100/ holds model/ (safetensors and flags), optimiser.pt (tensors only, loaded with
weights_only=True) and state.json. Data order and dropout are functions of (seed, step), so nothing else has state.
"""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import xattn
from xattn.experiments.record import read_json, say, write_json

FOLDER = "checkpoints"


@dataclass(kw_only=True)
class Progress:
    """How far a run is. `seen`: digest of the tokens trained on; `seconds`: time spent in training steps."""

    step: int = 0
    seen: str = ""
    seconds: float = 0.0
    tokens_per_second: float = 0.0


def save_checkpoint(run_dir: Path, model: Any, optimiser: torch.optim.Optimizer, progress: Progress, *, keep: int) -> bool:
    """Write the checkpoint of `progress.step` and drop all but the newest `keep`.

    Returns: whether it was written; a full disk is a warning, and the older checkpoints stay.
    """
    folder = run_dir / FOLDER
    final = folder / f"step-{progress.step:08d}"
    if final.exists():
        return True
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        xattn.save(model, temporary / "model")
        torch.save(optimiser.state_dict(), temporary / "optimiser.pt")
        write_json(temporary / "state.json", asdict(progress))
        _sync(temporary)
        os.replace(temporary, final)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        say(f"warning: the checkpoint of step {progress.step} could not be written ({error}); older ones are kept")
        return False
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return True


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none."""
    complete = _complete(run_dir / FOLDER)
    return complete[-1] if complete else None


def load_checkpoint(path: Path, *, attn_backend: str) -> tuple[Any, dict[str, Any], Progress]:
    """The model, the optimiser's state dict and the progress. No pickled code is ever run."""
    model = xattn.load(path / "model", attn_backend=attn_backend)
    state = torch.load(path / "optimiser.pt", map_location="cpu", weights_only=True)
    return model, state, Progress(**read_json(path / "state.json"))


def remove_checkpoints(run_dir: Path) -> None:
    """A finished run keeps its model and needs no checkpoints."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
