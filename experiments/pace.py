"""How fast a run is: tokens a second, the share of the device's peak that it uses, and the seconds left."""

import statistics
from dataclasses import dataclass, field
from typing import Any

import torch

import xattn
from xattn.experiments.device import peak_flops
from xattn.experiments.schema import TrainerConfig

# The first steps pay for allocation and warm-up; they count as training time but not towards tokens a second.
_WARMUP_STEPS = 3


@dataclass(kw_only=True)
class Pace:
    """`seconds`: of each step of this process. `before`: tokens a second in an earlier part of a resumed run."""

    trainer: TrainerConfig
    spec: Any
    device: torch.device
    precision: str
    before: float
    seconds: list[float] = field(default_factory=list)

    def tokens_per_second(self) -> float:
        """Tokens of a step over the median step time, warm-up left out: steady although other programs come and go."""
        settled = self.seconds[_WARMUP_STEPS:] or self.seconds[-1:]
        return self.trainer.tokens_per_step / statistics.median(settled) if settled else self.before

    def mfu(self) -> float | None:
        """Model FLOPs a second as a share of what the devices could do; recomputed activations do not count."""
        peak = peak_flops(self.device, self.precision)
        if peak is None:
            return None
        a_token = xattn.accounting.train_flops(self.spec, self.trainer.seq_len) / self.trainer.seq_len
        return a_token * self.tokens_per_second() / (peak * self.trainer.processes)

    def left(self, steps: int) -> float:
        """Seconds that so many further steps will take."""
        return steps * statistics.median(self.seconds)
