"""What is watched while a run trains: loss spikes and gradient norms, in numbers that a checkpoint carries on."""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

_WINDOW, _ENOUGH = 64, 16
# A median deviation is this much smaller than a normal standard deviation.
_MAD_TO_SIGMA = 1.4826
# A curve that hardly moves would make every wiggle a spike: a deviation counts as at least this share of the median.
_LEAST_DEVIATION = 0.01
_STEPS_KEPT = 20


@dataclass(kw_only=True)
class Watch:
    """`recent`: the last losses; `spikes`: how many, `spike_steps`: the first of them; gradient norms before clipping."""

    recent: list[float] = field(default_factory=list)
    spikes: int = 0
    spike_steps: list[int] = field(default_factory=list)
    grad_norm_max: float = 0.0
    grad_norm_max_step: int = 0
    clipped_steps: int = 0

    def see(self, loss: float, grad_norm: float, *, step: int, deviations: float, grad_clip: float | None) -> str | None:
        """Take in one step. Returns: a line to say for the first spike, else None.

        A spike is a loss more than `deviations` robust standard deviations above the median of the last 64 losses.
        """
        if grad_norm > self.grad_norm_max:
            self.grad_norm_max, self.grad_norm_max_step = grad_norm, step
        self.clipped_steps += grad_clip is not None and grad_norm > grad_clip
        median = statistics.median(self.recent) if len(self.recent) >= _ENOUGH else None
        said = None
        if median is not None and loss > median + deviations * self._deviation(median):
            self.spikes += 1
            self.spike_steps = [*self.spike_steps, step][:_STEPS_KEPT]
            if self.spikes == 1:
                said = f"warning: the loss spiked to {loss:.3f} at step {step} (median {median:.3f}); further spikes are counted"
        self.recent = [*self.recent, loss][-_WINDOW:]
        return said

    def _deviation(self, median: float) -> float:
        mad = statistics.median(abs(loss - median) for loss in self.recent)
        return max(_MAD_TO_SIGMA * mad, _LEAST_DEVIATION * abs(median))

    def result(self) -> dict[str, Any]:
        """The part of result.json that this makes."""
        return {
            "loss_spikes": {"count": self.spikes, "first_steps": self.spike_steps},
            "grad_norm": {"max": self.grad_norm_max, "max_step": self.grad_norm_max_step, "clipped_steps": self.clipped_steps},
        }

    def state(self) -> dict[str, Any]:
        return asdict(self)
