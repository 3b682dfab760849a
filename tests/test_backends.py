"""Every back-end against the definition: what it claims is right to the last gradient, the rest it refuses.

Nothing here names a back-end where BACKENDS can: a new one is measured as soon as it is listed.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from cases import (
    BATCH,
    CASES,
    DEVICES,
    DIM_HEAD,
    HEADS,
    SEATINGS,
    SIZES,
    Case,
    N,
    Seating,
    call_of,
    claims,
    seats,
    tensors,
)
from measure import assert_exact, assert_within, errors, forward_and_gradients, sticks
from torch import Tensor

from xattn.errors import ConfigError, UnsupportedFeature
from xattn.nn.layers import Decoder, Encoder
from xattn.ops import sdpa, triton
from xattn.ops.attention import attend
from xattn.ops.backends import BACKENDS, Backend, choose, dense_limit, order, rejected, resolve
from xattn.ops.layout import Layout
from xattn.ops.reference import reference
from xattn.spec.features import features
from xattn.spec.flags import flag_table, parse_attention
from xattn.spec.model import AttentionSpec
from xattn.spec.part import FAMILIES, PARTS, Flag, flag, flags_of, part
from xattn.spec.pattern import Pattern
from xattn.spec.positions import NoPositions
from xattn.spec.score import Score

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
# what a model may be moved to
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# those that can run on the CPU of this machine
HERE = [backend for backend in BACKENDS if backend.lacks("cpu") is None]
MEASURED = [backend for backend in BACKENDS if backend.name != "reference"]


def served(backends: list[Backend], *, dtypes: tuple[str, ...] = ("float64",)) -> list[Any]:
    """One row for each back-end, case, seating, precision and device of this machine that the back-end takes."""
    rows = []
    for device, marks in DEVICES.items():
        for backend in backends:
            for case in CASES.values():
                for seating in seats(case, carry=False):
                    for dtype in dtypes:
                        call = call_of(case.spec, SEATINGS[seating](N), dtype=DTYPES[dtype], device=device)
                        if claims(backend, call) and not backend.limits(call):
                            name = f"{backend.name}-{case}-{seating}-{dtype}-{device}"
                            rows.append(pytest.param(backend, case, seating, dtype, device, id=name, marks=marks))
    return rows


def run(backend: str, spec: AttentionSpec, given: dict[str, Tensor], seat: Seating, **more: Any) -> Tensor:
    """What a back-end makes of the tensors of a whole sequence, seated."""
    given = seat.take(given)
    queries, keys = seat.layouts(given["q"].device)
    return attend(
        given["q"], given["k"], given["v"], spec=spec, layout=queries, key_layout=keys,
        sink_logits_h=given["sink_logits"] if spec.sink_logits else None, backend=backend, **more,
    )  # fmt: skip


@cache
def defined(spec: AttentionSpec, seating: str, dtype: str, device: str, n: int = N) -> dict[str, Tensor]:
    """Output and gradients of the definition, run eagerly in a precision."""
    seat = SEATINGS[seating](n)
    at_i, at_j = seat.layouts(device)

    def define(q: Tensor, k: Tensor, v: Tensor, sink_logits_h: Tensor | None) -> Tensor:
        return reference(q, k, v, spec=spec, layout_i=at_i, layout_j=at_j, sink_logits_h=sink_logits_h)[0]

    return forward_and_gradients(define, seat.take(tensors(spec, n, device=device)), DTYPES[dtype])


@cache
def stick(spec: AttentionSpec, dtype: str, device: str, n: int = N) -> dict[str, float]:
    """How far from float64 the definition itself is in a low precision, times what a back-end is allowed."""
    exact, low = ([defined(spec, s, t, device, n) for s in SEATINGS] for t in ("float64", dtype))
    return sticks([errors(a, b) for a, b in zip(low, exact, strict=True)])


def measured(backend: str, spec: AttentionSpec, seating: str, dtype: str, device: str, n: int = N) -> dict[str, Tensor]:
    """Output and gradients of a back-end."""
    seat = SEATINGS[seating](n)
    at_i, at_j = seat.layouts(device)

    def go(q: Tensor, k: Tensor, v: Tensor, sink_logits_h: Tensor | None) -> Tensor:
        return attend(q, k, v, spec=spec, layout=at_i, key_layout=at_j, sink_logits_h=sink_logits_h, backend=backend)

    return forward_and_gradients(go, seat.take(tensors(spec, n, device=device)), DTYPES[dtype])


def check_parity(backend: Backend, spec: AttentionSpec, seating: str, dtype: str, device: str, n: int = N) -> None:
    """Forward and every gradient, by the measuring stick."""
    truth = defined(spec, seating, "float64", device, n)
    got = measured(backend.name, spec, seating, dtype, device, n)
    assert {t.dtype for t in got.values()} == {DTYPES[dtype]}
    if dtype == "float64":
        for name, want in truth.items():
            assert_exact(got[name], want, name)
    else:
        assert_within(errors(got, truth), stick(spec, dtype, device, n), stick(CASES["plain"].spec, dtype, device))


# Parity


@pytest.mark.parametrize(("backend", "case", "seating", "dtype", "device"), served(MEASURED, dtypes=tuple(DTYPES)))
def test_output_and_gradients_equal_the_definition(backend: Backend, case: Case, seating: str, dtype: str, device: str) -> None:
    check_parity(backend, case.spec, seating, dtype, device)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_attending_on_the_reference_is_the_definition(case: Case) -> None:
    got = measured("reference", case.spec, "packed_padded", "float64", "cpu")
    for name, want in defined(case.spec, "packed_padded", "float64", "cpu").items():
        assert got[name].equal(want), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 17, 63, 127, 257])
@pytest.mark.parametrize(
    ("backend", "case", "seating", "_", "device"),
    [
        row
        for row in served(MEASURED)
        if row.values[1].name in ("rotary", "rotary_sinks_sink_logits", "encoder_window_wide", "selective_window")
        and row.values[2] == "left_pad"
    ],
)
def test_every_length_equals_the_definition(
    backend: Backend, case: Case, seating: str, _: str, device: str, n: int, dtype: str
) -> None:
    if not backend.limits(call_of(case.spec, SEATINGS[seating](n), dtype=DTYPES[dtype], device=device)):
        check_parity(backend, case.spec, seating, dtype, device, n)


def test_every_claimed_feature_is_measured() -> None:
    for backend in MEASURED:
        calls = [call_of(c.spec, SEATINGS[s](N)) for c in CASES.values() for s in seats(c, carry=False)]
        # chunks with carried votes are measured in test_reference.py and test_decode.py
        calls += [replace(call, carries=True) for call in calls if call.spec.selection is not None]
        exercised = {name for call in calls if claims(backend, call) for name in features(call.spec) | call.features}
        assert not backend.supports - exercised, f"{backend.name} claims what no case measures"


def feature_names() -> set[str]:
    """Every feature that flags can ask of a back-end."""
    names = {"causal", "bidirectional", "kv_heads", "attn_dropout"} | set(flags_of(Pattern))
    names |= set(flags_of(AttentionSpec)) - set(SIZES)
    for cls in (cls for family in PARTS.values() for cls in family):
        names |= {cls.switch.name} | set(flags_of(cls))
    return names


def test_every_feature_has_a_case() -> None:
    covered = set().union(*(features(case.spec) for case in CASES.values()))
    # of layers that attend only once they are settled, and then are without it: tests/test_self_extend_auto.py
    unsettled = {"self_extend_trained_len"}
    assert not feature_names() - covered - unsettled, "a new flag needs rows in the case table"
    assert not covered - feature_names()


def test_every_flag_of_a_case_is_one_of_its_features() -> None:
    for case in CASES.values():
        assert set(case.flags) <= features(case.spec), case
        assert ("causal" if case.causal else "bidirectional") in features(case.spec), case


# Not inert


@pytest.mark.parametrize(
    ("backend", "case", "seating", "dtype", "device"),
    [row for row in served(list(BACKENDS)) if row.values[2] in ("plain", "packed_padded")],
)
def test_no_flag_is_inert(backend: Backend, case: Case, seating: str, dtype: str, device: str) -> None:
    seat = SEATINGS[seating](N)
    given = tensors(case.spec, device=device)
    # dropout is drawn anew from the same seed, so that only the flag differs
    torch.manual_seed(0)
    on = run(backend.name, case.spec, given, seat, training=True)
    # kv_heads changes the sizes of its inputs; it has a test of its own
    for name in set(case.flags) - {"kv_heads"}:
        if case.flags[name] == "bound":
            # selection_skip's promise of next to no change: test_kernels.py holds it to that
            continue
        torch.manual_seed(0)
        off = run(backend.name, case.without(name), given, seat, training=True)
        assert not torch.allclose(on, off), f"{name} changes nothing"


@pytest.mark.parametrize(
    ("backend", "case", "seating", "dtype", "device"),
    [
        row
        for row in served(list(BACKENDS))
        # selection joins all heads
        if "kv_heads" in row.values[1].flags and not row.values[1].selective and row.values[2] == "packed"
    ],
)
def test_each_key_head_reaches_its_own_group_of_query_heads(
    backend: Backend, case: Case, seating: str, dtype: str, device: str
) -> None:
    seat, given, group = SEATINGS[seating](N), tensors(case.spec, device=device), HEADS // case.spec.kv_heads
    before = run(backend.name, case.spec, given, seat)
    for g in range(case.spec.kv_heads):
        changed = given | {"k": given["k"].clone(), "v": given["v"].clone()}
        changed["k"][:, g] += 1.0
        changed["v"][:, g] += 1.0
        differs = (run(backend.name, case.spec, changed, seat) != before).flatten(2).any(dim=2).all(dim=0)
        assert differs.tolist() == [h // group == g for h in range(HEADS)]


@pytest.mark.parametrize("seating", [s for s in SEATINGS if s not in ("plain", "ring", "chunk")])
@pytest.mark.parametrize("backend", HERE, ids=lambda b: b.name)
def test_no_layout_is_inert(backend: Backend, seating: str) -> None:
    for name in ("plain", "window", "rotary_sinks_sink_logits", "alibi"):
        spec, seat = CASES[name].spec, SEATINGS[seating](N)
        if claims(backend, call_of(spec, seat)):
            given = tensors(spec)
            got, plain = run(backend.name, spec, given, seat), run(backend.name, spec, given, Seating(n=N))
            assert not torch.allclose(got, plain)


@pytest.mark.parametrize("backend", HERE, ids=lambda b: b.name)
def test_causal_is_not_inert(backend: Backend) -> None:
    for flags in ({}, {"sliding_window": 5}, {"alibi_pos_bias": True}, {"sink_logits": True}):
        specs = [parse_attention(causal=causal, **SIZES, **flags) for causal in (True, False)]
        if all(claims(backend, call_of(spec, Seating(n=N))) for spec in specs):
            given = tensors(specs[0])
            one, other = (run(backend.name, spec, given, Seating(n=N)) for spec in specs)
            assert not torch.allclose(one, other), flags


WINDOWED = [row for row in served(list(BACKENDS)) if row.values[1].spec.pattern.sliding_window and row.values[2] == "plain"]


@pytest.mark.parametrize(("backend", "case", "seating", "dtype", "device"), WINDOWED)
def test_token_i_minus_w_is_out_of_sight_and_the_next_one_is_seen(
    backend: Backend, case: Case, seating: str, dtype: str, device: str
) -> None:
    spec, seat = case.spec, SEATINGS[seating](N)
    window = spec.pattern.sliding_window
    given = tensors(spec, device=device)
    before = run(backend.name, spec, given, seat)

    def changed(token: int, row: int) -> bool:
        # with selection, what the token asks decides what later tokens see; what it answers stays within the window
        names = ("k", "v") if case.selective else ("q", "k", "v")
        other = given | {name: given[name].clone() for name in names}
        for name in names:
            other[name][:, :, token] += 1.0
        return not run(backend.name, spec, other, seat)[:, :, row].equal(before[:, :, row])

    for row in (window + spec.pattern.sink_tokens, N - 1):
        assert not changed(row - window, row), f"row {row} sees token {row - window}"
        assert changed(row - window + 1, row), f"row {row} does not see token {row - window + 1}"
    if not case.causal:
        assert not changed(N - 1, N - 1 - window)
        assert changed(N - 1, N - window)


@pytest.mark.parametrize(
    ("backend", "case", "seating", "dtype", "device"),
    [row for row in served(list(BACKENDS)) if row.values[2] in ("plain", "packed_padded", "ring")],
)
def test_gradients_reach_exactly_the_keys_in_sight(backend: Backend, case: Case, seating: str, dtype: str, device: str) -> None:
    seat = SEATINGS[seating](N)
    given = tensors(case.spec, device=device)
    v = given["v"].requires_grad_()
    at_i, at_j = seat.layouts(device)
    allowed = case.spec.pattern.allowed(at_i.pos_bn, at_j.pos_bn, at_i.doc_bn, at_j.doc_bn)
    out = run(backend.name, case.spec, given, seat)
    for i in (0, 4, 11, 18, 23, N - 1):
        (grad,) = torch.autograd.grad(out[:, :, i].sum(), v, retain_graph=True)
        reached = grad[:, :, seat.key_slots].abs().sum(dim=(1, 3)) > 0
        sight = allowed.expand(BATCH, -1, -1)[:, i]
        if case.flags.get("selection_skip"):
            # which keys are masked besides is for the numbers to say: test_reference.py
            assert bool(reached.any()) and not bool((reached & ~sight).any()), f"row {i}"
        else:
            assert reached.equal(sight), f"row {i}"


# The plans of sdpa


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """(queries, keys, bytes that the mask holds) of every call that reaches torch."""
    seen = []
    real = sdpa.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        seen.append((q.shape[2], k.shape[2], 0 if attn_mask is None else attn_mask.untyped_storage().nbytes()))
        return real(q, k, v, attn_mask=attn_mask, **more)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", spy)
    return seen


BLOCKED = {
    "window": {},
    "sinks": {"sink_tokens": 3},
    "sinks_sink_logits_rotary": {"sink_tokens": 3, "sink_logits": True, "rotary_pos_emb": True},
    "alibi_gqa": {"alibi_pos_bias": True, "kv_heads": 3},
}
# windows under, at and over the smallest block of 16; lengths that no block divides
STRETCHES = [
    (1, 17), (2, 63), (5, 37), (15, 63), (16, 63), (16, 64), (17, 127), (31, 63), (33, 127), (62, 63), (40, 257)
]  # fmt: skip


@pytest.mark.parametrize("seating", ["plain", "left_pad", "packed_padded"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "encoder"])
@pytest.mark.parametrize(("window", "n"), STRETCHES)
@pytest.mark.parametrize("flags", BLOCKED)
def test_blocked_windows_equal_the_definition(
    flags: str, window: int, n: int, causal: bool, seating: str, masks: list[tuple[int, ...]], device: str
) -> None:
    spec = parse_attention(causal=causal, **SIZES, sliding_window=window, **BLOCKED[flags])
    at, _ = SEATINGS[seating](n).layouts(device)
    blocked = (1 if causal else 2) * window < n and (seating == "plain" or not spec.pattern.sink_tokens)
    assert sdpa.plan(spec, at, at) == ("blocked" if blocked else "masked")
    check_parity(named("sdpa"), spec, seating, "float64", device, n)
    (queries, keys, _), *more = masks
    assert not more
    if blocked:
        # a block's keys are those within reach and the sinks, however long the sequence is
        reach = 2 * window + 32 if causal else 3 * window + 48
        assert queries <= window + 16 and keys <= reach + spec.pattern.sink_tokens + spec.sink_logits
    else:
        assert (queries, keys) == (n, n + spec.sink_logits)


def named(name: str) -> Backend:
    """The back-end of that name."""
    return next(backend for backend in BACKENDS if backend.name == name)


@pytest.mark.parametrize("name", ["plain", "gqa", "rotary", "sink_logits", "encoder", "encoder_sink_logits"])
def test_plain_attention_makes_no_mask(name: str, masks: list[tuple[int, ...]]) -> None:
    spec, at = CASES[name].spec, Layout.plain(N)
    assert sdpa.plan(spec, at, at) == "plain"
    assert sdpa.mask_bytes(spec, at, at, 4) == 0
    run("sdpa", spec, tensors(spec), SEATINGS["plain"](N))
    assert [mask for _, _, mask in masks] == [0]


@pytest.mark.parametrize("window", [N, N + 1, 500])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_over_everything_is_the_plain_plan(window: int, causal: bool) -> None:
    spec, at = parse_attention(causal=causal, **SIZES, sliding_window=window), Layout.plain(N)
    assert sdpa.plan(spec, at, at) == "plain"
    check_parity(named("sdpa"), spec, "plain", "float64", "cpu")


@pytest.mark.parametrize("sink_tokens", [1, 36, 37, 38, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_more_sink_tokens_than_tokens_are_all_of_them(sink_tokens: int, causal: bool) -> None:
    spec = parse_attention(causal=causal, **SIZES, sliding_window=5, sink_tokens=sink_tokens)
    for backend in [b for b in MEASURED if b in HERE]:
        if claims(backend, call_of(spec, Seating(n=N))):
            check_parity(backend, spec, "plain", "float64", "cpu")


def test_a_layout_remembers_no_mask_of_another_key_layout() -> None:
    spec, given = parse_attention(**SIZES), tensors(parse_attention(**SIZES))
    queries = Layout(torch.arange(N)[None])
    for shift in range(12):
        keys = Layout(torch.arange(N)[None] - 2 * shift + 6)
        got = attend(given["q"], given["k"], given["v"], spec=spec, layout=queries, key_layout=keys, backend="sdpa")
        want, _ = reference(given["q"], given["k"], given["v"], spec=spec, layout_i=queries, layout_j=keys)
        assert_exact(got, want)
        del keys


@pytest.mark.parametrize("name", ["rotary", "window", "alibi", "rotary_sinks_sink_logits"])
def test_a_layout_used_in_inference_may_be_trained_on(name: str) -> None:
    spec, (at, _) = CASES[name].spec, SEATINGS["left_pad"](N).layouts()
    given = tensors(spec)
    q = given["q"].requires_grad_()
    for backend in HERE:
        with torch.inference_mode():
            args = {"spec": spec, "layout": at, "sink_logits_h": given.get("sink_logits"), "backend": backend.name}
            want = attend(q, given["k"], given["v"], **args)
        got = attend(q, given["k"], given["v"], **args)
        got.sum().backward()
        assert got.equal(want)


def test_equal_layouts_give_equal_results_whether_or_not_they_are_one_object() -> None:
    for name in ("plain", "window", "rotary_sinks_sink_logits"):
        spec = CASES[name].spec
        given = tensors(spec)
        sinks = given.get("sink_logits")
        for backend in HERE:
            one, two = Layout.plain(N), Layout.plain(N)
            got = [
                attend(given["q"], given["k"], given["v"], spec=spec, layout=one, key_layout=keys, sink_logits_h=sinks,
                       backend=backend.name) for keys in (None, two)
            ]  # fmt: skip
            assert_exact(got[0], got[1])


# Dropout


def dropped(backend: Backend, flags: dict[str, Any], training: bool, draws: int = 512) -> tuple[Tensor, Tensor]:
    """Attention weights of many draws and without dropout, read off with the identity as values."""
    sizes = {"heads": 2, "kv_heads": 1, "dim_head": 17}
    spec, plain = parse_attention(**sizes, **flags, attn_dropout=0.25), parse_attention(**sizes, **flags)
    q, k = torch.randn(1, 2, 17, 17), torch.randn(1, 1, 17, 17)
    sinks = torch.randn(2) if spec.sink_logits else None
    v = torch.eye(17)[None, None]
    many = [x.expand(draws, -1, -1, -1) for x in (q, k, v)]
    got = attend(*many, spec=spec, sink_logits_h=sinks, training=training, backend=backend.name)
    want = attend(q, k, v, spec=plain, sink_logits_h=sinks, training=training, backend=backend.name)
    return got, want


DROPPING = [backend for backend in BACKENDS if not backend.missing(frozenset({"attn_dropout"}))]


@pytest.mark.parametrize("flags", [{}, {"sliding_window": 5}, {"alibi_pos_bias": True}, {"sink_logits": True}], ids=str)
@pytest.mark.parametrize("backend", DROPPING, ids=lambda b: b.name)
def test_dropout_drops_its_share_of_the_weights_and_scales_up_the_rest(backend: Backend, flags: dict[str, Any]) -> None:
    got, want = dropped(backend, flags, training=True)
    seen = (want > 0).expand_as(got)
    kept = got[seen] > 0
    share, count = 1 - kept.double().mean(), kept.numel()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5, "five standard errors of a fair draw"
    scaled = (want / 0.75).expand_as(got)
    assert torch.allclose(got[seen][kept], scaled[seen][kept])
    spread = want * (0.25 / 0.75) ** 0.5 / got.shape[0] ** 0.5
    assert bool(((got.mean(0, keepdim=True) - want).abs() <= 5 * spread + 1e-6).all()), "its mean is no dropout"


@pytest.mark.parametrize("backend", DROPPING, ids=lambda b: b.name)
def test_dropout_rests_when_not_training(backend: Backend) -> None:
    got, want = dropped(backend, {}, training=False, draws=2)
    assert torch.allclose(got, want.expand_as(got))


# Refusal


def combinations() -> list[AttentionSpec]:
    """The specs of all cases."""
    return [case.spec for case in CASES.values()]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_named_back_end_refuses_with_every_missing_feature_and_who_could(backend: Backend) -> None:
    refused = 0
    for spec in combinations():
        missing = backend.missing(features(spec)) or ([need] if (need := backend.lacks(DEVICE)) else [])
        if not missing:
            assert choose(spec, backend.name) is backend
            continue
        refused += 1
        able = [other.name for other in BACKENDS if not other.missing(features(spec)) and not other.lacks(DEVICE)]
        given = tensors(spec)
        for refuse in (
            lambda spec=spec: choose(spec, backend.name),
            lambda spec=spec, given=given: run(backend.name, spec, given, Seating(n=N)),
        ):
            with pytest.raises(UnsupportedFeature) as caught:
                refuse()
            told = str(caught.value)
            assert all(name in told for name in [backend.name, *missing]), told
            assert any(name in told.replace(f"'{backend.name}'", "") for name in able), f"who could? {told}"
    assert refused or backend.supports is None


def test_whether_triton_is_installed_is_not_asked_while_a_call_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 cannot trace through the question, and would break the graph at every attention."""

    def asked(*_: object) -> None:
        raise AssertionError("find_spec was called")

    monkeypatch.setattr("importlib.util.find_spec", asked)
    for device in ("cpu", "cuda"):
        rejected(CASES["plain"].spec, device_type=device)
    monkeypatch.setattr(triton, "_INSTALLED", False)
    assert "pip install triton" in rejected(CASES["plain"].spec)["triton"]


def test_auto_never_picks_a_back_end_that_lacks_a_feature() -> None:
    for case in CASES.values():
        for seating in seats(case, carry=False):
            call = call_of(case.spec, SEATINGS[seating](N))
            assert claims(resolve(call), call)
        assert not choose(case.spec).missing(features(case.spec))


def test_rejected_back_ends_are_exactly_those_that_lack_something() -> None:
    for spec in combinations():
        reasons = rejected(spec)
        for backend in BACKENDS:
            missing = backend.missing(features(spec))
            assert (backend.name in reasons) == bool(missing or backend.lacks("cpu"))
            assert all(name in reasons[backend.name] for name in missing)


def test_auto_prefers_the_first_back_end_that_can() -> None:
    assert choose(CASES["plain"].spec) is BACKENDS[0]
    for spec in combinations():
        able = [backend for backend in HERE if not backend.missing(features(spec))]
        assert choose(spec) is able[0]


def test_on_a_gpu_auto_asks_torch_for_plain_attention_and_the_kernels_for_the_rest() -> None:
    for case in CASES.values():
        fused = not set(case.flags) & {"sliding_window", "alibi_pos_bias", "logit_softcap", "sink_logits"}
        assert order(case.spec, "cuda", plain=True)[0].name == ("sdpa" if fused else "triton"), case
        assert order(case.spec, "cuda", plain=False)[0].name == "triton"
        assert order(case.spec, "cpu", plain=False)[-1].name == "triton"


def test_an_unknown_back_end_is_refused_with_a_suggestion() -> None:
    for ask in (lambda: choose(CASES["plain"].spec, "spda"), lambda: attend(*[torch.zeros(1, 6, 3, 16)] * 3,
                spec=CASES["plain"].spec, backend="spda")):  # fmt: skip
        with pytest.raises(UnsupportedFeature, match="spda.*did you mean sdpa"):
            ask()


@pytest.fixture
def parts() -> Iterator[None]:
    """Parts registered in the test are gone after it."""
    before = {family: list(PARTS[family]) for family in FAMILIES}
    yield
    for family in FAMILIES:
        PARTS[family][:] = before[family]


def refused_by_all_but_the_reference(spec: AttentionSpec, name: str) -> None:
    """The feature is known by its name, every back-end that lists what it supports refuses it, and auto avoids them."""
    assert name in features(spec)
    for backend in MEASURED:
        with pytest.raises(UnsupportedFeature, match=name):
            choose(spec, backend.name)
        with pytest.raises(UnsupportedFeature, match=name):
            run(backend.name, spec, tensors(spec), Seating(n=N))
    assert choose(spec).name == "reference"


def test_an_invented_part_is_refused_by_all_but_the_reference(parts: None) -> None:
    @part(switch="toy_gain")
    class ToyGain(Score):
        toy_gain: float | None = flag(float, None, "multiplies the logits")

        def modify(self, sim_bhij: Tensor, distance_bij: Tensor) -> Tensor:
            return sim_bhij * self.toy_gain

    spec = parse_attention(**SIZES, toy_gain=3.0)
    refused_by_all_but_the_reference(spec, "toy_gain")
    assert "toy_gain" in flag_table() and "toy_gain" in feature_names()
    given, plain = tensors(spec), parse_attention(**SIZES)
    got = run("auto", spec, given, Seating(n=N))
    assert_exact(got, run("reference", plain, given | {"q": given["q"] * 3.0}, Seating(n=N)))


def test_an_invented_part_with_a_bool_switch_is_refused_by_all_but_the_reference(parts: None) -> None:
    @part(switch=Flag(name="toy_positions", type=bool, default=False, help="forgets half of every query"))
    class Toy(NoPositions):
        toy_width: int = flag(int, 8, "how much it keeps", gate="toy_positions")

        def logits(self, q_bhid: Tensor, k_bhjd: Tensor, pos_bi: Tensor, pos_bj: Tensor) -> Tensor:
            return super().logits(q_bhid[..., : self.toy_width], k_bhjd[..., : self.toy_width], pos_bi, pos_bj)

    refused_by_all_but_the_reference(parse_attention(**SIZES, toy_positions=True), "toy_positions")
    refused_by_all_but_the_reference(parse_attention(**SIZES, toy_positions=True, toy_width=4), "toy_width")
    spec = parse_attention(**SIZES, toy_positions=True, toy_width=4)
    given = tensors(spec)
    cut = given["q"].clone()
    cut[..., 4:] = 0
    assert_exact(
        run("auto", spec, given, Seating(n=N)),
        run("reference", parse_attention(**SIZES), given | {"q": cut}, Seating(n=N)),
    )


def test_a_new_field_of_an_old_part_is_refused_by_all_but_the_reference() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wider(Pattern):
        toy_reach: int = flag(int, 0, "further keys")

    plain = parse_attention(**SIZES)
    spec = dataclasses.replace(plain, pattern=Wider(toy_reach=3))
    refused_by_all_but_the_reference(spec, "toy_reach")
    assert "toy_reach" not in features(dataclasses.replace(plain, pattern=Wider()))


def test_a_new_field_of_the_layer_itself_is_refused_by_all_but_the_reference() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wider(AttentionSpec):
        toy_values: bool = flag(bool, False, "something done to the values")

    refused_by_all_but_the_reference(Wider(**SIZES, toy_values=True), "toy_values")
    assert features(Wider(**SIZES)) == features(parse_attention(**SIZES))


def test_a_field_of_a_part_that_is_no_flag_cannot_be_dropped_in_silence(parts: None) -> None:
    try:

        @part(switch=Flag(name="toy_plain_field", type=bool, default=False, help="has a field that no flag declares"))
        class Toy(Score):
            unnamed: float = 1.0

            def modify(self, sim_bhij: Tensor, distance_bij: Tensor) -> Tensor:
                return sim_bhij * self.unnamed

    except (ConfigError, AssertionError, TypeError):
        return
    spec = dataclasses.replace(parse_attention(**SIZES), score=(Toy(unnamed=2.0),))
    assert "unnamed" in features(spec)


def test_a_part_that_was_never_registered_is_refused_by_all_but_the_reference() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Squared(Score):
        family: ClassVar[str] = "score"

        def modify(self, sim_bhij: Tensor, distance_bij: Tensor) -> Tensor:
            return sim_bhij * sim_bhij

    try:
        spec = dataclasses.replace(parse_attention(**SIZES), score=(Squared(),))
        features(spec)
    except (ConfigError, AssertionError, TypeError):
        return
    for backend in MEASURED:
        with pytest.raises(UnsupportedFeature):
            choose(spec, backend.name)


# Limits


def test_the_reference_refuses_logits_above_the_dense_limit() -> None:
    spec, given = CASES["selective"].spec, tensors(CASES["selective"].spec)
    size = BATCH * HEADS * N * N * 8
    with dense_limit(size):
        run("reference", spec, given, Seating(n=N))
        run("auto", spec, given, Seating(n=N))
    with dense_limit(size - 1):
        for name in ("reference", "auto"):
            with pytest.raises(UnsupportedFeature, match="dense_limit"):
                run(name, spec, given, Seating(n=N))
    run("reference", spec, given, Seating(n=N))


def test_auto_holds_no_dense_mask_above_the_limit(masks: list[tuple[int, ...]]) -> None:
    for name in ("plain", "rotary", "encoder", "sink_logits"):
        with dense_limit(0):
            run("auto", CASES[name].spec, tensors(CASES[name].spec), Seating(n=N))
    for name in ("alibi", "softcap", "self_extend"):
        with dense_limit(100), pytest.raises(UnsupportedFeature, match="dense_limit"):
            run("auto", CASES[name].spec, tensors(CASES[name].spec), Seating(n=N))


@pytest.mark.parametrize("seating", ["plain", "left_pad", "packed_padded", "ring"])
@pytest.mark.parametrize("name", ["window", "window_wide", "window_of_one", "alibi_window", "window_sinks", "alibi",
                                  "encoder_window", "plain", "window_wide_sinks_mqa"])  # fmt: skip
def test_a_mask_is_no_larger_than_was_foretold(name: str, seating: str, masks: list[tuple[int, ...]]) -> None:
    spec, seat = CASES[name].spec, SEATINGS[seating](257)
    given = tensors(spec, 257)
    run("sdpa", spec, given, seat)
    at_i, at_j = seat.layouts()
    assert sum(held for _, _, held in masks) <= sdpa.mask_bytes(spec, at_i, at_j, 8, batch=BATCH)


def test_a_window_on_a_long_sequence_needs_no_dense_mask() -> None:
    n = 4096
    spec = parse_attention(heads=2, dim_head=DIM_HEAD, sliding_window=64)
    q = torch.randn(1, 2, n, DIM_HEAD)
    # one byte a pair would hold no dense mask of numbers
    with dense_limit(n * n):
        attend(q, q, q, spec=spec)
        with pytest.raises(UnsupportedFeature, match="n x n logits"):
            attend(q, q, q, spec=spec, backend="reference")


def test_sink_logits_are_passed_exactly_when_the_spec_has_them() -> None:
    q = torch.zeros(2, HEADS, 3, DIM_HEAD)
    with pytest.raises(ConfigError, match="pass sink_logits_h"):
        attend(q, q, q, spec=CASES["sink_logits"].spec)
    with pytest.raises(ConfigError, match="sink_logits_h has no effect"):
        attend(q, q, q, spec=CASES["plain"].spec, sink_logits_h=torch.zeros(HEADS))


# Whole stacks


def stack(case: Case, **more: Any) -> Decoder | Encoder:
    """A stack of two layers of a case."""
    return (Decoder if case.causal else Encoder)(dim=32, depth=2, **SIZES, **case.flags, **more)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_explain_tells_who_serves_a_layer_and_what_the_others_lack(case: Case) -> None:
    told = stack(case).explain()
    assert choose(case.spec).name in told
    for name, reason in rejected(case.spec).items():
        assert f"{name} {reason}" in told
    for name, value in case.flags.items():
        assert f"{name}={value}" in told


def test_explain_tells_layers_apart() -> None:
    told = Decoder(dim=32, depth=4, **SIZES, logit_softcap=[None, None, 5.0, None]).explain()
    served = [line.split()[:2] for line in told.splitlines()[1:]]
    assert served == [["0-1", "sdpa"], ["2", "reference"], ["3", "sdpa"]]


def test_a_stack_refuses_its_back_end_when_it_is_built() -> None:
    for case in CASES.values():
        for backend in BACKENDS:
            missing = backend.missing(features(case.spec)) or ([need] if (need := backend.lacks(DEVICE)) else [])
            if missing:
                with pytest.raises(UnsupportedFeature) as caught:
                    stack(case, attn_backend=backend.name)
                assert all(name in str(caught.value) for name in missing)
            else:
                assert {row["backend"] for row in stack(case, attn_backend=backend.name).backends()} == {backend.name}


def test_one_layer_that_a_back_end_cannot_serve_refuses_the_stack() -> None:
    with pytest.raises(UnsupportedFeature, match="logit_softcap"):
        Decoder(dim=32, depth=3, **SIZES, logit_softcap=[None, None, 5.0], attn_backend="sdpa")
