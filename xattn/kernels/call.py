"""What a call is given, and what a kernel is told of it: its structure, which is compiled in, and its numbers, which are not.

Changing a number of `Numbers` never compiles anything anew; `Parts` is the one list of what is constexpr.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

LOG2E = 1.4426950408889634
INTERPRETED = triton.knobs.runtime.interpret
# forward and backward count how far apart heads lie in 32 bits
_REACH = 2**31


class Parts(NamedTuple):
    """Structure: one kernel is compiled for each value of this.

    extend: 0, or Self-Extend: 1 causal, 2 both ways. select: selective attention. skip: keys whose penalty has reached a
    threshold are dead, and blocks of them are not visited. band: selection's scratch holds a band beside the diagonal (a
    window), and the sinks where they are the first slots. stored: positions are read, else slot i holds token i. group: query
    heads that share a key head. exact: votes are summed in float32 throughout. even: lengths are multiples of 128, so no tile
    is ragged. deep: edges are many and simple (windows, zones, where slot i holds token i), so they are pipelined. warps: of the
    launch. pair: query heads that one program of the dQ kernel takes (they share F); slices: of dS, one a pair.
    """

    causal: bool
    window: bool
    sinks: bool
    stored: bool
    docs: bool
    softcap: bool
    alibi: bool
    extend: int
    select: bool
    skip: bool
    band: bool
    sink_logits: bool
    group: int
    d: int
    block_d: int
    exact: bool
    even: bool
    deep: bool
    block_i: int = 64
    block_j: int = 64
    warps: int = 4
    pair: int = 1
    slices: int = 1


class Numbers(NamedTuple):
    """Sizes in slots and scalars in units of log2; `first`, `blocks`, `width`, `front` describe the scratch (see scratch.py)."""

    batch: int
    heads: int
    n_i: int
    n_j: int
    window: int
    sinks: int
    near: int
    group: int
    scale: float
    cap: float
    first: int = 0
    blocks: int = 0
    width: int = 0
    front: int = 0


@dataclass(kw_only=True)
class Inputs:
    """The tensors of a call; those that its parts do not need are None.

    q (b h i d), k, v (b g j d), rotated; far_q, ahead_q, far_k: rotated to Self-Extend's grouped positions. sink (h),
    slopes (h) float32. dead (1) float32: the penalty, in log2, at which a key is dead. pos, doc (b n) int32 with walks from
    `walk.table`, all or none; b may be 1 in them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    far_q: Tensor | None = None
    ahead_q: Tensor | None = None
    far_k: Tensor | None = None
    sink: Tensor | None = None
    slopes: Tensor | None = None
    dead: Tensor | None = None
    pos_i: Tensor | None = None
    pos_j: Tensor | None = None
    doc_i: Tensor | None = None
    doc_j: Tensor | None = None
    walk_i: Tensor | None = None
    walk_j: Tensor | None = None

    def ready(self, *, reach: int = _REACH) -> "Inputs":
        """The same with last axes contiguous, heads within `reach` numbers, and copies that stride like their originals."""
        q, k, v = (laid_out(x, reach) for x in (self.q, self.k, self.v))
        far_q, ahead_q, far_k = self.far_q, self.ahead_q, self.far_k
        if any(x is not None and x.stride() != q.stride() for x in (far_q, ahead_q)):
            q, far_q, ahead_q = (None if x is None else _compact(x) for x in (q, far_q, ahead_q))
        if far_k is not None and far_k.stride() != k.stride():
            k, far_k = _compact(k), _compact(far_k)
        if q is self.q and k is self.k and v is self.v:
            return self
        return replace(self, q=q, k=k, v=v, far_q=far_q, ahead_q=ahead_q, far_k=far_k)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The numbers of a call: 0 (or sim_head -1) where a part is absent. cap and scale are natural, not log2."""

    causal: bool
    window: int
    sinks: int
    cap: float
    near: int
    group: int
    sim_head: int
    scale: float
    scratch_bytes: int


def parts_of(x: Inputs, o: Options) -> Parts:
    d, select = x.q.shape[-1], o.sim_head >= 0
    return Parts(
        causal=o.causal, window=o.window > 0, sinks=o.sinks > 0, stored=x.pos_i is not None, docs=x.doc_i is not None,
        softcap=o.cap > 0, alibi=x.slopes is not None, extend=0 if o.near == 0 else 1 if o.causal else 2,
        select=select, skip=x.dead is not None, band=select and o.window > 0 and (o.sinks == 0 or x.pos_i is None),
        sink_logits=x.sink is not None, group=x.q.shape[1] // x.k.shape[1], d=d, block_d=max(16, triton.next_power_of_2(d)),
        exact=x.q.dtype == torch.float32 or INTERPRETED, even=x.q.shape[2] % 128 == 0 and x.k.shape[2] % 128 == 0,
        deep=(o.window > 0 or o.near > 0 and o.causal) and x.pos_i is None and not select,
    )  # fmt: skip


def numbers_of(x: Inputs, o: Options) -> Numbers:
    n_i, n_j = x.q.shape[2], x.k.shape[2]
    window = min(o.window, max(n_i, n_j)) if x.pos_i is None else o.window
    blocks = -(-n_i // 128) * 2
    width = min(-(-(window - 1) // 64) + 1, blocks) if o.window else 0
    # in pairs, so that a tile of 128 keys lies in front or in the band
    front = min(-(-o.sinks // 128) * 2, blocks)
    return Numbers(
        batch=x.q.shape[0], heads=x.q.shape[1], n_i=n_i, n_j=n_j, window=window, sinks=o.sinks, near=o.near,
        group=max(o.group, 1), scale=o.scale * LOG2E, cap=o.cap * LOG2E, blocks=blocks, width=width, front=front,
    )  # fmt: skip


def heads_last(b: int, h: int, n: int, d: int, like: Tensor) -> Tensor:
    """(b h n d) stored as b n h d, so that merging heads copies nothing."""
    return torch.empty(b, n, h, d, device=like.device, dtype=like.dtype).transpose(1, 2)


def _compact(x_bhnd: Tensor) -> Tensor:
    """A copy stored as b n h d."""
    return heads_last(*x_bhnd.shape, x_bhnd).copy_(x_bhnd)


def laid_out(x_bhnd: Tensor, reach: int = _REACH) -> Tensor:
    """The tensor where its last axis is contiguous and its heads lie within `reach` numbers; else a copy for which that holds."""
    return x_bhnd if x_bhnd.stride(-1) == 1 and x_bhnd.stride(1) * x_bhnd.shape[1] < reach else _compact(x_bhnd)
