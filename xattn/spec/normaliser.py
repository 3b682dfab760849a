"""Normaliser: logits to weights. A query that sees nothing gets weights of zero."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from xattn.spec.part import Flag, Part, part


@dataclass(frozen=True, kw_only=True)
class Softmax(Part):
    """softmax over the allowed keys."""

    family: ClassVar[str] = "normaliser"

    def weights(self, sim_bhij: Tensor, allowed_bij: Tensor, sink_logits_h: Tensor | None = None) -> Tensor:
        """Attention weights (b h i j) from logits and the allowed pairs (b i j)."""
        sim = sim_bhij.masked_fill(~allowed_bij[:, None], float("-inf"))
        pivot = sim.detach().amax(dim=-1, keepdim=True)
        if sink_logits_h is not None:
            sink = sink_logits_h.to(sim.dtype)[:, None, None]
            pivot = pivot.maximum(sink.detach())
        # a row without keys has a pivot of -inf, and -inf - -inf is NaN
        pivot = pivot.masked_fill(pivot == float("-inf"), 0.0)
        weight = (sim - pivot).exp()
        total = weight.sum(dim=-1, keepdim=True)
        if sink_logits_h is not None:
            total = total + (sink - pivot).exp()
        return weight / total.masked_fill(total == 0, 1.0)


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
