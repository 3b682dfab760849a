"""Decoding: few queries against many keys, no gradient. Keys are split among programs, whose parts a second kernel merges.

The query heads that share a key head are packed into one tile, so that a key is read once for all of them. Positions of
queries are always stored; keys stand in any order, or (PLAIN) slot j holds token j and slots out of sight are not visited.
Self-Extend's keys come raw and are turned here, in the ways that a tile needs (by halves, where the whole head is turned).
F is read from `count`, which also carries the votes on.

Letters: m packed rows, query i of a group's head; r the split, u the last queries whose votes are asked for.
"""

import triton
import triton.language as tl

from xattn.kernels.stages import (
    BOTH,
    FAR,
    LOG2E,
    NEAR,
    allowed,
    bury,
    divide,
    logits,
    modify,
    normalise,
    rows,
    stand,
    subtract,
    votes,
    weigh,
)


@triton.jit
def _halves(ptr, at, real, SPLIT: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr):
    """Rows that begin at ptr + at, zero where not real; if SPLIT their two halves, else twice the same tile."""
    BLOCK_D: tl.constexpr = P.block_d
    D: tl.constexpr = P.d
    WIDTH: tl.constexpr = HALF if SPLIT else BLOCK_D
    d = tl.arange(0, WIDTH)
    here = real[:, None]
    if D != BLOCK_D:
        here = here & (d[None, :] < D)
    low = tl.load(ptr + at[:, None] + d[None, :], mask=here, other=0.0)
    high = low
    if SPLIT:
        high = tl.load(ptr + at[:, None] + (d + HALF)[None, :], mask=here, other=0.0)
    return low, high


@triton.jit
def _turn(k, at, real, n, SPLIT: tl.constexpr, HALF: tl.constexpr):
    """Keys turned by the cosines `at` and the sines n_j rows further; k is two halves, or the keys and their signed twins."""
    low, high = k[0].to(tl.float32), k[1].to(tl.float32)
    cos = tl.load(at, mask=real, other=1.0)
    sin = tl.load(at + n.n_j * HALF, mask=real, other=0.0)
    if SPLIT:
        turned = ((low * cos - high * sin).to(k[0].dtype), (high * cos + low * sin).to(k[0].dtype))
    else:
        whole = (low * cos + high * sin).to(k[0].dtype)
        turned = (whole, whole)
    return turned


@triton.jit
def _turned(
    k_ptr, k_j, turn_ptr, turn_at, j0, n, ZONE: tl.constexpr, SPLIT: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """A tile of keys, as `_halves`, at their positions and at their grouped ones: those of both that the zone needs."""
    BJ: tl.constexpr = P.block_j
    BLOCK_D: tl.constexpr = P.block_d
    row = tl.arange(0, BJ)
    k_ptr += tl.cast(j0, tl.int64) * k_j
    real = row < n.n_j - j0
    k = _halves(k_ptr, row * k_j, real, SPLIT, HALF, P)
    near_k = k
    far_k = k
    if P.extend > 0:
        WIDTH: tl.constexpr = HALF if SPLIT else BLOCK_D
        d = tl.arange(0, WIDTH)
        here = real[:, None]
        if not SPLIT:
            # the other half of a pair is loaded again, from the cache, rather than moved between registers
            twin = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, 0))
            here = here & (d[None, :] < 2 * HALF)
            twin_jd = tl.load(k_ptr + row[:, None] * k_j + twin[None, :], mask=here, other=0.0)
            k = (k[0], tl.where(d[None, :] < HALF, -twin_jd, twin_jd))
        at = turn_ptr + turn_at + (j0 + row)[:, None] * HALF + (d % HALF)[None, :]
        if ZONE != FAR:
            near_k = _turn(k, at, here, n, SPLIT, HALF)
        if ZONE != NEAR:
            far_k = _turn(k, at + 2 * n.n_j * HALF, here, n, SPLIT, HALF)
    return near_k, far_k


@triton.jit
def _logits(
    q, k, pos_i, pos_j, n, ZONE: tl.constexpr, TRANSPOSED: tl.constexpr, SPLIT: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """The logits, of whole rows or as the sum over their halves."""
    near_k, far_k = k
    near_q, far_q, ahead_q = q
    sim = logits((near_q[0], far_q[0], ahead_q[0]), (near_k[0], far_k[0]), pos_i, pos_j, n, ZONE, TRANSPOSED, P)
    if SPLIT:
        sim += logits((near_q[1], far_q[1], ahead_q[1]), (near_k[1], far_k[1]), pos_i, pos_j, n, ZONE, TRANSPOSED, P)
    return sim


@triton.jit
def _seats(places, slot, n, PLAIN: tl.constexpr, P: tl.constexpr):
    """Positions and documents of keys; -1 past the last."""
    if PLAIN:
        pos_j = tl.where(slot < n.n_j, slot, -1)
        doc_j = slot
    else:
        pos_j, doc_j = stand(places, slot, n.n_j, P)
    return pos_j, doc_j


@triton.jit
def _in_sight(pos_m, n, PLAIN: tl.constexpr, P: tl.constexpr):
    """Tiles of sink tokens in front, and the range of slots that any of these queries may see."""
    BJ: tl.constexpr = P.block_j
    fronts, lo, hi = 0, 0, n.n_j
    if PLAIN:
        last = tl.max(pos_m, 0)
        if P.causal:
            hi = tl.minimum(last + 1, n.n_j)
        if P.window:
            first = tl.min(tl.where(pos_m >= 0, pos_m, last), 0)
            lo = tl.maximum(first - n.window + 1, 0) // BJ * BJ
            if not P.causal:
                hi = tl.minimum(last + n.window, n.n_j)
            if P.sinks:
                fronts = (tl.minimum(n.sinks, tl.minimum(lo, n.n_j)) + BJ - 1) // BJ
                if not P.causal:
                    hi = tl.maximum(hi, tl.minimum(n.sinks, n.n_j))
    return fronts, lo, hi


@triton.jit
def _zones(pos_m, fronts, lo, n, P: tl.constexpr):
    """Of tiles of keys in order: before which step all pairs are grouped ones, and from which on none is."""
    BJ: tl.constexpr = P.block_j
    last = tl.max(pos_m, 0)
    first = tl.min(tl.where(pos_m >= 0, pos_m, last), 0)
    far = tl.maximum(first - n.near + 1, 0)
    far = tl.where(far >= lo, fronts + (far - lo) // BJ, tl.minimum(fronts, far // BJ))
    near = fronts + (tl.maximum(last - n.near + 1 - lo, 0) + BJ - 1) // BJ
    return far, near


@triton.jit(do_not_specialize=["n"])
def decode(
    q_ptr, k_ptr, v_ptr, far_q_ptr, ahead_q_ptr, turn_ptr, out_ptr, lse_ptr, sink_ptr, slope_ptr, penalty_ptr, dead_ptr,
    pos_i_ptr, pos_j_ptr, doc_i_ptr, doc_j_ptr, pos_i_b, pos_j_b, turn_b, q_b, q_h, q_i, k_b, k_g, k_j, v_b, v_g, v_j,
    out_r, out_b, out_h, out_i, lse_r, penalty_b, penalty_i, n,
    SPLIT: tl.constexpr, HALF: tl.constexpr, PLAIN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Output and base-2 log-sum-exp of one split of the keys: (r b h i d) by its strides, (r b h i)."""
    BM: tl.constexpr = P.block_i
    BJ: tl.constexpr = P.block_j
    BLOCK_D: tl.constexpr = P.block_d
    D: tl.constexpr = P.d
    GROUP: tl.constexpr = P.group
    r, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    tiles = (n.n_i * GROUP + BM - 1) // BM
    g = tl.program_id(1) // tiles
    m = tl.program_id(1) % tiles * BM + tl.arange(0, BM)
    i, h = m // GROUP, g * GROUP + m % GROUP
    real = i < n.n_i
    i = tl.where(real, i, 0)
    d = tl.arange(0, BLOCK_D)
    here = real[:, None] & (d[None, :] < D)
    q_at = b * q_b + tl.cast(h, tl.int64) * q_h + tl.cast(i, tl.int64) * q_i
    near_q = _halves(q_ptr, q_at, real, SPLIT, HALF, P)
    far_q = near_q
    ahead_q = near_q
    if P.extend > 0:
        far_q = _halves(far_q_ptr, q_at, real, SPLIT, HALF, P)
    if P.extend == 2:
        ahead_q = _halves(ahead_q_ptr, q_at, real, SPLIT, HALF, P)
    q = (near_q, far_q, ahead_q)
    pos_m = tl.load(pos_i_ptr + b * pos_i_b + i, mask=real, other=-1)
    doc_m = pos_m
    if P.docs:
        doc_m = tl.load(doc_i_ptr + b * pos_i_b + i, mask=real, other=-1)
    slope = tl.zeros([BM], tl.float32)
    if P.alibi:
        slope = tl.load(slope_ptr + h, mask=real, other=0.0)
    dead = 0.0
    if P.skip:
        dead = tl.load(dead_ptr)
    k_ptr += b * k_b + tl.cast(g, tl.int64) * k_g
    v_ptr += b * v_b + tl.cast(g, tl.int64) * v_g
    if P.select:
        penalty_ptr += b * penalty_b

    fronts, lo, hi = _in_sight(pos_m, n, PLAIN, P)
    count = fronts + (tl.maximum(hi - lo, 0) + BJ - 1) // BJ
    each = (count + tl.num_programs(0) - 1) // tl.num_programs(0)
    # causal Self-Extend of keys in order goes over near tiles, far ones and the mixed in between, each in its own loop
    ZONED: tl.constexpr = PLAIN and P.extend == 1
    ONLY: tl.constexpr = BOTH if P.extend > 0 else NEAR
    FIRST: tl.constexpr = NEAR if ZONED else ONLY
    LAST: tl.constexpr = BOTH if ZONED else ONLY
    begin, end = r * each, tl.minimum(r * each + each, count)
    far, near = begin, end
    if ZONED:
        far, near = _zones(pos_m, fronts, lo, n, P)
        far, near = tl.minimum(tl.maximum(far, begin), end), tl.maximum(tl.minimum(near, end), begin)
    row = tl.arange(0, BJ)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    for ZONE in tl.static_range(FIRST, LAST + 1):
        start, stop = begin, end
        if ZONED:
            start = near if ZONE == NEAR else begin if ZONE == FAR else far
            stop = end if ZONE == NEAR else far if ZONE == FAR else near
        for step in range(start, stop):
            j0 = tl.where(step < fronts, step * BJ, lo + (step - fronts) * BJ)
            k = _turned(k_ptr, k_j, turn_ptr, b * turn_b, j0, n, ZONE, SPLIT, HALF, P)
            pos_j, doc_j = _seats((pos_j_ptr, doc_j_ptr, b * pos_j_b), j0 + row, n, PLAIN, P)
            sim = _logits(q, k, pos_m[:, None], pos_j[None, :], n, ZONE, False, SPLIT, P)
            sim, _ = modify(sim, pos_m[:, None], pos_j[None, :], slope[:, None], n, P)
            if P.select:
                at = penalty_ptr + tl.cast(i, tl.int64)[:, None] * penalty_i + (j0 + row)[None, :]
                penalty = tl.load(at, mask=(j0 + row)[None, :] < n.n_j, other=0.0)
                sim = subtract(sim, bury(penalty * LOG2E, dead, P))
            seen = allowed(pos_m[:, None], pos_j[None, :], doc_m[:, None], doc_j[None, :], n, P)
            sim = tl.where(seen, sim, float("-inf"))
            v_jd = rows(v_ptr + tl.cast(j0, tl.int64) * v_j, row, v_j, n.n_j - j0, True, P)
            acc, total, top = weigh(acc, total, top, sim, v_jd, True)

    sink = tl.zeros([BM], tl.float32)
    if P.sink_logits:
        # the learned sink belongs to the first split; in the others it weighs nothing
        sink = tl.load(sink_ptr + h, mask=real, other=0.0).to(tl.float32) * LOG2E
        sink = tl.where(r == 0, sink, -1e30)
    out_md, lse_m = normalise(acc, total, top, sink, P)
    out_at = r * tl.cast(out_r, tl.int64) + b * out_b + tl.cast(h, tl.int64) * out_h + tl.cast(i, tl.int64) * out_i
    tl.store(out_ptr + out_at[:, None] + d[None, :], out_md.to(out_ptr.dtype.element_ty), mask=here)
    tl.store(lse_ptr + r * tl.cast(lse_r, tl.int64) + (b * n.heads + h) * n.n_i + i, lse_m, mask=real)


@triton.jit(do_not_specialize=["splits", "n"])
def merge(
    part_ptr, lse_ptr, out_ptr, part_r, lse_r, out_b, out_h, out_i, splits, n, SPLITS: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """One row of output (b h i d), by its strides, from the parts (r b h i d) of all splits, weighted by their log-sum-exp."""
    BLOCK_D: tl.constexpr = P.block_d
    D: tl.constexpr = P.d
    i, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = (b * n.heads + h) * n.n_i + i
    r, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    lse_r = tl.load(lse_ptr + at + r * tl.cast(lse_r, tl.int64), mask=r < splits, other=float("-inf"))
    highest = tl.max(lse_r, 0)
    share_r = tl.exp2(lse_r - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(share_r, 0)
    part_at = at * D + (r * tl.cast(part_r, tl.int64))[:, None] + d[None, :]
    part_rd = tl.load(part_ptr + part_at, mask=(r < splits)[:, None] & (d < D)[None, :], other=0.0)
    out_d = divide(tl.sum(part_rd * share_r[:, None], 0), tl.where(total == 0.0, 1.0, total), P)
    out_at = out_ptr + b * out_b + h * out_h + tl.cast(i, tl.int64) * out_i + d
    tl.store(out_at, out_d.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["head", "skipped", "n"])
def count(
    q_ptr, k_ptr, far_q_ptr, turn_ptr, slope_ptr, carry_ptr, penalty_ptr, after_ptr, pos_i_ptr, pos_j_ptr, doc_i_ptr, doc_j_ptr,
    pos_i_b, pos_j_b, turn_b, q_b, q_i, k_b, k_j, carry_b, penalty_b, penalty_i, after_b, after_u, head, skipped, n,
    SPLIT: tl.constexpr, HALF: tl.constexpr, PLAIN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The penalty F (b i j) of every query, and the votes (b u j) after each but the first `skipped`; the carry moves on.

    float32; n, votes and penalties are in natural units, for a carry lives long and must not drift with a change of units.
    Queries in order of their positions; q and k are the selecting head's.
    """
    BI: tl.constexpr = P.block_i
    BJ: tl.constexpr = P.block_j
    ZONE: tl.constexpr = BOTH if P.extend > 0 else NEAR
    j0, b = tl.program_id(0) * BJ, tl.program_id(1).to(tl.int64)
    j = j0 + tl.arange(0, BJ)
    row = tl.arange(0, BI)
    k = _turned(k_ptr + b * k_b, k_j, turn_ptr, b * turn_b, j0, n, ZONE, SPLIT, HALF, P)
    pos_j, doc_j = _seats((pos_j_ptr, doc_j_ptr, b * pos_j_b), j, n, PLAIN, P)
    pos_j, doc_j = pos_j[:, None], doc_j[:, None]
    slope = 0.0
    if P.alibi:
        slope = tl.load(slope_ptr + head) * 0.6931471805599453
    carry_j = tl.load(carry_ptr + b * carry_b + j, mask=j < n.n_j, other=0.0)
    penalty_ptr += b * penalty_b
    after_ptr += b * after_b
    before = tl.where(row[:, None] < row[None, :], 1.0, 0.0)
    for i0 in range(0, n.n_i, BI):
        i = i0 + row
        q_at = b * q_b + tl.cast(i0, tl.int64) * q_i
        near_q = _halves(q_ptr + q_at, row * q_i, i < n.n_i, SPLIT, HALF, P)
        far_q = near_q
        if P.extend > 0:
            far_q = _halves(far_q_ptr + q_at, row * q_i, i < n.n_i, SPLIT, HALF, P)
        pos_i, doc_i = stand((pos_i_ptr, doc_i_ptr, b * pos_i_b), i, n.n_i, P)
        pos_i, doc_i = pos_i[None, :], doc_i[None, :]
        sim_ji = _logits((near_q, far_q, far_q), k, pos_i, pos_j, n, ZONE, True, SPLIT, P)
        sim_ji, _ = modify(sim_ji, pos_i, pos_j, slope, n, P)
        seen = allowed(pos_i, pos_j, doc_i, doc_j, n, P)
        votes_ji = votes(sim_ji, seen & (pos_i != pos_j), pos_j)
        at = tl.cast(i, tl.int64)[None, :]
        here = (i[None, :] < n.n_i) & (j[:, None] < n.n_j)
        penalty_ji = tl.dot(votes_ji, before, input_precision="ieee") + carry_j[:, None]
        tl.store(penalty_ptr + at * penalty_i + j[:, None], penalty_ji, mask=here)
        after_at = after_ptr + (at - skipped) * after_u + j[:, None]
        tl.store(after_at, penalty_ji + votes_ji, mask=here & (i[None, :] >= skipped))
        carry_j += tl.sum(votes_ji, 1)
    tl.store(carry_ptr + b * carry_b + j, carry_j, mask=j < n.n_j)
