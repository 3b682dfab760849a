"""Decoding and carried votes on the Triton kernels, against the definition; without a GPU as test_kernels.py does."""

from typing import Any

import pytest
import torch
from cases import CASES, SEATINGS, Case, seats, tensors
from measure import FORWARD, error
from test_kernels import CUDA, DEVICE, HALF, interpreter, poison, spec_of, without_dropout  # noqa: F401
from torch import Tensor

import xattn
from xattn.errors import UnsupportedFeature
from xattn.ops.attention import attend
from xattn.ops.layout import Layout
from xattn.ops.reference import reference
from xattn.ops.triton import scratch_limit
from xattn.spec.model import AttentionSpec

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
ROWS = 2


def last(layout: Layout, queries: int) -> Layout:
    """The layout of a chunk: the last slots of a sequence."""
    return Layout(*(None if t is None else t[:, -queries:] for t in (layout.pos_bn, layout.doc_bn)), kind="runs")


def carry_of(spec: AttentionSpec, n: int) -> Tensor | None:
    """Votes that earlier queries may have cast."""
    source = torch.Generator().manual_seed(1)
    return None if spec.selection is None else 3 * torch.rand(2, n, generator=source).double().to(DEVICE)


def compute(
    spec: AttentionSpec, given: dict[str, Tensor], at: tuple[Layout, Layout], carry_bj: Tensor | None, dtype: torch.dtype, *,
    ours: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Output, and with a carry the votes after it, of the kernels or of the definition."""
    q, k, v = (given[name].to(dtype) for name in ("q", "k", "v"))
    sink = given["sink_logits"].to(dtype) if spec.sink_logits else None
    more = {} if carry_bj is None else {"carry_bj": carry_bj.to(torch.promote_types(dtype, torch.float32))}
    more |= {"carry_rows": min(ROWS, at[0].n)} if more else {}
    with torch.no_grad():
        if ours:
            got = attend(q, k, v, spec=spec, layout=at[0], key_layout=at[1], sink_logits_h=sink, backend="triton", **more)
        else:
            got = reference(q, k, v, spec=spec, layout_i=at[0], layout_j=at[1], sink_logits_h=sink, **more)
    got = got if isinstance(got, tuple) else (got, None)
    return {"out": got[0]} | ({"carry": got[1]} if more else {})


def assert_close(got: dict[str, Tensor], right: dict[str, Tensor], *eager: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    """Within the stick of the definition's worst errors; votes are sums, known to an ulp of the largest at best."""
    assert got.keys() == right.keys()
    for name, truth in right.items():
        ulp = float(truth.abs().max()) * torch.finfo(torch.float32).eps if name == "carry" else 0.0
        stick = FORWARD * max([ulp, *(error(single[name], double[name]) for single, double in eager)])
        assert error(got[name], truth) <= stick, f"{name}: off by {error(got[name], truth):.2e}, the stick is {stick:.2e}"


def check(
    spec: AttentionSpec, n: int, queries: int, *, seating: str = "plain", dtype: torch.dtype = torch.float32, **scale: float
) -> dict[str, Tensor]:
    """The last queries of a sequence by the measuring stick, which is as long as the definition is off over all queries."""
    seat = SEATINGS[seating](n)
    given = seat.take({name: t * scale.get(name, 1.0) for name, t in tensors(spec, n, device=DEVICE).items()})
    at, carry = seat.layouts(DEVICE), carry_of(spec, n)
    whole = [compute(spec, given, at, carry, to, ours=False) for to in (torch.float64, dtype)]
    given = given | {"q": given["q"][:, :, -queries:]}
    at = (last(at[0], queries), at[1])
    right, eager = (compute(spec, given, at, carry, to, ours=False) for to in (torch.float64, dtype))
    got = compute(spec, given, at, carry, dtype, ours=True)
    assert_close(got, right, (eager, right), (whole[1], whole[0]))
    assert got["out"].dtype == dtype and ("carry" not in got or got["carry"].dtype == torch.float32)
    return got


# each case in one seating, which the cases take in turn, with one query or a few
TURNS = [
    (case, seats(case)[number % len(seats(case))], 1 + 2 * (number % 2)) for number, case in enumerate(CASES.values())
]


@pytest.mark.parametrize(("case", "seating", "queries"), TURNS, ids=str)
def test_every_case_equals_the_definition(case: Case, seating: str, queries: int) -> None:
    check(without_dropout(case), 70, queries, seating=seating)


MIXED = ["gqa", "window_sinks", "sink_logits", "self_extend_uneven", "selective_gqa_head", "everything", "encoder_window_sinks"]


@pytest.mark.parametrize("seating", ["plain", "left_pad", "packed_padded", "ring"])
@pytest.mark.parametrize("name", MIXED)
def test_keys_split_among_programs_equal_the_definition(
    name: str, seating: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xattn.kernels import launch_decode

    monkeypatch.setattr(launch_decode, "splits", lambda programs, keys: 3)
    check(without_dropout(CASES[name]), 330, 2, seating=seating)


@pytest.mark.parametrize("name", ["gqa", "selective_rotary", "everything", "encoder_self_extend"])
def test_half_precision_equals_the_definition(name: str) -> None:
    check(without_dropout(CASES[name]), 200, 3, dtype=HALF)


@pytest.mark.parametrize("flags", [{"heads": 8, "kv_heads": 1}, {"dim_head": 24}, {"dim_head": 256}, {"heads": 5}], ids=str)
@pytest.mark.parametrize("queries", [1, 11, 16])
def test_every_tile_of_packed_heads_equals_the_definition(flags: dict[str, Any], queries: int) -> None:
    check(spec_of(**flags), 90, queries)
    check(spec_of(**flags, attn_selective=True), 90, queries)


# tiles of keys that are far from all queries, near to all, and mixed; the head is turned by halves
ZONES = {"kv_heads": 1, "rotary_pos_emb": True, "self_extend_group": 5, "self_extend_window": 101}


@pytest.mark.parametrize("more", [
    {"dim_head": 64}, {"dim_head": 32, "attn_selective": True}, {"dim_head": 32, "rotary_emb_dim": 16},
    {"dim_head": 32, "sliding_window": 190, "sink_tokens": 40},
], ids=["whole", "selective", "partial", "sinks"])  # fmt: skip
@pytest.mark.parametrize(("seating", "parts", "dtype"), [
    ("plain", 1, torch.float32), ("plain", 3, HALF), ("ring", 3, torch.float32),
])  # fmt: skip
def test_zones_of_self_extend_equal_the_definition(
    more: dict[str, Any], seating: str, parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xattn.kernels import launch_decode

    monkeypatch.setattr(launch_decode, "splits", lambda programs, keys: parts)
    check(spec_of(**ZONES, **more), 330, 3, seating=seating, dtype=dtype)


@pytest.mark.parametrize("queries", [1, 3])
def test_tiles_in_one_zone_of_self_extend_read_no_turns_of_the_other(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn.ops import triton

    n, tile, near = 330, 32, ZONES["self_extend_window"]
    far = (n - queries - near + 1) // tile * tile
    close = -(-(n - near) // tile) * tile
    turns = triton._turns

    def some(*given: Any) -> Tensor:
        exact, grouped = turns(*given).clone().chunk(2, dim=1)
        exact[:, :, :far], grouped[:, :, close:] = float("nan"), float("nan")
        return torch.cat([exact, grouped], dim=1)

    monkeypatch.setattr(triton, "_turns", some)
    check(spec_of(**ZONES, dim_head=32), n, queries)


def test_split_counts_follow_the_keys_in_sight() -> None:
    from xattn.kernels.launch_decode import splits

    assert splits(programs=1, keys=255) == 1 and splits(programs=8, keys=32768) == 33
    assert splits(programs=64, keys=32768) == 4 and splits(programs=1000, keys=32768) == 1


def test_two_runs_agree_to_the_bit() -> None:
    spec = without_dropout(CASES["everything"])
    one, two = (check(spec, 600, 2, dtype=HALF) for _ in range(2))
    assert all(one[name].equal(two[name]) for name in one)


def test_keys_in_order_that_nobody_sees_are_not_visited() -> None:
    spec = spec_of(sliding_window=9, sink_tokens=2, kv_heads=1)
    n, at = 600, 450
    given = {name: t.float() for name, t in tensors(spec, n, device=DEVICE).items()}
    for name in ("k", "v"):
        given[name][:, :, 64:384], given[name][:, :, 512:] = float("nan"), float("nan")
    layout = Layout(torch.arange(at, at + 1, device=DEVICE)[None], kind="runs")
    with torch.no_grad():
        q = given["q"][:, :, at : at + 1]
        out = attend(q, given["k"], given["v"], spec=spec, layout=layout, key_layout=Layout.plain(n, DEVICE), backend="triton")
    assert bool(out.isfinite().all())


def test_few_queries_without_a_gradient_take_the_decode_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn.kernels import autograd

    taken: list[int] = []
    run = autograd.run_decode
    monkeypatch.setattr(autograd, "run_decode", lambda x, *more: taken.append(x.q.shape[2]) or run(x, *more))
    spec = spec_of()
    for queries in (1, 16, 17):
        given = {name: t.float() for name, t in tensors(spec, 20, device=DEVICE).items()}
        q = given["q"][:, :, -queries:].requires_grad_()
        at = {"layout": last(Layout.plain(20, DEVICE), queries), "key_layout": Layout.plain(20, DEVICE)}
        assert attend(q, given["k"], given["v"], spec=spec, backend="triton", **at).requires_grad
        with torch.no_grad():
            attend(q, given["k"], given["v"], spec=spec, backend="triton", **at)
    assert taken == [1, 16]


# Carried votes


@pytest.mark.parametrize(
    ("name", "seating"),
    [("selective", "plain"), ("selective", "packed_padded"), ("selective_skip", "left_pad"), ("everything", "packed_padded")],
)
def test_chunks_that_carry_votes_equal_one_pass(name: str, seating: str) -> None:
    spec, first_size = without_dropout(CASES[name]), 150 if CUDA else 80
    n = first_size + 10
    at, _ = SEATINGS[seating](n).layouts(DEVICE)
    given = tensors(spec, n, device=DEVICE)
    right = compute(spec, given, (at, at), torch.zeros(2, n, device=DEVICE), torch.float64, ours=False)
    eager = compute(spec, given, (at, at), torch.zeros(2, n, device=DEVICE), torch.float32, ours=False)
    carry, outs, first = torch.zeros(2, n, device=DEVICE), [], 0
    for size in (first_size, 1, 9):
        here = slice(first, first + size)
        chunk = Layout(at.pos_bn[:, here], None if at.doc_bn is None else at.doc_bn[:, here])
        # F of 64 queries at a time
        with scratch_limit(1):
            got = compute(spec, given | {"q": given["q"][:, :, here]}, (chunk, at), carry, torch.float32, ours=True)
        outs.append(got["out"])
        carry, first = got["carry"][:, -1], first + size
    assert_close({"out": torch.cat(outs, dim=2), "carry": got["carry"]}, right, (eager, right))


def test_queries_in_any_order_vote_in_order_of_their_positions() -> None:
    spec, n = without_dropout(CASES["selective_window_sinks"]), 40
    given, carry = tensors(spec, n, device=DEVICE), carry_of(spec, n)
    order = torch.randperm(n, device=DEVICE)
    keys = Layout.plain(n, DEVICE)
    given["q"] = given["q"][:, :, order]
    at = (Layout(keys.pos_bn[:, order].expand(2, -1)), keys)
    right, eager = (compute(spec, given, at, carry, to, ours=False) for to in (torch.float64, torch.float32))
    got = compute(spec, given, at, carry, torch.float32, ours=True)
    assert_close(got, right, (eager, right))


def test_carried_votes_have_no_gradient_here() -> None:
    spec = spec_of(attn_selective=True)
    q = torch.zeros(1, 2, 3, 16, device=DEVICE, requires_grad=True)
    with pytest.raises(UnsupportedFeature, match="carried votes forward only.*no_grad.*reference"):
        attend(q, q, q, spec=spec, carry_bj=torch.zeros(1, 3, device=DEVICE), backend="triton")


# Caches


@pytest.mark.parametrize(
    "flags",
    [{"sliding_window": 9, "sink_tokens": 2, "kv_heads": 1}, {"attn_selective": True, "sim_head": 1},
     {"self_extend_group": 3, "self_extend_window": 8, "attn_selective": True}],
    ids=["ring", "selective", "self_extend"],
)  # fmt: skip
def test_cached_models_go_on_through_the_kernels(flags: dict[str, Any]) -> None:
    sizes = {"num_tokens": 16, "max_seq_len": 80, "dim": 32, "depth": 2, "heads": 2, "rotary_pos_emb": True}
    net = xattn.build(**sizes, **flags, attn_backend="reference").to(DEVICE).eval()
    ours = net.with_flags(attn_backend="triton")
    ids = torch.randint(0, 16, (2, 75), device=DEVICE)
    budget = {"kv_budget": 20} if "attn_selective" in flags and "sim_head" in flags else {}

    def feed(model: Any) -> Tensor:
        cache = model.cache(2, **budget)
        with torch.no_grad():
            return torch.cat([model(part, cache=cache) for part in ids.split([30, 20, 1, 1, 23], dim=1)], dim=1)

    single = feed(net)
    got = feed(ours)
    right = feed(net.double())
    assert error(got, right) <= FORWARD * max(error(single, right), 1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, while it compiles
def test_compiled_whole_it_gives_the_same() -> None:
    spec = spec_of(attn_selective=True, kv_heads=1, rotary_pos_emb=True)
    given = {name: t.float() for name, t in tensors(spec, 40, device=DEVICE).items()}
    at = {"layout": last(Layout.plain(40, DEVICE), 2), "key_layout": Layout.plain(40, DEVICE)}

    def step(q: Tensor, k: Tensor, v: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, spec=spec, carry_bj=carry, backend="triton", **at)

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    carry = torch.ones(2, 40, device=DEVICE)
    with torch.no_grad():
        found = [run(given["q"][:, :, -2:], given["k"], given["v"], carry) for run in (step, compiled)]
    assert all(error(one, two) <= 2e-6 * float(two.abs().max()) for one, two in zip(*found, strict=True))


def test_a_spec_may_drop_nothing_on_the_way() -> None:
    """What a flag changes for a whole sequence it changes for one query."""
    given = {name: t.float() for name, t in tensors(spec_of(), 70, device=DEVICE).items()}
    at = {"layout": last(Layout.plain(70, DEVICE), 1), "key_layout": Layout.plain(70, DEVICE)}
    outs = []
    for flags in ({}, {"sliding_window": 60}, {"sliding_window": 60, "sink_tokens": 3}, {"logit_softcap": 2.0},
                  {"alibi_pos_bias": True}, {"rotary_pos_emb": True},
                  {"rotary_pos_emb": True, "self_extend_group": 2, "self_extend_window": 40}):  # fmt: skip
        with torch.no_grad():
            q = given["q"][:, :, -1:]
            outs.append(attend(q, given["k"], given["v"], spec=spec_of(**flags), backend="triton", **at))
    assert all(error(a, b) > 1e-4 for number, a in enumerate(outs) for b in outs[:number])
