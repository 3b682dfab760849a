"""Which tiles a program visits: loop bounds from the pattern; tiles that nobody sees cost nothing, and only edges pay for masks.

A walk is eight slots, each but the last of a pair a multiple of the tile that is stepped by:

    front_lo front_hi   sink tokens before lo            an edge
    lo       in_lo      the near edge of what is seen    an edge
    in_lo    mid_lo     every pair attends               inside, first zone (walking keys: far; walking queries: near)
    mid_lo   mid_hi     where Self-Extend's zones meet   an edge (empty without it)
    mid_hi   in_hi      every pair attends               inside, second zone
    in_hi    hi         the far edge (the diagonal)      an edge

Edges are masked and compute both zones; one loop visits all of them (`edges`, `edge`), whatever their order.

For tokens 0 .. n - 1 of one document the bounds are arithmetic; for any other layout they come from a table with one row
for each GRAIN slots, made by `table` from the smallest and largest position and document of each block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xattn.kernels.stages import FAR

GRAIN = 64
# rows of the table beyond the last block, so that the largest tile may read past the end
_SPARE = 4


@triton.jit
def task(heads, n):
    """Which head, block and row of the batch a program takes: (head, block, row).

    Heads go fastest, for they share F in the L2 cache; rows slowest, so that the programs that run at a time read few of them:
    with more keys and values than the cache holds, each would come from memory again for every block of queries.
    """
    at = tl.program_id(0) // heads
    blocks = tl.num_programs(0) // (heads * n.batch)
    return tl.program_id(0) % heads, at % blocks, (at // blocks).to(tl.int64)


@triton.jit
def _up(x, step):
    return (x + step - 1) // step * step


@triton.jit
def _ordered(walk, STEP: tl.constexpr, P: tl.constexpr):
    """The walk with its slots in order, whatever came in."""
    front_lo, front_hi, lo, in_lo, mid_lo, mid_hi, in_hi, hi = walk
    end = _up(hi, STEP)
    lo = tl.minimum(lo, end)
    front_hi = tl.minimum(front_hi, lo)
    in_lo = tl.minimum(tl.maximum(in_lo, lo), end)
    in_hi = tl.maximum(tl.minimum(in_hi, end), in_lo)
    if P.extend == 1:
        mid_lo = tl.minimum(tl.maximum(mid_lo, in_lo), in_hi)
        mid_hi = tl.minimum(tl.maximum(mid_hi, mid_lo), in_hi)
    else:
        mid_lo = in_hi
        mid_hi = in_hi
    if P.extend == 2:
        # both ways there is a third zone: every tile is treated as an edge
        in_lo = end
        mid_lo = end
        mid_hi = end
        in_hi = end
    return front_lo, front_hi, lo, in_lo, mid_lo, mid_hi, in_hi, hi


@triton.jit
def _stored(ptr, block, BLOCK: tl.constexpr, STEP: tl.constexpr, P: tl.constexpr):
    """The walk of BLOCK slots from the table's rows."""
    row = ptr + block * BLOCK // 64 * 8
    front_lo, front_hi = tl.load(row), tl.load(row + 1)
    lo, in_lo, mid_lo = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    mid_hi, in_hi, hi = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    for more in tl.static_range(1, BLOCK // 64):
        front_lo = tl.minimum(front_lo, tl.load(row + more * 8))
        front_hi = tl.maximum(front_hi, tl.load(row + more * 8 + 1))
        lo = tl.minimum(lo, tl.load(row + more * 8 + 2))
        in_lo = tl.maximum(in_lo, tl.load(row + more * 8 + 3))
        mid_lo = tl.minimum(mid_lo, tl.load(row + more * 8 + 4))
        mid_hi = tl.maximum(mid_hi, tl.load(row + more * 8 + 5))
        in_hi = tl.minimum(in_hi, tl.load(row + more * 8 + 6))
        hi = tl.maximum(hi, tl.load(row + more * 8 + 7))
    return (
        front_lo // STEP * STEP, front_hi, lo // STEP * STEP, _up(in_lo, STEP),
        mid_lo // STEP * STEP, _up(mid_hi, STEP), in_hi // STEP * STEP, hi,
    )  # fmt: skip


@triton.jit
def keys_of(block, ptr, at, n, P: tl.constexpr):
    """The keys that the queries of one block may see, as a walk in steps of block_j; zones: far, then near.

    at: where the walks of this row of the batch begin, if they are stored.
    """
    BI: tl.constexpr = P.block_i
    BJ: tl.constexpr = P.block_j
    if P.stored:
        walk = _stored(ptr + at, block, BI, BJ, P)
    else:
        i0 = block * BI
        lo, in_lo, front_hi, hi = 0, 0, 0, n.n_j
        in_hi = n.n_j // BJ * BJ
        if P.causal:
            hi = tl.minimum(i0 + BI, n.n_j)
            in_hi = tl.minimum(in_hi, (i0 + 1) // BJ * BJ)
        if P.window:
            lo = tl.maximum(i0 - n.window + 1, 0) // BJ * BJ
            in_lo = _up(tl.maximum(i0 + BI - n.window, 0), BJ)
            if not P.causal:
                hi = tl.minimum(i0 + BI - 1 + n.window, n.n_j)
                in_hi = tl.minimum(in_hi, (i0 + n.window) // BJ * BJ)
            if P.sinks:
                front_hi = tl.minimum(n.sinks, n.n_j)
                if not P.causal:
                    hi = tl.maximum(hi, front_hi)
        mid_lo = tl.maximum(i0 - n.near + 1, 0) // BJ * BJ
        mid_hi = _up(tl.maximum(i0 + BI - n.near, 0), BJ)
        walk = (0, front_hi, lo, in_lo, mid_lo, mid_hi, in_hi, hi)
    return _ordered(walk, BJ, P)


@triton.jit
def queries_of(block, ptr, at, n, P: tl.constexpr):
    """The queries that may see the keys of one block, as a walk in steps of block_i without a front; zones: near, then far."""
    BI: tl.constexpr = P.block_i
    BJ: tl.constexpr = P.block_j
    if P.stored:
        walk = _stored(ptr + at, block, BJ, BI, P)
    else:
        j0 = block * BJ
        lo, in_lo, hi = 0, 0, n.n_i
        in_hi = n.n_i // BI * BI
        if P.causal:
            lo = j0 // BI * BI
            in_lo = _up(j0 + BJ - 1, BI)
        if P.window:
            hi = tl.minimum(j0 + BJ - 1 + n.window, n.n_i)
            in_hi = tl.minimum(in_hi, (j0 + n.window) // BI * BI)
            if not P.causal:
                lo = tl.maximum(j0 - n.window + 1, 0) // BI * BI
                in_lo = _up(tl.maximum(j0 + BJ - n.window, 0), BI)
            if P.sinks:
                hi = tl.where(j0 < n.sinks, n.n_i, hi)
                if not P.causal:
                    lo = tl.where(j0 < n.sinks, 0, lo)
        mid_lo = (j0 + n.near) // BI * BI
        mid_hi = _up(j0 + BJ - 1 + n.near, BI)
        walk = (0, 0, lo, in_lo, mid_lo, mid_hi, in_hi, hi)
    return _ordered(walk, BI, P)


@triton.jit
def edges(walk, STEP: tl.constexpr, P: tl.constexpr):
    """How many tiles of a walk lie on an edge."""
    front_lo, front_hi, lo, in_lo, mid_lo, mid_hi, in_hi, hi = walk
    count = (in_lo - lo) // STEP + (tl.maximum(hi - in_hi, 0) + STEP - 1) // STEP
    if P.sinks:
        count += (tl.maximum(front_hi - front_lo, 0) + STEP - 1) // STEP
    if P.extend == 1:
        count += (mid_hi - mid_lo) // STEP
    return count


@triton.jit
def edge(step, walk, STEP: tl.constexpr, P: tl.constexpr):
    """The slot of a walk's edge tile number `step`."""
    front_lo, front_hi, lo, in_lo, mid_lo, mid_hi, in_hi, hi = walk
    rest = step - (in_lo - lo) // STEP
    at = tl.where(rest >= 0, in_hi + rest * STEP, lo + step * STEP)
    rest -= (tl.maximum(hi - in_hi, 0) + STEP - 1) // STEP
    if P.extend == 1:
        at = tl.where(rest >= 0, mid_lo + rest * STEP, at)
        rest -= (mid_hi - mid_lo) // STEP
    if P.sinks:
        at = tl.where(rest >= 0, front_lo + rest * STEP, at)
    return at


@triton.jit
def zone(walk, ZONE: tl.constexpr, P: tl.constexpr):
    """A walk over keys without the edges that lie wholly in the other of causal Self-Extend's zones.

    What lies before far keys is far, and what lies behind near ones near, but for stored positions, which may stand in any order.
    """
    front_lo, front_hi, lo, in_lo, mid_lo, mid_hi, in_hi, hi = walk
    if P.extend == 1 and not P.stored:
        if ZONE == FAR:
            hi = tl.where(mid_hi < in_hi, in_hi, hi)
        else:
            front_hi = tl.where(mid_lo > in_lo, front_lo, front_hi)
            lo = tl.where(mid_lo > in_lo, in_lo, lo)
    return front_lo, front_hi, lo, in_lo, mid_lo, mid_hi, in_hi, hi


@triton.jit
def clip(walk, end):
    """The walk up to `end`, a multiple of its step."""
    return (
        walk[0], walk[1], tl.minimum(walk[2], end), tl.minimum(walk[3], end), tl.minimum(walk[4], end), tl.minimum(walk[5], end),
        tl.minimum(walk[6], end), tl.minimum(walk[7], end),
    )  # fmt: skip


@triton.jit
def share(lo, hi, part, parts, STEP: tl.constexpr):
    """The part of a range of whole tiles that falls to one of several programs."""
    each = ((hi - lo) // STEP + parts - 1) // parts * STEP
    return lo + part * each, tl.minimum(lo + part * each + each, hi)


def table(
    pos_bi: Tensor,
    pos_bj: Tensor,
    doc_bi: Tensor | None,
    doc_bj: Tensor | None,
    *,
    causal: bool,
    window: int,
    sinks: int,
    near: int,
    ordered: bool,
) -> tuple[Tensor, Tensor]:
    """Walks for stored positions: (b blocks of queries 8) over keys, and (b blocks of keys 8) over queries, int32 slots.

    Args: positions (b n), -1 an empty slot, and documents; window, sinks, near: 0 for none; ordered: queries and keys sit
    alike, and later slots of a document hold later positions. b may be 1.
    """
    low_i, high_i, whole_i = _extent(pos_bi, pos_bi >= 0)
    low_j, high_j, whole_j = _extent(pos_bj, pos_bj >= 0)
    nearest = low_i[:, :, None] - high_j[:, None]
    farthest = high_i[:, :, None] - low_j[:, None]
    seen = (high_i >= 0)[:, :, None] & (high_j >= 0)[:, None]
    inside = whole_i[:, :, None] & whole_j[:, None]
    if doc_bi is not None:
        first_i, last_i, _ = _extent(doc_bi, pos_bi >= 0)
        first_j, last_j, _ = _extent(doc_bj, pos_bj >= 0)
        seen = seen & (first_i[:, :, None] <= last_j[:, None]) & (first_j[:, None] <= last_i[:, :, None])
        inside = inside & (first_i == last_i)[:, :, None] & (first_i[:, :, None] == first_j[:, None])
        inside = inside & (first_j == last_j)[:, None]
    if causal:
        seen, inside = seen & (farthest >= 0), inside & (nearest >= 0)
        if ordered:
            block = torch.arange(seen.shape[1], device=seen.device)
            seen = seen & (block[:, None] >= block)
    front = torch.zeros_like(seen)
    if window:
        if sinks:
            front = seen & (low_j < sinks)[:, None]
        seen = seen & (nearest < window) & (farthest > -window)
        inside = inside & (farthest < window) & (nearest > -window)
    far, close = nearest >= near, (farthest < near) & (nearest > -near)
    by_query = _walks(seen if causal else seen | front, front, inside, far, close)
    swap = [x.transpose(1, 2) for x in (seen | front, torch.zeros_like(front), inside, close, far)]
    return by_query, _walks(*swap)


def _extent(x_bn: Tensor, valid_bn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest valid number of each block of GRAIN slots (largest -1: none), and whether all are valid."""
    short = -x_bn.shape[1] % GRAIN
    huge = torch.iinfo(torch.int32).max // 2
    low = torch.nn.functional.pad(torch.where(valid_bn, x_bn, huge), (0, short), value=huge).unflatten(1, (-1, GRAIN))
    high = torch.nn.functional.pad(torch.where(valid_bn, x_bn, -1), (0, short), value=-1).unflatten(1, (-1, GRAIN))
    whole = torch.nn.functional.pad(valid_bn, (0, short), value=False).unflatten(1, (-1, GRAIN)).all(dim=2)
    return low.amin(dim=2), high.amax(dim=2), whole


def _walks(seen: Tensor, front: Tensor, inside: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Walks (b x 8) of tile maps (b x y): which are seen, hold sinks, need no mask, and lie wholly in either zone."""
    count = seen.shape[2]
    at = torch.arange(count, device=seen.device)

    def leading(mask: Tensor) -> Tensor:
        """The first true tile, `count` if none."""
        return torch.where(mask, at, count).amin(dim=2)

    def trailing(mask: Tensor) -> Tensor:
        """One past the last true tile, 0 if none."""
        return torch.where(mask, at + 1, 0).amax(dim=2)

    lo, hi = leading(seen), trailing(seen)
    in_hi = trailing(inside)
    in_lo = trailing(~inside & (at < in_hi[..., None]))
    mid_lo = leading(~first & (at >= in_lo[..., None]))
    mid_hi = trailing(~second & (at < in_hi[..., None]))
    ahead = front & (at < lo[..., None])
    walk = torch.stack([leading(ahead), trailing(ahead), lo, in_lo, mid_lo, mid_hi, in_hi, hi], dim=2) * GRAIN
    # what a tile past the end would read: it changes nothing
    neutral = torch.tensor([count, 0, count, 0, count, 0, count, 0], device=seen.device) * GRAIN
    return torch.cat([walk, neutral.expand(walk.shape[0], _SPARE, 8)], dim=1).to(torch.int32).contiguous()
