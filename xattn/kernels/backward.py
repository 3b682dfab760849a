"""The fused backward: one kernel for dQ, one for dK and dV. No atomics, so two runs agree to the bit.

With A the weights and S the logits: dA = dO V^T, dS = A * (dA - delta), delta_i = dO_i . O_i, and dS goes back through
the score stage into dQ and dK. The dQ kernel finds delta and leaves it for the other; with selection, which needs dK and dV
first, a small kernel does. Selective attention subtracts F from the logits of every head, so dF = -sum over heads of
dS: the dQ kernel leaves dS summed over each pair of heads (a slice), and the dK/dV kernel leaves its column sums.
"""

import triton
import triton.language as tl

from xattn.kernels.scratch import penalty, put_by_queries
from xattn.kernels.stages import (
    AHEAD,
    BOTH,
    FAR,
    NEAR,
    allowed,
    logits,
    modify,
    numbers,
    put_rows,
    rows,
    stand,
    subtract,
    within,
)
from xattn.kernels.walk import clip, edge, edges, keys_of, queries_of, share, task


@triton.jit
def _delta(out_ptr, out_i, dout_id, dlse_ptr, dlse_at, row, count, P: tl.constexpr):
    """delta (i) = dO . O, less the gradient of the log-sum-exp, which reaches the logits the same way."""
    out_id = rows(out_ptr, row, out_i, count, True, P)
    delta_i = tl.sum(out_id.to(tl.float32) * dout_id.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta_i -= numbers(dlse_ptr + dlse_at, row, count, True, P)
    return delta_i


@triton.jit(do_not_specialize=["n"])
def find_delta(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, out_b, out_h, out_i, dout_b, dout_h, dout_i, n, P: tl.constexpr,
):  # fmt: skip
    """delta (b h i) by itself."""
    BI: tl.constexpr = P.block_i
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i0 = tl.program_id(0) * BI
    row = tl.arange(0, BI)
    dout_id = rows(dout_ptr + b * dout_b + h * dout_h + tl.cast(i0, tl.int64) * dout_i, row, dout_i, n.n_i - i0, True, P)
    at = (b * n.heads + h) * n.n_i + i0
    out_ptr += b * out_b + h * out_h + tl.cast(i0, tl.int64) * out_i
    delta_i = _delta(out_ptr, out_i, dout_id, dlse_ptr, at, row, n.n_i - i0, P)
    tl.store(delta_ptr + at + row, delta_i, mask=row < n.n_i - i0)


@triton.jit
def _dkdv_step(
    state, kv, j_at, queries, q_i, dout_i, i0, n, ZONE: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """What one tile of queries adds to dK and dV, as tiles [j, i]."""
    BI: tl.constexpr = P.block_i
    dk, far_dk, dv = state
    k_jd, far_k_jd, v_jd = kv
    pos_j, doc_j, slope, kb, column_ptr, column_at, column_i = j_at
    q_ptr, far_q_ptr, ahead_q_ptr, q_at, dout_ptr, lse_ptr, delta_ptr, scratch_ptr, places = queries
    row = tl.arange(0, BI)
    q_at += tl.cast(i0, tl.int64) * q_i
    q_id = k_jd
    far_q_id = k_jd
    ahead_q_id = k_jd
    if ZONE != FAR:
        q_id = rows(q_ptr + q_at, row, q_i, n.n_i - i0, MASK, P)
    if ZONE != NEAR:
        far_q_id = rows(far_q_ptr + q_at, row, q_i, n.n_i - i0, MASK, P)
        if P.extend == 2:
            ahead_q_id = rows(ahead_q_ptr + q_at, row, q_i, n.n_i - i0, MASK, P)
    pos_i, doc_i = stand(places, i0 + row, n.n_i, P)
    pos_i, doc_i = pos_i[None, :], doc_i[None, :]
    lse_i = numbers(lse_ptr + i0, row, n.n_i - i0, MASK, P)
    delta_i = numbers(delta_ptr + i0, row, n.n_i - i0, MASK, P)

    sim_ji = logits((q_id, far_q_id, ahead_q_id), (k_jd, far_k_jd), pos_i, pos_j, n, ZONE, True, P)
    sim_ji, change_ji = modify(sim_ji, pos_i, pos_j, slope, n, P)
    if P.select:
        sim_ji = subtract(sim_ji, penalty(scratch_ptr, i0 // 64, kb, n, True, P))
    attn_ji = tl.exp2(sim_ji - lse_i[None, :])
    if MASK:
        attn_ji = tl.where(allowed(pos_i, pos_j, doc_i, doc_j, n, P), attn_ji, 0.0)
    dout_id = rows(dout_ptr + tl.cast(i0, tl.int64) * dout_i, row, dout_i, n.n_i - i0, MASK, P)
    dv = tl.dot(attn_ji.to(dout_id.dtype), dout_id, dv, input_precision="ieee")
    dsim_ji = attn_ji * (tl.dot(v_jd, tl.trans(dout_id), input_precision="ieee") - delta_i[None, :])
    if P.select:
        BJ: tl.constexpr = P.block_j
        column_at += tl.cast(i0 // BI, tl.int64) * column_i
        tl.store(column_ptr + column_at + tl.arange(0, BJ), tl.sum(dsim_ji, 1))
    if P.softcap:
        dsim_ji = dsim_ji * change_ji
    if ZONE == NEAR:
        dk = tl.dot(dsim_ji.to(q_id.dtype), q_id, dk, input_precision="ieee")
    elif ZONE == FAR:
        far_dk = tl.dot(dsim_ji.to(far_q_id.dtype), far_q_id, far_dk, input_precision="ieee")
    else:
        far = within(pos_i - pos_j, n, FAR, P)
        near = ~far
        if P.extend == 2:
            ahead = within(pos_i - pos_j, n, AHEAD, P)
            near = near & ~ahead
            part = tl.where(ahead, dsim_ji, 0.0).to(ahead_q_id.dtype)
            far_dk = tl.dot(part, ahead_q_id, far_dk, input_precision="ieee")
        dk = tl.dot(tl.where(near, dsim_ji, 0.0).to(q_id.dtype), q_id, dk, input_precision="ieee")
        far_dk = tl.dot(tl.where(far, dsim_ji, 0.0).to(far_q_id.dtype), far_q_id, far_dk, input_precision="ieee")
    return dk, far_dk, dv


@triton.jit(do_not_specialize=["n", "first_block", "column_b", "column_h", "column_i"])
def find_dkdv(
    q_ptr, k_ptr, v_ptr, far_q_ptr, ahead_q_ptr, far_k_ptr, dout_ptr, lse_ptr, delta_ptr, slope_ptr, scratch_ptr, column_ptr,
    last_ptr, dk_ptr, far_dk_ptr, dv_ptr, pos_i_ptr, pos_j_ptr, doc_i_ptr, doc_j_ptr, walk_ptr, pos_i_b, pos_j_b,
    walk_b, q_b, q_h, q_i: tl.constexpr, k_b, k_g, k_j, v_b, v_g, v_j, dout_b, dout_h, dout_i: tl.constexpr, dk_b, dk_g, dk_j,
    scratch_b, column_b, column_h, column_i, first_block, n, P: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys of one key head, over all its query heads; with selection also the columns of dS."""
    BI: tl.constexpr = P.block_i
    BJ: tl.constexpr = P.block_j
    BLOCK_D: tl.constexpr = P.block_d
    GROUP: tl.constexpr = P.group
    groups = n.heads // GROUP
    g, block, b = task(groups, n)
    block += first_block
    j0 = block * BJ
    row = tl.arange(0, BJ)
    k_at = b * k_b + g * k_g + tl.cast(j0, tl.int64) * k_j
    k_jd = rows(k_ptr + k_at, row, k_j, n.n_j - j0, True, P)
    far_k_jd = k_jd
    if P.extend > 0:
        far_k_jd = rows(far_k_ptr + k_at, row, k_j, n.n_j - j0, True, P)
    v_jd = rows(v_ptr + b * v_b + g * v_g + tl.cast(j0, tl.int64) * v_j, row, v_j, n.n_j - j0, True, P)
    kv = (k_jd, far_k_jd, v_jd)
    pos_j, doc_j = stand((pos_j_ptr, doc_j_ptr, b * pos_j_b), j0 + row, n.n_j, P)
    pos_j, doc_j = pos_j[:, None], doc_j[:, None]

    dk = tl.zeros([BJ, BLOCK_D], tl.float32)
    far_dk = tl.zeros([BJ, BLOCK_D], tl.float32)
    dv = tl.zeros([BJ, BLOCK_D], tl.float32)
    walk = queries_of(block, walk_ptr, b * walk_b, n, P)
    if P.skip:
        # no query from `end` on sees a living key of this block
        walk = clip(walk, tl.load(last_ptr + b * n.blocks + block))
    in_lo, mid_lo, mid_hi, in_hi = walk[3], walk[4], walk[5], walk[6]
    if P.select:
        scratch_ptr += b * scratch_b
    EDGE: tl.constexpr = BOTH if P.extend > 0 else NEAR
    # 8 warps have registers to spare for a pipelined edge, 4 only where an edge is simple
    EDGE_STAGES: tl.constexpr = 1 if P.warps == 4 and (P.extend > 0 or not P.deep) else None
    for h in range(g * GROUP, g * GROUP + GROUP):
        queries = (
            q_ptr, far_q_ptr, ahead_q_ptr, b * q_b + h * q_h, dout_ptr + b * dout_b + h * dout_h,
            lse_ptr + (b * n.heads + h) * n.n_i, delta_ptr + (b * n.heads + h) * n.n_i, scratch_ptr,
            (pos_i_ptr, doc_i_ptr, b * pos_i_b),
        )  # fmt: skip
        slope = 0.0
        if P.alibi:
            slope = tl.load(slope_ptr + h)
        column_at = b * column_b + h * tl.cast(column_h, tl.int64) + (block - first_block) * BJ
        j_at = (pos_j, doc_j, slope, j0 // 64, column_ptr, column_at, column_i)
        for step in tl.range(0, edges(walk, BI, P), num_stages=EDGE_STAGES):
            i0 = edge(step, walk, BI, P)
            dk, far_dk, dv = _dkdv_step((dk, far_dk, dv), kv, j_at, queries, q_i, dout_i, i0, n, EDGE, True, P)
        for i0 in range(in_lo, mid_lo, BI):
            dk, far_dk, dv = _dkdv_step((dk, far_dk, dv), kv, j_at, queries, q_i, dout_i, i0, n, NEAR, False, P)
        if P.extend == 1:
            for i0 in range(mid_hi, in_hi, BI):
                dk, far_dk, dv = _dkdv_step((dk, far_dk, dv), kv, j_at, queries, q_i, dout_i, i0, n, FAR, False, P)

    # the logits carried log2(e), the gradient does not
    scale = n.scale * 0.6931471805599453
    at = b * dk_b + g * dk_g + tl.cast(j0, tl.int64) * dk_j
    put_rows(dk_ptr + at, dk * scale, row, dk_j, n.n_j - j0, P)
    put_rows(dv_ptr + at, dv, row, dk_j, n.n_j - j0, P)
    if P.extend > 0:
        put_rows(far_dk_ptr + at, far_dk * scale, row, dk_j, n.n_j - j0, P)


@triton.jit(do_not_specialize=["n", "first_block", "column_b", "column_h", "column_i"])
def sum_columns(
    column_ptr, sum_ptr, last_ptr, walk_ptr, walk_b, column_b, column_h, column_i, sum_b, sum_t, first_block, n,
    SEG: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Column sums of dS over the heads and queries of a segment, 64 keys: (b segments c), of the tiles that were visited."""
    BI: tl.constexpr = P.block_i
    BJ: tl.constexpr = P.block_j
    TILES: tl.constexpr = SEG * 64 // BI
    c, seg, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kb = first_block + c
    walk = queries_of(kb * 64 // BJ, walk_ptr, b * walk_b, n, P)
    lo, hi = walk[2], walk[7]
    if P.skip:
        hi = tl.minimum(hi, tl.load(last_ptr + b * n.blocks + kb))
    t = seg * TILES + tl.arange(0, TILES)
    j = tl.arange(0, 64)
    visited = (t * BI >= lo) & (t * BI < hi)
    total = tl.zeros([TILES, 64], tl.float32)
    for h in range(0, n.heads):
        at = column_ptr + b * column_b + h * tl.cast(column_h, tl.int64) + c * 64
        total += tl.load(at + t.to(tl.int64)[:, None] * column_i + j[None, :], mask=visited[:, None], other=0.0)
    tl.store(sum_ptr + b * sum_b + seg * sum_t + c * 64 + j, tl.sum(total, 0))


@triton.jit(do_not_specialize=["segments"])
def sum_after(sum_ptr, sum_b, sum_t, segments):
    """In place: sums of dS over each segment (b segments c) become sums of dF = -dS over the segments after it; 64 columns."""
    STEP: tl.constexpr = 16
    at = sum_ptr + tl.program_id(1).to(tl.int64) * sum_b + tl.program_id(0) * 64 + tl.arange(0, 64)
    total = tl.zeros([64], tl.float32)
    for back in range(0, segments, STEP):
        t = segments - 1 - back - tl.arange(0, STEP)
        here = at[None, :] + t[:, None].to(tl.int64) * sum_t
        more = tl.load(here, mask=t[:, None] >= 0, other=0.0)
        tl.store(here, total[None, :] - (tl.cumsum(more, 0) - more), mask=t[:, None] >= 0)
        total -= tl.sum(more, 0)


@triton.jit
def _dq_head(
    state, head, i_at, keys, k_j, v_j, j0, penalty_ij, n, ZONE: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """What one tile of keys adds to dQ of one head, and dS before the soft cap's derivative, as tiles [i, j]."""
    BJ: tl.constexpr = P.block_j
    dq, far_dq, ahead_dq = state
    q, dout_id, lse_i, delta_i, slope = head
    pos_i, doc_i, qb = i_at
    k_ptr, far_k_ptr, head_at, v_ptr, places = keys
    row = tl.arange(0, BJ)
    k_at = head_at + tl.cast(j0, tl.int64) * k_j
    k_jd = q[0]
    far_k_jd = q[0]
    if ZONE != FAR:
        k_jd = rows(k_ptr + k_at, row, k_j, n.n_j - j0, MASK, P)
    if ZONE != NEAR:
        far_k_jd = rows(far_k_ptr + k_at, row, k_j, n.n_j - j0, MASK, P)
    v_jd = rows(v_ptr + tl.cast(j0, tl.int64) * v_j, row, v_j, n.n_j - j0, MASK, P)
    pos_j, doc_j = stand(places, j0 + row, n.n_j, P)
    pos_j, doc_j = pos_j[None, :], doc_j[None, :]

    sim_ij = logits(q, (k_jd, far_k_jd), pos_i, pos_j, n, ZONE, False, P)
    sim_ij, change_ij = modify(sim_ij, pos_i, pos_j, slope, n, P)
    if P.select:
        sim_ij = subtract(sim_ij, penalty_ij)
    attn_ij = tl.exp2(sim_ij - lse_i[:, None])
    if MASK:
        attn_ij = tl.where(allowed(pos_i, pos_j, doc_i, doc_j, n, P), attn_ij, 0.0)
    dsim_ij = attn_ij * (tl.dot(dout_id, tl.trans(v_jd), input_precision="ieee") - delta_i[:, None])
    given_ij = dsim_ij
    if P.softcap:
        dsim_ij = dsim_ij * change_ij
    if ZONE == NEAR:
        dq = tl.dot(dsim_ij.to(k_jd.dtype), k_jd, dq, input_precision="ieee")
    elif ZONE == FAR:
        far_dq = tl.dot(dsim_ij.to(far_k_jd.dtype), far_k_jd, far_dq, input_precision="ieee")
    else:
        far = within(pos_i - pos_j, n, FAR, P)
        near = ~far
        if P.extend == 2:
            ahead = within(pos_i - pos_j, n, AHEAD, P)
            near = near & ~ahead
            part = tl.where(ahead, dsim_ij, 0.0).to(far_k_jd.dtype)
            ahead_dq = tl.dot(part, far_k_jd, ahead_dq, input_precision="ieee")
        dq = tl.dot(tl.where(near, dsim_ij, 0.0).to(k_jd.dtype), k_jd, dq, input_precision="ieee")
        far_dq = tl.dot(tl.where(far, dsim_ij, 0.0).to(far_k_jd.dtype), far_k_jd, far_dq, input_precision="ieee")
    return dq, far_dq, ahead_dq, given_ij


@triton.jit
def _dq_step(
    state, other_dq, first, second, i_at, first_keys, second_keys, scratch, k_j, v_j, j0, n, ZONE: tl.constexpr,
    MASK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One tile of keys for the program's one or two heads."""
    scratch_ptr, slice_ptr = scratch
    dq, far_dq, ahead_dq = state
    penalty_ij = 0.0
    if P.select:
        penalty_ij = penalty(scratch_ptr, i_at[2], j0 // 64, n, False, P)
    dq, far_dq, ahead_dq, dsim_ij = _dq_head(
        (dq, far_dq, ahead_dq), first, i_at, first_keys, k_j, v_j, j0, penalty_ij, n, ZONE, MASK, P
    )  # fmt: skip
    if P.pair == 2:
        # as it went into dQ: 16 bits wait in half the registers
        waiting_ij = dsim_ij.to(slice_ptr.dtype.element_ty)
        other_dq, far_dq, ahead_dq, dsim_ij = _dq_head(
            (other_dq, far_dq, ahead_dq), second, i_at, second_keys, k_j, v_j, j0, penalty_ij, n, ZONE, MASK, P
        )  # fmt: skip
        dsim_ij += waiting_ij.to(tl.float32)
    if P.select:
        put_by_queries(slice_ptr, dsim_ij, i_at[2], j0 // 64, n, MASK, P)
    return dq, far_dq, ahead_dq, other_dq


@triton.jit
def _query_head(
    b, h, i0, row, q_ptr, far_q_ptr, ahead_q_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, slope_ptr, q_b, q_h, q_i,
    out_b, out_h, out_i, dout_b, dout_h, dout_i, n, P: tl.constexpr,
):  # fmt: skip
    """Queries, dO and the rest of one head's block; without selection delta is found here."""
    q_at = b * q_b + h * q_h + tl.cast(i0, tl.int64) * q_i
    q_id = rows(q_ptr + q_at, row, q_i, n.n_i - i0, True, P)
    far_q_id = q_id
    ahead_q_id = q_id
    if P.extend > 0:
        far_q_id = rows(far_q_ptr + q_at, row, q_i, n.n_i - i0, True, P)
    if P.extend == 2:
        ahead_q_id = rows(ahead_q_ptr + q_at, row, q_i, n.n_i - i0, True, P)
    dout_id = rows(dout_ptr + b * dout_b + h * dout_h + tl.cast(i0, tl.int64) * dout_i, row, dout_i, n.n_i - i0, True, P)
    at = (b * n.heads + h) * n.n_i + i0
    lse_i = numbers(lse_ptr + at, row, n.n_i - i0, True, P)
    if P.select:
        delta_i = numbers(delta_ptr + at, row, n.n_i - i0, True, P)
    else:
        out_ptr += b * out_b + h * out_h + tl.cast(i0, tl.int64) * out_i
        delta_i = _delta(out_ptr, out_i, dout_id, dlse_ptr, at, row, n.n_i - i0, P)
        tl.store(delta_ptr + at + row, delta_i, mask=row < n.n_i - i0)
    slope = 0.0
    if P.alibi:
        slope = tl.load(slope_ptr + h)
    return (q_id, far_q_id, ahead_q_id), dout_id, lse_i, delta_i, slope


@triton.jit(do_not_specialize=["n", "first_block", "dq_first", "dq_part"])
def find_dq(
    q_ptr, k_ptr, v_ptr, far_q_ptr, ahead_q_ptr, far_k_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, slope_ptr,
    scratch_ptr, slices_ptr, live_ptr, count_ptr, dq_ptr, far_dq_ptr, ahead_dq_ptr, pos_i_ptr, pos_j_ptr, doc_i_ptr,
    doc_j_ptr, walk_ptr,
    pos_i_b, pos_j_b, walk_b, q_b, q_h, q_i, k_b, k_g, k_j: tl.constexpr, v_b, v_g, v_j: tl.constexpr, out_b, out_h, out_i,
    dout_b, dout_h, dout_i, dq_part, dq_b, dq_h, dq_i, dq_first, scratch_b, slice_stride, live_b, first_block, n,
    P: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries of one head, or of a pair of heads that share F; with selection also their slice of dS.

    Axis 1 of the grid shares out a block's keys; each program then leaves its part of dQ, dq_part apart.
    """
    BI: tl.constexpr = P.block_i
    BJ: tl.constexpr = P.block_j
    BLOCK_D: tl.constexpr = P.block_d
    GROUP: tl.constexpr = P.group
    PAIR: tl.constexpr = P.pair
    pairs = n.heads // PAIR
    pair, block, b = task(pairs, n)
    block = first_block + tl.num_programs(0) // (pairs * n.batch) - 1 - block
    h = pair * PAIR
    i0 = block * BI
    row = tl.arange(0, BI)
    first = _query_head(
        b, h, i0, row, q_ptr, far_q_ptr, ahead_q_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, slope_ptr, q_b, q_h, q_i,
        out_b, out_h, out_i, dout_b, dout_h, dout_i, n, P,
    )  # fmt: skip
    second = first
    if PAIR == 2:
        second = _query_head(
            b, h + 1, i0, row, q_ptr, far_q_ptr, ahead_q_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, slope_ptr, q_b,
            q_h, q_i, out_b, out_h, out_i, dout_b, dout_h, dout_i, n, P,
        )  # fmt: skip
    places = (pos_j_ptr, doc_j_ptr, b * pos_j_b)
    g = h // GROUP
    first_keys = (k_ptr, far_k_ptr, b * k_b + g * k_g, v_ptr + b * v_b + g * v_g, places)
    g = (h + PAIR - 1) // GROUP
    second_keys = (k_ptr, far_k_ptr, b * k_b + g * k_g, v_ptr + b * v_b + g * v_g, places)
    if P.select:
        scratch_ptr += b * scratch_b
        slices_ptr += tl.cast(pair, tl.int64) * slice_stride + b * scratch_b
    scratch = (scratch_ptr, slices_ptr)
    pos_i, doc_i = stand((pos_i_ptr, doc_i_ptr, b * pos_i_b), i0 + row, n.n_i, P)
    i_at = (pos_i[:, None], doc_i[:, None], i0 // 64)

    dq = tl.zeros([BI, BLOCK_D], tl.float32)
    far_dq = tl.zeros([BI, BLOCK_D], tl.float32)
    ahead_dq = tl.zeros([BI, BLOCK_D], tl.float32)
    other_dq = tl.zeros([BI, BLOCK_D], tl.float32)
    walk = keys_of(block, walk_ptr, b * walk_b, n, P)
    part, parts = tl.program_id(1), tl.num_programs(1)
    EDGE: tl.constexpr = BOTH if P.extend > 0 else NEAR
    if P.skip:
        segment = i0 // 128
        if part == parts - 1:
            for j0 in tl.range(segment * 128, walk[7], BJ, num_stages=1):
                dq, far_dq, ahead_dq, other_dq = _dq_step(
                    (dq, far_dq, ahead_dq), other_dq, first, second, i_at, first_keys, second_keys, scratch, k_j, v_j, j0, n,
                    EDGE, True, P,
                )  # fmt: skip
        live_ptr += b * live_b + segment * n.blocks
        lo, hi = share(0, tl.load(count_ptr + b * (live_b // n.blocks) + segment), part, parts, 1)
        SEEN: tl.constexpr = P.window or P.stored
        # loaded a step ahead, as in the forward
        ahead = tl.load(live_ptr + tl.minimum(lo, n.blocks - 1))
        for step in range(lo, hi):
            j0 = ahead * 64
            ahead = tl.load(live_ptr + step + 1)
            dq, far_dq, ahead_dq, other_dq = _dq_step(
                (dq, far_dq, ahead_dq), other_dq, first, second, i_at, first_keys, second_keys, scratch, k_j, v_j, j0, n,
                EDGE, SEEN, P,
            )  # fmt: skip
    else:
        lo, hi = share(0, edges(walk, BJ, P), part, parts, 1)
        STAGES: tl.constexpr = None if P.deep and P.extend == 0 else 1
        for step in tl.range(lo, hi, num_stages=STAGES):
            j0 = edge(step, walk, BJ, P)
            dq, far_dq, ahead_dq, other_dq = _dq_step(
                (dq, far_dq, ahead_dq), other_dq, first, second, i_at, first_keys, second_keys, scratch, k_j, v_j, j0, n,
                EDGE, True, P,
            )  # fmt: skip
        if P.extend == 1:
            lo, hi = share(walk[3], walk[4], part, parts, BJ)
            for j0 in range(lo, hi, BJ):
                dq, far_dq, ahead_dq, other_dq = _dq_step(
                    (dq, far_dq, ahead_dq), other_dq, first, second, i_at, first_keys, second_keys, scratch, k_j, v_j, j0, n,
                    FAR, False, P,
                )  # fmt: skip
        lo, hi = share(walk[5] if P.extend == 1 else walk[3], walk[6], part, parts, BJ)
        for j0 in range(lo, hi, BJ):
            dq, far_dq, ahead_dq, other_dq = _dq_step(
                (dq, far_dq, ahead_dq), other_dq, first, second, i_at, first_keys, second_keys, scratch, k_j, v_j, j0, n,
                NEAR, False, P,
            )  # fmt: skip

    scale = n.scale * 0.6931471805599453
    at = part * tl.cast(dq_part, tl.int64) + b * dq_b + h * dq_h + tl.cast(i0 - dq_first, tl.int64) * dq_i
    put_rows(dq_ptr + at, dq * scale, row, dq_i, n.n_i - i0, P)
    if PAIR == 2:
        put_rows(dq_ptr + at + dq_h, other_dq * scale, row, dq_i, n.n_i - i0, P)
    if P.extend > 0:
        put_rows(far_dq_ptr + at, far_dq * scale, row, dq_i, n.n_i - i0, P)
    if P.extend == 2:
        put_rows(ahead_dq_ptr + at, ahead_dq * scale, row, dq_i, n.n_i - i0, P)
