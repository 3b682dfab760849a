"""self_extend_group=auto: the authors' rule, settled once by the length to come, and the same in every cut of a sequence."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import assert_exact
from test_cache import VOCAB, feed, ids_of, model

import xattn
from xattn import AutoregressiveWrapper, ConfigError, TokenError
from xattn.ops.attention import attend
from xattn.spec.flags import parse_attention
from xattn.spec.positions import Rope, SelfExtend

AUTO = {"rotary_pos_emb": True, "self_extend_group": "auto"}
TRAINED = 16
MIXES = {
    "alone": {},
    "selective": {"attn_selective": True},
    "hybrid": {"sliding_window": [4, None], "self_extend_group": [None, "auto"]},
    "wide_window": {"sliding_window": 24},
    "window_sinks": {"sliding_window": 9, "sink_tokens": 1},
    "yarn_partial": {"rope_scaling": "yarn", "rope_scaling_factor": 1.5, "rotary_emb_dim": 6},
    "own_window": {"self_extend_window": 7, "alibi_pos_bias": True},
}  # fmt: skip
every_mix = pytest.mark.parametrize("mix", MIXES)


def net_of(mix: str = "alone", **more: Any) -> xattn.TransformerWrapper:
    return model(AUTO | MIXES[mix] | more, max_seq_len=TRAINED)


def chosen(trained: int, n: int, **more: Any) -> Rope:
    return parse_attention(heads=1, dim_head=8, **AUTO, self_extend_trained_len=trained, **more).settled(n).positions


# The rule


@given(trained=st.integers(4, 400), n=st.integers(1, 20_000), window=st.none() | st.integers(1, 40))
def test_the_group_is_the_smallest_power_of_two_that_obeys_the_authors_rule(trained: int, n: int, window: int | None) -> None:
    own = {} if window is None or 3 * window >= 2 * trained else {"self_extend_window": window}
    part = chosen(trained, n, **own)
    if n <= trained:
        assert type(part) is Rope
        return
    group, near = part.self_extend_group, part.self_extend_window
    quarter = own.get("self_extend_window", trained // 4)

    def obeys(group: int, near: int) -> bool:
        return near + (n - near) / group < 2 * trained / 3

    assert obeys(group, near) and group & (group - 1) == 0
    assert group == 1 or not obeys(group // 2, quarter)
    if own:
        assert near == quarter
    elif group <= quarter:
        assert near % group == 0 and quarter - group < near <= quarter
    else:
        assert near == quarter
    # what the rule is for: no distance beyond what training has seen
    assert part.max_positions(trained) >= n


@given(trained=st.integers(4, 400), window=st.none() | st.integers(1, 40))
def test_limits_are_the_last_lengths_of_each_choice(trained: int, window: int | None) -> None:
    own = {} if window is None or 3 * window >= 2 * trained else {"self_extend_window": window}
    part = parse_attention(heads=1, dim_head=8, **AUTO, self_extend_trained_len=trained, **own).positions
    limits = part.limits()
    assert limits == sorted(set(limits)) and limits[-1] > 2**38
    for before, limit in zip(limits, limits[1:], strict=False):
        assert part.settled(before + 1) == part.settled(limit) != part.settled(limit + 1)


@pytest.mark.parametrize(("n", "group"), [(256, None), (257, 2), (512, 8), (1024, 16), (2048, 32)])
def test_for_a_trained_length_of_256_the_window_is_64(n: int, group: int | None) -> None:
    part = chosen(256, n)
    assert getattr(part, "self_extend_group", None) == group
    assert group is None or part.self_extend_window == 64


def test_scaling_stretches_the_trained_length_first() -> None:
    flags = {"rope_scaling": "linear", "rope_scaling_factor": 4.0}
    assert type(chosen(64, 256, **flags)) is Rope
    got, want = chosen(64, 1024, **flags), chosen(256, 1024)
    assert (got.self_extend_group, got.self_extend_window) == (want.self_extend_group, want.self_extend_window)


def test_a_window_without_sinks_needs_a_group_for_its_own_width_only() -> None:
    assert chosen(16, 1000, sliding_window=24) == chosen(16, 24)
    assert chosen(16, 1000, sliding_window=24, sink_tokens=1) == chosen(16, 1000)


# One choice for a sequence


@every_mix
def test_auto_is_the_group_that_it_says_it_chose(mix: str) -> None:
    net, ids, n = net_of(mix), ids_of(60), 60
    rows = net.backends(n)
    flags = {name: [row["flags"].get(name) for row in rows] for name in ("self_extend_group", "self_extend_window")}
    assert "auto" not in flags["self_extend_group"] and any(flags["self_extend_group"])
    with torch.no_grad():
        assert_exact(net(ids), net.with_flags(**flags)(ids, extrapolate=True))
        short = ids[:, :TRAINED]
        assert_exact(net(short), net.with_flags(self_extend_group=None)(short))


@every_mix
@pytest.mark.parametrize("size", [1, 5, 16, 17, 60])
def test_any_chunking_equals_the_full_sequence(mix: str, size: int) -> None:
    net, ids = net_of(mix), ids_of(60)
    assert_exact(feed(net, net.cache(2, max_len=60), ids, size), net(ids))
    # the length to come decides, not the tokens so far
    assert_exact(feed(net, net.cache(2, max_len=90), ids, size), net(ids, max_len=90))


@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=2), room=st.integers(0, 200), size=st.integers(1, 9))
@settings(max_examples=30)
def test_rows_are_independent_under_one_length_to_come(lengths: list[int], room: int, size: int) -> None:
    net, n = net_of("selective"), max(lengths)
    ids, max_len = ids_of(n), n + room
    mask = torch.stack([torch.arange(n) >= n - length for length in lengths])
    got = feed(net, net.cache(2, max_len=max_len), ids, size, mask=mask)
    for row, length in enumerate(lengths):
        alone = net(ids[row : row + 1, n - length :], max_len=max_len)
        assert_exact(got[row : row + 1, n - length :], alone)


def test_lengths_that_choose_differently_differ() -> None:
    net, ids = net_of(), ids_of(60)
    with torch.no_grad():
        plain, short, far = net(ids, max_len=60), net(ids, max_len=60), net(ids, max_len=600)
    assert torch.equal(plain, short) and not torch.allclose(plain, far)


@every_mix
def test_cached_greedy_equals_uncached_beyond_the_trained_length(mix: str) -> None:
    ar = AutoregressiveWrapper(net_of(mix))
    prompts = [ids_of(n, 1)[0] for n in (3, 30, 8)]
    slow = ar.generate(prompts, 20, temperature=0, cache_kv=False)
    assert torch.equal(ar.generate(prompts, 20, temperature=0), slow)
    assert torch.equal(ar.generate(prompts, 20, temperature=0, prefill_chunk=7), slow)
    beams = {"beams": 2, "return_scores": True}
    assert torch.equal(*(ar.beam_search(prompts, 6, cache_kv=kv, **beams)[0] for kv in (True, False)))


def test_up_to_the_trained_length_keys_are_stored_turned_and_beyond_it_raw() -> None:
    net = net_of()
    short, far = net.cache(max_len=TRAINED), net.cache(max_len=TRAINED + 1)
    assert all(type(layer.spec.positions) is Rope and layer.turned_spec is not None for layer in short.layers)
    assert all(type(layer.spec.positions) is SelfExtend and layer.turned_spec is None for layer in far.layers)
    assert far.nbytes() == 0 and far.settled == net.spec.layers.settled(TRAINED + 1)


# The reach


def test_max_positions_says_what_may_be_read() -> None:
    def reach(**flags: Any) -> int | None:
        return model({"rotary_pos_emb": True} | flags, max_seq_len=TRAINED).max_positions()

    fixed = {"self_extend_group": 4, "self_extend_window": 4}
    assert reach() == TRAINED and reach(**fixed) == 12 * 4 + 4 and reach(self_extend_group="auto") is None
    assert reach(rope_scaling="ntk", rope_scaling_factor=2.5) == 40
    assert reach(self_extend_group=[None, 4], self_extend_window=[None, 4]) == TRAINED, "the other layer is not extended"
    assert reach(sliding_window=[8, None], self_extend_group=[None, "auto"]) is None, "a window sees no farther"
    assert reach(sliding_window=8) == TRAINED and model({"alibi_pos_bias": True}, max_seq_len=TRAINED).max_positions() == TRAINED
    assert reach(use_abs_pos_emb=True, **fixed) == TRAINED, "learned positions end there"


def test_beyond_the_reach_is_refused_with_a_cure_and_within_it_is_not() -> None:
    fixed = model({"rotary_pos_emb": True, "self_extend_group": 4, "self_extend_window": 4}, max_seq_len=TRAINED)
    assert fixed(ids_of(52)).shape == (2, 52, VOCAB)
    with pytest.raises(TokenError, match="53 tokens.*max_seq_len=16, extended to 52.*extrapolate=True"):
        fixed(ids_of(53))
    plain = AutoregressiveWrapper(model({"rotary_pos_emb": True}, max_seq_len=TRAINED))
    for cache_kv in (True, False):
        with pytest.raises(TokenError, match="17 tokens, and max_seq_len=16: .*self_extend_group='auto'"):
            plain.generate(ids_of(17), 1, cache_kv=cache_kv)
    with pytest.raises(TokenError, match="learned positions"):
        AutoregressiveWrapper(model({}, max_seq_len=TRAINED)).generate(ids_of(17), 1)
    assert AutoregressiveWrapper(net_of()).generate(ids_of(17), 30).shape == (2, 30)


# Flags


def test_weights_keep_the_length_they_know(tmp_path: Any) -> None:
    trained = model({"rotary_pos_emb": True}, max_seq_len=TRAINED, dtype=torch.float32)
    xattn.save(trained, tmp_path)
    for net in (
        trained.with_flags(self_extend_group="auto", max_seq_len=500),
        trained.with_flags(self_extend_group="auto").with_flags(max_seq_len=500),
        xattn.load(tmp_path, self_extend_group="auto", max_seq_len=500),
        trained.with_flags(self_extend_group=["auto", 2], self_extend_window=[None, 4], max_seq_len=500),
    ):
        part = net.spec.layers.blocks[0].attention.positions
        assert part.self_extend_trained_len == TRAINED and part.unsettled
    back = net.with_flags(self_extend_group=2, self_extend_window=4)
    assert "self_extend_trained_len" not in xattn.to_flags(back.spec)
    assert xattn.to_flags(net.with_flags(self_extend_group=None).spec) == xattn.to_flags(trained.spec) | {"max_seq_len": 500}


REFUSED = {
    "no_length": ({}, ["self_extend_trained_len=None", "trained"]),
    "short": ({"self_extend_trained_len": 3}, ["self_extend_trained_len=3", "4 or more"]),
    "wide": ({"self_extend_trained_len": 12, "self_extend_window": 8}, ["self_extend_window=8", "length of 12", "1 to 7"]),
    "window": ({"self_extend_trained_len": 12, "sliding_window": 12}, ["no effect", "sliding_window=12", "None"]),
    "typo": ({"self_extend_group": "atuo"}, ["self_extend_group", "atuo", "auto"]),
    "fixed": (
        {"self_extend_group": 2, "self_extend_window": 4, "self_extend_trained_len": 12},
        ["self_extend_trained_len=12", "no effect"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_flags_are_refused_with_what_would_work(name: str) -> None:
    flags, words = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        parse_attention(heads=2, dim_head=8, **AUTO | flags)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_stack_alone_knows_no_trained_length() -> None:
    with pytest.raises(ConfigError, match="self_extend_trained_len"):
        xattn.Decoder(dim=16, depth=1, heads=2, **AUTO)
    layers = xattn.Decoder(dim=16, depth=1, heads=2, **AUTO, self_extend_trained_len=8)
    assert xattn.TransformerWrapper(num_tokens=5, max_seq_len=64, attn_layers=layers).max_positions() is None


def test_a_length_to_come_that_nobody_knows_or_that_is_wrong_is_refused() -> None:
    net = net_of()
    with pytest.raises(ConfigError, match="max_len"):
        net.cache()
    with pytest.raises(TokenError, match="max_len=9 is less than the 10 tokens"):
        net(ids_of(10), max_len=9)
    cache = net.cache(2, max_len=20)
    with torch.no_grad(), pytest.raises(ConfigError, match="no effect with a cache"):
        net(ids_of(10), cache=cache, max_len=20)
    with torch.no_grad(), pytest.raises(TokenError, match="max_len=20"):
        net(ids_of(21), cache=cache)
    assert cache.lengths == [0, 0], "what is refused leaves the cache as it was"


def test_an_unsettled_layer_does_not_attend() -> None:
    spec = parse_attention(heads=2, dim_head=8, **AUTO, self_extend_trained_len=8)
    x = torch.randn(1, 2, 20, 8)
    with pytest.raises(ConfigError, match="settled"):
        attend(x, x, x, spec=spec)
    attend(x, x, x, spec=spec.settled(20))


def test_explain_shows_what_was_chosen() -> None:
    net = model({"rotary_pos_emb": True, "self_extend_group": "auto"}, max_seq_len=256)
    told = net.explain()
    assert "self_extend_group=auto" in told and "trained length 256: group 8, window 64 at 512" in told
    assert told.count("trained length") == 1
    assert "self_extend_group=16, self_extend_window=64" in net.explain(1024) and "auto" not in net.explain(1024)
    assert "self_extend" not in net.explain(256)


def test_training_and_encoders_settle_by_the_sequence() -> None:
    ar = AutoregressiveWrapper(model(AUTO | {"attn_selective": True, "memory_loss_weight": 0.1}, max_seq_len=TRAINED)).train()
    ar.requires_grad_(True)
    ar(ids_of(TRAINED + 1)).backward()
    assert all(p.grad is not None for p in ar.parameters())
    encoder = model(AUTO | {"causal": False}, max_seq_len=TRAINED)
    fixed = encoder.with_flags(**{n: encoder.backends(50)[0]["flags"][n] for n in ("self_extend_group", "self_extend_window")})
    with torch.no_grad():
        assert_exact(encoder(ids_of(50)), fixed(ids_of(50), extrapolate=True))


# torch's own compiler does that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_whole_and_settles_each_length() -> None:
    net = model(AUTO | {"attn_selective": True}, max_seq_len=TRAINED)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        for n in (TRAINED, 40, 120):
            assert_exact(compiled(ids_of(n)), net(ids_of(n)))
