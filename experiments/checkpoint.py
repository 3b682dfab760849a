"""Checkpoints to resume from: written beside, then renamed, so that the newest one in the folder is always whole.

RUN_DIR/checkpoints/step-00000100/ holds state.json and either model/ (safetensors and flags), optimiser.pt and ema.pt
(tensors only, loaded with weights_only=True) of one process, or flags.json and shards/ (torch.distributed.checkpoint) of
several. Both hold the same tensors under the same names, so either resumes on any number of processes. Data order and
dropout are functions of (seed, step), so nothing else has state.
"""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, TensorStorageMetadata
from torch.distributed.checkpoint import load as load_shards
from torch.distributed.checkpoint import save as save_shards

import xattn
from xattn.experiments.distributed import Ranks
from xattn.experiments.optim import Optimiser, state_by_name
from xattn.experiments.record import read_json, say, write_json
from xattn.experiments.watch import Watch

FOLDER = "checkpoints"
_SHARDS, _FLAGS = "shards", "flags.json"
# Every writer reports a full disk in its own way.
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)


@dataclass(kw_only=True)
class Progress:
    """How far a run is. `seen`: digest of the tokens trained on; `seconds`: time spent in training steps."""

    step: int = 0
    seen: str = ""
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    watch: dict[str, Any] = field(default_factory=lambda: Watch().state())


class Loaded(NamedTuple):
    """What a checkpoint holds, in whole tensors. `optimiser`: as `state_by_name`; `ema`: as `ema_state`, None without one."""

    model: Any
    optimiser: dict[str, dict[str, torch.Tensor]]
    progress: Progress
    ema: dict[str, torch.Tensor] | None


def save_checkpoint(
    run_dir: Path,
    model: Any,
    optimiser: Optimiser,
    progress: Progress,
    *,
    keep: int,
    ema: dict[str, torch.Tensor] | None = None,
    ranks: Ranks | None = None,
) -> bool:
    """Write the checkpoint of `progress.step` and drop all but the newest `keep`. All ranks call this together.

    Returns: whether it was written; a full disk is a warning, and the older checkpoints stay.
    """
    ranks = ranks or Ranks()
    folder = run_dir / FOLDER
    final, temporary = folder / f"step-{progress.step:08d}", folder / f".step-{progress.step:08d}.tmp"
    if not ranks.agree(not final.exists()):
        return True

    def begin() -> None:
        if ranks.first:
            # What a killed writer left.
            for left in folder.glob(".step-*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write() -> None:
        if ranks.strategy != "none":
            tensors = _flat(model, optimiser, ema)
            save_shards(tensors, storage_writer=FileSystemWriter(temporary / _SHARDS))
            return
        xattn.save(model, temporary / "model")
        torch.save(state_by_name(model, optimiser), temporary / "optimiser.pt")
        if ema is not None:
            torch.save(ema, temporary / "ema.pt")

    def publish() -> None:
        if ranks.first:
            if ranks.strategy != "none":
                write_json(temporary / _FLAGS, xattn.to_flags(model.spec))
            write_json(temporary / "state.json", asdict(progress))
            _sync(temporary)
            os.replace(temporary, final)

    error = _in_turn(ranks, begin, write, publish)
    if error is not None:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
            say(f"warning: the checkpoint of step {progress.step} could not be written ({error}); older ones are kept")
        return False
    if ranks.first:
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return True


def _in_turn(ranks: Ranks, *parts: Callable[[], None]) -> BaseException | str | None:
    """Call each part once all ranks are through the one before it. Returns the error that ended this, if one did."""
    for part in parts:
        error: BaseException | str | None = None
        try:
            part()
        except _WRITE_ERRORS as caught:
            error = caught
        if not ranks.agree(error is None):
            return error or "another rank failed"
    return None


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none."""
    complete = _complete(run_dir / FOLDER)
    return complete[-1] if complete else None


def load_checkpoint(path: Path, *, attn_backend: str) -> Loaded:
    """Everything in a checkpoint, in whole tensors on the CPU. No pickled code is ever run."""
    progress = Progress(**read_json(path / "state.json"))
    if (path / _SHARDS).is_dir():
        return _load_shards(path, progress, attn_backend=attn_backend)
    ema = path / "ema.pt"
    return Loaded(
        model=xattn.load(path / "model", attn_backend=attn_backend),
        optimiser=_tensors(path / "optimiser.pt"),
        progress=progress,
        ema=_tensors(ema) if ema.exists() else None,
    )


def _tensors(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


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


# Shards: one flat mapping "model.NAME", "optimiser.NAME.KEY", "ema.NAME" of tensors and nothing else.


def _flat(model: Any, optimiser: Optimiser, ema: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    flat = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, values in state_by_name(model, optimiser).items():
        flat |= {f"optimiser.{name}.{key}": value for key, value in values.items()}
    return flat | {f"ema.{name}": value for name, value in (ema or {}).items()}


def _load_shards(path: Path, progress: Progress, *, attn_backend: str) -> Loaded:
    reader = _Reader(path / _SHARDS)
    try:
        known = reader.read_metadata().state_dict_metadata
        if not all(isinstance(entry, TensorStorageMetadata) for entry in known.values()):
            raise xattn.CheckpointError(f"{path / _SHARDS} holds more than tensors; no run of xattn wrote it")
        flat = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in known.items()}
        with warnings.catch_warnings():
            # It says that it loads in one process, which is what no_dist asks for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load_shards(flat, storage_reader=reader, no_dist=True)
    except (OSError, pickle.UnpicklingError, CheckpointException) as error:
        raise xattn.CheckpointError(f"{path / _SHARDS} is not a readable checkpoint: {error}") from None
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimiser": {}, "ema": {}}
    for name, value in flat.items():
        part, _, rest = name.partition(".")
        if part == "optimiser":
            parameter, _, key = rest.rpartition(".")
            parts[part].setdefault(parameter, {})[key] = value
        else:
            parts[part][rest] = value
    spec = xattn.parse(json.loads((path / _FLAGS).read_text(encoding="utf-8")))
    model = xattn.TransformerWrapper.from_spec(spec, attn_backend=attn_backend)
    model.load_state_dict(parts["model"])
    return Loaded(model=model, optimiser=parts["optimiser"], progress=progress, ema=parts["ema"] or None)


class _Unpickler(pickle.Unpickler):
    """torch.distributed.checkpoint pickles its table of contents: only the classes of that table may be named in it."""

    _ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        **dict.fromkeys(("pathlib", "pathlib._local"), {"PosixPath", "WindowsPath"}),
        "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "strided"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of contents holds")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """The stock reader, except that reading the table of contents runs no code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata
