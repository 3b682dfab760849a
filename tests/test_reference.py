"""The definition against the papers: oracles written as loops over numbers, which share no code with xattn.

Letters: z a logit, i a query's slot, j a key's slot, r a relative position; a token is (document, position) or None.
"""

import cmath
import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from cases import CASES, DIM_HEAD, HEADS, SEATINGS, SIZES, Case, Seating, seats, tensors
from hypothesis import given
from hypothesis import strategies as st
from measure import assert_exact, forward_and_gradients
from torch import Tensor

from xattn.errors import ConfigError, ShapeError
from xattn.ops.attention import attend
from xattn.ops.layout import Layout
from xattn.ops.reference import reference
from xattn.spec.flags import parse_attention
from xattn.spec.model import AttentionSpec
from xattn.spec.positions import Rope, SelfExtend
from xattn.spec.score import Alibi

CPU = torch.device("cpu")
Token = tuple[int, int] | None


# The oracle: one number at a time, from flags, never from a spec.


def tokens_of(seating: Seating, b: int) -> list[Token]:
    """(document, position) of each slot of a row; a document ends where the id changes or padding begins."""
    found: list[Token] = []
    document, position, before = 0, -1, None
    for s in range(seating.n):
        if seating.mask is not None and not seating.mask[b][s]:
            found.append(None)
            before = None
            continue
        name = ("id", seating.docs[b][s]) if seating.docs is not None else ("id", 0)
        if name == before:
            position += 1
        else:
            document, position, before = document + 1, 0, name
        found.append((document, position))
    return found


def visible(at_i: Token, at_j: Token, flags: dict[str, Any], causal: bool) -> bool:
    """Same document, not ahead when causal, fewer than W apart unless it is one of the first tokens."""
    if at_i is None or at_j is None or at_i[0] != at_j[0]:
        return False
    apart = at_i[1] - at_j[1]
    if causal and apart < 0:
        return False
    near = abs(apart) < flags.get("sliding_window", 10**9)
    return near or at_j[1] < flags.get("sink_tokens", 0)


def met_at(pos_i: int, pos_j: int, flags: dict[str, Any]) -> int:
    """The relative position at which a pair meets (Self-Extend §3; mirrored for a key ahead)."""
    group, near = flags.get("self_extend_group"), flags.get("self_extend_window")
    apart = pos_i - pos_j
    if group is None or abs(apart) < near:
        return apart
    if apart < 0:
        return -(pos_j // group - pos_i // group + near - near // group)
    return pos_i // group - pos_j // group + near - near // group


def angles(flags: dict[str, Any], dim_head: int) -> list[float]:
    """Radians a position of each rotated pair (RoFormer §3.2.2; linear, NTK-aware and YaRN scaling)."""
    if not flags.get("rotary_pos_emb"):
        return []
    width, base = flags.get("rotary_emb_dim", dim_head), flags.get("rotary_base", 10000.0)
    kind, s = flags.get("rope_scaling"), flags.get("rope_scaling_factor")
    found = []
    for pair in range(width // 2):
        theta = base ** (-2 * pair / width)
        if kind == "linear":
            theta = theta / s
        if kind == "ntk":
            theta = (base * s ** (width / (width - 2))) ** (-2 * pair / width)
        if kind == "yarn":
            # r: how often the pair turns over the trained length; gamma ramps from 0 at alpha=1 to 1 at beta=32
            turns = flags["rope_original_len"] / (2 * math.pi / theta)
            gamma = 0.0 if turns < 1 else 1.0 if turns > 32 else (turns - 1) / (32 - 1)
            theta = (1 - gamma) * theta / s + gamma * theta
        found.append(theta)
    return found


def alibi_slopes(heads: int) -> list[float]:
    """The paper's recipe: a geometric series for a power of two; else that one plus every other slope of the next."""
    if math.log2(heads).is_integer():
        start = 2.0 ** (-8 / heads)
        return [start ** (h + 1) for h in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return alibi_slopes(lower) + alibi_slopes(2 * lower)[0::2][: heads - lower]


def logit(q: list[float], k: list[float], r: int, h: int, flags: dict[str, Any], thetas: list[float]) -> float:
    """One logit after the score stage: rotary pairs as complex numbers, scale, temperature, soft cap, ALiBi."""
    half = len(thetas)
    z = sum(a * b for a, b in zip(q[2 * half :], k[2 * half :], strict=True))
    for p, theta in enumerate(thetas):
        z += (complex(q[p], q[p + half]) * complex(k[p], -k[p + half]) * cmath.exp(1j * r * theta)).real
    z /= math.sqrt(len(q))
    if flags.get("rope_scaling") == "yarn":
        # YaRN §3.4: q and k both grow by 0.1 ln(s) + 1
        z *= (0.1 * math.log(flags["rope_scaling_factor"]) + 1) ** 2
    cap = flags.get("logit_softcap")
    if cap is not None:
        z = cap * math.tanh(z / cap)
    if flags.get("alibi_pos_bias"):
        z -= alibi_slopes(flags["heads"])[h] * abs(r)
    return z


def attention_by_hand(
    q: list,
    k: list,
    v: list,
    sinks: list[float] | None,
    at_i: list[Token],
    at_j: list[Token],
    flags: dict[str, Any],
    causal: bool,
    limit: float,
) -> list[list[list[float]]]:
    """out[h][i] of one row of a batch, from q[h][i], k[g][j] and v[g][j]; keys whose penalty reaches the limit are masked."""
    heads, shared = len(q), len(q) // len(k)
    thetas = angles(flags, len(q[0][0]))
    pairs = [(i, j) for i, a in enumerate(at_i) for j, c in enumerate(at_j) if visible(a, c, flags, causal)]
    met = {(i, j): met_at(at_i[i][1], at_j[j][1], flags) for i, j in pairs}
    z = [{(i, j): logit(q[h][i], k[h // shared][j], r, h, flags, thetas) for (i, j), r in met.items()} for h in range(heads)]
    penalty = dict.fromkeys(pairs, 0.0)
    if flags.get("attn_selective"):
        votes = z[flags.get("sim_head", 0)]
        for i, j in pairs:
            if at_j[j][1] == 0:
                continue
            voters = [m for m, c in pairs if c == j and at_j[j] < at_i[m] < at_i[i]]
            penalty[i, j] = sum(max(votes[m, j], 0.0) for m in voters)
    forgotten = {at for at in pairs if penalty[at] >= limit}
    out = []
    for h in range(heads):
        rows = []
        for i in range(len(at_i)):
            seen = {j: z[h][i, j] - penalty[i, j] for a, j in pairs if a == i and (a, j) not in forgotten}
            total = sum(math.exp(x) for x in seen.values()) + (0.0 if sinks is None else math.exp(sinks[h]))
            rows.append([
                sum(math.exp(x) / total * v[h // shared][j][d] for j, x in seen.items()) for d in range(len(v[0][0]))
            ])  # fmt: skip
        out.append(rows)
    return out


def forgotten_from(q: list, k: list, flags: dict[str, Any]) -> float:
    """The penalty at which selection_skip masks a key: "bound" follows from the longest query and key of the whole batch."""
    skip = flags.get("selection_skip")
    if skip != "bound":
        return math.inf if skip is None else skip

    def longest(rows: list) -> float:
        return max(math.hypot(*x) for b in rows for head in b for x in head)

    return 2 * longest(q) * longest(k) / math.sqrt(len(q[0][0][0])) + math.log(len(k[0][0])) + 10


def run_reference(spec: AttentionSpec, given: dict[str, Tensor], at_i: Layout, at_j: Layout | None = None) -> Tensor:
    """The reference's output for a dict of tensors."""
    return reference(
        given["q"], given["k"], given["v"], spec=spec, layout_i=at_i, layout_j=at_j or at_i,
        sink_logits_h=given["sink_logits"] if spec.sink_logits else None,
    )[0]  # fmt: skip


@pytest.mark.parametrize(("case", "seating"), [pytest.param(c, s, id=f"{c}-{s}") for c in CASES.values() for s in seats(c)])
def test_reference_equals_the_papers_formulas(case: Case, seating: str) -> None:
    seat = SEATINGS[seating](17)
    given = seat.take(tensors(case.spec, 17))
    flags = SIZES | case.flags
    got = run_reference(case.spec, given, *seat.layouts())
    limit = forgotten_from(given["q"].tolist(), given["k"].tolist(), flags)
    for b in range(got.shape[0]):
        tokens = tokens_of(seat, b)
        q, k, v = (given[name][b].tolist() for name in ("q", "k", "v"))
        sinks = given["sink_logits"].tolist() if "sink_logits" in given else None
        keys = [tokens[s] for s in seat.key_slots]
        want = attention_by_hand(q, k, v, sinks, tokens[seat.first_query :], keys, flags, case.causal, limit)
        assert_exact(got[b], torch.tensor(want, dtype=torch.float64))


def test_the_bound_masks_keys_whose_penalty_has_reached_it() -> None:
    # head 0 votes 1 a query against every key, and no logit is larger: c = 1, T = 2 + ln 37 + 10
    spec, n = parse_attention(**SIZES, attn_selective=True, selection_skip="bound"), 37
    given = {name: torch.zeros(1, HEADS, n, DIM_HEAD, dtype=torch.float64) for name in ("q", "k", "v")}
    given["q"][..., 0], given["k"][..., 0] = 2.0, 2.0
    v = given["v"].requires_grad_()
    out = run_reference(spec, given, Layout.plain(n))
    (grad,) = torch.autograd.grad(out[:, :, -1].sum(), v)
    reached = grad.abs().sum(dim=(0, 1, 3)) > 0
    limit = 2 + math.log(n) + 10
    # the last query is preceded by n - 2 - j votes against key j; the first token is never voted against
    assert reached.tolist() == [j == 0 or n - 2 - j < limit for j in range(n)] and not bool(reached.all())


# Rotary


def test_rotary_turns_halves_by_position_times_frequency() -> None:
    x, pos = torch.randn(1, 1, 1, 6, dtype=torch.float64), 5
    got = Rope(rotary_base=100.0).turn(x, torch.tensor([[pos]])).flatten().tolist()
    x = x.flatten().tolist()
    for pair in range(3):
        angle = pos * 100.0 ** (-2 * pair / 6)
        assert got[pair] == pytest.approx(x[pair] * math.cos(angle) - x[pair + 3] * math.sin(angle), abs=1e-12)
        assert got[pair + 3] == pytest.approx(x[pair] * math.sin(angle) + x[pair + 3] * math.cos(angle), abs=1e-12)


@lru_cache
def _rope(**flags: Any) -> Rope:
    return parse_attention(heads=2, dim_head=32, rotary_pos_emb=True, **flags).positions


def test_linear_scaling_squeezes_positions_into_the_trained_length() -> None:
    rope = _rope(rope_scaling="linear", rope_scaling_factor=4.0)
    at = [torch.tensor([[12]]), torch.tensor([[3]])]
    x = torch.randn(1, 1, 1, 32, dtype=torch.float64)
    assert_exact(rope.turn(x, at[0]), _rope().turn(x, at[1]))


def test_ntk_scaling_keeps_the_fastest_pair_and_stretches_the_slowest_by_the_factor() -> None:
    plain, ntk = (_rope(**f).frequencies(32, CPU) for f in ({}, {"rope_scaling": "ntk", "rope_scaling_factor": 4.0}))
    assert_exact(ntk[0], plain[0])
    assert_exact(ntk[-1] * 4, plain[-1])
    ratio = ntk / plain
    assert bool((ratio[1:] < ratio[:-1]).all()), "the stretch grows with the wavelength"


def test_yarn_keeps_pairs_that_turn_often_and_stretches_pairs_that_do_not_turn_once() -> None:
    plain = _rope().frequencies(32, CPU)
    yarn = _rope(rope_scaling="yarn", rope_scaling_factor=4.0, rope_original_len=512).frequencies(32, CPU)
    wavelength = 2 * math.pi / plain
    often, never = 512 / wavelength > 32, 512 / wavelength < 1
    between = ~often & ~never
    assert often.any() and never.any() and between.any()
    assert_exact(yarn[often], plain[often])
    assert_exact(yarn[never], plain[never] / 4)
    assert bool(((yarn < plain) & (yarn > plain / 4))[between].all())


@pytest.mark.parametrize("scaling", [{}, {"rope_scaling": "ntk", "rope_scaling_factor": 4.0}], ids=["plain", "ntk"])
def test_rotary_logits_depend_on_the_relative_position_alone(scaling: dict[str, Any]) -> None:
    spec = parse_attention(heads=2, dim_head=32, rotary_pos_emb=True, **scaling)
    given, near = tensors(spec, 7), torch.arange(7)[None]
    got = run_reference(spec, given, Layout(near + 1000))
    # angles of 1000 radians are held to 1e-13 of a radian
    assert_exact(got, run_reference(spec, given, Layout(near)))


# Self-Extend

GOLDEN = "0|1 0|2 1 0|3 2 1 0|4 3 2 1 0|4 4 3 2 1 0|5 5 4 3 2 1 0|5 5 4 4 3 2 1 0|6 6 5 5 4 3 2 1 0|6 6 5 5 4 4 3 2 1 0"


def golden() -> list[list[int]]:
    """The authors' matrix of relative positions: N=10, G=2, w=4."""
    return [[int(r) for r in row.split()] for row in GOLDEN.split("|")]


def test_self_extend_distances_are_the_golden_matrix() -> None:
    pos = torch.arange(10)[None]
    part = SelfExtend(self_extend_group=2, self_extend_window=4)
    got = part.distance(pos, pos)[0]
    assert [got[i, : i + 1].tolist() for i in range(10)] == golden()
    assert got.equal(-got.T), "a key ahead mirrors a key behind"


def test_self_extend_logits_turn_by_the_golden_matrix() -> None:
    pos = torch.arange(10)[None]
    part = SelfExtend(self_extend_group=2, self_extend_window=4)
    # one pair at frequency 1: a key along each axis reads off cos r and sin r
    x, y = torch.eye(2, dtype=torch.float64)[:, None, None, None].expand(2, 1, 1, 10, 2)
    cos, sin = part.logits(x, x, pos, pos)[0, 0], part.logits(x, y, pos, pos)[0, 0]
    for i, row in enumerate(golden()):
        r = torch.tensor(row, dtype=torch.float64)
        assert_exact(cos[i, : i + 1], r.cos())
        assert_exact(sin[i, : i + 1], r.sin())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("n", "group", "near"), [(37, 1, 1), (37, 1, 5), (37, 3, 37), (37, 4, 50), (17, 2, 17)],
    ids=["group1-window1", "group1", "window_is_n", "window_above_n", "short"],
)  # fmt: skip
def test_self_extend_that_stretches_nothing_is_plain_rotary(n: int, group: int, near: int, causal: bool) -> None:
    plain = parse_attention(causal=causal, **SIZES, rotary_pos_emb=True)
    spec = parse_attention(causal=causal, **SIZES, rotary_pos_emb=True, self_extend_group=group, self_extend_window=near)
    given, at = tensors(plain, n), Layout.plain(n)
    assert run_reference(spec, given, at).equal(run_reference(plain, given, at)), "bit for bit"


@given(group=st.integers(1, 9), near=st.integers(1, 20), i=st.integers(0, 400), j=st.integers(0, 400))
def test_self_extend_meets_every_pair_at_the_papers_distance(group: int, near: int, i: int, j: int) -> None:
    part = SelfExtend(self_extend_group=group, self_extend_window=near)
    flags = {"self_extend_group": group, "self_extend_window": near}
    assert part.distance(torch.tensor([[i]]), torch.tensor([[j]])).item() == met_at(i, j, flags)


# Pattern

SEEN = [
    pytest.param(c, s, id=f"{c}-{s}")
    for c in CASES.values()
    for s in SEATINGS
    if {"sliding_window", "sink_tokens"} & set(c.flags) or c.name in ("plain", "encoder")
]


@pytest.mark.parametrize(("case", "seating"), SEEN)
def test_a_query_sees_exactly_the_window_its_sinks_and_its_document(case: Case, seating: str) -> None:
    seat = SEATINGS[seating](37)
    at_i, at_j = seat.layouts()
    got = case.spec.pattern.allowed(at_i.pos_bn, at_j.pos_bn, at_i.doc_bn, at_j.doc_bn)
    for b in range(got.shape[0]):
        tokens = tokens_of(seat, b)
        for i, at in enumerate(tokens[seat.first_query :]):
            want = [visible(at, tokens[s], case.flags, case.causal) for s in seat.key_slots]
            assert got[b, i].tolist() == want, f"row {b}, query {i}"


@pytest.mark.parametrize("window", [1, 2, 5, 36])
def test_a_window_of_w_shows_w_keys_self_included(window: int) -> None:
    pos = torch.arange(37)[None]
    causal, both = (
        parse_attention(causal=c, **SIZES, sliding_window=window).pattern.allowed(pos, pos)[0].sum(dim=-1).tolist()
        for c in (True, False)
    )
    assert causal == [min(i + 1, window) for i in range(37)]
    assert both == [min(i + 1, window) + min(37 - i, window) - 1 for i in range(37)]


@pytest.mark.parametrize("name", ["window", "selective_window", "encoder_window", "window_sinks", "rotary_window_gqa"])
@pytest.mark.parametrize("window", [37, 38, 1000])
def test_a_window_no_shorter_than_the_sequence_is_full_attention(name: str, window: int) -> None:
    case = CASES[name]
    rest = {n: value for n, value in case.flags.items() if n not in ("sliding_window", "sink_tokens")}
    full = parse_attention(causal=case.causal, **SIZES, **rest)
    spec = parse_attention(causal=case.causal, **SIZES, **(case.flags | {"sliding_window": window}))
    given, at = tensors(full), Layout.plain(37)
    assert run_reference(spec, given, at).equal(run_reference(full, given, at))


# Score and normaliser


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20])
def test_alibi_slopes_are_the_papers(heads: int) -> None:
    assert_exact(Alibi.slopes(heads), torch.tensor(alibi_slopes(heads), dtype=torch.float64))


def test_a_soft_cap_bounds_every_logit_and_leaves_small_ones() -> None:
    part = parse_attention(**SIZES, logit_softcap=2.0).score[0]
    sim = torch.tensor([-1e9, -2.0, -1e-6, 0.0, 1e-6, 2.0, 1e9], dtype=torch.float64)
    got = part.modify(sim.view(1, 1, 1, -1), torch.zeros(1, 1, 7)).flatten()
    assert_exact(got, torch.tensor([2.0 * math.tanh(x / 2.0) for x in sim.tolist()], dtype=torch.float64))


def test_sink_logits_take_weight_and_give_nothing() -> None:
    spec, plain = parse_attention(**SIZES, sink_logits=True), parse_attention(**SIZES)
    given, at = tensors(spec), Layout.plain(37)
    # gpt-oss: out = out without sink * sigmoid(log-sum-exp - sink)
    z = torch.einsum("bhid,bhjd->bhij", given["q"], given["k"]) / math.sqrt(DIM_HEAD)
    z = z.masked_fill(torch.ones(37, 37).triu(1).bool(), -math.inf)
    share = torch.sigmoid(z.logsumexp(-1) - given["sink_logits"][:, None])
    assert_exact(run_reference(spec, given, at), run_reference(plain, given, at) * share[..., None])
    given["sink_logits"] = torch.full((HEADS,), -1e9, dtype=torch.float64)
    assert_exact(run_reference(spec, given, at), run_reference(plain, given, at))
    given["sink_logits"] = torch.full((HEADS,), 1e9, dtype=torch.float64)
    assert_exact(run_reference(spec, given, at), torch.zeros_like(given["q"]))


def test_large_logits_do_not_overflow() -> None:
    spec = parse_attention(**SIZES, sink_logits=True)
    given = tensors(spec)
    given["q"] *= 1e4
    assert run_reference(spec, given, Layout.plain(37)).isfinite().all()
    out = run_reference(spec, {name: t.float() for name, t in given.items()}, Layout.plain(37))
    assert out.isfinite().all()


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_query_heads_share_keys_in_consecutive_groups(kv_heads: int) -> None:
    spec, plain = parse_attention(**SIZES, kv_heads=kv_heads), parse_attention(**SIZES)
    given, at = tensors(spec), Layout.plain(37)
    k, v = (torch.stack([given[x][:, h // (HEADS // kv_heads)] for h in range(HEADS)], dim=1) for x in ("k", "v"))
    assert_exact(run_reference(spec, given, at), run_reference(plain, given | {"k": k, "v": v}, at))


# Selective attention


def published_sketch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Figure 2 of arXiv 2410.02703, line for line."""
    n = q.shape[2]
    lg = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    lg = torch.where(torch.ones(n, n).tril().bool(), lg, -math.inf)
    s = lg[:, 0].relu()
    s[..., 0] = 0
    s = (1 - torch.eye(n)) * s
    s = torch.roll(s, 1, -2)
    s[..., 0, :] = 0
    lg = lg - s.cumsum(-2)[:, None]
    return lg.softmax(-1) @ v


@pytest.mark.parametrize("n", [1, 2, 3, 17, 63])
def test_selective_equals_the_published_sketch(n: int) -> None:
    spec = parse_attention(**SIZES, attn_selective=True)
    given = tensors(spec, n)
    want = published_sketch(given["q"], given["k"], given["v"])
    assert_exact(run_reference(spec, given, Layout.plain(n)), want)


def test_another_sim_head_is_the_sketch_with_heads_exchanged() -> None:
    spec, given = parse_attention(**SIZES, attn_selective=True, sim_head=4), tensors(parse_attention(**SIZES))
    swap = [4, 1, 2, 3, 0, 5]
    want = published_sketch(*(given[name][:, swap] for name in ("q", "k", "v")))[:, swap]
    assert_exact(run_reference(spec, given, Layout.plain(37)), want)


def _penalty(**flags: Any) -> tuple[Tensor, Tensor]:
    """F (n n) of one row, and its logits, for a layer with 2 heads."""
    spec = parse_attention(heads=2, dim_head=DIM_HEAD, attn_selective=True, **flags)
    pos = torch.arange(37)[None]
    sim = torch.randn(1, 2, 37, 37, dtype=torch.float64)
    penalty, _ = spec.selection.penalty(sim, spec.pattern.allowed(pos, pos), pos, pos)
    return penalty[0], sim[0]


@pytest.mark.parametrize("flags", [{}, {"sliding_window": 6}, {"sim_head": 1}], ids=["full", "window", "head"])
def test_the_penalty_never_falls_and_spares_the_first_token_the_own_and_the_next_query(flags: dict[str, Any]) -> None:
    penalty, _ = _penalty(**flags)
    assert bool((penalty >= 0).all()) and float(penalty.max()) > 0
    assert bool((penalty[1:] >= penalty[:-1]).all()), "a hidden token never comes back"
    assert not penalty[:, 0].any(), "the first token is never hidden"
    assert not penalty.diagonal().any() and not penalty.diagonal(-1).any(), "only queries in between vote"


def test_the_first_token_of_every_document_is_spared() -> None:
    spec, seat = CASES["selective"].spec, SEATINGS["packed_padded"](37)
    at, _ = seat.layouts()
    sim = torch.ones(2, HEADS, 37, 37, dtype=torch.float64)
    allowed = spec.pattern.allowed(at.pos_bn, at.pos_bn, at.doc_bn, at.doc_bn)
    penalty, _ = spec.selection.penalty(sim, allowed, at.pos_bn, at.pos_bn)
    spared = 0
    for b in range(2):
        tokens = tokens_of(seat, b)
        for j, at_j in enumerate(tokens):
            for i, at_i in enumerate(tokens):
                if at_i is None or at_j is None or at_i[0] != at_j[0] or at_i < at_j:
                    continue
                want = 0 if at_j[1] == 0 else max(at_i[1] - at_j[1] - 1, 0)
                spared += at_j[1] == 0
                assert penalty[b, i, j] == want, (b, i, j)
    assert spared > 20


def test_votes_are_counted_exactly_in_half_precision() -> None:
    # every vote is 3; a bfloat16 sum of them stops near 1024
    n, spec = 600, parse_attention(heads=2, kv_heads=1, dim_head=4, attn_selective=True)
    q, k = torch.full((1, 2, n, 4), 3.0).bfloat16(), torch.full((1, 1, n, 4), 0.5).bfloat16()
    at = Layout.plain(n)
    _, carry = reference(q, k, k, spec=spec, layout_i=at, layout_j=at)
    assert carry.dtype == torch.float32
    assert carry[0].tolist() == [0.0] + [3.0 * (n - 1 - j) for j in range(1, n)]


CARRIED = ["selective", "selective_window", "selective_gqa_head", "selective_window_sinks",
           "selective_window_self_extend_gqa_softcap", "everything"]  # fmt: skip


@pytest.mark.parametrize("sizes", [(37,), (1,) * 37, (5, 1, 16, 8, 7), (36, 1)], ids=str)
@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("seating", ["plain", "left_pad", "packed_padded"])
def test_queries_in_chunks_with_the_carry_equal_one_pass(name: str, seating: str, sizes: tuple[int, ...]) -> None:
    case = CASES[name]
    at, _ = SEATINGS[seating](37).layouts()
    given, sinks = tensors(case.spec), tensors(case.spec).get("sink_logits")
    whole, total = reference(given["q"], given["k"], given["v"], spec=case.spec, layout_i=at, layout_j=at, sink_logits_h=sinks)
    carry, outs, first = None, [], 0
    for size in sizes:
        here = slice(first, first + size)
        chunk = Layout(at.pos_bn[:, here], None if at.doc_bn is None else at.doc_bn[:, here])
        out, carry = reference(
            given["q"][:, :, here], given["k"], given["v"], spec=case.spec, layout_i=chunk, layout_j=at,
            sink_logits_h=sinks, carry_bj=carry,
        )  # fmt: skip
        outs.append(out)
        first += size
    assert_exact(torch.cat(outs, dim=2), whole)
    assert_exact(carry, total, "carry")


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_keys_may_be_stored_in_any_order(case: Case) -> None:
    given, order, at = tensors(case.spec, 17), torch.randperm(17), Layout.plain(17)
    moved = given | {name: given[name][:, :, order] for name in ("k", "v")}
    keys = Layout(at.pos_bn[:, order])
    assert_exact(run_reference(case.spec, moved, at, keys), run_reference(case.spec, given, at))


@pytest.mark.parametrize("alone", [True, False], ids=["queries", "queries_and_keys"])
@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_queries_in_any_order_are_served_right_or_refused(case: Case, alone: bool) -> None:
    given, order, at = tensors(case.spec, 17), torch.randperm(17), Layout.plain(17)
    q, shuffled = given["q"][:, :, order], Layout(at.pos_bn[:, order])
    k, v = (given[name] if alone else given[name][:, :, order] for name in ("k", "v"))
    sinks = given.get("sink_logits")
    try:
        got = attend(q, k, v, spec=case.spec, layout=shuffled, key_layout=at if alone else None, sink_logits_h=sinks)
    except ConfigError:
        assert case.selective, "only a running sum over queries needs their order"
        return
    assert_exact(got, run_reference(case.spec, given, at)[:, :, order])


@pytest.mark.parametrize("case", [CASES["selective"], CASES["everything"]], ids=str)
def test_selective_without_the_votes_of_earlier_queries_is_refused(case: Case) -> None:
    # the carry is what a cache brings; a chunk without it would quietly attend to tokens that are hidden
    seat = SEATINGS["chunk"](37)
    given = seat.take(tensors(case.spec))
    queries, keys = seat.layouts()
    with pytest.raises(ConfigError):
        attend(given["q"], given["k"], given["v"], spec=case.spec, layout=queries, key_layout=keys,
               sink_logits_h=given.get("sink_logits"))  # fmt: skip


@pytest.mark.parametrize("group", [1, 2, 3, 7])
@pytest.mark.parametrize("window", [1, 4, 6, 20, 30])
def test_self_extend_reaches_max_positions_and_no_farther(group: int, window: int) -> None:
    trained = 20
    part = parse_attention(heads=1, dim_head=4, rotary_pos_emb=True, self_extend_group=group, self_extend_window=window).positions
    longest = part.max_positions(trained)

    def reach(n: int) -> int:
        pos = torch.arange(n)[None]
        return int(part.distance(pos, pos).max())

    assert reach(longest) <= trained - 1 < reach(longest + 1)


# Documents and padding


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_packed_documents_equal_each_document_alone(case: Case) -> None:
    seat = SEATINGS["packed_padded"](37)
    given, (at, _) = tensors(case.spec), seat.layouts()
    got = run_reference(case.spec, given, at)
    for b in range(2):
        tokens = tokens_of(seat, b)
        for document in {t[0] for t in tokens if t is not None}:
            slots = [s for s, t in enumerate(tokens) if t is not None and t[0] == document]
            alone = {n: t if n == "sink_logits" else t[b : b + 1, :, slots] for n, t in given.items()}
            assert_exact(got[b : b + 1, :, slots], run_reference(case.spec, alone, Layout.plain(len(slots))))
        empty = [s for s, t in enumerate(tokens) if t is None]
        assert empty and not got[b, :, empty].any(), "padding attends to nothing"


@pytest.mark.parametrize("seating", ["left_pad", "right_pad"])
@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_a_padded_row_equals_the_row_unpadded(case: Case, seating: str) -> None:
    seat = SEATINGS[seating](37)
    given, (at, _) = tensors(case.spec), seat.layouts()
    got = run_reference(case.spec, given, at)
    for b in range(2):
        slots = [s for s in range(37) if seat.mask[b][s]]
        alone = {n: t if n == "sink_logits" else t[b : b + 1, :, slots] for n, t in given.items()}
        assert_exact(got[b : b + 1, :, slots], run_reference(case.spec, alone, Layout.plain(len(slots))))


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.causal], ids=str)
def test_a_causal_row_does_not_know_how_long_the_sequence_is(case: Case) -> None:
    given = tensors(case.spec)
    prefix = {n: t if n == "sink_logits" else t[:, :, :17] for n, t in given.items()}
    whole = run_reference(case.spec, given, Layout.plain(37))
    assert_exact(run_reference(case.spec, prefix, Layout.plain(17)), whole[:, :, :17])


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(case: Case) -> None:
    seat = SEATINGS["empty_row"](17)
    at, _ = seat.layouts()
    got = forward_and_gradients(
        lambda q, k, v, sink_logits_h: reference(
            q, k, v, spec=case.spec, layout_i=at, layout_j=at, sink_logits_h=sink_logits_h
        )[0],
        tensors(case.spec, 17), torch.float64,
    )  # fmt: skip
    for name in ("out", "dq", "dk", "dv"):
        assert got[name].isfinite().all()
        assert not got[name][1].any(), f"{name} of a row without tokens"
    assert got["out"][0].any() and got["dv"][0].any()


# Layout


def test_a_document_is_a_run_of_equal_ids_and_counts_from_zero() -> None:
    at = Layout.build(7, device=CPU, doc_ids_bn=torch.tensor([[5, 5, 2, 2, 2, 5, 5]]))
    assert at.pos_bn.tolist() == [[0, 1, 0, 1, 2, 0, 1]]
    assert len(set(at.doc_bn[0].tolist())) == 3


@given(st.data())
def test_layouts_seat_tokens_as_the_rules_say(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    docs = data.draw(st.none() | st.lists(st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=2, max_size=2))
    if docs is None:
        starts = data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2))
        mask = [[s >= start for s in range(n)] for start in starts]
    else:
        mask = data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=2, max_size=2))
    seat = Seating(n=n, mask=mask, docs=docs)
    at, _ = seat.layouts()
    for b in range(2):
        tokens = tokens_of(seat, b)
        assert at.pos_bn[b].tolist() == [-1 if t is None else t[1] for t in tokens]
        if docs is not None:
            real = [s for s, t in enumerate(tokens) if t is not None]
            for s in real:
                for t in real:
                    assert (at.doc_bn[b, s] == at.doc_bn[b, t]) == (tokens[s][0] == tokens[t][0])


# Gradients

CHECKED = [
    "plain", "gqa", "rotary_partial_yarn", "self_extend_softcap_sink_logits", "softcap_alibi", "window_sinks",
    "sink_logits", "selective", "selective_window_sinks", "selective_window_self_extend_gqa_softcap", "everything",
    "encoder_window_sinks_sink_logits_alibi_gqa", "encoder_self_extend_window_softcap",
]  # fmt: skip


@pytest.mark.parametrize("name", CHECKED)
def test_gradients_equal_finite_differences(name: str) -> None:
    case = CASES[name]
    flags = {"rotary_emb_dim": 2} if "rotary_emb_dim" in case.flags else {}
    flags = case.flags | flags | {"sliding_window": 6} if "sliding_window" in case.flags else case.flags | flags
    spec = parse_attention(causal=case.causal, **{**SIZES, "dim_head": 4}, **flags)
    # 13 slots reach beyond the window of 6 and the neighbours of 4; the second document is packed behind the first
    at = Layout.build(13, device=CPU, doc_ids_bn=torch.tensor([[0] * 10 + [1] * 3]))
    given = tensors(spec, 13, batch=1)
    # off the bfloat16 grid no logit of the selecting head sits on ReLU's corner
    inputs = [given[n] + 0.01 * torch.rand_like(given[n]) for n in ("q", "k", "v", "sink_logits") if n in given]

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return reference(q, k, v, spec=spec, layout_i=at, layout_j=at, sink_logits_h=sinks)[0]

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs], fast_mode=True)


# Shapes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": (2, 6, 37, 8)}, ["d", "8", "16"]),
        ({"k": (2, 3, 37, 16)}, ["k", "g", "3", "6"]),
        ({"v": (2, 6, 36, 16)}, ["v", "j", "36", "37"]),
        ({"k": (3, 6, 37, 16)}, ["k", "b", "3", "2"]),
        ({"q": (2, 5, 37, 16)}, ["q", "h", "5", "6"]),
        ({"q": (6, 37, 16)}, ["q", "b h i d"]),
    ],
    ids=str,
)
def test_sizes_that_disagree_name_the_tensor_the_axis_and_both_sizes(change: dict, words: list[str]) -> None:
    spec = parse_attention(**SIZES)
    given = {n: torch.randn(change.get(n, (2, 6, 37, 16))) for n in ("q", "k", "v")}
    with pytest.raises(ShapeError) as caught:
        attend(given["q"], given["k"], given["v"], spec=spec)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_layout_of_another_batch_is_refused() -> None:
    spec, (at, _) = parse_attention(**SIZES), SEATINGS["left_pad"](37).layouts()
    for batch in (1, 3):
        q = torch.randn(batch, 6, 37, 16)
        with pytest.raises(ShapeError):
            attend(q, q, q, spec=spec, layout=at)


def test_sink_logits_of_another_number_of_heads_are_refused() -> None:
    spec, q = parse_attention(**SIZES, sink_logits=True), torch.randn(2, 6, 37, 16)
    for heads in (1, 5):
        with pytest.raises(ShapeError):
            attend(q, q, q, spec=spec, sink_logits_h=torch.zeros(heads))


def test_a_mask_that_is_not_bool_or_has_holes_is_refused() -> None:
    with pytest.raises(ShapeError, match="bool"):
        Layout.build(3, device=CPU, mask_bn=torch.ones(1, 3))
    with pytest.raises(ShapeError, match="row 1.*separate runs"):
        Layout.build(3, device=CPU, mask_bn=torch.tensor([[True, True, False], [True, False, True]]))


@pytest.mark.parametrize("what", ["mask_bn", "doc_ids_bn"])
def test_a_mask_or_document_ids_of_another_length_are_refused(what: str) -> None:
    with pytest.raises(ShapeError):
        Layout.build(5, device=CPU, **{what: torch.ones(2, 4, dtype=torch.bool)})
