"""Rotary turns that share their tables over the layers of a forward pass."""

from torch import Tensor

from xattn.ops.layout import Layout
from xattn.spec.positions import Rope


def turned(x_bhnd: Tensor, rope: Rope, layout: Layout) -> Tensor:
    """x (b h n d) rotated to the layout's positions, stored as b n h d."""
    dim_head, dtype = x_bhnd.shape[-1], x_bhnd.dtype
    cos, sin = layout.memo(("rope", rope, dim_head, dtype), lambda: rope.table(layout.pos_bn, dim_head, dtype))
    # turned in the projection's own b n h d order: torch's kernels then answer in it, and merging heads copies nothing
    x_bnhd = rope.rotate(x_bhnd.transpose(1, 2), (cos.transpose(1, 2), sin.transpose(1, 2)))
    return x_bnhd.transpose(1, 2)
