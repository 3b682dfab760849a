"""The attention module: projections and learned extras around `attend`, with a cache or without."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear

from xattn.cache.layer import LayerCache
from xattn.cache.static import StaticLayer
from xattn.nn.norm import norm
from xattn.ops.attention import attend
from xattn.ops.backends import choose
from xattn.ops.layout import Layout
from xattn.ops.memory import live_keys
from xattn.ops.rotary import turned
from xattn.spec.model import EVER, AttentionSpec


class Attention(nn.Module):
    """Self-attention of width dim as the spec says; bias-free projections.

    Args:
        spec: the layer's attention. dim: width of the model. qk_rmsnorm: normalise each query and key head.
        attn_backend: "auto" or a back-end's name; one that cannot serve the spec raises UnsupportedFeature here.
    """

    def __init__(self, spec: AttentionSpec, *, dim: int, qk_rmsnorm: bool = False, attn_backend: str = "auto") -> None:
        super().__init__()
        choose(spec.settled(EVER), attn_backend)
        self.spec, self.attn_backend = spec, attn_backend
        # compiled code cannot make a spec, and can read one that the module holds
        self._settled_specs = tuple((n, spec.settled(n)) for n in spec.positions.limits()) if spec.unsettled else ()
        self.to_q = nn.Linear(dim, spec.heads * spec.dim_head, bias=False)
        self.to_k = nn.Linear(dim, spec.kv_heads * spec.dim_head, bias=False)
        self.to_v = nn.Linear(dim, spec.kv_heads * spec.dim_head, bias=False)
        self.to_out = nn.Linear(spec.heads * spec.dim_head, dim, bias=False)
        self.q_norm = norm(spec.dim_head, rms=True) if qk_rmsnorm else nn.Identity()
        self.k_norm = norm(spec.dim_head, rms=True) if qk_rmsnorm else nn.Identity()
        self.sink_logits = nn.Parameter(torch.zeros(spec.heads)) if spec.sink_logits else None

    def forward(
        self, x_bnm: Tensor, layout: Layout, cache: LayerCache | StaticLayer | None = None, *, max_len: int | None = None
    ) -> Tensor:
        """(b n m) -> (b n m); layout says where each slot stands, cache holds the tokens before them.

        max_len: tokens that the sequence will have in all, for self_extend_group=auto (default: the slots given); a cache
        knows its own.
        """
        d = self.spec.dim_head
        q_bhid, k_bgjd, v_bgjd = (
            rearrange(to(x_bnm), "b n (h d) -> b h n d", d=d) for to in (self.to_q, self.to_k, self.to_v)
        )
        # a norm may leave autocast's dtype, and attention takes one dtype
        q_bhid, k_bgjd = self.q_norm(q_bhid).to(v_bgjd.dtype), self.k_norm(k_bgjd).to(v_bgjd.dtype)
        if cache is None:
            spec = self._settled(layout, max_len)
            out_bhid = attend(q_bhid, k_bgjd, v_bgjd, spec=spec, layout=layout, **self._extras())
        else:
            out_bhid = self._go_on(q_bhid, k_bgjd, v_bgjd, layout, cache)
        return self.to_out(rearrange(out_bhid, "b h i d -> b i (h d)"))

    def _settled(self, layout: Layout, max_len: int | None) -> AttentionSpec:
        if not self.spec.unsettled:
            return self.spec
        n = layout.n if max_len is None else max_len
        for limit, spec in self._settled_specs:
            if n <= limit:
                return spec
        raise AssertionError(f"no group for {n} tokens")

    def live_keys(self, x_bnm: Tensor, layout: Layout, *, max_len: int | None = None) -> Tensor:
        """The most keys that any query of a row needs (b,), by the votes of the selecting head; see `xattn.ops.memory`."""
        spec, head = self._settled(layout, max_len), self.spec.selection.sim_head
        group = head * spec.kv_heads // spec.heads
        q_bid, k_bjd = (
            linear(x_bnm, rearrange(to.weight, "(h d) m -> h d m", d=spec.dim_head)[at])
            for to, at in ((self.to_q, head), (self.to_k, group))
        )
        dtype = k_bjd.dtype
        return live_keys(self.q_norm(q_bid).to(dtype), self.k_norm(k_bjd).to(dtype), spec=spec, layout=layout)

    def _extras(self) -> dict[str, Any]:
        return {"sink_logits_h": self.sink_logits, "training": self.training, "backend": self.attn_backend}

    def _go_on(self, q_bhid: Tensor, k_bgid: Tensor, v_bgid: Tensor, layout: Layout, cache: LayerCache | StaticLayer) -> Tensor:
        """Attends to what the cache holds and to the call's own keys, and leaves those in the cache."""
        spec = cache.spec
        if cache.turned_spec is not None:
            # a key is turned once, on entering, never again
            q_bhid, k_bgid = (turned(x, spec.positions, layout) for x in (q_bhid, k_bgid))
            q_bhid, spec = q_bhid * spec.positions.temperature, cache.turned_spec
        view = cache.extend(k_bgid, v_bgid)
        more = {} if view.carry_bj is None else {"carry_bj": view.carry_bj, "carry_rows": cache.carry_rows}
        out = attend(
            q_bhid, view.k_bgjd, view.v_bgjd, spec=spec, layout=layout, key_layout=view.layout, **more, **self._extras()
        )
        out_bhid, votes_buj = out if more else (out, None)
        cache.retain(votes_buj)
        return out_bhid
