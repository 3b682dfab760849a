"""Launching the decode kernels: how many splits, and with carried votes how many queries at a time.

Letters: r splits, u the last queries whose votes are asked for.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from xattn.kernels import decode
from xattn.kernels.again import name_kernels
from xattn.kernels.call import Inputs, Options, Parts, heads_last, numbers_of, parts_of
from xattn.kernels.tiles import decode_tile, fitting

# programs that the largest GPUs hold at once, two for each of 132 processors: one wave has no tail
_PROGRAMS = 264
# what one program of `merge` holds, and what is worth a program
_MOST_SPLITS, _LEAST_KEYS = 64, 256


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What decoding takes beyond a call's Inputs, whose keys are raw with Self-Extend.

    plain: key slot j holds token j. carry (b j) float32, the votes so far; rows: after how many of the last queries to
    return them. turn (b 4 j half) float32: cos and sin of each key's position, then of its grouped one; b may be 1.
    """

    plain: bool
    carry: Tensor | None = None
    rows: int = 1
    turn: Tensor | None = None


def _row(t: Tensor | None) -> int:
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)


def splits(programs: int, keys: int) -> int:
    """Among how many programs the keys of one tile of queries are shared out."""
    return max(1, min(_PROGRAMS // programs, -(-keys // _LEAST_KEYS), _MOST_SPLITS))


def run_decode(inputs: Inputs, options: Options, more: Decoding) -> tuple[Tensor, Tensor]:
    """out (b h i d), and the votes (b u j) float32 after each of the last u = rows queries; empty without a carry."""
    name_kernels()
    return fitting(_decode, inputs, options, more)


def _decode(inputs: Inputs, options: Options, more: Decoding, *, step: int) -> tuple[Tensor, Tensor]:
    # its kernels count in 64 bits, and a cache is not to be copied
    x = inputs.ready(reach=2**63)
    b, h, n_i, d = x.q.shape
    n_j, device = x.k.shape[2], x.q.device
    out = heads_last(b, h, n_i, d, x.q)
    if more.carry is None:
        _attend(x, options, more, out, None, step)
        return out, torch.empty(0, device=device)
    carry = more.carry.float().contiguous().clone()
    after = torch.empty(b, more.rows, n_j, device=device, dtype=torch.float32)
    # F of so many queries fits the scratch
    piece = max(64, options.scratch_bytes // (4 * b * n_j) // 64 * 64)
    for first in range(0, n_i, piece):
        part = slice(first, min(first + piece, n_i))
        some = _queries(x, part)
        penalty = _count(some, options, more, carry, after, to_come=n_i - first, step=step)
        _attend(some, options, more, out[:, :, part], penalty, step)
    return out, after


def _queries(x: Inputs, part: slice) -> Inputs:
    """The call of some of its queries."""
    heads = {name: t[:, :, part] for name in ("q", "far_q", "ahead_q") if (t := getattr(x, name)) is not None}
    places = {name: t[:, part] for name in ("pos_i", "doc_i") if (t := getattr(x, name)) is not None}
    return replace(x, **heads, **places)


def _count(x: Inputs, o: Options, more: Decoding, carry: Tensor, after: Tensor, *, to_come: int, step: int) -> Tensor:
    """F (b i j) of these queries; `after` takes the votes after those of them that are among the last u of `to_come`."""
    b, _, n_i, _ = x.q.shape
    n_j = x.k.shape[2]
    P, how = _tiled("count", x, o, more, rows=n_i, step=step)
    n = numbers_of(x, o)._replace(scale=o.scale, cap=o.cap)
    penalty = torch.empty(b, n_i, n_j, device=x.q.device, dtype=torch.float32)
    u = after.shape[1]
    skipped = max(0, to_come - u)
    mine = after[:, max(0, u - to_come) :]
    head, g = o.sim_head, o.sim_head // P.group
    far_q = None if x.far_q is None else x.far_q[:, head]
    decode.count[(-(-n_j // P.block_j), b)](
        x.q[:, head], x.k[:, g], far_q, more.turn, x.slopes, carry, penalty, mine, *_places(x, more),
        x.q.stride(0), x.q.stride(2), x.k.stride(0), x.k.stride(2), carry.stride(0), *penalty.stride()[:2], *mine.stride()[:2],
        head, skipped, n, P=P, **how,
    )  # fmt: skip
    return penalty


def _attend(x: Inputs, o: Options, more: Decoding, out: Tensor, penalty: Tensor | None, step: int) -> None:
    """Fills out (b h i d)."""
    b, h, n_i, d = x.q.shape
    g, n_j = x.k.shape[1:3]
    n, rows = numbers_of(x, o), n_i * (h // g)
    P, how = _tiled("decode", x, o, more, rows=rows, step=step)
    tiles = g * -(-rows // P.block_i)
    # of keys in order only those within the window are visited
    seen = min(n_j, o.sinks + n_i + (1 if o.causal else 2) * o.window) if more.plain and o.window else n_j
    r = splits(tiles * b, seen)
    lse = torch.empty(r, b, h, n_i, device=out.device, dtype=torch.float32)
    part = out[None] if r == 1 else torch.empty(r, b, h, n_i, d, device=out.device, dtype=torch.float32)
    penalty_at = (0, 0) if penalty is None else penalty.stride()[:2]
    decode.decode[(r, tiles, b)](
        x.q, x.k, x.v, x.far_q, x.ahead_q, more.turn, part, lse, x.sink, x.slopes, penalty, x.dead, *_places(x, more),
        *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3], *part.stride()[:4], lse.stride(0), *penalty_at, n, P=P, **how,
    )  # fmt: skip
    if r > 1:
        decode.merge[(n_i, h, b)](
            part, lse, out, part.stride(0), lse.stride(0), *out.stride()[:3], r, n, SPLITS=triton.next_power_of_2(r), P=P,
            num_warps=4,
        )  # fmt: skip


def _tiled(kernel: str, x: Inputs, o: Options, more: Decoding, *, rows: int, step: int) -> tuple[Parts, dict[str, Any]]:
    """A kernel's structure with its tile, and its other constants with how it is launched."""
    P = parts_of(x, o)
    split = _split(more, P)
    t = decode_tile(
        kernel, rows=rows, block_d=P.block_d, itemsize=x.q.element_size(), extend=P.extend > 0, split=split, step=step
    )
    how = {"SPLIT": split, "HALF": _half(more), "PLAIN": more.plain, "num_warps": t.warps, "num_stages": t.stages}
    return P._replace(block_i=t.block_i, block_j=t.block_j, warps=t.warps, even=False), how


def _half(more: Decoding) -> int:
    """Pairs that a key's rotation turns; 1 where nothing is turned here."""
    return 1 if more.turn is None else more.turn.shape[3]


def _split(more: Decoding, parts: Parts) -> bool:
    """Whether keys are turned as two halves: all of the head is turned, and fills its tile."""
    half = _half(more)
    return more.turn is not None and half >= 16 and 2 * half == parts.d == parts.block_d


def _places(x: Inputs, more: Decoding) -> tuple[Tensor | int | None, ...]:
    """Positions and documents, and how far apart rows of the batch lie in them and in the table of turns."""
    return x.pos_i, x.pos_j, x.doc_i, x.doc_j, _row(x.pos_i), _row(x.pos_j), _row(more.turn)
