"""The Triton kernels against the definition. Without a GPU they run under Triton's interpreter, in float32 and float16.

What the interpreter cannot see - bfloat16, layouts, races, shared memory - the same tests see on a GPU, where every test of
test_backends.py runs the kernels as well.
"""

import itertools
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, SEATINGS, Case, Seating, seats, tensors
from measure import assert_within, error, errors, forward_and_gradients, sticks
from torch import Tensor

import xattn
from xattn.errors import UnsupportedFeature
from xattn.ops import triton as backend
from xattn.ops.attention import attend
from xattn.ops.backends import choose
from xattn.ops.layout import Layout
from xattn.ops.reference import reference
from xattn.ops.triton import scratch_limit
from xattn.spec.flags import parse_attention
from xattn.spec.model import AttentionSpec

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16
# more than two tiles; more than one where every tile is interpreted
LONG = 130 if CUDA else 100
# the interpreter multiplies infinities that kernels mask
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    """Kernels are interpreted where there is no GPU: asked for before they are first imported, and only in this file."""
    before = os.environ.get("TRITON_INTERPRET")
    if not CUDA:
        os.environ["TRITON_INTERPRET"] = "1"
    import xattn.kernels.autograd  # noqa: F401

    yield
    if not CUDA:
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that nobody wrote reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def spec_of(**flags: Any) -> AttentionSpec:
    """A layer of two heads of width 16, unless the flags say otherwise."""
    return parse_attention(**{"heads": 2, "dim_head": 16, **flags})


def results(
    spec: AttentionSpec, given: dict[str, Tensor], at: tuple[Layout, Layout], dtype: torch.dtype, *, ours: bool
) -> dict[str, Tensor]:
    """Output and gradients of the kernels, or of the definition."""

    def run(q: Tensor, k: Tensor, v: Tensor, sink_logits_h: Tensor | None = None) -> Tensor:
        if ours:
            return attend(q, k, v, spec=spec, layout=at[0], key_layout=at[1], sink_logits_h=sink_logits_h, backend="triton")
        return reference(q, k, v, spec=spec, layout_i=at[0], layout_j=at[1], sink_logits_h=sink_logits_h)[0]

    return forward_and_gradients(run, given, dtype)


def check(
    spec: AttentionSpec, n: int, *, seating: str = "plain", dtype: torch.dtype = torch.float32, batch: int = 1, **scale: float
) -> dict[str, Tensor]:
    """Output and every gradient by the measuring stick; `scale` multiplies named inputs."""

    def seated(name: str, spec: AttentionSpec) -> tuple[dict[str, Tensor], tuple[Layout, Layout]]:
        seat: Seating = SEATINGS[name](n)
        given = seat.take(tensors(spec, n, batch=batch, device=DEVICE))
        return {name: t * scale.get(name, 1.0) for name, t in given.items()}, seat.layouts(DEVICE)

    def stick_of(spec: AttentionSpec) -> dict[str, float]:
        eager = []
        # rows of their own and rows with padding, so that luck in one draw counts less
        for name in {seating, "plain"} | ({"left_pad", "right_pad", "packed_padded"} if batch == 2 else set()):
            given, at = seated(name, spec)
            truth = results(spec, given, at, torch.float64, ours=False)
            eager.append(errors(results(spec, given, at, dtype, ours=False), truth))
        return sticks(eager)

    given, at = seated(seating, spec)
    stick = plain = stick_of(spec)
    if 0.0 in stick.values():
        sizes = {"heads": spec.heads, "kv_heads": spec.kv_heads, "dim_head": spec.dim_head}
        plain = stick_of(parse_attention(causal=spec.pattern.causal, **sizes))
    truth = results(spec, given, at, torch.float64, ours=False)
    got = results(spec, given, at, dtype, ours=True)
    assert_within(errors(got, truth), stick, plain)
    return got


def without_dropout(case: Case) -> AttentionSpec:
    """The kernels do not drop weights: the rest of the case."""
    return replace(case.spec, attn_dropout=0.0)


# every case once in a row of its own, and once in a seating that the cases take in turn
TURNS = [
    (case, [s for s in seats(case, carry=False) if s != "plain"][number % (len(seats(case, carry=False)) - 1)])
    for number, case in enumerate(CASES.values())
]


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_every_case_equals_the_definition(case: Case) -> None:
    check(without_dropout(case), LONG)


@pytest.mark.parametrize(("case", "seating"), TURNS, ids=lambda x: str(x))
def test_every_case_equals_the_definition_wherever_its_tokens_sit(case: Case, seating: str) -> None:
    check(without_dropout(case), 70, seating=seating, batch=2)


@pytest.mark.parametrize("name", ["plain", "selective_rotary", "everything", "encoder_window_sinks"])
def test_half_precision_equals_the_definition(name: str) -> None:
    check(without_dropout(CASES[name]), LONG, dtype=HALF)


@pytest.mark.parametrize("n", [1, 17, 63, 64, 127, 257])
def test_every_length_equals_the_definition(n: int) -> None:
    for flags in ({}, {"attn_selective": True}, {"sliding_window": 20, "sink_tokens": 2}):
        check(spec_of(heads=1, **flags), n)


@pytest.mark.parametrize("width", [16, 24, 80, 128, 256])
def test_every_width_equals_the_definition(width: int) -> None:
    check(spec_of(heads=1, dim_head=width, attn_selective=width <= 128), 70)


TILES = [(64, 64, 4, 1), (128, 64, 4, 1), (128, 64, 8, 1), (64, 128, 8, 1), (128, 128, 8, 1)]


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch that nobody wrote reads as a strong attraction, which a comparison with NaN would hide."""
    from xattn.kernels import launch

    take = launch._Call.scratch
    monkeypatch.setattr(launch._Call, "scratch", lambda *args, **more: take(*args, **more).fill_(-1000.0))


@pytest.mark.usefixtures("stale")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(
    "flags", [{"attn_selective": True}, {"attn_selective": True, "sliding_window": 70},
              {"attn_selective": True, "sliding_window": 70, "sink_tokens": 3}, {"attn_selective": True, "selection_skip": 6.0},
              {"rotary_pos_emb": True, "self_extend_group": 2, "self_extend_window": 60, "sliding_window": 130,
              "sink_tokens": 3}],
    ids=["selective", "band", "band_sinks", "skip", "extend"],
)  # fmt: skip
def test_tiles_of_every_size_give_the_same(tile: tuple[int, ...], flags: dict[str, Any]) -> None:
    from xattn.kernels import tiles

    chosen = tiles.Tile(*tile)
    with tiles.override(forward=chosen, dkdv=chosen, dq=chosen):
        check(spec_of(heads=1, **flags), 2 * LONG)


@pytest.mark.parametrize("seating", ["plain", "packed_padded", "left_pad"])
def test_small_tiles_without_selection(seating: str) -> None:
    from xattn.kernels import tiles

    chosen = tiles.Tile(16, 32, 4, 1)
    with tiles.override(forward=chosen, dkdv=chosen, dq=chosen):
        for flags in ({"sliding_window": 30, "sink_tokens": 3}, {"causal": False, "sliding_window": 9}):
            check(spec_of(heads=1, **flags), LONG, seating=seating, batch=2)


# Selection


@pytest.mark.parametrize(
    "flags",
    [{}, {"sliding_window": 90}, {"sliding_window": 90, "sink_tokens": 5}, {"sliding_window": 70, "sink_tokens": 150},
     {"selection_skip": 7.0}, {"sliding_window": 90, "sink_tokens": 2, "selection_skip": 7.0}],
    ids=str,
)  # fmt: skip
def test_chunks_of_scratch_change_nothing(flags: dict[str, Any]) -> None:
    with scratch_limit(1):
        check(spec_of(attn_selective=True, sim_head=1, kv_heads=1, **flags), 560)


def test_scratch_keeps_to_its_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn.kernels import launch

    alive: list[weakref.ref[Tensor]] = []
    held: list[int] = []
    take = launch._Call.scratch

    def watch(self: Any, *args: Any, **more: Any) -> Tensor:
        found = take(self, *args, **more)
        alive.append(weakref.ref(found))
        held.append(sum(t.nbytes for t in (ref() for ref in alive) if t is not None))
        return found

    monkeypatch.setattr(launch._Call, "scratch", watch)
    limit = 5 * 2**18
    with scratch_limit(limit):
        check(spec_of(heads=1, attn_selective=True), 600)
    # F, and in the chunks of dQ a slice of dS with it; a spare tile at either end of each comes on top
    assert len(held) > 4 and limit / 2 < max(held) <= limit + 4 * 4096 * 4


def test_scratch_of_a_window_is_its_band_and_its_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn.kernels import launch

    tiles: list[int] = []
    take = launch._Call.scratch

    def watch(self: Any, *args: Any, slices: int = 0, **more: Any) -> Tensor:
        found = take(self, *args, slices=slices, **more)
        tiles.append(found.shape[-1] // 4096 - 2)
        return found

    monkeypatch.setattr(launch._Call, "scratch", watch)
    n, blocks = (1100, 18) if CUDA else (600, 10)
    for sinks, by_rows, by_columns in ((0, blocks * 3, blocks * 3), (5, blocks * 5, blocks + blocks - 1 + (blocks - 2) * 3)):
        tiles.clear()
        with scratch_limit(2**30):
            check(spec_of(heads=1, attn_selective=True, sliding_window=90, sink_tokens=sinks or None), n)
        assert set(tiles) == {by_rows, by_columns}


def test_a_key_that_all_vote_against_is_forgotten_without_a_trace() -> None:
    for dtype in (torch.float32, HALF):
        got = check(spec_of(heads=1, attn_selective=True), 260, dtype=dtype, q=10.0, k=10.0)
        assert all(bool(t.isfinite().all()) for t in got.values())


def test_a_penalty_beyond_float16_is_no_infinity() -> None:
    spec, n = spec_of(heads=1, attn_selective=True), 260
    given = {name: t.to(HALF) * (1.0 if name == "v" else 30.0) for name, t in tensors(spec, n, batch=1, device=DEVICE).items()}
    q, k, v = (given[name].requires_grad_() for name in ("q", "k", "v"))
    at = Layout.plain(n, DEVICE)
    _, carry = reference(q.double(), k.double(), v.double(), spec=spec, layout_i=at, layout_j=at)
    assert float(carry.detach().max()) > 65504
    out = attend(q, k, v, spec=spec, backend="triton")
    assert all(bool(t.isfinite().all()) for t in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


def test_large_logits_stay_finite() -> None:
    for flags in ({}, {"sink_logits": True}, {"logit_softcap": 5.0}):
        got = check(spec_of(heads=1, **flags), 70, batch=6, q=100.0)
        assert all(bool(t.isfinite().all()) for t in got.values())


def test_two_runs_agree_to_the_bit() -> None:
    spec = without_dropout(CASES["everything"])
    one, two = (check(spec, LONG, dtype=HALF) for _ in range(2))
    assert all(one[name].equal(two[name]) for name in one)


def test_skipping_visits_fewer_blocks_and_stays_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn.kernels import launch

    n, visits = 700, []
    find = launch._Call._find_live

    def watch(self: Any, carry: Tensor) -> None:
        find(self, carry)
        segments = -(-n // 128)
        visits.append((int(self.live[1][:, :segments].sum()), sum(2 * s for s in range(segments))))

    monkeypatch.setattr(launch._Call, "_find_live", watch)
    given = tensors(spec_of(), n, batch=1, device=DEVICE)
    # a selecting head that votes against everything but every other block
    given["q"][:, 0], given["k"][:, 0] = 0.0, 0.0
    given["q"][:, 0, :, 0] = 1.0
    given["k"][:, 0, :, 0] = torch.where(torch.arange(n, device=DEVICE) // 64 % 2 == 0, -2.0, 2.0)
    q, k, v = (given[name].float() for name in ("q", "k", "v"))
    whole, skipped = (
        attend(q, k, v, spec=spec_of(attn_selective=True, selection_skip=skip), backend="triton") for skip in (None, "bound")
    )
    live, before = visits[-1]
    assert 0 < live < 0.8 * before, f"{live} of {before} blocks were visited"
    # e^-10 of the weight at most is masked, and what is left is scaled up by as much
    assert error(skipped, whole) <= 2 * 2.718281828**-10 * float(v.norm(dim=-1).max())


# What else the kernels promise


def test_the_log_sum_exp_is_right_and_can_be_differentiated() -> None:
    for flags in ({}, {"sink_logits": True}, {"sliding_window": 20}):
        spec = spec_of(**flags)
        given = {name: t.float() for name, t in tensors(spec, 70, batch=1, device=DEVICE).items()}
        at = Layout.plain(70, DEVICE)
        q, k = given["q"].requires_grad_(), given["k"].requires_grad_()
        sink = given.get("sink_logits")
        _, lse = backend.with_lse(q, k, given["v"], spec=spec, layout_i=at, layout_j=at, sink_logits_h=sink)
        sim = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * spec.scale
        sim = sim.masked_fill(~spec.pattern.allowed(at.pos_bn, at.pos_bn)[:, None], float("-inf"))
        if sink is not None:
            sim = torch.cat([sim, sink.double()[None, :, None, None].expand(*sim.shape[:3], 1)], dim=3)
        want = sim.logsumexp(dim=3)
        weight = given["dout"][..., 0]
        got_grads = torch.autograd.grad((lse * weight).sum() * 0.6931471805599453, (q, k))
        want_grads = torch.autograd.grad((want * weight).sum(), (q, k))
        assert error(lse.detach().double() * 0.6931471805599453, want.detach()) < 1e-5
        assert all(error(a, b) < 1e-5 * float(b.abs().max()) for a, b in zip(got_grads, want_grads, strict=True))


def test_heads_too_far_apart_for_32_bits_are_copied_but_for_decoding() -> None:
    from xattn.kernels.call import Inputs

    n = 2**20
    far, close = torch.empty(1, 32, n, 128, device="meta"), torch.empty(1, n, 32, 128, device="meta").transpose(1, 2)
    ready = Inputs(q=far, k=close, v=far, far_q=far, far_k=close).ready()
    assert [t.stride(1) for t in (ready.q, ready.k, ready.v, ready.far_q, ready.far_k)] == [128] * 5
    assert ready.k is close
    assert Inputs(q=far, k=far, v=far).ready(reach=2**63).k is far


def test_strided_inputs_are_taken_as_they_are() -> None:
    spec = spec_of(heads=4, kv_heads=2, attn_selective=True)
    given = {name: t.float() for name, t in tensors(spec, 70, batch=2, device=DEVICE).items()}
    plain = attend(given["q"], given["k"], given["v"], spec=spec, backend="triton")
    views = [given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v")]
    assert attend(*views, spec=spec, backend="triton").equal(plain)
    wide = [torch.cat([t, t], dim=3)[..., : t.shape[3]] for t in (given["q"], given["k"], given["v"])]
    assert attend(*wide, spec=spec, backend="triton").equal(plain)
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (given["q"], given["k"], given["v"])]
    assert attend(*turned, spec=spec, backend="triton").equal(plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("flags", [{}, {"attn_selective": True, "sliding_window": 20, "kv_heads": 1}], ids=str)
def test_compiled_whole_it_gives_the_same_output_and_gradients(flags: dict[str, Any]) -> None:
    spec = spec_of(rotary_pos_emb=True, **flags)
    given = {name: t.float() for name, t in tensors(spec, 40, batch=1, device=DEVICE).items()}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, spec=spec, backend="triton")

    compiled = torch.compile(attention, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    found = []
    for run in (attention, compiled):
        leaves = [given[name].clone().requires_grad_() for name in ("q", "k", "v")]
        out = run(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, given["dout"])])
    assert all(error(a, b) <= 2e-6 * float(b.abs().max()) for a, b in zip(*found, strict=True))


def test_the_operators_are_registered_as_torch_wants_them() -> None:
    from xattn.kernels import autograd

    spec = spec_of(heads=1, attn_selective=True)
    given = {name: t.float().requires_grad_(name != "dout") for name, t in tensors(spec, 30, batch=1, device=DEVICE).items()}
    seen: list[tuple[Any, ...]] = []
    operator = autograd._Eager.apply
    try:
        autograd._Eager.apply = lambda *args: seen.append(args) or operator(*args)
        attend(given["q"], given["k"], given["v"], spec=spec, backend="triton")
    finally:
        autograd._Eager.apply = operator
    torch.library.opcheck(torch.ops.xattn.attention, seen[0], test_utils=("test_schema", "test_faketensor"))


def test_a_model_trains_on_the_kernels() -> None:
    model = xattn.build(
        num_tokens=16, max_seq_len=40, dim=32, depth=2, heads=2, rotary_pos_emb=True, attn_selective=[True, False],
        sliding_window=[None, 8], attn_backend="triton",
    ).to(DEVICE)  # fmt: skip
    assert {row["backend"] for row in model.backends()} == {"triton"}
    ids = torch.randint(0, 16, (2, 41), device=DEVICE)
    xattn.AutoregressiveWrapper(model)(ids).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# The walk


@pytest.mark.parametrize("seating", list(SEATINGS))
def test_walks_of_stored_positions_visit_every_pair_and_mask_every_edge(seating: str) -> None:
    from xattn.kernels.walk import GRAIN, table

    seat = SEATINGS[seating](333)
    at_i, at_j = seat.layouts()
    own = at_i is at_j and at_i.kind != "free"
    for causal, window, sinks in itertools.product((True, False), (0, 5, 90), (0, 3)):
        if sinks and not window:
            continue
        spec = spec_of(causal=causal, **({"sliding_window": window} if window else {}),
        **({"sink_tokens": sinks} if sinks else {}))
        allowed = spec.pattern.allowed(at_i.pos_bn, at_j.pos_bn, at_i.doc_bn, at_j.doc_bn)
        by_query, by_key = table(
            at_i.pos_bn, at_j.pos_bn, at_i.doc_bn, at_j.doc_bn, causal=causal, window=window, sinks=sinks, near=0, ordered=own
        )  # fmt: skip
        for walks, pairs in ((by_query, allowed), (by_key, allowed.transpose(1, 2))):
            for b, block in itertools.product(range(pairs.shape[0]), range(-(-pairs.shape[1] // GRAIN))):
                front_lo, front_hi, lo, in_lo, _, _, in_hi, hi = walks[b, block].tolist()
                mine = pairs[b, block * GRAIN : (block + 1) * GRAIN]
                seen = mine.any(dim=0).nonzero().flatten().tolist()
                assert all(lo <= slot < hi or front_lo <= slot < front_hi for slot in seen)
                assert bool(mine[:, in_lo : max(in_lo, in_hi)].all()), "a tile without a mask hides a pair"


# Where there is no GPU


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_without_a_gpu_naming_the_kernels_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UnsupportedFeature, match="needs a CUDA GPU.*use attn_backend='auto'"):
        choose(CASES["plain"].spec, "triton")
    with pytest.raises(UnsupportedFeature, match="needs a CUDA GPU"):
        xattn.Decoder(dim=32, depth=1, heads=2, attn_backend="triton")
    q = torch.zeros(1, 2, 3, 16)
    with pytest.raises(UnsupportedFeature, match="needs a CUDA GPU"):
        attend(q, q, q, spec=spec_of(), backend="triton")


def test_what_the_kernels_cannot_do_is_refused_with_its_reason() -> None:
    q = torch.zeros(1, 2, 3, 16, device=DEVICE)
    wide = torch.zeros(1, 2, 3, 272, device=DEVICE)
    for tensor, spec, why in (
        (q.double(), spec_of(), "float64"),
        (wide, spec_of(dim_head=272), "dim_head up to 256, not 272"),
        (q, spec_of(attn_dropout=0.1), "does not implement attn_dropout"),
    ):
        with pytest.raises(UnsupportedFeature, match=why):
            attend(tensor, tensor, tensor, spec=spec, backend="triton")
