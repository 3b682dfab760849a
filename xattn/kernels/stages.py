"""The five stages of attention as @triton.jit helpers, twins of the parts in xattn/spec; every kernel calls these.

Logits are in units of log2, so that exp2 serves: a number here is the definition's times log2(e). A tile may lie either
way, [i, j] or [j, i]: positions come shaped to broadcast, (i 1) against (1 j), or (1 i) against (j 1). P is the call's
`Parts`, n its `Numbers`. (Triton 3.6 takes a field of P as a condition; as a number it must be bound to a constexpr name.)
"""

import triton
import triton.language as tl

# Which dot products a tile of Self-Extend needs: exact distances only, grouped ones only, or both; grouped ones for keys ahead.
NEAR = tl.constexpr(0)
FAR = tl.constexpr(1)
BOTH = tl.constexpr(2)
AHEAD = tl.constexpr(3)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows(ptr, row, stride, count, MASK: tl.constexpr, P: tl.constexpr):
    """Rows (len(row) block_d) of a matrix whose rows lie `stride` apart; where MASK, zero from `count` on."""
    RAGGED: tl.constexpr = MASK and not P.even
    BLOCK_D: tl.constexpr = P.block_d
    D: tl.constexpr = P.d
    d = tl.arange(0, BLOCK_D)
    at = ptr + row[:, None] * stride + d[None, :]
    if D == BLOCK_D:
        if RAGGED:
            tile = tl.load(at, mask=row[:, None] < count, other=0.0)
        else:
            tile = tl.load(at)
    elif RAGGED:
        tile = tl.load(at, mask=(row[:, None] < count) & (d[None, :] < D), other=0.0)
    else:
        tile = tl.load(at, mask=d[None, :] < D, other=0.0)
    return tile


@triton.jit
def put_rows(ptr, tile, row, stride, count, P: tl.constexpr):
    """Store what `rows` would load, in the matrix's dtype."""
    BLOCK_D: tl.constexpr = P.block_d
    D: tl.constexpr = P.d
    d = tl.arange(0, BLOCK_D)
    mask = row[:, None] < count
    if D != BLOCK_D:
        mask = mask & (d[None, :] < D)
    tl.store(ptr + row[:, None] * stride + d[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def numbers(ptr, at, count, MASK: tl.constexpr, P: tl.constexpr):
    """One number a slot; where MASK, zero from `count` on."""
    if MASK and not P.even:
        x = tl.load(ptr + at, mask=at < count, other=0.0)
    else:
        x = tl.load(ptr + at)
    return x


@triton.jit
def stand(places, slot, count, P: tl.constexpr):
    """Position and document of each slot: what the layout stored (-1 outside), or simply the slot.

    places: the stored positions and documents, and where this row of the batch begins in them.
    """
    pos_ptr, doc_ptr, at = places
    pos = slot
    doc = slot
    if P.stored:
        pos = tl.load(pos_ptr + at + slot, mask=slot < count, other=-1)
    if P.docs:
        doc = tl.load(doc_ptr + at + slot, mask=slot < count, other=-1)
    return pos, doc


# Stage 1: positions


@triton.jit
def product(q_id, k_jd, TRANSPOSED: tl.constexpr):
    """q . k of every pair: (i j), or (j i) computed as such, never by turning an accumulator."""
    if TRANSPOSED:
        sim = tl.dot(k_jd, tl.trans(q_id), input_precision="ieee")
    else:
        sim = tl.dot(q_id, tl.trans(k_jd), input_precision="ieee")
    return sim


@triton.jit
def within(apart, n, ZONE: tl.constexpr, P: tl.constexpr):
    """Whether queries `apart` from keys lie in one zone of Self-Extend."""
    if ZONE == FAR:
        ok = apart >= n.near
    elif ZONE == AHEAD:
        ok = apart <= -n.near
    else:
        ok = apart < n.near
        if P.extend == 2:
            ok = ok & (apart > -n.near)
    return ok


@triton.jit
def reaches(low_i, high_i, low_j, high_j, n, ZONE: tl.constexpr, P: tl.constexpr):
    """Whether some pair of a tile may lie in a zone, by the smallest and largest positions of either side."""
    if ZONE == FAR:
        ok = high_i - low_j >= n.near
    elif ZONE == AHEAD:
        ok = high_j - low_i >= n.near
    else:
        ok = low_i - high_j < n.near
        if P.extend == 2:
            ok = ok & (low_j - high_i < n.near)
    return ok


@triton.jit
def logits(q, k, pos_i, pos_j, n, ZONE: tl.constexpr, TRANSPOSED: tl.constexpr, P: tl.constexpr):
    """Logits of q = (exact, grouped, grouped for keys ahead) against k = (exact, grouped).

    Self-Extend replaces the logits of pairs that are n.near or more apart.
    """
    if ZONE == FAR:
        sim = product(q[1], k[1], TRANSPOSED)
    else:
        sim = product(q[0], k[0], TRANSPOSED)
        if ZONE == BOTH:
            apart = pos_i - pos_j
            sim = tl.where(within(apart, n, FAR, P), product(q[1], k[1], TRANSPOSED), sim)
            if P.extend == 2:
                sim = tl.where(within(apart, n, AHEAD, P), product(q[2], k[1], TRANSPOSED), sim)
    return sim * n.scale


@triton.jit
def distance(pos_i, pos_j, n, P: tl.constexpr):
    """How far each key lies behind each query, as Self-Extend counts it."""
    apart = pos_i - pos_j
    if P.extend > 0:
        shift = n.near - n.near // n.group
        far = pos_i // n.group - pos_j // n.group
        apart = tl.where(apart >= n.near, far + shift, tl.where(apart <= -n.near, far - shift, apart))
    return apart


# Stage 2: score


@triton.jit
def tanh(x):
    """tanh by exp2; a series where 1 - 2 / (1 + e) would cancel."""
    xx = x * x
    series = x * (1.0 + xx * (-0.3333333333 + xx * (0.1333333333 + xx * (-0.0539682540 + xx * 0.0218694885))))
    e = tl.exp2(-2.885390081777927 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def modify(sim, pos_i, pos_j, slope, n, P: tl.constexpr):
    """The changed logits, and their derivative by the unchanged ones (1.0 without a soft cap)."""
    change = 1.0
    if P.softcap:
        bent = tanh(sim / n.cap)
        sim = n.cap * bent
        change = 1.0 - bent * bent
    if P.alibi:
        sim -= slope * tl.abs(distance(pos_i, pos_j, n, P)).to(tl.float32)
    return sim, change


# Stage 3: pattern


@triton.jit
def allowed(pos_i, pos_j, doc_i, doc_j, n, P: tl.constexpr):
    """Which pairs may attend."""
    apart = pos_i - pos_j
    if P.stored:
        ok = (pos_i >= 0) & (pos_j >= 0)
    elif P.even and P.causal:
        ok = apart >= 0
    else:
        ok = (pos_i < n.n_i) & (pos_j < n.n_j)
    if P.causal:
        ok = ok & (apart >= 0)
    if P.window:
        seen = tl.abs(apart) < n.window
        if P.sinks:
            seen = seen | (pos_j < n.sinks)
        ok = ok & seen
    if P.docs:
        ok = ok & (doc_i == doc_j)
    return ok


# Stage 4: selection


@triton.jit
def votes(sim, earlier, pos_j):
    """What each query of the selecting head votes against each earlier key it sees; never a document's first token."""
    return tl.where(earlier & (pos_j != 0), tl.maximum(sim, 0.0), 0.0)


@triton.jit
def bury(penalty, dead, P: tl.constexpr):
    """With skipping, an infinite penalty where it has reached `dead`."""
    if P.skip:
        penalty = tl.where(penalty.to(tl.float32) < dead, penalty, float("inf"))
    return penalty


@triton.jit
def subtract(sim, penalty):
    """Logits less the penalty; -inf for dead keys."""
    return sim - penalty.to(tl.float32)


# Stage 5: normaliser


@triton.jit
def divide(a, b, P: tl.constexpr):
    """a / b, rounded once where that shows: a GPU's own division of float32 is off by up to two units in the last place."""
    if P.exact:
        share = tl.div_rn(a, b)
    else:
        share = a / b
    return share


@triton.jit
def weigh(acc_id, total_i, top_i, sim_ij, v_jd, MASK: tl.constexpr):
    """One tile of an online softmax: weighted values, sum of weights, and the largest logit so far (-inf: nothing seen)."""
    highest = tl.maximum(top_i, tl.max(sim_ij, 1))
    pivot = highest
    if MASK:
        # -inf minus -inf is no number
        pivot = tl.where(highest == float("-inf"), 0.0, highest)
    attn_ij = tl.exp2(sim_ij - pivot[:, None])
    decay = tl.exp2(top_i - pivot)
    total_i = total_i * decay + tl.sum(attn_ij, 1)
    acc_id = tl.dot(attn_ij.to(v_jd.dtype), v_jd, acc_id * decay[:, None], input_precision="ieee")
    return acc_id, total_i, highest


@triton.jit
def normalise(acc_id, total_i, top_i, sink, P: tl.constexpr):
    """Output and base-2 log-sum-exp; a row that saw nothing gives 0 and -inf (the sink alone, where there is one)."""
    if P.sink_logits:
        highest = tl.maximum(top_i, sink)
        decay = tl.exp2(top_i - highest)
        total_i = total_i * decay + tl.exp2(sink - highest)
        acc_id = acc_id * decay[:, None]
        top_i = highest
    nothing = total_i == 0.0
    total_i = tl.where(nothing, 1.0, total_i)
    return divide(acc_id, total_i[:, None], P), tl.where(nothing, float("-inf"), top_i + tl.log2(total_i))
