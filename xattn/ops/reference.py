"""THE definition of attention: the five stages in order, readable, differentiable, in any precision; nothing else defines it."""

import torch
from einops import einsum
from torch import Tensor
from torch.nn.functional import dropout

from xattn.ops.layout import Layout
from xattn.spec.model import AttentionSpec


def reference(
    q_bhid: Tensor,
    k_bgjd: Tensor,
    v_bgjd: Tensor,
    *,
    spec: AttentionSpec,
    layout_i: Layout,
    layout_j: Layout,
    sink_logits_h: Tensor | None = None,
    dropout_p: float = 0.0,
    carry_bj: Tensor | None = None,
    carry_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries (b h i d) over keys and values (b g j d), as the spec says; memory b h i j.

    positions -> score -> pattern -> selection -> normaliser, in float32 or better whatever the inputs' dtype.

    Args:
        layout_i, layout_j: where queries and keys stand.
        sink_logits_h: the learned sink of each head, for a spec with sink_logits.
        carry_bj: votes that earlier queries cast against each key (attn_selective).
        carry_rows: return the votes after each of that many last queries, so that some can be taken back.
    Returns:
        out (b h i d) in v's dtype, and the carry (b j) for later queries, or (b u j) for u carry_rows (None without
        attn_selective).
    """
    pos_bi, pos_bj = layout_i.pos_bn, layout_j.pos_bn
    groups = spec.heads // spec.kv_heads
    k_bhjd, v_bhjd = (x.repeat_interleave(groups, dim=1) for x in (k_bgjd, v_bgjd))

    sim_bhij = spec.scale * spec.positions.logits(q_bhid, k_bhjd, pos_bi, pos_bj)
    sim_bhij = sim_bhij.to(torch.promote_types(sim_bhij.dtype, torch.float32))
    distance_bij = spec.positions.distance(pos_bi, pos_bj)
    for part in spec.score:
        sim_bhij = part.modify(sim_bhij, distance_bij)
    allowed_bij = spec.pattern.allowed(pos_bi, pos_bj, layout_i.doc_bn, layout_j.doc_bn)
    if spec.selection is not None:
        penalty_bij, after_bij = spec.selection.penalty(
            sim_bhij, allowed_bij, pos_bi, pos_bj, carry_bj, layout_i.order_bn
        )
        carry_bj = after_bij[:, -1] if carry_rows is None else after_bij[:, -carry_rows:]
        sim_bhij = sim_bhij - penalty_bij[:, None]
        if spec.selection.selection_skip is not None:
            threshold = spec.selection.threshold(spec.reach(q_bhid, k_bgjd), layout_j.n)
            allowed_bij = allowed_bij & (penalty_bij < threshold)
    attn_bhij = spec.normaliser.weights(sim_bhij, allowed_bij, sink_logits_h)

    attn_bhij = dropout(attn_bhij, p=dropout_p, training=dropout_p > 0).to(v_bhjd.dtype)
    return einsum(attn_bhij, v_bhjd, "b h i j, b h j d -> b h i d"), carry_bj
