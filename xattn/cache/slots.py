"""Slots: which token of which document sits in each slot of a storage. Layers of one kind share one `Slots`.

Letters: s slots; r rows, 1 while all rows of the batch are alike.
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.cache.kind import Kind
from xattn.cache.rows import Chunk, Rows
from xattn.ops.layout import Layout


@dataclass(kw_only=True, eq=False)
class Place:
    """Where a call's tokens go: token `cols` of row `rows` into slot `slots`; or all, in order, into a slice of slots."""

    rows: Tensor | None = None
    cols: Tensor | None = None
    slots: Tensor | slice

    def write(self, store_b_s: Tensor, new_b_n: Tensor, *, heads: bool = False) -> None:
        """store (b s), or (b g s d) with heads, takes the new tokens (b n), or (b g n d)."""
        if isinstance(self.slots, slice):
            (store_b_s[:, :, self.slots] if heads else store_b_s[:, self.slots]).copy_(new_b_n)
        elif heads:
            store_b_s[self.rows, :, self.slots] = new_b_n[self.rows, :, self.cols]
        else:
            store_b_s[self.rows, self.slots] = new_b_n[self.rows, self.cols]


class Slots:
    """Positions (r s), -1 for an empty slot, and documents (r s) or None.

    Between `begin` and `commit` of a call: `layout`, where the keys that a layer attends to stand, old ones first;
    `place`, where the new ones go; `old`, how many slots held keys before.
    """

    def __init__(self, kind: Kind, device: torch.device) -> None:
        self.kind = kind
        self.pos_rs = torch.empty(1, 0, dtype=torch.long, device=device)
        self.doc_rs: Tensor | None = None
        self.layout: Layout | None = None
        self.place: Place | None = None
        self.old = 0

    @property
    def capacity(self) -> int:
        """Slots allocated."""
        return self.pos_rs.shape[1]

    def nbytes(self) -> int:
        """Bytes of the positions, and of the documents where there are any."""
        return sum(t.untyped_storage().nbytes() for t in (self.pos_rs, self.doc_rs) if t is not None)

    def begin(self, chunk: Chunk, max_len: int | None) -> None:
        """Makes room for a call's tokens and says where keys stand during it."""
        before, after = chunk.start.longest, chunk.end.longest
        self.grow(self.kind.capacity(after, max_len))
        self._widen(chunk)
        self.old, self.place = self.kind.held(before), self._place(chunk)
        if before == 0:
            self.layout = chunk.layout
        elif self.kind.ring is None:
            self._write(chunk)
            self.old = after
            plain = chunk.alike and self.doc_rs is None
            self.layout = Layout.plain(after, self.pos_rs.device) if plain else self.layout_of(after)
        else:
            self.layout = self.beside(chunk, self.old)

    def commit(self, chunk: Chunk) -> None:
        """The call is over: its tokens are old ones now."""
        if self.layout is chunk.layout or self.kind.ring is not None:
            self._write(chunk)
        self.layout = self.place = None

    def grow(self, capacity: int) -> None:
        """Room for that many slots, never less than there is."""
        if capacity > self.capacity:
            self.pos_rs = grown(self.pos_rs, capacity, dim=1, value=-1)
            self.doc_rs = None if self.doc_rs is None else grown(self.doc_rs, capacity, dim=1)

    def taken(self, index: Tensor) -> "Slots":
        """A copy of the rows at index (b',); where all share one, a copy of that."""
        new, shared = copy(self), self.pos_rs.shape[0] == 1
        new.pos_rs = self.pos_rs.clone() if shared else self.pos_rs[index]
        new.doc_rs = None if self.doc_rs is None else self.doc_rs[index]
        return new

    def crop(self, rows: Rows, next_b: Tensor) -> None:
        """Empties the slots of tokens at position next (b,) and later in the document that each row is in."""
        gone = self.pos_rs.expand(rows.batch, -1) >= next_b.to(self.pos_rs.device)[:, None]
        if self.doc_rs is not None:
            gone &= self.doc_rs == rows.doc_b.to(self.pos_rs.device)[:, None]
        alike = self.pos_rs.shape[0] == 1 and rows.alike and bool((next_b == next_b[0]).all())
        self.pos_rs = torch.where(gone[:1] if alike else gone, -1, self.pos_rs)

    def layout_of(self, held: int) -> Layout:
        """Where the keys of the first slots stand: a copy, for slots change and layouts keep what they derive."""
        return Layout(self.pos_rs[:, :held].clone(), None if self.doc_rs is None else self.doc_rs[:, :held].clone())

    def beside(self, chunk: Chunk, held: int) -> Layout:
        """The keys of the first slots, then the call's own."""
        batch = max(self.pos_rs.shape[0], chunk.layout.pos_bn.shape[0])
        pos = [t.expand(batch, -1) for t in (self.pos_rs[:, :held], chunk.layout.pos_bn)]
        doc = None if self.doc_rs is None else torch.cat([self.doc_rs[:, :held], chunk.layout.doc_bn], dim=1)
        return Layout(torch.cat(pos, dim=1), doc)

    def _widen(self, chunk: Chunk) -> None:
        """A row of positions for each row of the batch, and documents, once they are needed."""
        batch = chunk.start.batch
        if not chunk.alike and self.pos_rs.shape[0] != batch:
            self.pos_rs = self.pos_rs.expand(batch, -1).contiguous()
        if chunk.end.packed and self.doc_rs is None:
            self.doc_rs = torch.zeros_like(self.pos_rs)

    def _write(self, chunk: Chunk) -> None:
        batch = self.pos_rs.shape[0]
        place = self.place
        if not isinstance(place.slots, slice) and chunk.alike and batch == 1:
            place = Place(rows=place.rows[:1], cols=place.cols, slots=place.slots)
        place.write(self.pos_rs, chunk.layout.pos_bn.expand(batch, -1))
        if self.doc_rs is not None:
            place.write(self.doc_rs, chunk.layout.doc_bn)

    def _place(self, chunk: Chunk) -> Place:
        """Full: tokens in order of reading. Ring: sinks in front by position, then position modulo the ring."""
        ring, sinks, device = self.kind.ring, self.kind.sinks, self.pos_rs.device
        if chunk.alike:
            first, n = int(chunk.start.next_b[0]), chunk.n
            if ring is None:
                return Place(slots=slice(first, first + n))
            # the sinks of this chunk, then what of it the ring can hold
            pinned = max(0, min(sinks - first, n))
            kept = [torch.arange(pinned, device=device), torch.arange(max(pinned, n - ring), n, device=device)]
            cols = torch.cat(kept)[None]
            rows = torch.arange(chunk.start.batch, device=device)[:, None]
            return Place(rows=rows, cols=cols, slots=self.ring_slot(first + cols))
        pos_bn, token_bn = chunk.layout.pos_bn, chunk.layout.pos_bn >= 0
        if ring is None:
            rows, cols = token_bn.nonzero(as_tuple=True)
            return Place(rows=rows, cols=cols, slots=chunk.tokens_bn[rows, cols] - 1)
        if chunk.end.packed:
            token_bn = token_bn & (chunk.layout.doc_bn == chunk.end.doc_b.to(device)[:, None])
        recent_bn = pos_bn >= chunk.end.next_b.to(device)[:, None] - ring
        rows, cols = (token_bn & (recent_bn | (pos_bn < sinks))).nonzero(as_tuple=True)
        return Place(rows=rows, cols=cols, slots=self.ring_slot(pos_bn[rows, cols]))

    def ring_slot(self, pos: Tensor) -> Tensor:
        """The slot of a ring that keeps the token at a position."""
        sinks, ring = self.kind.sinks, self.kind.ring
        return pos if ring == 0 else torch.where(pos < sinks, pos, sinks + (pos - sinks) % ring)


def grown(old: Tensor, size: int, *, dim: int, value: int = 0) -> Tensor:
    """A copy with that size along one axis, filled up with a value."""
    shape = list(old.shape)
    shape[dim] = size
    new = old.new_full(shape, value)
    new.narrow(dim, 0, old.shape[dim]).copy_(old)
    return new
