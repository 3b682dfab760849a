"""LayerCache: the keys and values of one layer, and its votes F; `extend` before attending, `retain` after.

Letters: s slots; u versions of F, the newest and one for each token that can be taken back.
"""

from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xattn.cache.kind import Kind, keys_are_turned
from xattn.cache.rows import Chunk
from xattn.cache.slots import Place, Slots, grown
from xattn.ops.layout import Layout
from xattn.spec.model import AttentionSpec
from xattn.spec.positions import NoPositions


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """What the queries of a call attend to: keys and values (b g j d), where they stand, and the votes (b j) so far."""

    k_bgjd: Tensor
    v_bgjd: Tensor
    layout: Layout
    carry_bj: Tensor | None


class LayerCache:
    """One layer's storage. carry_rows: of how many of a call's last queries `retain` wants the votes after."""

    def __init__(
        self, kind: Kind, attn: AttentionSpec, slots: Slots, *, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kind, self.slots, self.spec = kind, slots, attn
        # what is left of the spec for queries and keys that are turned already
        self.turned_spec = replace(attn, positions=NoPositions()) if keys_are_turned(attn) else None
        shape = (batch, attn.kv_heads, 0, attn.dim_head)
        self.k_bgsd, self.v_bgsd = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        votes = torch.promote_types(dtype, torch.float32)
        self.votes_bus = torch.empty(batch, kind.vote_rows(), 0, dtype=votes, device=device) if kind.selective else None
        self._chunk: Chunk | None = None
        self._new: tuple[Tensor, Tensor] | None = None

    def nbytes(self) -> int:
        """Bytes of keys, values and votes, as allocated."""
        return sum(t.untyped_storage().nbytes() for t in self.stores())

    def stores(self) -> list[Tensor]:
        """Its tensors."""
        return [t for t in (self.k_bgsd, self.v_bgsd, self.votes_bus) if t is not None]

    def begin(self, chunk: Chunk) -> None:
        """A call starts."""
        self._chunk = chunk

    @property
    def carry_rows(self) -> int:
        """Queries, from the last one back, whose votes must be known apart."""
        return min(self._chunk.n, self.kind.vote_rows())

    def extend(self, k_bgnd: Tensor, v_bgnd: Tensor) -> View:
        """The view for a call's queries, given its own keys and values, which enter the storage now or in `retain`."""
        self.grow(self.slots.capacity)
        chunk, slots = self._chunk, self.slots
        self._new = (k_bgnd, v_bgnd)
        fresh = slots.layout is chunk.layout
        if fresh or self.kind.ring is None:
            self._write(slots.place)
        if fresh:
            k, v = k_bgnd, v_bgnd
        elif self.kind.ring is None:
            k, v = (t[:, :, : slots.old] for t in (self.k_bgsd, self.v_bgsd))
        else:
            held = [t[:, :, : slots.old] for t in (self.k_bgsd, self.v_bgsd)]
            k, v = (torch.cat(pair, dim=2) for pair in zip(held, self._new, strict=True))
        return View(k_bgjd=k, v_bgjd=v, layout=slots.layout, carry_bj=self._carry(k.shape[2]))

    def retain(self, carry_buj: Tensor | None) -> None:
        """Keeps what later queries will need, and the votes after the last `carry_rows` queries (b u j)."""
        chunk, slots = self._chunk, self.slots
        fresh, ring = slots.layout is chunk.layout, self.kind.ring is not None
        if ring and not fresh:
            self._write(slots.place)
        if carry_buj is not None:
            old = carry_buj.shape[2] if not (fresh or ring) else carry_buj.shape[2] - chunk.n
            self._keep_votes(carry_buj[:, :, :old], carry_buj[:, :, old:])
        self._chunk = self._new = None

    def taken(self, index: Tensor, slots: Slots) -> "LayerCache":
        """A copy of the rows at index (b',), over a copy of the slots."""
        new = copy(self)
        new.slots = slots
        new.k_bgsd, new.v_bgsd = self.k_bgsd[index], self.v_bgsd[index]
        new.votes_bus = None if self.votes_bus is None else self.votes_bus[index]
        return new

    def grow(self, capacity: int) -> None:
        """Room for that many slots, never less than there is."""
        if capacity > self.k_bgsd.shape[2]:
            self.k_bgsd, self.v_bgsd = (grown(t, capacity, dim=2) for t in (self.k_bgsd, self.v_bgsd))
            if self.votes_bus is not None:
                self.votes_bus = grown(self.votes_bus, capacity, dim=2)

    def _write(self, place: Place) -> None:
        for store, new in zip((self.k_bgsd, self.v_bgsd), self._new, strict=True):
            place.write(store, new, heads=True)

    def _version(self, tokens: Tensor) -> Tensor:
        """Which version of F holds after that many tokens of a row."""
        return tokens % self.kind.vote_rows()

    def _carry(self, keys: int) -> Tensor | None:
        """The votes (b j) before the call: those of the slots held, and zero for what is new."""
        if self.votes_bus is None:
            return None
        chunk, slots = self._chunk, self.slots
        batch = self.votes_bus.shape[0]
        rows = torch.arange(batch, device=self.votes_bus.device)
        version_b = self._version(chunk.start.count_b).to(self.votes_bus.device)
        if slots.layout is chunk.layout:
            return self.votes_bus.new_zeros(batch, keys)
        # a version that is still in reach was written before any token that could have been taken back: new slots are 0 in it
        old_bs = self.votes_bus[rows, version_b, : slots.old]
        return torch.cat([old_bs, old_bs.new_zeros(batch, keys - slots.old)], dim=1)

    def _keep_votes(self, old_bus: Tensor, new_bun: Tensor) -> None:
        """Stores the votes against the slots held and against the new tokens, for each of the last queries."""
        chunk, slots = self._chunk, self.slots
        device, u = self.votes_bus.device, old_bus.shape[1]
        after_bu = chunk.tokens_bn[:, -u:].expand(self.votes_bus.shape[0], -1)
        rows, version_bu = torch.arange(after_bu.shape[0], device=device)[:, None], self._version(after_bu)
        self.votes_bus[rows, version_bu, : old_bus.shape[2]] = old_bus
        if new_bun.shape[2]:
            for version_b, votes_bn in zip(version_bu.unbind(1), new_bun.unbind(1), strict=True):
                one = self.votes_bus[rows[:, 0], version_b]
                slots.place.write(one, votes_bn)
                self.votes_bus[rows[:, 0], version_b] = one
