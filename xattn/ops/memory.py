"""How many keys selective attention still needs: what the memory loss makes smaller, so that pruning costs less."""

import torch
from torch import Tensor

from xattn.ops.layout import Layout
from xattn.spec.model import AttentionSpec

# votes from which a key counts as gone: tau of the paper
GONE = 1.0


def live_keys(q_bid: Tensor, k_bjd: Tensor, *, spec: AttentionSpec, layout: Layout) -> Tensor:
    """The most keys that any query of a row needs besides its own, softly counted, (b,):

        M_b = max over i of M_i,   M_i = sum over j in sight of i, j != i, of 1 - min(F_ij, tau) / tau,   tau = 1

    Without a window this is i - sum_j min(F_ij, tau) / tau. Differentiable; memory b n n, of the selecting head alone (of
    all heads with a soft cap or ALiBi, which know heads by their number).

    Args:
        q_bid, k_bjd: queries of the selecting head, and its keys, not rotated.
    Source: Leviathan et al., arXiv 2410.02703, "memory loss".
    """
    pos_bn = layout.pos_bn
    sim = spec.scale * spec.positions.logits(q_bid[:, None], k_bjd[:, None], pos_bn, pos_bn)
    sim = sim.to(torch.promote_types(sim.dtype, torch.float32))
    if spec.score:
        distance_bij = spec.positions.distance(pos_bn, pos_bn)
        for part in spec.score:
            sim = part.modify(sim.expand(-1, spec.heads, -1, -1), distance_bij)
    else:
        sim = sim.expand(-1, spec.heads, -1, -1)
    allowed_bij = spec.pattern.allowed(pos_bn, pos_bn, layout.doc_bn, layout.doc_bn)
    votes_bij, _ = spec.selection.penalty(sim, allowed_bij, pos_bn, pos_bn, order_bi=layout.order_bn)
    own_bij = pos_bn[:, :, None] == pos_bn[:, None, :]
    alive_bij = torch.where(allowed_bij & ~own_bij, 1 - votes_bij.clamp(max=GONE) / GONE, 0.0)
    return alive_bij.sum(dim=-1).amax(dim=-1)
