"""Launching the kernels: grids, strides, and the scratch of selection, which is cut into chunks that fit its cap.

Letters: c columns of the scratch (keys of a chunk), t segments of queries.
"""

import math
from functools import cached_property
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from xattn.kernels import backward, forward, selection
from xattn.kernels.again import Launches
from xattn.kernels.call import LOG2E, Inputs, Options, Parts, heads_last, laid_out, numbers_of, parts_of
from xattn.kernels.scratch import SPARE, cut_chunks, rows_before
from xattn.kernels.selection import SEGMENT, SKIP_SEGMENT
from xattn.kernels.tiles import Tile, fitting, pair, small, tile

# enough programs of the dQ kernel for the largest GPUs: four for each of 132 processors
_PROGRAMS = 528
# carries are kept for the backward up to so many queries: 256 bytes a key, or 1 KiB with skipping, whose segments are short
_KEPT = 32768


class _Call:
    """What every launch of one call shares."""

    def __init__(self, what: str, inputs: Inputs, options: Options, *more: Tensor | None, step: int) -> None:
        self.x, self.o = inputs.ready(), options
        self.launch = Launches(what, step, options, *vars(self.x).values(), *more)
        self.parts, self.n = self.launch.once("call", lambda: (parts_of(self.x, options), numbers_of(self.x, options)))
        x, q = self.x, self.x.q
        self.size = {
            "block_d": self.parts.block_d, "itemsize": q.element_size(), "select": self.parts.select,
            "extend": self.parts.extend > 0, "step": step,
        }  # fmt: skip

        def row(t: Tensor | None) -> int:
            return 0 if t is None or t.shape[0] == 1 else t.stride(0)

        self.segment = SKIP_SEGMENT if self.parts.skip else SEGMENT
        # segments that one program of `fill` and `spread` goes through
        self.coarse = SEGMENT // self.segment
        # what skipping needs, once `carries` has found it: (live, count), last, and live's row
        self.live, self.last, self.live_b = (None, None), None, 0
        self.far = (x.far_q, x.ahead_q, x.far_k)
        self._spaces: dict[int, Tensor] = {}
        self._most_tiles = 0
        self.places = (x.pos_i, x.pos_j, x.doc_i, x.doc_j)
        self.by_query = (*self.places, x.walk_i, row(x.pos_i), row(x.pos_j), row(x.walk_i))
        self.by_key = (*self.places, x.walk_j, row(x.pos_i), row(x.pos_j), row(x.walk_j))

    def tile(self, kernel: str) -> tuple[Tile, Parts, dict[str, int]]:
        """A kernel's tile, its structure, and how it is launched."""
        return self.launch.once(kernel, lambda: self._tile(kernel))

    def _tile(self, kernel: str) -> tuple[Tile, Parts, dict[str, int]]:
        t = tile(kernel, window=self.parts.window, **self.size)
        if self.parts.skip and t.block_j > 64:
            # keys are dead or alive in blocks of 64, and F of a dead block is never written
            t = t._replace(block_j=64, warps=4, stages=2)
        parts = self.parts._replace(block_i=t.block_i, block_j=t.block_j, warps=t.warps)
        return t, parts, {"num_warps": t.warps, "num_stages": t.stages}

    def small(self, kernel: str) -> dict[str, int]:
        """How one of selection's own kernels is launched."""
        size = {name: self.size[name] for name in ("block_d", "itemsize", "extend", "step")}
        return self.launch.once(kernel, lambda: small(kernel, **size))

    @cached_property
    def selecting(self) -> tuple[Tensor | None, ...]:
        """q, k, far_q, far_k of the selecting head, and the slopes."""
        h = self.o.sim_head
        g = h // self.parts.group
        far = (None, None) if self.x.far_k is None else (self.x.far_q[:, h], self.x.far_k[:, g])
        return self.x.q[:, h], self.x.k[:, g], *far, self.x.slopes

    @property
    def selecting_strides(self) -> tuple[int, ...]:
        """q_b, q_i, k_b, k_j."""
        return self.x.q.stride(0), self.x.q.stride(2), self.x.k.stride(0), self.x.k.stride(2)

    # Selection

    @property
    def segments(self) -> int:
        """Segments of queries; with skipping, whole groups of `coarse` of them."""
        return -(-self.n.blocks // SEGMENT) * self.coarse

    @property
    def _band(self) -> tuple[int, int]:
        """Tiles across the band of a window, and in front of it; 0 where the scratch holds all below the diagonal."""
        return (self.n.width, self.n.front) if self.parts.band else (0, 0)

    def tiles_before(self, y: int, *, by_keys: bool) -> int:
        """Tiles of scratch in rows (or columns) before y."""
        return rows_before(min(y, self.n.blocks), self.n.blocks, *self._band, by_keys=by_keys)

    def chunks(self, tile_bytes: int, *, by_keys: bool) -> tuple[tuple[int, int], ...]:
        """Rows (or columns) of tiles, cut at segments so that a chunk's scratch fits the cap; one segment at least.

        What `scratch` gives from now on lies, chunk after chunk, in one place that is large enough for the largest: chunks differ
        a little in size, and an allocator would keep a block for each.
        """
        chunks = cut_chunks(
            self.n.blocks, *self._band, tile_bytes * self.n.batch, self.o.scratch_bytes, by_keys=by_keys, step=SEGMENT
        )
        self._spaces = {}
        self._most_tiles = max(self._tiles(first, last, by_keys=by_keys) for first, last in chunks)
        return chunks

    def _tiles(self, first: int, last: int, *, by_keys: bool) -> int:
        return self.tiles_before(last, by_keys=by_keys) - self.tiles_before(first, by_keys=by_keys)

    def shares(self, rows: int) -> int:
        """Programs among which the keys of one block of queries are shared out, so that a small chunk fills the GPU."""
        programs = rows * self.n.batch * self.n.heads // _pair(self)
        return max(1, min(_PROGRAMS // programs, self.n.blocks // 32, 16))

    def scratch(self, first: int, last: int, *, by_keys: bool, dtype: torch.dtype, slices: int = 0) -> Tensor:
        """Uninitialised tiles (slices, b, numbers) of the rows from first to last, a chunk; the next chunk's take their place.

        slices: of dS; 0 for the one of F.
        """
        shape = (max(slices, 1), self.n.batch)
        most, mine = ((tiles + 2 * SPARE) * 4096 for tiles in (self._most_tiles, self._tiles(first, last, by_keys=by_keys)))
        if slices not in self._spaces:
            self._spaces[slices] = torch.empty(math.prod(shape) * most, device=self.x.q.device, dtype=dtype)
        return self._spaces[slices][: math.prod(shape) * mine].view(*shape, mine)

    @property
    def penalty_dtype(self) -> torch.dtype:
        """float16 is exact enough for F beside 16-bit inputs; it is never summed in it."""
        return torch.float32 if self.x.q.dtype == torch.float32 else torch.float16

    def carries(self, kept: Tensor | None = None) -> Tensor:
        """F of every key at the first query of each segment: (b segments c) float32; from the forward's, if it kept them."""
        carry = self._count() if kept is None else kept
        if self.parts.skip:
            self._find_live(carry)
        return carry

    def _count(self) -> Tensor:
        n, columns = self.n, self.n.blocks * 64
        part = torch.empty(n.batch, self.segments + 1, columns, device=self.x.q.device, dtype=torch.float32)
        self.launch(
            selection.count_votes, (n.blocks, self.segments, n.batch),
            *self.selecting, part, *self.by_key, *self.selecting_strides, part.stride(0), part.stride(1), self.o.sim_head,
            n, SEG=self.segment, P=self.parts, **self.small("fill"),
        )  # fmt: skip
        return part.cumsum(dim=1)

    def _find_live(self, carry: Tensor) -> None:
        """Which blocks of keys each segment must visit, and from which query on a block is dead."""
        n = self.n
        least = carry[:, :-1].unflatten(2, (-1, 64)).amin(dim=3)
        live = torch.empty(n.batch, self.segments, n.blocks, device=carry.device, dtype=torch.int32)
        count = torch.empty(n.batch, self.segments, device=carry.device, dtype=torch.int32)
        parts = self.parts._replace(block_i=self.segment * 64)
        self.launch(
            selection.find_live, (-(-n.blocks // self.segment), n.batch, 1),
            least, self.x.dead, live, count, *self.by_query[4:5], self.by_query[7], least.stride(0), live.stride(0), n,
            BLOCKS=triton.next_power_of_2(n.blocks), P=parts, num_warps=4,
        )  # fmt: skip
        segment = torch.arange(self.segments, device=carry.device)[:, None] * self.segment
        # penalties never fall: once dead, dead for good; a block's own segment always visits it
        alive = (least < self.x.dead) | (segment <= torch.arange(n.blocks, device=carry.device))
        self.last = (alive.sum(dim=1) * (self.segment * 64)).to(torch.int32)
        self.live, self.live_b = (live, count), live.stride(0)

    def fill(self, carry: Tensor, first: int, last: int, *, by_keys: bool) -> Tensor:
        """F in the scratch, for rows of tiles from first to last (columns when by_keys)."""
        n = self.n
        scratch = self.scratch(first, last, by_keys=by_keys, dtype=self.penalty_dtype)
        # rows see keys up to their own; columns are seen by queries from their own on
        first_segment = first // SEGMENT
        last_segment = -(-(n.blocks if by_keys else last) // SEGMENT)
        grid = (last - first if by_keys else last, last_segment - first_segment, n.batch)
        self.launch(
            selection.fill, grid,
            *self.selecting, carry, self.x.dead, self.last, scratch, *self.by_key, *self.selecting_strides, carry.stride(0),
            carry.stride(1) * self.coarse, scratch.stride(1), first if by_keys else 0, first_segment,
            n.blocks if by_keys else last, self.o.sim_head, n._replace(first=first), SEG=SEGMENT, BY_KEYS=by_keys, P=self.parts,
            **self.small("fill"),
        )  # fmt: skip
        return scratch


def carry_shape(b: int, n: int, *, select: bool, skip: bool) -> tuple[int, ...]:
    """What the forward keeps of selection for the backward: the carries, while they are small beside keys and values."""
    segments = -(-n // (64 * SEGMENT)) * (SEGMENT // SKIP_SEGMENT if skip else 1)
    return (b, segments + 1, -(-n // 128) * 128) if select and n <= _KEPT else (0,)


def run_forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """out (b h i d), base-2 log-sum-exp (b h i) float32, and what the backward can use again (`carry_shape`)."""
    return fitting(_forward, inputs, options)


def _forward(inputs: Inputs, options: Options, *, step: int) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call("forward", inputs, options, step=step)
    x, n = call.x, call.n
    b, h, n_i, d = x.q.shape
    out = heads_last(b, h, n_i, d, x.q)
    lse = torch.empty(b, h, n_i, device=x.q.device, dtype=torch.float32)
    t, parts, how = call.tile("forward")
    if parts.select:
        carry = call.carries()
        chunks = call.chunks(4096 * call.penalty_dtype.itemsize, by_keys=False)
    else:
        chunks = [(0, n.blocks)]
    for first, last in chunks:
        scratch = call.fill(carry, first, last, by_keys=False) if parts.select else None
        blocks = -(-(min(last * 64, n_i) - first * 64) // t.block_i)
        if blocks <= 0:
            continue
        call.launch(
            forward.forward, (blocks * b * h, 1, 1),
            x.q, x.k, x.v, *call.far, out, lse, x.sink, x.slopes, scratch, *call.live, *call.by_query,
            *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3], *out.stride()[:3],
            scratch.stride(1) if parts.select else 0, call.live_b, first * 64 // t.block_i, n._replace(first=first), P=parts,
            **how,
        )  # fmt: skip
    shape = carry_shape(b, n_i, select=parts.select, skip=parts.skip)
    kept = carry if len(shape) > 1 else lse.new_empty(0)
    call.launch.done()
    return out, lse, kept


class _Rows(NamedTuple):
    """What the backward knows of each query: out, dout (b h i d); lse, its gradient or None, and delta (b h i) float32."""

    out: Tensor
    dout: Tensor
    lse: Tensor
    dlse: Tensor | None
    delta: Tensor


def run_backward(
    inputs: Inputs, options: Options, out: Tensor, lse: Tensor, carry: Tensor, dout: Tensor, dlse: Tensor | None
) -> dict[str, Tensor]:
    """Gradients of q, k, v, far_q, ahead_q, far_k and sink, those that exist; dlse (b h i) is the log-sum-exp's gradient."""
    return fitting(_backward, inputs, options, out, lse, carry, dout, dlse)


def _backward(
    inputs: Inputs, options: Options, out: Tensor, lse: Tensor, carry: Tensor, dout: Tensor, dlse: Tensor | None, *, step: int
) -> dict[str, Tensor]:
    y = _Rows(
        out=out, dout=laid_out(dout), lse=lse, dlse=None if dlse is None else dlse.contiguous(), delta=torch.empty_like(lse)
    )
    call = _Call("backward", inputs, options, *y, carry, step=step)
    x, n, parts = call.x, call.n, call.parts
    b, h, n_i, d = x.q.shape
    g, n_j = x.k.shape[1:3]
    grads = {"q": heads_last(b, h, n_i, d, x.q), "k": heads_last(b, g, n_j, d, x.k), "v": heads_last(b, g, n_j, d, x.v)}
    grads |= {name: heads_last(b, h, n_i, d, x.q) for name in ("far_q", "ahead_q") if getattr(x, name) is not None}
    grads |= {"far_k": heads_last(b, g, n_j, d, x.k)} if x.far_k is not None else {}
    if parts.select:
        call.launch(
            backward.find_delta, (-(-n_i // 64), h, b),
            y.out, y.dout, y.dlse, y.delta, *y.out.stride()[:3], *y.dout.stride()[:3], n, P=parts, num_warps=4,
        )  # fmt: skip
        carry = call.carries(carry if carry.numel() else None)
        suffix = torch.empty(b, call.segments, n.blocks * 64, device=x.q.device, dtype=torch.float32)
        for first, last in call.chunks(4096 * call.penalty_dtype.itemsize, by_keys=True):
            scratch = call.fill(carry, first, last, by_keys=True)
            _dkdv(call, grads, scratch, first, last, y, suffix[:, :, first * 64 : last * 64])
            del scratch
        call.launch(backward.sum_after, (n.blocks, b, 1), suffix, suffix.stride(0), suffix.stride(1), call.segments, num_warps=2)
        _dq_and_selection(call, grads, carry, suffix, y)
    else:
        into = {name: grads[name][None] for name in ("q", "far_q", "ahead_q") if name in grads}
        _dq(call, into, None, None, 0, n.blocks, y)
        _dkdv(call, grads, None, 0, n.blocks, y, None)
    if x.sink is not None:
        sink_bhi = torch.exp2(x.sink.float()[:, None] * LOG2E - lse)
        # a row that saw nothing is 0 whatever the sink
        grads["sink"] = -(sink_bhi * y.delta).sum(dim=(0, 2)).to(x.sink.dtype)
    call.launch.done()
    return grads


def _dkdv(
    call: _Call, grads: dict[str, Tensor], scratch: Tensor | None, first: int, last: int, y: _Rows, sums: Tensor | None
) -> None:
    """dK, dV of the keys of blocks first to last; with selection, the column sums of dS of each segment (b t c)."""
    x, n = call.x, call.n
    t, parts, how = call.tile("dkdv")
    b, h, columns = n.batch, n.heads, (last - first) * 64
    column = None
    strides = (0, 0, 0)
    if parts.select:
        per_segment = call.segment * 64 // t.block_i
        column = torch.empty(b, h, call.segments * per_segment, columns, device=x.q.device, dtype=torch.float32)
        strides = column.stride()[:3]
    blocks = -(-(min(last * 64, n.n_j) - first * 64) // t.block_j) if parts.select else -(-n.n_j // t.block_j)
    dk, dv = grads["k"], grads["v"]
    call.launch(
        backward.find_dkdv, (max(blocks, 0) * b * x.k.shape[1], 1, 1),
        x.q, x.k, x.v, *call.far, y.dout, y.lse, y.delta, x.slopes, scratch, column, call.last, dk, grads.get("far_k"), dv,
        *call.by_key, *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3], *y.dout.stride()[:3], *dk.stride()[:3],
        scratch.stride(1) if parts.select else 0, *strides, first * 64 // t.block_j, n._replace(first=first), P=parts, **how,
    )  # fmt: skip
    if parts.select:
        call.launch(
            backward.sum_columns, (last - first, call.segments, b),
            column, sums, call.last, call.by_key[4], call.by_key[7], *strides, sums.stride(0), sums.stride(1), first, n,
            SEG=call.segment, P=parts, num_warps=4,
        )  # fmt: skip


def _dq(
    call: _Call, into: dict[str, Tensor], scratch: Tensor | None, slices: Tensor | None, first: int, last: int, y: _Rows
) -> None:
    """dQ of the queries of blocks first to last, without selection delta too; `into` (parts b h i d) starts at their first."""
    x, n = call.x, call.n
    t, parts, how = call.tile("dq")
    parts = parts._replace(pair=_pair(call))
    blocks = -(-(min(last * 64, n.n_i) - first * 64) // t.block_i)
    dq = into["q"]
    selected = (scratch.stride(1), slices.stride(0)) if parts.select else (0, 0)
    call.launch(
        backward.find_dq, (max(blocks, 0) * n.batch * (n.heads // parts.pair), dq.shape[0], 1),
        x.q, x.k, x.v, *call.far, y.out, y.dout, y.lse, y.dlse, y.delta, x.slopes, scratch, slices, *call.live, dq,
        into.get("far_q"), into.get("ahead_q"), *call.by_query, *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3],
        *y.out.stride()[:3], *y.dout.stride()[:3], *dq.stride()[:4], first * 64, *selected, call.live_b,
        first * 64 // t.block_i, n._replace(first=first), P=parts, **how,
    )  # fmt: skip


def _pair(call: _Call) -> int:
    return pair(
        block_d=call.parts.block_d, itemsize=call.x.q.element_size(), heads=call.n.heads, select=call.parts.select,
        extend=call.parts.extend > 0,
    )  # fmt: skip


def _dq_and_selection(call: _Call, grads: dict[str, Tensor], carry: Tensor, suffix: Tensor, y: _Rows) -> None:
    """dQ by chunks of queries, with the slices of dS, and from them what the selecting head gets."""
    x, n, parts = call.x, call.n, call.parts
    s = call.o.sim_head
    slices_count = n.heads // _pair(call)
    chunks = call.chunks(4096 * (call.penalty_dtype.itemsize + slices_count * x.q.element_size()), by_keys=False)
    key_grads = {name: grads[name][:, s // parts.group] for name in ("k", "far_k") if name in grads}
    query_grads = {name: grads[name] for name in ("q", "far_q") if name in grads}
    if len(chunks) > 1:
        # what several chunks add to is float32
        sums = {name: torch.zeros(t.shape, device=t.device, dtype=torch.float32) for name, t in key_grads.items()}
    else:
        sums = key_grads
    dk = sums["k"]
    far_dk = sums.get("far_k")
    head_q, head_k, head_far_q, head_far_k, slopes = call.selecting
    q_b, q_i, k_b, k_j = call.selecting_strides
    for first, last in chunks:
        rows = min(last, -(-n.n_i // 64)) - first
        if rows <= 0:
            continue
        mine = {name: t[:, :, first * 64 : last * 64] for name, t in query_grads.items()}
        shares = call.shares(rows)
        if shares == 1:
            into = {name: t[None] for name, t in mine.items()}
        else:
            into = {name: torch.empty(shares, *t.shape, device=t.device, dtype=torch.float32) for name, t in mine.items()}
        dq = into["q"][:, :, s]
        far_dq = into["far_q"][:, :, s] if "far_q" in into else None
        scratch = call.fill(carry, first, last, by_keys=False)
        slices = call.scratch(first, last, by_keys=False, dtype=x.q.dtype, slices=slices_count)
        _dq(call, into, scratch, slices, first, last, y)
        # F has done its work: dz takes its place
        dz = scratch.view(x.q.dtype)
        numbers = n._replace(first=first)
        first_segment, last_segment = first // SEGMENT, -(-last // SEGMENT)
        # a group of segments is walked from its last
        after = suffix[:, call.coarse - 1 :: call.coarse]
        call.launch(
            selection.spread, (last, last_segment - first_segment, n.batch),
            head_q, head_k, head_far_q, head_far_k, slopes, after, call.last, slices, dz, *call.by_key, q_b, q_i, k_b, k_j,
            after.stride(0), after.stride(1), scratch.stride(1), slices.stride(0), first_segment, last, s, numbers,
            SEG=SEGMENT, P=parts._replace(slices=slices_count), **call.small("spread"),
        )  # fmt: skip
        call.launch(
            selection.add_dq, (rows, n.batch, shares),
            head_k, head_far_k, *call.live, dz, dq, far_dq, *call.by_query, k_b, k_j, *dq.stride()[:3], first * 64,
            scratch.stride(1), call.live_b, first, numbers, P=parts, **call.small("add"),
        )  # fmt: skip
        call.launch(
            selection.add_dk, (min(last, -(-n.n_j // 64)), n.batch, 1),
            head_q, head_far_q, call.last, dz, dk, far_dk, *call.by_key, q_b, q_i, dk.stride(0), dk.stride(1),
            scratch.stride(1), first, last, numbers, P=parts, **call.small("add"),
        )  # fmt: skip
        if shares > 1:
            for name, t in mine.items():
                t.copy_(into[name].sum(dim=0))
        # before the next chunk takes its own
        del scratch, slices, dz, into, dq, far_dq
    if len(chunks) > 1:
        for name, t in key_grads.items():
            t += sums[name].to(t.dtype)
