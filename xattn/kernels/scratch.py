"""Scratch of selective attention: F and its gradient in 64 x 64 tiles, stored in the order of a Hopper accumulator's registers.

A tile's 4096 numbers lie as 128 threads hold them, 8 contiguous ones a thread, so that a one-dimensional load and a
reshape land in the layout that the matrix unit leaves its sums in: no trip through shared memory. The arithmetic is right
on any machine; only its speed depends on the layouts meeting.

Only tiles at or below the diagonal exist, and with a window only those in its band and, in front of it, the columns that
hold sink tokens. They lie row after row of queries, or column after column of keys; one spare tile in front and one behind
take what masked corners touch.

Letters: y rows of tiles (of queries, or of keys when BY_KEYS), x tiles across.
"""

from bisect import bisect_left
from functools import lru_cache
from itertools import pairwise

import triton
import triton.language as tl

SPARE = 1


@triton.jit
def _columns_before(kb, n, P: tl.constexpr):
    """Tiles in the columns before kb, counted from the first: whole ones, or from the front on those of the band."""
    whole = kb
    if P.band:
        whole = tl.minimum(kb, n.front)
    before = whole * n.blocks - whole * (whole - 1) // 2
    if P.band:
        before += (kb - whole) * n.width
    return before


@triton.jit
def slot(qb, kb, n, BY_KEYS: tl.constexpr, P: tl.constexpr):
    """Which tile of the scratch holds block qb of queries and kb of keys; n.first: the first row (or column) in it."""
    if BY_KEYS:
        at = _columns_before(kb, n, P) - _columns_before(n.first, n, P) + qb - kb
    elif P.band:
        at = (qb - n.first) * (n.front + n.width)
        at += tl.where(kb < n.front, kb, n.front + n.width - 1 + kb - qb)
    else:
        at = qb * (qb + 1) // 2 - n.first * (n.first + 1) // 2 + kb
    return tl.cast(at + 1, tl.int64)


def rows_before(y: int, blocks: int, width: int, front: int, *, by_keys: bool) -> int:
    """Tiles in the rows (or columns) before y, counted from the start; width 0: no band, and no columns in front of it."""
    if not by_keys:
        return y * (front + width) if width else y * (y + 1) // 2
    whole = min(y, front) if width else y
    return whole * blocks - whole * (whole - 1) // 2 + (y - whole) * width


@lru_cache(maxsize=1024)
def cut_chunks(
    blocks: int, width: int, front: int, tile_bytes: int, cap: int, *, by_keys: bool, step: int
) -> tuple[tuple[int, int], ...]:
    """Rows (or columns) of tiles in chunks that fit the cap where cuts at multiples of `step` allow it.

    As few as that takes, and even ones, for a small last one would leave processors idle.
    """
    cuts = [*range(0, blocks, step), blocks]
    held = [rows_before(y, blocks, width, front, by_keys=by_keys) * tile_bytes for y in cuts]
    count = max(1, -(-held[-1] // cap))
    while True:
        chosen = [0]
        for share in range(1, count):
            goal = held[-1] * share / count
            at = bisect_left(held, goal)
            chosen.append(at - (at > 0 and goal - held[at - 1] <= held[at] - goal))
        ends = sorted({*chosen, len(cuts) - 1})
        pairs = list(pairwise(ends))
        if len(pairs) == len(cuts) - 1 or all(held[last] - held[first] <= cap for first, last in pairs):
            return tuple((cuts[first], cuts[last]) for first, last in pairs)
        count += 1


@triton.jit
def _place(i, M: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr):
    """Which 64 x 64 tile (down, across) the i-th register of a packed M x N block belongs to, and its place in there."""
    piece = i // 1024
    if WARPS == 8 and M == 128:
        down = piece % 2
        quarter = (piece // 2) % 4
        across = piece // 8
    else:
        quarter = piece % 4
        across = (piece // 4) % (N // 64)
        down = piece // (4 * (N // 64))
    return down, across, quarter * 1024 + i % 1024


@triton.jit
def unpack(x, M: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr):
    """Registers in storage order -> a block (M N)."""
    if WARPS == 8 and M == 128:
        y = tl.permute(tl.reshape(x, [N // 64, 4, M // 64, 4, 8, 4, 2, 2, 2]), (2, 3, 7, 4, 0, 1, 6, 5, 8))
    else:
        y = tl.permute(tl.reshape(x, [M // 64, N // 64, 4, 4, 8, 4, 2, 2, 2]), (0, 3, 7, 4, 1, 2, 6, 5, 8))
    return tl.reshape(y, [M, N])


@triton.jit
def pack(x, M: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr):
    """A block (M N) -> registers in storage order."""
    y = tl.reshape(x, [M // 64, 4, 2, 8, N // 64, 4, 2, 4, 2])
    if WARPS == 8 and M == 128:
        y = tl.permute(y, (4, 5, 0, 1, 3, 7, 6, 2, 8))
    else:
        y = tl.permute(y, (0, 4, 5, 1, 3, 7, 6, 2, 8))
    return tl.reshape(y, [M * N])


@triton.jit
def _at(base, below, M: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr):
    """Where the registers of a packed block lie whose upper left tile is `base`, the next row's `below` further on."""
    i = tl.arange(0, M * N)
    if M == 64 and N == 64:
        at = base * 4096 + i
    else:
        down, across, inside = _place(i, M, N, WARPS)
        at = base * 4096 + ((down * below + across) * 4096 + inside)
    return at


@triton.jit
def penalty(ptr, qb, kb, n, BY_KEYS: tl.constexpr, P: tl.constexpr):
    """F of a block whose upper left tile is (qb, kb): (queries keys), or (keys queries) when BY_KEYS."""
    W: tl.constexpr = P.warps
    M: tl.constexpr = P.block_j if BY_KEYS else P.block_i
    N: tl.constexpr = P.block_i if BY_KEYS else P.block_j
    base = slot(qb, kb, n, BY_KEYS, P)
    if BY_KEYS:
        below = slot(qb, kb + 1, n, BY_KEYS, P) - base
    else:
        below = slot(qb + 1, kb, n, BY_KEYS, P) - base
    return unpack(tl.load(ptr + _at(base, below, M, N, W)), M, N, W)


@triton.jit
def put_by_queries(ptr, x, qb, kb, n, MASK: tl.constexpr, P: tl.constexpr):
    """Store a block (queries keys); where MASK, only its tiles that exist."""
    W: tl.constexpr = P.warps
    M: tl.constexpr = P.block_i
    N: tl.constexpr = P.block_j
    base = slot(qb, kb, n, False, P)
    below = slot(qb + 1, kb, n, False, P) - base
    at = ptr + _at(base, below, M, N, W)
    packed = pack(x.to(ptr.dtype.element_ty), M, N, W)
    if MASK and not (M == 64 and N == 64):
        down, across, inside = _place(tl.arange(0, M * N), M, N, W)
        exists = kb + across <= qb + down
        if P.band:
            exists = exists & ((kb + across > qb + down - n.width) | (kb + across < n.front))
        tl.store(at, packed, mask=exists)
    else:
        tl.store(at, packed)
