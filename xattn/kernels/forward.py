"""The fused forward: one program is a block of queries of one head, walking over the keys it sees.

Letters: g the key head that query head h shares.
"""

import triton
import triton.language as tl

from xattn.kernels.scratch import penalty
from xattn.kernels.stages import (
    AHEAD,
    FAR,
    LOG2E,
    NEAR,
    allowed,
    modify,
    normalise,
    product,
    put_rows,
    reaches,
    rows,
    stand,
    subtract,
    weigh,
    within,
)
from xattn.kernels.walk import edge, edges, keys_of, task, zone


@triton.jit
def _step(state, q_id, i_at, keys, k_j, v_j, j0, n, ZONE: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr):
    """The five stages over one tile of keys; where MASK, pairs out of the zone count as not seen."""
    BJ: tl.constexpr = P.block_j
    acc_id, total_i, top_i = state
    pos_i, doc_i, slope, qb = i_at
    k_ptr, v_ptr, scratch_ptr, places = keys
    row = tl.arange(0, BJ)
    k_jd = rows(k_ptr + tl.cast(j0, tl.int64) * k_j, row, k_j, n.n_j - j0, MASK, P)
    pos_j, doc_j = stand(places, j0 + row, n.n_j, P)
    pos_j, doc_j = pos_j[None, :], doc_j[None, :]

    sim_ij, _ = modify(product(q_id, k_jd, False) * n.scale, pos_i, pos_j, slope, n, P)
    if P.select:
        sim_ij = subtract(sim_ij, penalty(scratch_ptr, qb, j0 // 64, n, False, P))
    if MASK:
        ok = allowed(pos_i, pos_j, doc_i, doc_j, n, P)
        if P.extend > 0:
            ok = ok & within(pos_i - pos_j, n, ZONE, P)
        sim_ij = tl.where(ok, sim_ij, float("-inf"))
    v_jd = rows(v_ptr + tl.cast(j0, tl.int64) * v_j, row, v_j, n.n_j - j0, MASK, P)
    return weigh(acc_id, total_i, top_i, sim_ij, v_jd, MASK)


@triton.jit
def _edge(state, q_id, i_at, keys, k_j, v_j, i0, j0, n, ZONE: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr):
    """A tile that may lie in any zone: with Self-Extend, passed over where none of its pairs lies in this one."""
    acc, total, top = state
    if P.extend == 2 or P.extend == 1 and (P.stored or P.skip):
        BI: tl.constexpr = P.block_i
        BJ: tl.constexpr = P.block_j
        if P.stored:
            # an empty slot stands at -1, as if before all: it can only make a tile visited
            pos_j, _ = stand(keys[3], j0 + tl.arange(0, BJ), n.n_j, P)
            touched = reaches(tl.min(i_at[0]), tl.max(i_at[0]), tl.min(pos_j), tl.max(pos_j), n, ZONE, P)
        else:
            touched = reaches(i0, i0 + BI - 1, j0, j0 + BJ - 1, n, ZONE, P)
        if touched:
            acc, total, top = _step((acc, total, top), q_id, i_at, keys, k_j, v_j, j0, n, ZONE, True, P)
    else:
        acc, total, top = _step((acc, total, top), q_id, i_at, keys, k_j, v_j, j0, n, ZONE, MASK, P)
    return acc, total, top


@triton.jit
def _zone(state, q_id, i_at, keys, k_j, v_j, i0, walk, live_ptr, count_ptr, n, ZONE: tl.constexpr, P: tl.constexpr):
    """All keys of one zone of Self-Extend; without it, all keys."""
    BJ: tl.constexpr = P.block_j
    acc, total, top = state
    if P.skip:
        # the segment's own keys first: each query sees itself, so no later tile can leave it without a finite maximum
        for j0 in tl.range(i0 // 128 * 128, walk[7], BJ, num_stages=1):
            acc, total, top = _edge((acc, total, top), q_id, i_at, keys, k_j, v_j, i0, j0, n, ZONE, True, P)
        MASK: tl.constexpr = P.window or P.stored
        # the next number is loaded a step ahead: the pipeline would spend one of its stages on it
        ahead = tl.load(live_ptr)
        for step in range(0, tl.load(count_ptr)):
            j0 = ahead * 64
            ahead = tl.load(live_ptr + step + 1)
            acc, total, top = _edge((acc, total, top), q_id, i_at, keys, k_j, v_j, i0, j0, n, ZONE, MASK, P)
    else:
        walk = zone(walk, ZONE, P)
        STAGES: tl.constexpr = None if P.deep else 1
        for step in tl.range(0, edges(walk, BJ, P), num_stages=STAGES):
            j0 = edge(step, walk, BJ, P)
            acc, total, top = _edge((acc, total, top), q_id, i_at, keys, k_j, v_j, i0, j0, n, ZONE, True, P)
        lo, hi = walk[3], walk[6]
        if P.extend == 1:
            if ZONE == FAR:
                hi = walk[4]
            else:
                lo = walk[5]
        if ZONE != AHEAD:
            for j0 in range(lo, hi, BJ):
                acc, total, top = _step((acc, total, top), q_id, i_at, keys, k_j, v_j, j0, n, ZONE, False, P)
    return acc, total, top


@triton.jit(do_not_specialize=["n", "first_block"])
def forward(
    q_ptr, k_ptr, v_ptr, far_q_ptr, ahead_q_ptr, far_k_ptr, out_ptr, lse_ptr, sink_ptr, slope_ptr, scratch_ptr,
    live_ptr, count_ptr, pos_i_ptr, pos_j_ptr, doc_i_ptr, doc_j_ptr, walk_ptr, pos_i_b, pos_j_b, walk_b, q_b, q_h,
    q_i: tl.constexpr, k_b, k_g,
    k_j: tl.constexpr, v_b, v_g, v_j: tl.constexpr, out_b, out_h, out_i, scratch_b, live_b,
    first_block, n, P: tl.constexpr,
):  # fmt: skip
    """Output and base-2 log-sum-exp (b h i) of the blocks of queries from first_block on."""
    BI: tl.constexpr = P.block_i
    BLOCK_D: tl.constexpr = P.block_d
    GROUP: tl.constexpr = P.group
    h, block, b = task(n.heads, n)
    # the last, heaviest, first
    block = first_block + tl.num_programs(0) // (n.heads * n.batch) - 1 - block
    i0 = block * BI
    row = tl.arange(0, BI)
    q_at = b * q_b + h * q_h + tl.cast(i0, tl.int64) * q_i
    q_id = rows(q_ptr + q_at, row, q_i, n.n_i - i0, True, P)
    k_at = b * k_b + h // GROUP * k_g
    if P.select:
        scratch_ptr += b * scratch_b
    keys = (k_ptr + k_at, v_ptr + b * v_b + h // GROUP * v_g, scratch_ptr, (pos_j_ptr, doc_j_ptr, b * pos_j_b))
    pos_i, doc_i = stand((pos_i_ptr, doc_i_ptr, b * pos_i_b), i0 + row, n.n_i, P)
    slope = 0.0
    if P.alibi:
        slope = tl.load(slope_ptr + h)
    i_at = (pos_i[:, None], doc_i[:, None], slope, i0 // 64)

    acc = tl.zeros([BI, BLOCK_D], tl.float32)
    total = tl.zeros([BI], tl.float32)
    top = tl.full([BI], float("-inf"), tl.float32)
    walk = keys_of(block, walk_ptr, b * walk_b, n, P)
    if P.skip:
        segment = i0 // 128
        live_ptr += b * live_b + segment * n.blocks
        count_ptr += b * (live_b // n.blocks) + segment
    # one zone after another, each with its own queries and keys: two at once would take the room of a stage of the pipeline
    acc, total, top = _zone((acc, total, top), q_id, i_at, keys, k_j, v_j, i0, walk, live_ptr, count_ptr, n, NEAR, P)
    if P.extend > 0:
        keys = (far_k_ptr + k_at, keys[1], keys[2], keys[3])
        q_id = rows(far_q_ptr + q_at, row, q_i, n.n_i - i0, True, P)
        acc, total, top = _zone((acc, total, top), q_id, i_at, keys, k_j, v_j, i0, walk, live_ptr, count_ptr, n, FAR, P)
        if P.extend == 2:
            q_id = rows(ahead_q_ptr + q_at, row, q_i, n.n_i - i0, True, P)
            acc, total, top = _zone((acc, total, top), q_id, i_at, keys, k_j, v_j, i0, walk, live_ptr, count_ptr, n, AHEAD, P)

    sink = 0.0
    if P.sink_logits:
        sink = tl.load(sink_ptr + h).to(tl.float32) * LOG2E
    out_id, lse_i = normalise(acc, total, top, sink, P)
    put_rows(out_ptr + b * out_b + h * out_h + tl.cast(i0, tl.int64) * out_i, out_id, row, out_i, n.n_i - i0, P)
    tl.store(lse_ptr + (b * n.heads + h) * n.n_i + i0 + row, lse_i, mask=row < n.n_i - i0)
