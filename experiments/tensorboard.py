"""The TensorBoard mirror: event files in RUN_DIR/tensorboard, to look at with `tensorboard --logdir runs`."""

import json
from pathlib import Path
from typing import Any

from xattn.experiments.record import read_metrics

FOLDER = "tensorboard"


class TensorBoard:
    """One run's event files: every number of a row as a scalar at its step, the config as text and hyperparameters."""

    def __init__(self, run_dir: Path, *, name: str, job_type: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        rows = read_metrics(run_dir)
        # Of a resumed run the record keeps the rows up to its checkpoint: TensorBoard is told to forget later ones too.
        self._step = rows[-1]["step"] if rows else 0
        self._writer = SummaryWriter(run_dir / FOLDER, purge_step=self._step + 1 if rows else None)
        self._writer.add_text("config", "    " + json.dumps(config, indent=4, default=str).replace("\n", "\n    "))
        described = {"name": name, "job_type": job_type} | _flat(config)
        for summary in hparams(described, {"final/loss_nats": None, "final/bpb": None}):
            self._writer.file_writer.add_summary(summary)

    def log(self, row: dict[str, Any]) -> None:
        self._step = row.get("step", self._step)
        self._scalars({key: value for key, value in row.items() if key not in ("step", "tokens")})

    def summary(self, values: dict[str, Any]) -> None:
        self._scalars(values)

    def preempting(self) -> None:
        self._writer.flush()

    def finish(self, *, failed: bool) -> None:
        self._writer.close()

    def _scalars(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, self._step)
        # The default keeps two minutes of rows in memory: all of a short run is lost at a kill.
        self._writer.flush()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`group.field` -> a value that the HParams page can show."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
    return flat
