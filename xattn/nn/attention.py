"""The attention module: projections and learned extras around `attend`."""

import torch
from einops import rearrange
from torch import Tensor, nn

from xattn.nn.norm import norm
from xattn.ops.attention import attend
from xattn.ops.backends import choose
from xattn.ops.layout import Layout
from xattn.spec.model import AttentionSpec


class Attention(nn.Module):
    """Self-attention of width dim as the spec says; bias-free projections.

    Args:
        spec: the layer's attention. dim: width of the model. qk_rmsnorm: normalise each query and key head.
        attn_backend: "auto" or a back-end's name; one that cannot serve the spec raises UnsupportedFeature here.
    """

    def __init__(self, spec: AttentionSpec, *, dim: int, qk_rmsnorm: bool = False, attn_backend: str = "auto") -> None:
        super().__init__()
        choose(spec, attn_backend)
        self.spec, self.attn_backend = spec, attn_backend
        self.to_q = nn.Linear(dim, spec.heads * spec.dim_head, bias=False)
        self.to_k = nn.Linear(dim, spec.kv_heads * spec.dim_head, bias=False)
        self.to_v = nn.Linear(dim, spec.kv_heads * spec.dim_head, bias=False)
        self.to_out = nn.Linear(spec.heads * spec.dim_head, dim, bias=False)
        self.q_norm = norm(spec.dim_head, rms=True) if qk_rmsnorm else nn.Identity()
        self.k_norm = norm(spec.dim_head, rms=True) if qk_rmsnorm else nn.Identity()
        self.sink_logits = nn.Parameter(torch.zeros(spec.heads)) if spec.sink_logits else None

    def forward(self, x_bnm: Tensor, layout: Layout) -> Tensor:
        """(b n m) -> (b n m); layout says where each slot stands."""
        d = self.spec.dim_head
        q_bhid, k_bgjd, v_bgjd = (
            rearrange(to(x_bnm), "b n (h d) -> b h n d", d=d) for to in (self.to_q, self.to_k, self.to_v)
        )
        # a norm may leave autocast's dtype, and attention takes one dtype
        q_bhid, k_bgjd = self.q_norm(q_bhid).to(v_bgjd.dtype), self.k_norm(k_bgjd).to(v_bgjd.dtype)
        out_bhid = attend(
            q_bhid, k_bgjd, v_bgjd, spec=self.spec, layout=layout, sink_logits_h=self.sink_logits,
            training=self.training, backend=self.attn_backend,
        )  # fmt: skip
        return self.to_out(rearrange(out_bhid, "b h i d -> b i (h d)"))
