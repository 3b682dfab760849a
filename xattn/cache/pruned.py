"""PrunedLayer: a selective layer that keeps a budget of keys; the key most voted against leaves when one more comes.

The greedy rule, token by token: once K keys are held, a new token takes the place of the key with the highest F, the
oldest of equals; the first token of the document never leaves, nor does the newest. What no later query can see (an ended
document, or beyond a window) leaves before all others. F never falls, yet the order of keys may change, so a key that has
left is gone for good: this is not the K lowest of all F.

A call of c > 1 tokens attends to at most K - 1 old keys and to its own, then keeps the best K of them: the same as token by
token where c = 1, and less pruning within the call where c is larger.

Source: Leviathan et al., arXiv 2410.02703 §4. Letters: s slots.
"""

import torch
from torch import Tensor

from xattn.cache.kind import Kind
from xattn.cache.layer import LayerCache, View
from xattn.cache.rows import Chunk, Rows
from xattn.cache.slots import Slots, grown
from xattn.ops.layout import Layout
from xattn.spec.model import AttentionSpec

INF = float("inf")


class PrunedLayer(LayerCache):
    """One layer's storage of at most `kind.budget` keys, each row with positions of its own."""

    def __init__(self, kind: Kind, attn: AttentionSpec, *, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(kind, attn, Slots(kind, device), batch=batch, dtype=dtype, device=device)
        self.slots.pos_rs = self.slots.pos_rs.expand(batch, -1)
        self._max_len: int | None = None
        self._layout: Layout | None = None

    def begin(self, chunk: Chunk, max_len: int | None = None) -> None:
        """A call starts."""
        super().begin(chunk)
        self._max_len = max_len

    def extend(self, k_bgnd: Tensor, v_bgnd: Tensor) -> View:
        """The view of the keys held and the call's own, after making room for one."""
        chunk, slots = self._chunk, self.slots
        held = self.kind.held(chunk.start.longest)
        self._new = (k_bgnd, v_bgnd)
        room = self.kind.capacity(chunk.end.longest, self._max_len)
        if chunk.end.packed and slots.doc_rs is None:
            slots.doc_rs = torch.zeros_like(slots.pos_rs)
        if held == 0:
            self._layout = chunk.layout
            return View(k_bgjd=k_bgnd, v_bgjd=v_bgnd, layout=chunk.layout, carry_bj=self._votes().new_zeros(*k_bgnd.shape[::2]))
        slots.grow(room)
        self.grow(room)
        victim_b = self._victim()
        if self._one_by_one:
            return self._replace(victim_b, self.kind.held(chunk.end.longest))
        full_b = (slots.pos_rs >= 0).sum(dim=1) >= self.kind.budget
        rows = torch.arange(len(full_b), device=full_b.device)
        slots.pos_rs[rows, victim_b] = torch.where(full_b, -1, slots.pos_rs[rows, victim_b])
        self._layout = slots.beside(chunk, held)
        k, v = (torch.cat([t[:, :, :held], new], dim=2) for t, new in zip((self.k_bgsd, self.v_bgsd), self._new, strict=True))
        carry = torch.cat([self._votes()[:, :held], self._votes().new_zeros(len(rows), chunk.n)], dim=1)
        return View(k_bgjd=k, v_bgjd=v, layout=self._layout, carry_bj=carry)

    def retain(self, carry_buj: Tensor) -> None:
        """Takes over the votes; after a call of more than one token, keeps the best keys of all."""
        votes_bj = carry_buj[:, -1]
        if self._one_by_one and self._layout is not self._chunk.layout:
            self._votes()[:, : votes_bj.shape[1]] = votes_bj
        else:
            self._select(votes_bj)
        self._chunk = self._new = self._layout = None

    def taken(self, index: Tensor, slots: Slots | None = None) -> "PrunedLayer":
        """A copy of the rows at index (b',)."""
        return super().taken(index, self.slots.taken(index))

    @property
    def _one_by_one(self) -> bool:
        """Whether the call brings one token to every row, which then takes a slot in place."""
        return self._chunk.n == 1 and bool((self._chunk.end.count_b > self._chunk.start.count_b).all())

    def _votes(self) -> Tensor:
        """F (b s)."""
        return self.votes_bus[:, 0]

    def _rank(self, pos_bs: Tensor, doc_bs: Tensor | None, votes_bs: Tensor, *, at: Rows, next_b: Tensor) -> Tensor:
        """`rank` for rows that are where the host says."""
        doc_b1, next_b1 = (t.to(pos_bs.device)[:, None] for t in (at.doc_b, next_b))
        return rank(self.kind, pos_bs, doc_bs, votes_bs, doc_b1=doc_b1, next_b1=next_b1)

    def _victim(self) -> Tensor:
        """The slot of each row that a new token takes."""
        slots, chunk = self.slots, self._chunk
        # the first of the call's tokens decides what is in sight
        same_b = chunk.end.doc_b == chunk.start.doc_b
        next_b = torch.where(same_b, chunk.start.next_b, 0)
        at = chunk.end if self._one_by_one else chunk.start
        rank_bs = self._rank(slots.pos_rs, slots.doc_rs, self._votes(), at=at, next_b=next_b)
        return victim(rank_bs, slots.pos_rs)

    def _replace(self, victim_b: Tensor, held: int) -> View:
        """One new token a row, written where the victim was."""
        slots, chunk = self.slots, self._chunk
        rows = torch.arange(len(victim_b), device=victim_b.device)
        for store, new in zip((self.k_bgsd, self.v_bgsd), self._new, strict=True):
            store[rows, :, victim_b] = new[:, :, 0]
        self._votes()[rows, victim_b] = 0
        slots.pos_rs[rows, victim_b] = chunk.layout.pos_bn.expand(len(rows), -1)[:, 0]
        if slots.doc_rs is not None:
            slots.doc_rs[rows, victim_b] = chunk.layout.doc_bn[:, 0]
        k, v = (t[:, :, :held] for t in (self.k_bgsd, self.v_bgsd))
        # the positions change in place at the next call, and this layout must not
        self._layout = slots.layout_of(held)
        return View(k_bgjd=k, v_bgjd=v, layout=self._layout, carry_bj=self._votes()[:, :held].clone())

    def _select(self, votes_bj: Tensor) -> None:
        """Keeps of all keys in view the budget's number that leave least readily."""
        slots, chunk, at = self.slots, self._chunk, self._layout
        batch = votes_bj.shape[0]
        pos_bj = at.pos_bn.expand(batch, -1)
        doc_bj = None if at.doc_bn is None else at.doc_bn
        rank_bj = self._rank(pos_bj, doc_bj, votes_bj, at=chunk.end, next_b=chunk.end.next_b)
        newest = pos_bj == chunk.end.next_b.to(pos_bj.device)[:, None] - 1
        if doc_bj is not None:
            newest &= doc_bj == chunk.end.doc_b.to(pos_bj.device)[:, None]
        rank_bj = rank_bj.masked_fill(newest, -INF)
        # of equals the youngest stays
        young_bj = pos_bj.argsort(dim=1, descending=True, stable=True)
        order_bj = young_bj.gather(1, rank_bj.gather(1, young_bj).argsort(dim=1, stable=True))
        room = self.kind.capacity(chunk.end.longest, self._max_len)
        keep_bs = order_bj[:, : self.kind.held(chunk.end.longest)]
        keep_bs = keep_bs.sort(dim=1).values
        heads = keep_bs[:, None, :, None]
        k, v = self._in_view()
        k, v = (t.gather(2, heads.expand(-1, t.shape[1], -1, t.shape[3])) for t in (k, v))
        self.k_bgsd, self.v_bgsd = (grown(t, room, dim=2) for t in (k, v))
        self.votes_bus = grown(votes_bj.gather(1, keep_bs)[:, None], room, dim=2)
        dead_bs = rank_bj.gather(1, keep_bs) == INF
        slots.pos_rs = grown(torch.where(dead_bs, -1, pos_bj.gather(1, keep_bs)), room, dim=1, value=-1)
        if slots.doc_rs is not None:
            slots.doc_rs = grown(doc_bj.gather(1, keep_bs), room, dim=1)

    def _in_view(self) -> tuple[Tensor, Tensor]:
        """Keys and values in view: those held, then the call's own."""
        held = self._layout.n - self._chunk.n
        return tuple(
            torch.cat([t[:, :, :held], new], dim=2) for t, new in zip((self.k_bgsd, self.v_bgsd), self._new, strict=True)
        )


def rank(
    kind: Kind, pos_bs: Tensor, doc_bs: Tensor | None, votes_bs: Tensor, *, doc_b1: Tensor | None, next_b1: Tensor
) -> Tensor:
    """How readily each key leaves (b s), when the next query stands at next in document doc: inf first, -inf never."""
    current = torch.ones_like(pos_bs, dtype=torch.bool) if doc_bs is None else doc_bs == doc_b1
    dead = (pos_bs < 0) | ~current
    if kind.window is not None:
        dead |= (pos_bs <= next_b1 - kind.window) & (pos_bs >= kind.sinks)
    return votes_bs.masked_fill(current & (pos_bs == 0), -INF).masked_fill(dead, INF)


def victim(rank_bs: Tensor, pos_bs: Tensor) -> Tensor:
    """The slot (b,) that leaves first: an empty one, or the key most voted against, the oldest of equals."""
    worst_b1 = rank_bs.amax(dim=1, keepdim=True)
    return pos_bs.masked_fill(rank_bs < worst_b1, torch.iinfo(torch.long).max).argmin(dim=1)
