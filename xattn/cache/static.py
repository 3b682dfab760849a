"""StaticCache: a cache that takes one token a row at a time, in shapes that never change, and never waits for the host.

It works in the cache's own storages, and moves the host's numbers on beside the device's: between two steps the cache is
what ordinary calls would have made of it. Full storage is attended to as allocated: slot j holds token j, so what was never
written lies in the future. A ring gets one slot more, where the newest token waits until it has attended: its own slot
still holds a key in sight. Letters: s slots; r rows, 1 while all are alike; u versions of F.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from xattn.cache.cache import Cache
from xattn.cache.layer import LayerCache, View
from xattn.cache.pruned import PrunedLayer, rank, victim
from xattn.cache.rows import Rows
from xattn.cache.slots import Slots, grown
from xattn.errors import ConfigError, ShapeError, TokenError
from xattn.ops.layout import Layout
from xattn.spec.model import LayersSpec


class Clock:
    """How far each row is, on the device: tokens read and the next position (r 1), and the document (r 1) of packed rows."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        alike = slice(0, 1) if rows.alike else slice(None)

        def told(x_b: Tensor) -> Tensor:
            return x_b[alike, None].to(device, copy=True)

        self.count_r1, self.next_r1 = told(rows.count_b), told(rows.next_b)
        self.doc_r1 = told(rows.doc_b) if rows.packed else None

    def layout(self) -> Layout:
        """Where the tokens of this step stand."""
        return Layout(self.next_r1, self.doc_r1, kind="runs")

    def tick(self) -> None:
        """Each row has read a token."""
        self.count_r1.add_(1)
        self.next_r1.add_(1)

    def stores(self) -> list[Tensor]:
        """Its tensors."""
        return [t for t in (self.count_r1, self.next_r1, self.doc_r1) if t is not None]


def put(store: Tensor, slot_r1: Tensor, new: Tensor, *, dim: int = 1) -> None:
    """store takes new, one slot long, into the slot of each row."""
    shape = list(store.shape)
    shape[dim] = 1
    index = slot_r1.view(-1, *(1 for _ in shape[1:])).expand(shape)
    store.scatter_(dim, index, new.expand(shape))


class StaticSlots:
    """Where the keys of layers that share a table of positions stand.

    During a step: `layout` of all slots, `enters` the slot (r 1) that the new token takes before attending, and for a ring
    `stays` the one it takes afterwards.
    """

    def __init__(self, slots: Slots, clock: Clock, longest: int, max_len: int) -> None:
        self.slots, self.clock = slots, clock
        slots.grow(slots.kind.capacity(longest, max_len))
        rows = max(slots.pos_rs.shape[0], clock.next_r1.shape[0])
        self.pos_rs, self.doc_rs = slots.pos_rs.expand(rows, -1).contiguous(), slots.doc_rs
        self.waits = slots.kind.ring is not None
        if self.waits:
            self.waiting_11 = torch.full((1, 1), slots.capacity, device=self.pos_rs.device)
            self.pos_rs = grown(self.pos_rs, slots.capacity + 1, dim=1, value=-1)
            self.doc_rs = None if self.doc_rs is None else grown(self.doc_rs, slots.capacity + 1, dim=1)
        # for the cache the slot that waits is not there
        slots.pos_rs = self.pos_rs[:, : slots.capacity]
        slots.doc_rs = None if self.doc_rs is None else self.doc_rs[:, : slots.capacity]
        # nothing that this layout keeps ever changes
        plain = not self.waits and self.doc_rs is None
        self._plain = Layout.plain(slots.capacity, self.pos_rs.device) if plain else None
        self.layout: Layout | None = None
        self.enters_r1: Tensor | None = None
        self.stays_r1: Tensor | None = None

    def begin(self) -> None:
        """A step starts."""
        self.enters_r1 = self.waiting_11 if self.waits else self.clock.count_r1
        self.stays_r1 = self._stays() if self.waits else None
        self._put(self.enters_r1)
        self.layout = Layout(self.pos_rs, self.doc_rs) if self._plain is None else self._plain

    def commit(self) -> None:
        """The step is over."""
        if self.waits:
            self._put(self.stays_r1)
        self.layout = self.enters_r1 = self.stays_r1 = None

    def stores(self) -> list[Tensor]:
        """Its tensors."""
        return [t for t in (self.pos_rs, self.doc_rs) if t is not None]

    def _stays(self) -> Tensor:
        pos_r1, kind = self.clock.next_r1, self.slots.kind
        # a window of one keeps nothing but sinks
        return self.slots.ring_slot(pos_r1) if kind.ring else torch.where(pos_r1 < kind.sinks, pos_r1, self.waiting_11)

    def _put(self, slot_r1: Tensor) -> None:
        put(self.pos_rs, slot_r1, self.clock.next_r1)
        if self.doc_rs is not None:
            put(self.doc_rs, slot_r1, self.clock.doc_r1)


class StaticLayer:
    """One layer's storage during static steps; stands for a `LayerCache`."""

    carry_rows = 1

    def __init__(self, layer: LayerCache, slots: StaticSlots) -> None:
        self.spec, self.turned_spec, self.slots = layer.spec, layer.turned_spec, slots
        capacity = slots.slots.capacity
        layer.grow(capacity)
        self.k_bgsd, self.v_bgsd, self.votes_bus = layer.k_bgsd, layer.v_bgsd, layer.votes_bus
        if slots.waits:
            self.k_bgsd, self.v_bgsd = (grown(t, capacity + 1, dim=2) for t in (self.k_bgsd, self.v_bgsd))
            layer.k_bgsd, layer.v_bgsd = (t[:, :, :capacity] for t in (self.k_bgsd, self.v_bgsd))
        if slots.waits and self.votes_bus is not None:
            self.votes_bus = grown(self.votes_bus, capacity + 1, dim=2)
            layer.votes_bus = self.votes_bus[:, :, :capacity]
        self._new: tuple[Tensor, Tensor] | None = None

    def extend(self, k_bg1d: Tensor, v_bg1d: Tensor) -> View:
        """All slots, the step's own key and value among them."""
        self._new = (k_bg1d, v_bg1d)
        self._put(self.slots.enters_r1)
        return View(k_bgjd=self.k_bgsd, v_bgjd=self.v_bgsd, layout=self.slots.layout, carry_bj=self._carry())

    def retain(self, carry_buj: Tensor | None) -> None:
        """Keeps what later queries will need, and the votes after this one (b 1 j)."""
        if self.slots.waits:
            self._put(self.slots.stays_r1)
        if carry_buj is not None:
            self._keep_votes(carry_buj.to(self.votes_bus.dtype))
        self._new = None

    def stores(self) -> list[Tensor]:
        """Its tensors."""
        return [t for t in (self.k_bgsd, self.v_bgsd, self.votes_bus) if t is not None]

    def _put(self, slot_r1: Tensor) -> None:
        for store, new in zip((self.k_bgsd, self.v_bgsd), self._new, strict=True):
            put(store, slot_r1, new, dim=2)

    def _version(self, tokens_r1: Tensor) -> Tensor:
        """Which version of F holds after that many tokens: an index (b 1 s)."""
        b, u, s = self.votes_bus.shape
        return (tokens_r1 % u)[:, :, None].expand(b, 1, s)

    def _carry(self) -> Tensor | None:
        """The votes (b j) before the step; a slot that no query has seen holds 0."""
        if self.votes_bus is None or self.votes_bus.shape[1] == 1:
            return None if self.votes_bus is None else self.votes_bus[:, 0]
        return self.votes_bus.gather(1, self._version(self.slots.clock.count_r1))[:, 0]

    def _keep_votes(self, after_b1j: Tensor) -> None:
        if self.slots.waits:
            # the token that leaves this slot takes its votes along
            stays = self.slots.stays_r1[:, :, None].expand(len(after_b1j), 1, 1)
            after_b1j = after_b1j.scatter(2, stays, 0.0)
        if self.votes_bus.shape[1] == 1:
            self.votes_bus.copy_(after_b1j)
        else:
            self.votes_bus.scatter_(1, self._version(self.slots.clock.count_r1 + 1), after_b1j)


class StaticPruned:
    """A layer with a budget during static steps: the new token takes the slot of the key that leaves."""

    carry_rows = 1

    def __init__(self, layer: PrunedLayer, clock: Clock, longest: int, max_len: int) -> None:
        self.spec, self.turned_spec, self.kind, self.clock = layer.spec, layer.turned_spec, layer.kind, clock
        capacity = layer.kind.capacity(longest, max_len)
        layer.slots.grow(capacity)
        layer.grow(capacity)
        self.k_bgsd, self.v_bgsd, self.votes_bs = layer.k_bgsd, layer.v_bgsd, layer.votes_bus[:, 0]
        self.pos_bs, self.doc_bs = layer.slots.pos_rs, layer.slots.doc_rs

    def extend(self, k_bg1d: Tensor, v_bg1d: Tensor) -> View:
        """All slots, after the new token has taken one."""
        clock = self.clock
        rank_bs = rank(self.kind, self.pos_bs, self.doc_bs, self.votes_bs, doc_b1=clock.doc_r1, next_b1=clock.next_r1)
        slot_b1 = victim(rank_bs, self.pos_bs)[:, None]
        for store, new in ((self.k_bgsd, k_bg1d), (self.v_bgsd, v_bg1d)):
            put(store, slot_b1, new, dim=2)
        put(self.pos_bs, slot_b1, clock.next_r1)
        if self.doc_bs is not None:
            put(self.doc_bs, slot_b1, clock.doc_r1)
        self.votes_bs.scatter_(1, slot_b1, 0.0)
        layout = Layout(self.pos_bs, self.doc_bs)
        return View(k_bgjd=self.k_bgsd, v_bgjd=self.v_bgsd, layout=layout, carry_bj=self.votes_bs)

    def retain(self, carry_buj: Tensor) -> None:
        """Takes over the votes."""
        self.votes_bs.copy_(carry_buj[:, -1])

    def stores(self) -> list[Tensor]:
        """Its tensors."""
        return [t for t in (self.k_bgsd, self.v_bgsd, self.votes_bs, self.pos_bs, self.doc_bs) if t is not None]


class StaticCache:
    """Stands for a `Cache` while a model reads one token a row; see `xattn.generate.StaticStep`, which drives it.

    Args:
        max_len: tokens a row that it is allocated for and refuses to exceed (default: the cache's).
    Raises:
        ConfigError: no max_len, or one beyond the cache's.
    """

    def __init__(self, cache: Cache, *, max_len: int | None = None) -> None:
        cache.refuse_unfinished()
        if max_len is None:
            max_len = cache.max_len
        if max_len is None:
            raise ConfigError("static steps need to know how long rows will grow; give max_len=tokens, here or to the cache")
        if cache.max_len is not None and max_len > cache.max_len:
            raise ConfigError(f"max_len={max_len} is more than the cache was opened for ({cache.max_len})")
        # steps move these numbers on in place; whoever counted by the old ones is told to begin anew
        rows = cache.rows = cache.rows.clone()
        self.cache, self.max_len, self._rows = cache, max_len, rows
        # the farthest next position of any step
        self.reach = rows.reach + max(max_len - rows.longest, 1) - 1
        self._clock = Clock(rows, cache.device)
        shared: dict[int, StaticSlots] = {}
        self.layers: list[StaticLayer | StaticPruned] = []
        for layer in cache.layers:
            sizes = (self._clock, rows.longest, max_len)
            if isinstance(layer, PrunedLayer):
                self.layers.append(StaticPruned(layer, *sizes))
                continue
            slots = layer.slots
            if id(slots) not in shared:
                shared[id(slots)] = StaticSlots(slots, *sizes)
            self.layers.append(StaticLayer(layer, shared[id(slots)]))
        self._slots = list(shared.values())

    # what the model calls, all of it on the device

    def begin(
        self, spec: LayersSpec, like: Tensor, *, dtype: torch.dtype, mask: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Layout:
        """Where this step's tokens stand. Raises ConfigError outside `step`, or for what `Cache.begin` refuses."""
        if not self.cache.stepping:
            raise ConfigError("a static cache is stepped by xattn.StaticStep(model, cache); give the model the cache itself")
        if mask is not None or doc_ids is not None:
            raise ConfigError("a static step takes one token of every row's document; read masks and doc_ids in ordinary calls")
        if like.shape[1] != 1:
            raise ShapeError(f"a static step takes one token a row, not {like.shape[1]}")
        self.cache.check(spec, like, dtype)
        for slots in self._slots:
            slots.begin()
        return self._clock.layout()

    def commit(self) -> None:
        """The step has gone through all layers."""
        for slots in self._slots:
            slots.commit()
        self._clock.tick()

    # what the host does beside a step

    @contextmanager
    def step(self) -> Iterator[None]:
        """One token a row is read within this context, by the model or by the replay of a graph.

        Raises:
            ConfigError: the cache has been used otherwise since. TokenError: beyond max_len.
        """
        cache, rows = self.cache, self._rows
        cache.refuse_unfinished()
        if cache.rows is not rows:
            raise ConfigError("the cache has gone on by other calls since these static steps began; begin them anew")
        if rows.longest >= self.max_len:
            raise TokenError(f"static steps began with max_len={self.max_len}, and a row would have {rows.longest + 1} tokens")
        cache.stepping = True
        yield
        rows.tick()
        cache.lower_bound(rows.count_b - cache.rollback)
        cache.stepping = False

    def stores(self) -> list[Tensor]:
        """Every tensor that steps change."""
        return [store for holder in (self._clock, *self._slots, *self.layers) for store in holder.stores()]

    def reorder(self, index_b: Tensor) -> None:
        """Row r becomes a copy of row index[r], in place; index is on the device, one number a row."""
        cache = self.cache
        cache.refuse_unfinished()
        for store in self.stores():
            if len(store) == cache.batch:
                store.copy_(store[index_b])
        if not self._rows.alike:
            cache.take_rows(index_b)
            self._rows = cache.rows
