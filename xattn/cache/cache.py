"""Cache: the state of a batch of sequences in a causal model, from which the next tokens go on.

One law holds for every flag: any way of cutting a sequence into calls gives what one call gives. docs/caches.md tells more.
"""

from typing import Any

import torch
from torch import Tensor

from xattn.cache.kind import Kind, KvBudget, kinds
from xattn.cache.layer import LayerCache
from xattn.cache.pruned import PrunedLayer
from xattn.cache.rows import Chunk, Rows
from xattn.cache.slots import Slots
from xattn.errors import ConfigError, ShapeError, TokenError
from xattn.ops.layout import Layout
from xattn.spec.model import LayersSpec


class Cache:
    """Keys, values and votes of every layer, changed in place by `model(ids, cache=cache)`. Opened by `model.cache(...)`.

    Args:
        spec: the layers it serves. batch: its rows. dtype, device: of the keys and values; F is float32 or better.
        kv_budget: keys that selective layers keep (int, fraction, or a list of these and None a layer); None for all.
        rollback: tokens that `crop` can take back where rings or F have moved on; each costs a slot a ring, a float a key.
        max_len: tokens a row that it is allocated for at once, and refuses to exceed; None grows by doubling. It settles
            self_extend_group=auto: `settled` has the layers as they are for that length.
        full_len: what a fraction in kv_budget is a fraction of (default: max_len).
    Raises:
        ConfigError: a bidirectional layer, a budget that has no effect or is too small, or auto without max_len.
    """

    def __init__(
        self,
        spec: LayersSpec,
        batch: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv_budget: KvBudget = None,
        rollback: int = 0,
        max_len: int | None = None,
        full_len: int | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("max_len", max_len)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        self.spec, self.dtype, self.max_len, self.rollback = spec, dtype, max_len, rollback
        self.device = torch.empty(0, device=device).device
        self.rows = Rows(batch)
        if spec.unsettled and max_len is None:
            raise ConfigError(
                "self_extend_group=auto is settled once, by the length to come, so that any cut of a sequence gives the same; "
                "open the cache with max_len=tokens"
            )
        self.settled = spec.settled(max_len) if spec.unsettled else spec
        attns = [block.attention for block in self.settled.blocks]
        self.kinds = kinds(spec, kv_budget=kv_budget, rollback=rollback, full_len=max_len if full_len is None else full_len)
        # layers that keep the same tokens share one table of positions; F may be kept or not
        self._slots: dict[tuple[int | None, int], Slots] = {}
        self.layers = [self._layer(kind, attn) for kind, attn in zip(self.kinds, attns, strict=True)]
        # the fewest tokens a row that F can be turned back to
        self._low_b = torch.zeros(batch, dtype=torch.long)
        self._chunk: Chunk | None = None
        # whether a static step is under way
        self.stepping = False

    def _layer(self, kind: Kind, attn: Any) -> LayerCache:
        where = {"batch": self.batch, "dtype": self.dtype, "device": self.device}
        if kind.budget is not None:
            return PrunedLayer(kind, attn, **where)
        slots = self._slots.setdefault((kind.ring, kind.sinks), Slots(kind, self.device))
        return LayerCache(kind, attn, slots, **where)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.rows.batch

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has had."""
        return self.rows.count_b.tolist()

    def nbytes(self) -> int:
        """Bytes of every tensor it holds, as allocated: `accounting.cache_bytes` predicts them."""
        tables = {id(layer.slots): layer.slots for layer in self.layers}.values()
        return sum(layer.nbytes() for layer in self.layers) + sum(slots.nbytes() for slots in tables)

    # one call

    def begin(
        self, spec: LayersSpec, like: Tensor, *, dtype: torch.dtype, mask: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Layout:
        """Where the next slots of a model of these layers stand: as many, in as many rows, as `like` (b n ...) has.

        Raises:
            ConfigError: layers, a batch, dtype or device it was not opened for, gradients, or a call before that did not end.
            TokenError: no token, or beyond max_len.
        """
        n = like.shape[1]
        self.refuse_unfinished()
        if n < 1:
            raise TokenError("a call with a cache needs one token or more")
        self.check(spec, like, dtype)
        chunk = self.rows.read(n, device=self.device, mask=mask, doc_ids=doc_ids)
        if self.max_len is not None and chunk.end.longest > self.max_len:
            raise TokenError(f"the cache was opened with max_len={self.max_len}, and a row would have {chunk.end.longest} tokens")
        for slots in self._slots.values():
            slots.begin(chunk, self.max_len)
        for layer in self.layers:
            layer.begin(chunk, self.max_len) if isinstance(layer, PrunedLayer) else layer.begin(chunk)
        self._chunk = chunk
        return chunk.layout

    def check(self, spec: LayersSpec, like: Tensor, dtype: torch.dtype) -> None:
        """Raises ConfigError for layers, a batch, dtype or device it was not opened for, and for gradients."""
        if spec is not self.spec and spec != self.spec:
            raise ConfigError("the cache was opened for other flags than this model has; open one with model.cache(...)")
        if like.shape[0] != self.batch:
            raise ConfigError(f"the cache was opened for batch={self.batch}, and this call has {like.shape[0]} rows")
        for name, had, got in (("dtype", self.dtype, dtype), ("device", self.device, like.device)):
            if had != got:
                raise ConfigError(f"the cache was opened with {name}={had}, and this call has {got}; open one that fits")
        if torch.is_grad_enabled():
            raise ConfigError("a cache keeps no gradients; call the model under torch.no_grad() or torch.inference_mode()")

    def commit(self) -> None:
        """The call has gone through all layers."""
        chunk = self._chunk
        for slots in self._slots.values():
            slots.commit(chunk)
        if any(kind.selective for kind in self.kinds):
            # F is known after the call's last rollback + 1 slots, and as far back as versions reach
            low_b = chunk.end.count_b - self.rollback
            if chunk.n > self.rollback:
                low_b = torch.maximum(low_b, chunk.tokens_before_last(self.rollback))
            self.lower_bound(low_b)
        self.rows, self._chunk = chunk.end, None

    def lower_bound(self, low_b: Tensor) -> None:
        """F can no more be turned back to fewer tokens a row than these."""
        self._low_b = torch.maximum(self._low_b, low_b)

    def refuse_unfinished(self) -> None:
        """Raises ConfigError after a call, or a static step, that did not end."""
        if self._chunk is not None or self.stepping:
            raise ConfigError("the last call with this cache failed midway and left it half written; use an earlier clone()")

    # between calls

    @property
    def reach(self) -> int:
        """The farthest next position of any row."""
        return self.rows.reach

    def clone(self) -> "Cache":
        """A copy that shares nothing: many requests may go on from one prompt."""
        return self._taken(torch.arange(self.batch))

    def repeat(self, times: int) -> "Cache":
        """A copy whose row r * times + t is a copy of row r, for each t: one prompt continued many times."""
        return self._taken(torch.arange(self.batch).repeat_interleave(times))

    def reorder(self, index_b: Tensor) -> None:
        """Row r becomes a copy of row index[r], as beams do; the batch becomes len(index)."""
        other = self._taken(index_b)
        self.__dict__.update(other.__dict__)

    def _taken(self, index: Tensor) -> "Cache":
        self.refuse_unfinished()
        if index.ndim != 1 or len(index) == 0 or int(index.min()) < 0 or int(index.max()) >= self.batch:
            raise ShapeError(f"rows {index.tolist()} are not all in 0 to {self.batch - 1}; give one axis of row numbers")
        new = object.__new__(Cache)
        new.__dict__.update(self.__dict__)
        at = index.to(self.device)
        new._slots = {key: slots.taken(at) for key, slots in self._slots.items()}
        shared = {id(slots): new._slots[key] for key, slots in self._slots.items()}
        new.layers = [layer.taken(at, shared.get(id(layer.slots))) for layer in self.layers]
        new.take_rows(index)
        return new

    def take_rows(self, index: Tensor) -> None:
        """The host's part of `reorder`."""
        self.rows, self._low_b = self.rows.take(index), self._low_b[index.cpu()]

    def crop(self, length: int | Tensor) -> None:
        """Takes tokens back, so that each row has had `length` of them (a number, or one for each row), as if it never read more.

        F is restored exactly, never by subtraction.

        Raises:
            ConfigError: beyond the row's current document, beyond what a ring still holds or F's versions reach (open the
                cache with rollback=...), or after a key was pruned. Nothing has changed then.
        """
        self.refuse_unfinished()
        rows = self.rows
        length_b = torch.as_tensor(length).cpu().expand(self.batch).long()
        back_b = rows.count_b - length_b
        next_b = rows.next_b - back_b
        self._check_crop(length_b, back_b, next_b)
        for slots in {id(layer.slots): layer.slots for layer in self.layers}.values():
            slots.crop(rows, next_b)
        new = rows.clone()
        new.count_b, new.next_b = length_b.clone(), next_b
        new.gap_b = torch.where(back_b > 0, False, rows.gap_b)
        self.rows = new

    def _check_crop(self, length_b: Tensor, back_b: Tensor, next_b: Tensor) -> None:
        def refuse(bad_b: Tensor, why: str) -> None:
            if bool(bad_b.any()):
                row = int(bad_b.long().argmax())
                had, wanted = int(self.rows.count_b[row]), int(length_b[row])
                raise ConfigError(f"row {row} has had {had} tokens and cannot go back to {wanted}: {why}")

        rows, cure = self.rows, f"open the cache with a larger rollback (it is {self.rollback})"
        refuse(back_b < 0, "crop only takes tokens back")
        refuse(next_b < 0, "its current document begins after that; keep a clone() from before it")
        for kind in dict.fromkeys(self.kinds):
            if kind.budget is not None:
                refuse(back_b > 0, "a layer with a kv_budget cannot go back; keep a clone() instead")
            if kind.ring is not None:
                # what the next query sees, against the oldest key that the ring holds
                oldest_b = torch.clamp(next_b - kind.window + 1, min=kind.sinks)
                refuse(oldest_b < torch.minimum(rows.high_b - kind.ring, next_b), f"its ring no longer holds those keys; {cure}")
            if kind.selective and kind.budget is None:
                refuse((back_b > 0) & (length_b < self._low_b), f"F is kept for the last tokens only; {cure}")
