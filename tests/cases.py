"""THE case table: every attention variant as a row of flags, and every way tokens can sit in a batch.

A new flag adds its rows to CASES; the oracles, back-ends, kernels and caches are all measured over the same rows.
Letters: b 2 rows of a batch, h 6 query heads, n 37 slots, d 16 wide heads; g 1, 2, 3 or 6 by the row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from xattn.errors import ConfigError
from xattn.ops.backends import Backend, Call
from xattn.ops.layout import Layout
from xattn.spec.features import features
from xattn.spec.flags import flag_table, parse_attention
from xattn.spec.model import AttentionSpec

BATCH, HEADS, N, DIM_HEAD = 2, 6, 37, 16
# the devices of this machine, each with the marks of its tests
DEVICES = {"cpu": ()} | ({"cuda": (pytest.mark.gpu,)} if torch.cuda.is_available() else {})
SIZES = {"heads": HEADS, "dim_head": DIM_HEAD}


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One variant: a name, its flags beyond the sizes, and whether it is causal."""

    name: str
    flags: dict[str, Any]
    causal: bool

    @cached_property
    def spec(self) -> AttentionSpec:
        """The layer these flags describe."""
        return parse_attention(causal=self.causal, **SIZES, **self.flags)

    @property
    def selective(self) -> bool:
        """Whether tokens hide others, so that a row depends on the queries before it."""
        return self.spec.selection is not None

    def without(self, name: str) -> AttentionSpec:
        """The layer with one flag off, or at another value where it cannot be off alone."""
        table, off = flag_table(), dict(self.flags)
        closed = {name}
        while more := {n for n in off if table[n].gate in closed} - closed:
            closed |= more
        off = {n: value for n, value in off.items() if n not in closed}
        try:
            return parse_attention(causal=self.causal, **SIZES, **off)
        except ConfigError:
            return parse_attention(causal=self.causal, **SIZES, **{**self.flags, name: ANOTHER_VALUE[name]})

    def __repr__(self) -> str:
        return self.name


# for a flag that cannot be left out while its gate is on: a value that no row has
ANOTHER_VALUE = {"rope_scaling_factor": 7.0, "rope_original_len": 200, "self_extend_window": 5}


def _rows() -> Iterator[Case]:
    def row(name: str, *, causal: bool = True, **flags: Any) -> Case:
        return Case(name=name, flags=flags, causal=causal)

    rope = {"rotary_pos_emb": True}
    stretch = rope | {"self_extend_group": 2, "self_extend_window": 4}
    yarn = {"rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_original_len": 40}

    # each flag alone
    yield row("plain")
    yield row("gqa", kv_heads=3)
    yield row("mqa", kv_heads=1)
    yield row("dropout", attn_dropout=0.25)
    yield row("rotary", **rope)
    yield row("rotary_base", **rope, rotary_base=50.0)
    yield row("rotary_partial", **rope, rotary_emb_dim=6)
    yield row("rope_linear", **rope, rope_scaling="linear", rope_scaling_factor=3.0)
    yield row("rope_ntk", **rope, rope_scaling="ntk", rope_scaling_factor=3.0)
    yield row("rope_yarn", **rope, **yarn)
    yield row("self_extend", **stretch)
    yield row("self_extend_uneven", **rope, self_extend_group=3, self_extend_window=4)
    yield row("softcap", logit_softcap=1.5)
    yield row("alibi", alibi_pos_bias=True)
    yield row("window", sliding_window=5)
    yield row("window_of_one", sliding_window=1)
    yield row("window_wide", sliding_window=18)
    yield row("window_sinks", sliding_window=5, sink_tokens=2)
    yield row("sink_logits", sink_logits=True)
    yield row("selective", attn_selective=True)
    yield row("selective_head", attn_selective=True, sim_head=4)
    yield row("selective_skip", attn_selective=True, selection_skip=5.0)
    yield row("selective_skip_bound", attn_selective=True, selection_skip="bound")

    # together, causal
    yield row("rotary_window_gqa", **rope, sliding_window=5, kv_heads=3)
    yield row("rotary_partial_yarn", **rope, **yarn, rotary_emb_dim=10, rotary_base=500.0, kv_heads=2)
    yield row("rotary_sinks_sink_logits", **rope, sliding_window=7, sink_tokens=3, sink_logits=True)
    yield row("alibi_window", alibi_pos_bias=True, sliding_window=6)
    yield row("alibi_window_sinks_sink_logits", alibi_pos_bias=True, sliding_window=6, sink_tokens=1, sink_logits=True)
    yield row("alibi_gqa_dropout", alibi_pos_bias=True, kv_heads=2, attn_dropout=0.25)
    yield row("window_wide_sinks_mqa", sliding_window=17, sink_tokens=1, kv_heads=1)
    yield row("window_sinks_dropout_sink_logits", sliding_window=5, sink_tokens=1, attn_dropout=0.25, sink_logits=True)
    yield row("softcap_alibi", logit_softcap=1.5, alibi_pos_bias=True)
    yield row("softcap_window_sinks_sink_logits_alibi", logit_softcap=2.5, sliding_window=6, sink_tokens=2,
              sink_logits=True, alibi_pos_bias=True)  # fmt: skip
    yield row("self_extend_window_gqa", **stretch, sliding_window=9, kv_heads=3)
    yield row("self_extend_alibi", **stretch, alibi_pos_bias=True)
    yield row("self_extend_yarn_partial", **stretch, **yarn, rotary_emb_dim=8)
    yield row("self_extend_softcap_sink_logits", **stretch, logit_softcap=1.5, sink_logits=True)
    yield row("selective_rotary", attn_selective=True, **rope)
    yield row("selective_window", attn_selective=True, sliding_window=6)
    yield row("selective_window_sinks", attn_selective=True, sim_head=3, sliding_window=6, sink_tokens=2)
    yield row("selective_gqa_head", attn_selective=True, sim_head=5, kv_heads=2)
    yield row("selective_softcap", attn_selective=True, logit_softcap=1.5)
    yield row("selective_alibi", attn_selective=True, sim_head=1, alibi_pos_bias=True)
    yield row("selective_sink_logits", attn_selective=True, sink_logits=True)
    yield row("selective_self_extend", attn_selective=True, **stretch)
    yield row("selective_window_self_extend_gqa_softcap", attn_selective=True, sim_head=2, sliding_window=9, **stretch,
              kv_heads=3, logit_softcap=1.5)  # fmt: skip
    yield row("everything", attn_selective=True, sim_head=4, sliding_window=9, sink_tokens=2, **stretch, **yarn,
              rotary_base=300.0, rotary_emb_dim=12, kv_heads=3, logit_softcap=2.5, alibi_pos_bias=True,
              sink_logits=True, attn_dropout=0.25)  # fmt: skip

    # encoders
    both = {"causal": False}
    yield row("encoder", **both)
    yield row("encoder_gqa", **both, kv_heads=3)
    yield row("encoder_rotary", **both, **rope)
    yield row("encoder_yarn", **both, **rope, **yarn)
    yield row("encoder_self_extend", **both, **rope, self_extend_group=3, self_extend_window=4)
    yield row("encoder_softcap", **both, logit_softcap=1.5)
    yield row("encoder_alibi", **both, alibi_pos_bias=True)
    yield row("encoder_window", **both, sliding_window=4)
    yield row("encoder_window_wide", **both, sliding_window=18)
    yield row("encoder_window_sinks", **both, sliding_window=4, sink_tokens=2)
    yield row("encoder_sink_logits", **both, sink_logits=True)
    yield row("encoder_window_sinks_sink_logits_alibi_gqa", **both, sliding_window=4, sink_tokens=2, sink_logits=True,
              alibi_pos_bias=True, kv_heads=3)  # fmt: skip
    yield row("encoder_self_extend_window_softcap", **both, **stretch, sliding_window=7, logit_softcap=1.5)


CASES: dict[str, Case] = {case.name: case for case in _rows()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Seating:
    """Where tokens sit: a padding mask and document ids (b n) as lists, and the slots that queries and keys come from.

    keys: the key slots in the order they are stored (a ring buffer's), None for all in order.
    first_query: queries are the slots from here on (a chunk after earlier ones).
    """

    n: int
    mask: list[list[bool]] | None = None
    docs: list[list[int]] | None = None
    keys: list[int] | None = None
    first_query: int = 0

    @property
    def key_slots(self) -> list[int]:
        """The slot of every key, in order of storage."""
        return list(range(self.n)) if self.keys is None else self.keys

    def layouts(self, device: torch.device | str = "cpu") -> tuple[Layout, Layout]:
        """Layouts of the queries and of the keys; the same object where they sit alike."""
        mask, docs = (None if rows is None else torch.tensor(rows, device=device) for rows in (self.mask, self.docs))
        whole = Layout.build(self.n, device=torch.device(device), mask_bn=mask, doc_ids_bn=docs)
        queries = _taken(whole, slice(self.first_query, None)) if self.first_query else whole
        return queries, whole if self.keys is None else _taken(whole, self.keys)

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The queries and keys of a whole sequence (n slots) as this seating has them."""
        k, v = (tensors[name][:, :, self.key_slots] for name in ("k", "v"))
        return {**tensors, "q": tensors["q"][:, :, self.first_query :], "k": k, "v": v}


def _taken(layout: Layout, slots: slice | list[int]) -> Layout:
    return Layout(layout.pos_bn[:, slots], None if layout.doc_bn is None else layout.doc_bn[:, slots])


def _runs(*runs: tuple[Any, int]) -> list[Any]:
    return [value for value, count in runs for _ in range(count)]


def _left(n: int) -> list[list[bool]]:
    return [_runs((True, n)), _runs((False, n // 3), (True, n - n // 3))]


def _packed(n: int) -> list[list[int]]:
    # an id that comes back is another document
    third, half = n // 3, n // 2
    return [_runs((4, half), (9, n - half)), _runs((7, third), (2, third // 2), (7, n - third - third // 2))]


def _padded_documents(n: int) -> list[list[bool]]:
    # the padding carries the id of the document beside it
    return [_runs((True, n - n // 5), (False, n // 5)), _runs((False, n // 4), (True, n - n // 4))]


SEATINGS: dict[str, Callable[[int], Seating]] = {
    "plain": lambda n: Seating(n=n),
    "left_pad": lambda n: Seating(n=n, mask=_left(n)),
    "right_pad": lambda n: Seating(n=n, mask=[row[::-1] for row in _left(n)]),
    "empty_row": lambda n: Seating(n=n, mask=[[True] * n, [False] * n]),
    "packed": lambda n: Seating(n=n, docs=_packed(n)),
    "packed_padded": lambda n: Seating(n=n, docs=_packed(n), mask=_padded_documents(n)),
    "ring": lambda n: Seating(n=n, mask=_left(n), keys=[(7 * s + 3) % n if n % 7 else s for s in range(n)]),
    "chunk": lambda n: Seating(n=n, mask=_left(n), first_query=2 * n // 3),
}
# where queries and keys sit alike
OWN = tuple(name for name, make in SEATINGS.items() if make(N).keys is None and not make(N).first_query)


def seats(case: Case, *, carry: bool = True) -> list[str]:
    """The seatings in which a case is defined by its queries, keys and values alone.

    A selective chunk needs the votes of the queries before it, so it is never among them; without a carry to bring such
    votes, selective queries and keys must sit alike.
    """
    if not case.selective:
        return list(SEATINGS)
    return [name for name in SEATINGS if name in OWN or (carry and name != "chunk")]


def tensors(spec: AttentionSpec, n: int = N, *, batch: int = BATCH, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Random q, k, v, sink_logits (where the spec has them) and out's gradient dout, in float64.

    Every number is a bfloat16, so that rounding the inputs costs nothing in any precision.
    """
    source = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64).bfloat16().double().to(device)

    wide = (n, spec.dim_head)
    made = {"q": normal(batch, spec.heads, *wide), "k": normal(batch, spec.kv_heads, *wide)}
    made |= {"v": normal(batch, spec.kv_heads, *wide), "dout": normal(batch, spec.heads, *wide)}
    if spec.sink_logits:
        made["sink_logits"] = normal(spec.heads)
    return made


def call_of(
    spec: AttentionSpec, seating: Seating, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Call:
    """The call that attending with this seating makes."""
    at_i, at_j = seating.layouts(device)
    return Call(spec=spec, layout_i=at_i, layout_j=at_j, batch=BATCH, dtype=dtype, device=torch.device(device))


def claims(backend: Backend, call: Call) -> bool:
    """Whether a back-end says that it honours everything in the call."""
    return not backend.missing(features(call.spec) | call.features)
