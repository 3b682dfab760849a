"""Score: what happens to a logit before anything is masked. The parts of a layer apply in the order of this file."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from xattn.spec.part import Flag, Part, flag, part, require


class Score(Part):
    """A change of logits that knows only the logits and how far apart the pair is."""

    family: ClassVar[str] = "score"

    def modify(self, sim_bhij: Tensor, distance_bij: Tensor) -> Tensor:
        """The changed logits (b h i j); distance (b i j) is as the positions family counts it."""
        raise NotImplementedError


@part(switch="logit_softcap")
class Softcap(Score):
    """c * tanh(sim / c): no logit leaves (-c, c). Source: Gemma 2, arXiv 2408.00118 §2."""

    logit_softcap: float | None = flag(
        float, None, "soft cap on the logits: c * tanh(sim / c)", aliases=("attn_logit_softcap", "attn_softcap")
    )

    def __post_init__(self) -> None:
        cap = self.logit_softcap
        require(cap is not None and 0 < cap < math.inf, f"logit_softcap={cap} must be finite and above 0; 50 is usual")

    def modify(self, sim_bhij: Tensor, distance_bij: Tensor) -> Tensor:
        return self.logit_softcap * torch.tanh(sim_bhij / self.logit_softcap)


@part(switch=Flag(name="alibi_pos_bias", type=bool, default=False, help="ALiBi: a linear penalty on distance, by head"))
class Alibi(Score):
    """sim - slope_h * |distance|, added after the soft cap so that a cap cannot flatten it.

    Source: arXiv 2108.12409 §3. Order as in flash-attention 2. With Self-Extend the distance is the grouped one.
    """

    @staticmethod
    def slopes(heads: int, device: torch.device | None = None) -> Tensor:
        """The fixed slopes (heads,), float64: 2^(-8 (h + 1) / heads), interleaved when heads is no power of two."""
        lower = 2 ** (heads.bit_length() - 1)
        # counted on the device: a list of numbers would have to travel there, which a CUDA graph cannot hold
        head = torch.arange(lower, dtype=torch.float64, device=device)
        return 2.0 ** -(8 * torch.cat([head + 1, head[: heads - lower] + 0.5]) / lower)

    def modify(self, sim_bhij: Tensor, distance_bij: Tensor) -> Tensor:
        slopes_h11 = self.slopes(sim_bhij.shape[1], sim_bhij.device)[:, None, None].to(sim_bhij.dtype)
        return sim_bhij - slopes_h11 * distance_bij[:, None].abs().to(sim_bhij.dtype)
