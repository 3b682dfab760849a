"""Normaliser: logits to weights. A query that sees nothing gets weights of zero."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xattn.spec.part import Flag, Part, part


@dataclass(frozen=True, kw_only=True)
class Softmax(Part):
    """softmax over the allowed keys."""

    family: ClassVar[str] = "normaliser"
    switch: ClassVar[Flag | None] = None

    def weights(self, sim_bhij: Tensor, allowed_bij: Tensor, sink_logits_h: Tensor | None = None) -> Tensor:
        """Attention weights (b h i j) from logits and the allowed pairs (b i j)."""
        seen_b1i1 = allowed_bij.any(dim=-1)[:, None, :, None]
        # a softmax over nothing is NaN, also in its gradient: such a row takes all keys, then counts for nothing
        sim = sim_bhij.masked_fill(~allowed_bij[:, None] & seen_b1i1, float("-inf"))
        return self.softmax(sim, sink_logits_h).masked_fill(~seen_b1i1, 0.0)

    def softmax(self, sim_bhij: Tensor, sink_logits_h: Tensor | None) -> Tensor:
        """The weights of rows that see something."""
        return sim_bhij.softmax(dim=-1)


@part(
    switch=Flag(
        name="sink_logits",
        type=bool,
        default=False,
        help="a learned logit a head joins the softmax without a value, so a head can attend to nothing",
        aliases=("attn_sink_logits", "attn_head_learned_sink"),
    )
)
class SinkSoftmax(Softmax):
    """softmax with one more column per head, the learned sink_logits (h,), whose weight is dropped.

    Source: gpt-oss, arXiv 2508.10925 §2.2; Miller, "Attention is off by one", with the logit fixed at 0.
    """

    def softmax(self, sim_bhij: Tensor, sink_logits_h: Tensor | None) -> Tensor:
        sink = sink_logits_h.to(sim_bhij.dtype)[None, :, None, None].expand(*sim_bhij.shape[:3], 1)
        return torch.cat([sim_bhij, sink], dim=-1).softmax(dim=-1)[..., :-1]
