"""Selection: the votes of one head become the penalty F of all, and the gradient of F becomes that head's.

Everything is in tiles of 64 x 64. A segment is a few rows of tiles: `count_votes` leaves each segment's column sums,
whose running sum is the carry with which `fill` starts a segment. The gradient runs the other way: R_kj, the sum of
dF_ij over the queries i after k, starts a segment from a carry and walks it from its last row to its first.
"""

import triton
import triton.language as tl

from xattn.kernels.scratch import pack, slot, unpack
from xattn.kernels.stages import BOTH, NEAR, allowed, bury, logits, modify, put_rows, rows, stand, votes
from xattn.kernels.walk import keys_of, queries_of, share

# tiles (of 64 queries) in a segment; with skipping, whether a block of keys is dead is asked once a segment
SEGMENT, SKIP_SEGMENT = 8, 2


@triton.jit
def _keys(k_ptr, far_k_ptr, k_b, k_j, places, b, kb, n, P: tl.constexpr):
    """Keys, grouped keys, positions and documents of a block of 64 in one row of the batch."""
    j0 = kb * 64
    row = tl.arange(0, 64)
    k_at = b * k_b + tl.cast(j0, tl.int64) * k_j
    k_jd = rows(k_ptr + k_at, row, k_j, n.n_j - j0, True, P)
    far_k_jd = k_jd
    if P.extend > 0:
        far_k_jd = rows(far_k_ptr + k_at, row, k_j, n.n_j - j0, True, P)
    pos_j, doc_j = stand(places, j0 + row, n.n_j, P)
    return k_jd, far_k_jd, pos_j, doc_j


@triton.jit
def _tile(
    q_ptr, far_q_ptr, q_i, places, key, slope, qb, n, TRANSPOSED: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Votes of one tile, the derivative of the logits that cast them, and the pairs allowed (True where not MASK)."""
    k_jd, far_k_jd, pos_j, doc_j = key
    i0 = qb * 64
    row = tl.arange(0, 64)
    q_at = tl.cast(i0, tl.int64) * q_i
    q_id = rows(q_ptr + q_at, row, q_i, n.n_i - i0, True, P)
    far_q_id = q_id
    if P.extend > 0:
        far_q_id = rows(far_q_ptr + q_at, row, q_i, n.n_i - i0, True, P)
    pos_i, doc_i = stand(places, i0 + row, n.n_i, P)
    if TRANSPOSED:
        pos_i, doc_i, pos_j, doc_j = pos_i[None, :], doc_i[None, :], pos_j[:, None], doc_j[:, None]
    else:
        pos_i, doc_i, pos_j, doc_j = pos_i[:, None], doc_i[:, None], pos_j[None, :], doc_j[None, :]
    ZONE: tl.constexpr = BOTH if P.extend > 0 else NEAR
    sim = logits((q_id, far_q_id, far_q_id), (k_jd, far_k_jd), pos_i, pos_j, n, ZONE, TRANSPOSED, P)
    sim, change = modify(sim, pos_i, pos_j, slope, n, P)
    if MASK:
        ok = allowed(pos_i, pos_j, doc_i, doc_j, n, P)
        cast = votes(sim, ok & (pos_i != pos_j), pos_j)
    else:
        ok = True
        cast = votes(sim, True, pos_j)
    return cast, change, ok


@triton.jit
def _unmasked_from(kb, t_lo, t_hi, P: tl.constexpr):
    """The first of a segment's tiles from which on every query sees every key of the block."""
    at = t_hi
    if not P.window and not P.stored:
        at = tl.minimum(tl.maximum(t_lo, kb + 1), t_hi)
    return at


@triton.jit
def _segment(block, seg, walk_ptr, walk_at, last_ptr, last_at, n, SEG: tl.constexpr, P: tl.constexpr):
    """First tile, and one past the last, of the queries in this segment that may see a living key of the block."""
    walk = queries_of(block, walk_ptr, walk_at, n, P)
    lo, hi = walk[2], walk[7]
    if P.skip:
        hi = tl.minimum(hi, tl.load(last_ptr + last_at + block))
    return tl.maximum(seg * SEG, lo // 64), tl.minimum((seg + 1) * SEG, (hi + 63) // 64)


@triton.jit(do_not_specialize=["n", "head"])
def count_votes(
    q_ptr, k_ptr, far_q_ptr, far_k_ptr, slope_ptr, part_ptr, pos_i_ptr, pos_j_ptr, doc_i_ptr, doc_j_ptr, walk_ptr,
    pos_i_b, pos_j_b, walk_b, q_b, q_i, k_b, k_j, part_b, part_s, head, n, SEG: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Votes of the segment of queries before each against each key, (b 1+segments j) float32; q, k are the selecting head's."""
    kb, seg, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    places = (pos_i_ptr, doc_i_ptr, b * pos_i_b)
    key = _keys(k_ptr, far_k_ptr, k_b, k_j, (pos_j_ptr, doc_j_ptr, b * pos_j_b), b, kb, n, P)
    slope = 0.0
    if P.alibi:
        slope = tl.load(slope_ptr + head)
    total = tl.zeros([64], tl.float32)
    walk = queries_of(kb, walk_ptr, b * walk_b, n, P)
    t_lo, t_hi = tl.maximum(seg * SEG, walk[2] // 64), tl.minimum((seg + 1) * SEG, (walk[7] + 63) // 64)
    q_ptr += b * q_b
    if P.extend > 0:
        far_q_ptr += b * q_b
    inside = _unmasked_from(kb, t_lo, t_hi, P)
    for t in range(t_lo, inside):
        cast, _, _ = _tile(q_ptr, far_q_ptr, q_i, places, key, slope, t, n, True, True, P)
        total += tl.sum(cast, 1)
    for t in range(inside, t_hi):
        cast, _, _ = _tile(q_ptr, far_q_ptr, q_i, places, key, slope, t, n, True, False, P)
        total += tl.sum(cast, 1)
    at = part_ptr + b * part_b + tl.cast(seg, tl.int64) * part_s + kb * 64 + tl.arange(0, 64)
    tl.store(at + part_s, total)
    if seg == 0:
        tl.store(at, tl.zeros([64], tl.float32))


@triton.jit(do_not_specialize=["n"])
def find_live(
    least_ptr, dead_ptr, live_ptr, count_ptr, walk_ptr, walk_b, least_b, live_b, n, BLOCKS: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Blocks of keys before a segment of 128 queries that may be seen from it and hold a living key, in order.

    least (b segments blocks) is the smallest penalty in a block at the segment's first query.
    """
    seg, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kb = tl.arange(0, BLOCKS)
    walk = keys_of(seg, walk_ptr, b * walk_b, n, P)
    seen = (kb * 64 >= walk[2]) & (kb * 64 < walk[7])
    if P.sinks:
        seen = seen | ((kb * 64 >= walk[0]) & (kb * 64 < walk[1]))
    seen = seen & (kb < seg * 2)
    least = tl.load(least_ptr + b * least_b + seg * n.blocks + kb, mask=seen, other=float("inf"))
    live = (least < tl.load(dead_ptr)).to(tl.int32)
    tl.store(live_ptr + b * live_b + seg * n.blocks + tl.cumsum(live, 0) - live, kb, mask=live > 0)
    tl.store(count_ptr + b * (live_b // n.blocks) + seg, tl.sum(live, 0))


@triton.jit
def _fill_step(
    carry, t, kb, q_ptr, far_q_ptr, q_i, places, key, slope, dead, scratch_ptr, n, BY_KEYS: tl.constexpr,
    MASK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """F of one tile, infinite for dead keys, and the carry after it."""
    cast, _, _ = _tile(q_ptr, far_q_ptr, q_i, places, key, slope, t, n, True, MASK, P)
    i = tl.arange(0, 64)
    earlier = tl.where(i[:, None] < i[None, :], 1.0, 0.0)
    # float16, in which F is stored beside 16-bit inputs, ends at 65504: a key with such a penalty is long dead
    HALF: tl.constexpr = scratch_ptr.dtype.element_ty == tl.float16
    if HALF:
        cast = tl.minimum(cast, 60000.0)
    votes_ji = cast.to(tl.float32 if P.exact else tl.float16)
    before = tl.dot(votes_ji, earlier.to(votes_ji.dtype), input_precision="ieee") + carry[:, None]
    carry += tl.sum(cast, 1)
    if HALF:
        before = tl.minimum(before, 60000.0)
    before = bury(before.to(scratch_ptr.dtype.element_ty), dead, P)
    if not BY_KEYS:
        # computed as [j, i], in which sums over queries stay within a thread
        before = tl.trans(before)
    at = scratch_ptr + slot(t, kb, n, BY_KEYS, P) * 4096 + tl.arange(0, 4096)
    tl.store(at, pack(before, 64, 64, 4))
    return carry


@triton.jit(do_not_specialize=["n", "first_block", "first_segment", "last_block"])
def fill(
    q_ptr, k_ptr, far_q_ptr, far_k_ptr, slope_ptr, carry_ptr, dead_ptr, last_ptr, scratch_ptr, pos_i_ptr, pos_j_ptr, doc_i_ptr,
    doc_j_ptr, walk_ptr, pos_i_b, pos_j_b, walk_b, q_b, q_i, k_b, k_j, carry_b, carry_s, scratch_b, first_block, first_segment,
    last_block, head, n, SEG: tl.constexpr, BY_KEYS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """F of one block of keys and one segment of queries into the scratch: row after row, or BY_KEYS transposed."""
    kb = first_block + tl.program_id(0)
    seg = first_segment + tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    t_lo, t_hi = _segment(kb, seg, walk_ptr, b * walk_b, last_ptr, b * n.blocks, n, SEG, P)
    t_hi = tl.minimum(t_hi, last_block)
    if t_lo < t_hi:
        places = (pos_i_ptr, doc_i_ptr, b * pos_i_b)
        key = _keys(k_ptr, far_k_ptr, k_b, k_j, (pos_j_ptr, doc_j_ptr, b * pos_j_b), b, kb, n, P)
        slope = 0.0
        if P.alibi:
            slope = tl.load(slope_ptr + head)
        dead = 0.0
        if P.skip:
            dead = tl.load(dead_ptr)
        carry = tl.load(carry_ptr + b * carry_b + tl.cast(seg, tl.int64) * carry_s + kb * 64 + tl.arange(0, 64))
        q_ptr += b * q_b
        if P.extend > 0:
            far_q_ptr += b * q_b
        scratch_ptr += b * scratch_b
        inside = _unmasked_from(kb, t_lo, t_hi, P)
        for t in range(t_lo, inside):
            carry = _fill_step(
                carry, t, kb, q_ptr, far_q_ptr, q_i, places, key, slope, dead, scratch_ptr, n, BY_KEYS, True, P
            )  # fmt: skip
        for t in range(inside, t_hi):
            carry = _fill_step(
                carry, t, kb, q_ptr, far_q_ptr, q_i, places, key, slope, dead, scratch_ptr, n, BY_KEYS, False, P
            )  # fmt: skip


@triton.jit
def _spread_step(
    carry, t, kb, q_ptr, far_q_ptr, q_i, places, key, slope, slices_ptr, slice_stride, dz_ptr, n, MASK: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """dz of one tile, and the carry before it."""
    SLICES: tl.constexpr = P.slices
    cast, change, ok = _tile(q_ptr, far_q_ptr, q_i, places, key, slope, t, n, False, MASK, P)
    base = slot(t, kb, n, False, P) * 4096
    packed = tl.arange(0, 4096)
    dsim = tl.load(slices_ptr + base + packed).to(tl.float32)
    for more in tl.static_range(1, SLICES):
        dsim += tl.load(slices_ptr + more * slice_stride + base + packed).to(tl.float32)
    dsim = unpack(dsim, 64, 64, 4)
    if MASK:
        # a tile that the dQ kernel had no reason to visit was never written
        dsim = tl.where(ok, dsim, 0.0)
    i = tl.arange(0, 64)
    # dF is minus dS
    later = tl.where(i[:, None] < i[None, :], -1.0, 0.0)
    # the slices are bfloat16 too where the inputs have 16 bits
    dsim_ij = dsim.to(tl.float32 if P.exact else tl.bfloat16)
    gained = tl.dot(later.to(dsim_ij.dtype), dsim_ij, input_precision="ieee") + carry[None, :]
    carry -= tl.sum(dsim, 0)
    dz = tl.where(cast > 0, gained, 0.0)
    if P.softcap:
        dz = dz * change
    tl.store(dz_ptr + base + i[:, None] * 64 + i[None, :], dz.to(dz_ptr.dtype.element_ty))
    return carry


@triton.jit(do_not_specialize=["n", "first_segment", "last_block"])
def spread(
    q_ptr, k_ptr, far_q_ptr, far_k_ptr, slope_ptr, carry_ptr, last_ptr, slices_ptr, dz_ptr, pos_i_ptr, pos_j_ptr, doc_i_ptr,
    doc_j_ptr, walk_ptr, pos_i_b, pos_j_b, walk_b, q_b, q_i, k_b, k_j, carry_b, carry_s, scratch_b, slice_stride, first_segment,
    last_block, head, n, SEG: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Slices of dS -> the selecting head's gradient dz, tile by tile in rows of 64, from a segment's last tile to its first."""
    kb, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    seg = first_segment + tl.program_id(1)
    t_lo, t_hi = _segment(kb, seg, walk_ptr, b * walk_b, last_ptr, b * n.blocks, n, SEG, P)
    t_hi = tl.minimum(t_hi, last_block)
    if t_lo < t_hi:
        places = (pos_i_ptr, doc_i_ptr, b * pos_i_b)
        key = _keys(k_ptr, far_k_ptr, k_b, k_j, (pos_j_ptr, doc_j_ptr, b * pos_j_b), b, kb, n, P)
        slope = 0.0
        if P.alibi:
            slope = tl.load(slope_ptr + head)
        carry = tl.load(carry_ptr + b * carry_b + tl.cast(seg, tl.int64) * carry_s + kb * 64 + tl.arange(0, 64))
        q_ptr += b * q_b
        if P.extend > 0:
            far_q_ptr += b * q_b
        slices_ptr += b * scratch_b
        dz_ptr += b * scratch_b
        inside = _unmasked_from(kb, t_lo, t_hi, P)
        for back in range(0, t_hi - inside):
            carry = _spread_step(
                carry, t_hi - 1 - back, kb, q_ptr, far_q_ptr, q_i, places, key, slope, slices_ptr, slice_stride,
                dz_ptr, n, False, P,
            )  # fmt: skip
        for back in range(0, inside - t_lo):
            carry = _spread_step(
                carry, inside - 1 - back, kb, q_ptr, far_q_ptr, q_i, places, key, slope, slices_ptr, slice_stride,
                dz_ptr, n, True, P,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n", "first_block", "dq_first", "dq_part"])
def add_dq(
    k_ptr, far_k_ptr, live_ptr, count_ptr, dz_ptr, dq_ptr, far_dq_ptr, pos_i_ptr, pos_j_ptr, doc_i_ptr, doc_j_ptr, walk_ptr,
    pos_i_b, pos_j_b, walk_b, k_b, k_j, dq_part, dq_b, dq_i, dq_first, scratch_b, live_b, first_block, n, P: tl.constexpr,
):  # fmt: skip
    """dQ += dz K of the selecting head, a block of 64 queries; axis 2 of the grid shares out its keys, as in the dQ kernel."""
    BLOCK_D: tl.constexpr = P.block_d
    qb, b = first_block + tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, 64)
    pos_i, doc_i = stand((pos_i_ptr, doc_i_ptr, b * pos_i_b), qb * 64 + i, n.n_i, P)
    dq = tl.zeros([64, BLOCK_D], tl.float32)
    far_dq = tl.zeros([64, BLOCK_D], tl.float32)
    walk = keys_of(qb, walk_ptr, b * walk_b, n, P)
    front_lo, front_hi, lo, hi = walk[0], walk[1], walk[2], walk[7]
    fronts = (tl.maximum(front_hi - front_lo, 0) + 63) // 64
    count = fronts + (tl.maximum(hi - lo, 0) + 63) // 64
    segment = qb // 2
    if P.skip:
        # living blocks before the segment, then its own
        live_ptr += b * live_b + segment * n.blocks
        fronts = tl.load(count_ptr + b * (live_b // n.blocks) + segment)
        lo = segment * 128
        count = fronts + (hi - lo + 63) // 64
    part = tl.program_id(2)
    first_step, last_step = share(0, count, part, tl.num_programs(2), 1)
    ahead = 0
    if P.skip:
        ahead = tl.load(live_ptr + tl.minimum(first_step, n.blocks - 1))
    for step in range(first_step, last_step):
        kb = tl.where(step < fronts, front_lo // 64 + step, lo // 64 + step - fronts)
        if P.skip:
            kb = tl.where(step < fronts, ahead, kb)
            ahead = tl.load(live_ptr + tl.minimum(step + 1, n.blocks - 1))
        dz = tl.load(dz_ptr + b * scratch_b + slot(qb, kb, n, False, P) * 4096 + i[:, None] * 64 + i[None, :])
        k_jd, far_k_jd, pos_j, doc_j = _keys(k_ptr, far_k_ptr, k_b, k_j, (pos_j_ptr, doc_j_ptr, b * pos_j_b), b, kb, n, P)
        if P.stored or P.skip and P.window:
            # the walk of these queries may pass tiles in which nobody sees anybody, which were never written
            ok = allowed(pos_i[:, None], pos_j[None, :], doc_i[:, None], doc_j[None, :], n, P)
            dz = tl.where(ok, dz, 0.0)
        if P.extend > 0:
            far = pos_i[:, None] - pos_j[None, :] >= n.near
            far_dq = tl.dot(tl.where(far, dz, 0.0), far_k_jd, far_dq, input_precision="ieee")
            dz = tl.where(far, 0.0, dz)
        dq = tl.dot(dz, k_jd, dq, input_precision="ieee")
    scale = n.scale * 0.6931471805599453
    at = part * tl.cast(dq_part, tl.int64) + b * dq_b + tl.cast(qb * 64 - dq_first, tl.int64) * dq_i
    left = n.n_i - qb * 64
    put_rows(dq_ptr + at, rows(dq_ptr + at, i, dq_i, left, True, P).to(tl.float32) + dq * scale, i, dq_i, left, P)
    if P.extend > 0:
        far_dq = rows(far_dq_ptr + at, i, dq_i, left, True, P).to(tl.float32) + far_dq * scale
        put_rows(far_dq_ptr + at, far_dq, i, dq_i, left, P)


@triton.jit(do_not_specialize=["n", "first_block", "last_block"])
def add_dk(
    q_ptr, far_q_ptr, last_ptr, dz_ptr, dk_ptr, far_dk_ptr, pos_i_ptr, pos_j_ptr, doc_i_ptr, doc_j_ptr, walk_ptr, pos_i_b,
    pos_j_b, walk_b, q_b, q_i, dk_b, dk_j, scratch_b, first_block, last_block, n, P: tl.constexpr,
):  # fmt: skip
    """dK += dz^T Q of the selecting head, a block of 64 keys, over the blocks of queries from first_block to last_block."""
    BLOCK_D: tl.constexpr = P.block_d
    kb, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, 64)
    pos_j, doc_j = stand((pos_j_ptr, doc_j_ptr, b * pos_j_b), kb * 64 + i, n.n_j, P)
    dk = tl.zeros([64, BLOCK_D], tl.float32)
    far_dk = tl.zeros([64, BLOCK_D], tl.float32)
    walk = queries_of(kb, walk_ptr, b * walk_b, n, P)
    lo, hi = walk[2], walk[7]
    if P.skip:
        hi = tl.minimum(hi, tl.load(last_ptr + b * n.blocks + kb))
    t_lo, t_hi = tl.maximum(lo // 64, first_block), tl.minimum((hi + 63) // 64, last_block)
    for t in range(t_lo, t_hi):
        dz = tl.load(dz_ptr + b * scratch_b + slot(t, kb, n, False, P) * 4096 + i[:, None] * 64 + i[None, :])
        q_at = tl.cast(t * 64, tl.int64) * q_i
        q_id = rows(q_ptr + b * q_b + q_at, i, q_i, n.n_i - t * 64, True, P)
        if P.extend > 0:
            pos_i, doc_i = stand((pos_i_ptr, doc_i_ptr, b * pos_i_b), t * 64 + i, n.n_i, P)
            far_q_id = rows(far_q_ptr + b * q_b + q_at, i, q_i, n.n_i - t * 64, True, P)
            far = pos_i[:, None] - pos_j[None, :] >= n.near
            far_dk = tl.dot(tl.trans(tl.where(far, dz, 0.0)), far_q_id, far_dk, input_precision="ieee")
            dz = tl.where(far, 0.0, dz)
        dk = tl.dot(tl.trans(dz), q_id, dk, input_precision="ieee")
    if t_lo < t_hi:
        scale = n.scale * 0.6931471805599453
        at = b * dk_b + tl.cast(kb * 64, tl.int64) * dk_j
        left = n.n_j - kb * 64
        put_rows(dk_ptr + at, rows(dk_ptr + at, i, dk_j, left, True, P).to(tl.float32) + dk * scale, i, dk_j, left, P)
        if P.extend > 0:
            far_dk = rows(far_dk_ptr + at, i, dk_j, left, True, P).to(tl.float32) + far_dk * scale
            put_rows(far_dk_ptr + at, far_dk, i, dk_j, left, P)
