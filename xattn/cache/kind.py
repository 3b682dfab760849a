"""Kind: what one layer's cache is made of, read off its attention; every size of a cache follows from it.

Letters: s slots of one row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from xattn.spec.model import AttentionSpec, LayersSpec
from xattn.spec.part import require
from xattn.spec.positions import Rope

KvBudget = int | float | Sequence[int | float | None] | None
# the first allocation of a cache that was not told how long it will grow
FIRST_SLOTS = 64
# the first token, and the newest, which is always seen
EXEMPT = 2


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A composition: storage (full, or a ring of window - 1 survivors), pinned sinks, votes F with a budget, spare slots.

    window: keys a query sees, itself included, or None. sinks: first tokens of a document that stay. selective: keeps
    F, a float a key. budget: keys that pruning leaves, or None. spare: tokens that can be taken back (rollback).
    """

    window: int | None = None
    sinks: int = 0
    selective: bool = False
    budget: int | None = None
    spare: int = 0

    @property
    def ring(self) -> int | None:
        """Slots of the ring, which exclude the sinks; None for a storage that is no ring."""
        return None if self.window is None or self.budget is not None else self.window - 1 + self.spare

    @property
    def most(self) -> int | None:
        """Slots after which the storage grows no more; None for no bound."""
        return self.budget if self.ring is None else self.ring + self.sinks

    def held(self, n: int) -> int:
        """Slots in use after n tokens of a row."""
        return n if self.most is None else min(n, self.most)

    def capacity(self, n: int, max_len: int | None = None) -> int:
        """Slots allocated for n tokens of a row: the next power of two, or max_len at once, and never more than most."""
        if max_len is None:
            max_len = max(FIRST_SLOTS, 1 << (n - 1).bit_length()) if n else 0
        return self.held(max_len)

    def vote_rows(self) -> int:
        """Versions of F that are kept: the newest, and one for each token that can be taken back."""
        return 1 + self.spare if self.selective else 0

    def slot_bytes(self, attn: AttentionSpec, itemsize: int) -> int:
        """Bytes of one slot of one row: key, value, and F in float32 (float64 for float64 keys)."""
        return 2 * attn.kv_heads * attn.dim_head * itemsize + self.vote_rows() * max(4, itemsize)


def keys_are_turned(attn: AttentionSpec) -> bool:
    """Whether keys are stored rotated to their positions; Self-Extend, which turns a key in two ways, keeps them raw."""
    return type(attn.positions) is Rope


def kinds(spec: LayersSpec, *, kv_budget: KvBudget = None, rollback: int = 0, full_len: int | None = None) -> list[Kind]:
    """The kind of every layer.

    Args:
        kv_budget: keys a selective layer keeps: a count, a fraction in (0, 1) of full_len, or a list with one of the two
            or None a layer. One value reaches the selective layers alone.
        rollback: tokens that can be taken back although a ring or F has moved on.
    Raises:
        ConfigError: a bidirectional layer; a budget that is too small, reaches no layer, or meets rollback.
    """
    attns = [block.attention for block in spec.blocks]
    require(all(a.pattern.causal for a in attns), "a cache needs a causal model: later tokens change the keys of an Encoder")
    require(rollback >= 0, f"rollback={rollback} must not be negative")
    budgets = _budgets(attns, kv_budget, full_len)
    require(
        rollback == 0 or not any(budgets),
        f"rollback={rollback} with kv_budget={kv_budget}: what pruning evicts cannot come back; keep a clone() instead",
    )
    return [_kind(attn, budget, rollback) for attn, budget in zip(attns, budgets, strict=True)]


def _kind(attn: AttentionSpec, budget: int | None, rollback: int) -> Kind:
    window, sinks = attn.pattern.sliding_window, attn.pattern.sink_tokens
    selective = attn.selection is not None
    if budget is not None and window is not None and budget >= window + sinks:
        # more than a query ever sees: the ring alone is smaller
        budget = None
    spare = rollback if window is not None or selective else 0
    return Kind(window=window, sinks=sinks, selective=selective, budget=budget, spare=spare)


def _budgets(attns: list[AttentionSpec], given: KvBudget, full_len: int | None) -> list[int | None]:
    """The keys each layer keeps; None for all."""
    if given is None:
        return [None] * len(attns)
    selective = [attn.selection is not None for attn in attns]
    if isinstance(given, (int, float)):
        require(any(selective), f"kv_budget={given} has no effect: no layer has attn_selective; set it or drop kv_budget")
        given = [given if on else None for on in selective]
    given = list(given)
    require(
        len(given) == len(attns), f"kv_budget has {len(given)} entries for depth={len(attns)}; a list gives one value a layer"
    )
    dead = [i for i, (budget, on) in enumerate(zip(given, selective, strict=True)) if budget is not None and not on]
    require(not dead, f"kv_budget={given} has no effect in layer {dead and dead[0]}: attn_selective is off there; use None")
    return [None if budget is None else _count(budget, full_len) for budget in given]


def _count(budget: int | float, full_len: int | None) -> int:
    require(not isinstance(budget, bool), f"kv_budget={budget} must be a number of keys, or a fraction")
    if isinstance(budget, float):
        require(0 < budget < 1, f"kv_budget={budget} is a float, so a fraction, and must be in (0, 1); a count is an int")
        require(full_len is not None, f"kv_budget={budget} is a fraction: say of what length with max_len")
        budget = max(EXEMPT, math.ceil(budget * full_len))
    require(
        budget >= EXEMPT,
        f"kv_budget={budget} is smaller than the {EXEMPT} keys that are never evicted, the first token and the newest",
    )
    return budget
