"""The law of caches: any way of cutting a sequence into calls gives what one call gives; and what a cache refuses.

Models here are in float64, two layers deep, with weights large enough that votes and windows matter.
"""

from collections.abc import Sequence
from functools import cache as memo
from typing import Any

import pytest
import torch
from cases import CASES, SEATINGS, Case, N
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import assert_exact
from torch import Tensor

import xattn
from xattn import accounting
from xattn.cache import Cache
from xattn.nn.wrapper import TransformerWrapper

VOCAB = 29
SIZES = {"num_tokens": VOCAB, "max_seq_len": 128, "dim": 24, "depth": 2, "heads": 6, "dim_head": 16}
CAUSAL = [case for case in CASES.values() if case.causal]
BY_NAME = {case.name: case for case in CAUSAL}
SELECTIVE = [case for case in CAUSAL if case.selective]
HYBRID = {"rotary_pos_emb": True, "sliding_window": [4, None], "sink_tokens": [1, None], "attn_selective": [True, False]}
every_case = pytest.mark.parametrize("case", CAUSAL, ids=str)


def model(flags: dict[str, Any], dtype: torch.dtype = torch.float64, **sizes: Any) -> TransformerWrapper:
    """A model of these flags, the same for the same flags, without dropout."""
    torch.manual_seed(1)
    flags = {name: value for name, value in flags.items() if name != "attn_dropout"}
    net = xattn.build({**SIZES, **sizes, **flags}).to(dtype).eval()
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1:
                weight.mul_(3)
    return net.requires_grad_(False)


@memo
def of(case: Case) -> TransformerWrapper:
    """The model of a case."""
    return model(case.flags)


def ids_of(n: int, batch: int = 2) -> Tensor:
    """Token ids (batch n), always the same."""
    return torch.randint(0, VOCAB, (batch, n), generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def feed(net: TransformerWrapper, cache: Cache, ids: Tensor, sizes: Sequence[int] | int, **rows: Tensor) -> Tensor:
    """The logits of a sequence that is read in calls of these sizes, the last one repeated until all is read."""
    sizes, outs, first = [sizes] if isinstance(sizes, int) else list(sizes), [], 0
    while first < ids.shape[1]:
        here = slice(first, first + sizes[min(len(outs), len(sizes) - 1)])
        outs.append(net(ids[:, here], cache=cache, **{name: t[:, here] for name, t in rows.items()}))
        first = here.stop
    return torch.cat(outs, dim=1)


def chunk_sizes(flags: dict[str, Any]) -> list[int]:
    """1, 2, 5, all, and a window with its neighbours."""
    window = flags.get("sliding_window", 0)
    return sorted({1, 2, 5, N} | {size for size in (window - 1, window, window + 1) if size > 0})


# The law


@pytest.mark.parametrize(("case", "size"), [(c, s) for c in CAUSAL for s in chunk_sizes(c.flags)], ids=str)
def test_any_chunking_equals_the_full_sequence(case: Case, size: int) -> None:
    net, ids = of(case), ids_of(N)
    assert_exact(feed(net, net.cache(2), ids, size), net(ids))


@pytest.mark.parametrize("seating", ["left_pad", "right_pad", "packed", "packed_padded", "empty_row"])
@every_case
def test_padded_and_packed_batches_in_chunks_equal_one_pass(case: Case, seating: str) -> None:
    net, ids, seat = of(case), ids_of(N), SEATINGS[seating](N)
    rows = {name: torch.tensor(t) for name, t in (("mask", seat.mask), ("doc_ids", seat.docs)) if t is not None}
    token = rows.get("mask", torch.ones(2, N, dtype=torch.bool))
    truth = net(ids, **rows)[token]
    for sizes in (1, 3, (11, 1, 5), N):
        cache = net.cache(2)
        assert_exact(feed(net, cache, ids, sizes, **rows)[token], truth, f"{seating} in {sizes}")
        assert cache.lengths == token.sum(dim=1).tolist()


@every_case
def test_ragged_rows_go_on_as_if_each_were_alone(case: Case) -> None:
    net, ids, lengths = of(case), ids_of(20, 3), (3, 11, 7)
    new = ids_of(9, 3)
    for side in ("left", "right"):
        slot = torch.arange(11)
        mask = torch.stack([slot < n if side == "right" else slot >= 11 - n for n in lengths])
        prompts = torch.zeros(3, 11, dtype=torch.long)
        for row, n in enumerate(lengths):
            prompts[row, mask[row]] = ids[row, :n]
        cache = net.cache(3)
        feed(net, cache, prompts, (4, 7), mask=mask)
        got = feed(net, cache, new, (1, 1, 3, 4))
        for row, n in enumerate(lengths):
            alone = net(torch.cat([ids[row, :n], new[row]])[None])[:, n:]
            assert_exact(got[row : row + 1], alone, f"{side} row {row}")


@pytest.mark.parametrize("case", [c for c in CAUSAL if c.flags.get("sliding_window", N) < 12], ids=str)
def test_a_prompt_longer_than_the_ring_sees_what_it_should(case: Case) -> None:
    net, ids = of(case), ids_of(60)
    cache = net.cache(2)
    assert_exact(feed(net, cache, ids, (40, 13, 1)), net(ids))
    held = case.flags["sliding_window"] - 1 + case.flags.get("sink_tokens", 0)
    assert all(layer.k_bgsd.shape[2] == held for layer in cache.layers)


@every_case
def test_tokens_taken_back_leave_no_trace(case: Case) -> None:
    net, ids, wrong = of(case), ids_of(N), ids_of(8)
    cache = net.cache(2, rollback=4)
    feed(net, cache, ids[:, :17], (9, 8))
    feed(net, cache, wrong[:, :4], 4)
    cache.crop(17)
    feed(net, cache, wrong[:, 4:7], (1, 2))
    cache.crop(18)
    cache.crop(17)
    got = feed(net, cache, ids[:, 17:], (1, 2, 6))
    assert_exact(got, net(ids)[:, 17:])
    assert cache.lengths == [N, N]


@every_case
def test_rows_may_take_back_different_numbers_of_tokens(case: Case) -> None:
    net, ids = of(case), ids_of(N)
    cache = net.cache(2, rollback=5)
    feed(net, cache, ids[:, :16], (11, 5))
    cache.crop(torch.tensor([12, 15]))
    last = torch.stack([ids[0, 12:20], ids[1, 15:23]])
    got = feed(net, cache, last, (3, 1))
    truth = net(ids)
    assert_exact(got, torch.stack([truth[0, 12:20], truth[1, 15:23]]))


@every_case
def test_beams_are_rows_in_a_new_order(case: Case) -> None:
    net, ids, order = of(case), ids_of(N, 3), torch.tensor([2, 0, 0])
    cache = net.cache(3)
    feed(net, cache, ids[:, :20], (13, 1))
    cache.reorder(order)
    whole = torch.cat([ids[order, :20], ids[:, 20:]], dim=1)
    assert_exact(feed(net, cache, ids[:, 20:], (1, 4)), net(whole)[:, 20:])


@every_case
def test_one_prompt_serves_many_requests(case: Case) -> None:
    net, ids, requests = of(case), ids_of(23, 1), ids_of(10, 4)
    prompt = net.cache()
    feed(net, prompt, ids, 23)
    truth = net(torch.cat([ids.expand(4, -1), requests], dim=1))[:, 23:]
    assert_exact(feed(net, prompt.repeat(4), requests, (1, 5)), truth)
    for row in range(4):
        assert_exact(feed(net, prompt.clone(), requests[row : row + 1], 3), truth[row : row + 1])
    assert prompt.lengths == [23]


def test_after_a_packed_prompt_the_last_document_goes_on() -> None:
    for case in CAUSAL:
        net, ids = of(case), ids_of(30)
        docs = torch.tensor([[0] * 8 + [1] * 12, [5] * 15 + [5] * 5])
        cache = net.cache(2)
        feed(net, cache, ids[:, :20], 20, doc_ids=docs)
        got = feed(net, cache, ids[:, 20:], (1, 4))
        assert_exact(got[:1], net(ids[:1, 8:])[:, 12:], str(case))
        assert_exact(got[1:], net(ids[1:])[:, 20:], str(case))


def test_an_empty_slot_between_equal_ids_ends_the_document() -> None:
    ids, docs = ids_of(14), torch.full((2, 14), 3)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, 6:8] = False
    for case in CAUSAL:
        net = of(case)
        truth = net(ids, mask=mask, doc_ids=docs)[mask]
        for sizes in (8, 7, (6, 2, 6), 1):
            assert_exact(feed(net, net.cache(2), ids, sizes, mask=mask, doc_ids=docs)[mask], truth, f"{case} in {sizes}")


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """Flags of a random layer, some differing between its two layers."""
    flags: dict[str, Any] = {"kv_heads": draw(st.sampled_from([1, 2, 3, 6]))}
    windows = draw(st.lists(st.none() | st.integers(1, 9), min_size=2, max_size=2))
    selective = draw(st.lists(st.booleans(), min_size=2, max_size=2))
    if any(windows):
        flags["sliding_window"] = windows
        flags["sink_tokens"] = [None if w is None else draw(st.integers(0, 3)) for w in windows]
    if any(selective):
        flags["attn_selective"] = selective
        flags["sim_head"] = [draw(st.integers(0, 5)) if on else None for on in selective]
        if draw(st.booleans()):
            flags["selection_skip"] = draw(st.sampled_from([0.5, 2.0]))
    if draw(st.booleans()):
        flags["rotary_pos_emb"] = True
        near = [n for n in range(1, 5) if all(w is None or n < w for w in windows)]
        if near and draw(st.booleans()):
            flags |= {"self_extend_group": draw(st.integers(1, 4)), "self_extend_window": draw(st.sampled_from(near))}
    for name, values in (("alibi_pos_bias", [True]), ("sink_logits", [True]), ("logit_softcap", [1.5])):
        if draw(st.booleans()):
            flags[name] = draw(st.sampled_from(values))
    return flags


@given(flags=layers(), data=st.data())
@settings(max_examples=60)
def test_random_layers_lengths_cuts_and_rollbacks_obey_the_law(flags: dict[str, Any], data: st.DataObject) -> None:
    net, n = model(flags), data.draw(st.integers(2, 40))
    ids, rollback = ids_of(n), data.draw(st.integers(0, 3))
    mask = torch.stack([torch.arange(n) >= data.draw(st.integers(0, n - 1)) for _ in range(2)])
    cache, outs, first = net.cache(2, rollback=rollback), [], 0
    truth = net(ids, mask=mask)
    while first < n:
        here = slice(first, first + data.draw(st.integers(1, 9)))
        outs.append(feed(net, cache, ids[:, here], 9, mask=mask[:, here]))
        first = min(here.stop, n)
        back = data.draw(st.integers(0, min(rollback, outs[-1].shape[1] if bool(mask[:, here].all()) else 0)))
        if back:
            cache.crop(torch.tensor(cache.lengths) - back)
            outs[-1], first = outs[-1][:, : outs[-1].shape[1] - back], first - back
    assert_exact(torch.cat(outs, dim=1)[mask], truth[mask])


# What is kept


def test_votes_of_these_models_are_large_enough_to_matter() -> None:
    for case in SELECTIVE:
        net = of(case)
        cache = net.cache(2)
        feed(net, cache, ids_of(N), 5)
        assert max(float(layer.votes_bus.max()) for layer in cache.layers) > 1, case
        if case.flags.get("selection_skip") == 5.0:
            assert any(bool((layer.votes_bus > 5).any()) for layer in cache.layers), "nothing was masked"


def test_the_bound_of_selection_skip_is_that_of_the_call_and_keeps_its_promise() -> None:
    # each call bounds the logits anew; whichever the bound, what is masked had at most e^-10 of a row's weight
    flags = {"attn_selective": True, "qk_rmsnorm": True}
    net, plain = model(flags | {"selection_skip": "bound"}, depth=1), model(flags, depth=1)
    ids = ids_of(120)
    one, exact, cut = net(ids), plain(ids), feed(net, net.cache(2), ids, 7)
    size = float(exact.abs().max())
    assert float((one - exact).abs().max()) > 0, "nothing was masked"
    assert float((one - exact).abs().max()) < 1e-4 * size and float((cut - exact).abs().max()) < 1e-4 * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_votes_are_kept_in_float32_or_better(dtype: torch.dtype) -> None:
    net = model({"attn_selective": True, "rotary_pos_emb": True}, dtype)
    cache = net.cache(2)
    feed(net, cache, ids_of(N), 5)
    for layer in cache.layers:
        assert layer.k_bgsd.dtype == layer.v_bgsd.dtype == dtype
        assert layer.votes_bus.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_rotary_keys_are_stored_turned_and_self_extends_raw() -> None:
    flags = {"rotary_pos_emb": True, "depth": 1}
    turned, raw = model(flags), model(flags | {"self_extend_group": 2, "self_extend_window": 4})
    stores = []
    for net in (turned, raw):
        cache = net.cache(1)
        feed(net, cache, ids_of(6, 1), 2)
        stores.append(cache.layers[0].k_bgsd[:, :, :6])
    rope = turned.spec.layers.blocks[0].attention.positions
    assert_exact(stores[0], rope.turn(stores[1], torch.arange(6)[None]))


BYTES = [
    {},
    {"kv_heads": 2, "rotary_pos_emb": True},
    {"sliding_window": 9},
    {"sliding_window": 9, "sink_tokens": 2},
    {"sliding_window": 9, "window_pattern": "LG", "rotary_pos_emb": True},
    {"attn_selective": True},
    {"attn_selective": True, "sliding_window": 9},
    {"attn_selective": [False, True], "rotary_pos_emb": True},
    {"rotary_pos_emb": True, "self_extend_group": 2, "self_extend_window": 4},
]


@pytest.mark.parametrize("flags", BYTES, ids=lambda f: "+".join(f) or "plain")
@pytest.mark.parametrize("opened", [{}, {"max_len": 90}, {"rollback": 3}, {"kv_budget": 12}, {"dtype": torch.bfloat16}], ids=str)
def test_bytes_are_predicted_exactly(flags: dict[str, Any], opened: dict[str, Any]) -> None:
    net = model(flags, opened.get("dtype", torch.float32))
    if "kv_budget" in opened and "attn_selective" not in flags:
        pytest.skip("a budget needs selective attention")
    more = {name: value for name, value in opened.items() if name != "dtype"}
    itemsize = net.head_vm.dtype.itemsize
    for batch in (1, 3):
        cache = net.cache(batch, **more)
        for n in (0, 5, 6, 70, 90):
            if n:
                feed(net, cache, ids_of(n, batch)[:, cache.lengths[0] :], 90)
            predicted = accounting.cache_bytes(net.spec, n, batch=batch, itemsize=itemsize, **more)
            stored = [t for layer in cache.layers for t in layer.stores()]
            stored += {id(layer.slots): layer.slots.pos_rs for layer in cache.layers}.values()
            assert cache.nbytes() == predicted == sum(t.untyped_storage().nbytes() for t in stored), n
    # what the tokens alone take is what is allocated once the length was known, positions and spare slots aside
    if "max_len" in opened:
        tables = {id(layer.slots): layer.slots for layer in cache.layers}.values()
        held = cache.nbytes() - sum(slots.nbytes() for slots in tables)
        assert held == 3 * accounting.kv_bytes(net.spec, 90, itemsize=itemsize)


def test_a_window_layer_does_not_grow_and_a_cache_grows_seldom() -> None:
    net = model({"rotary_pos_emb": True, "sliding_window": [8, None]})
    cache, homes = net.cache(1), [set(), set()]
    for token in ids_of(120, 1).split(1, dim=1):
        feed(net, cache, token, 1)
        for seen, layer in zip(homes, cache.layers, strict=True):
            seen.add((layer.k_bgsd.shape[2], layer.k_bgsd.data_ptr()))
    assert {slots for slots, _ in homes[0]} == {7} and len(homes[0]) == 1
    assert {slots for slots, _ in homes[1]} == {64, 128} and len(homes[1]) == 2


# What is refused


def opened(flags: dict[str, Any] | None = None, **more: Any) -> tuple[TransformerWrapper, Cache]:
    """A model and a cache of it that has read ten tokens in two rows."""
    net = model(HYBRID if flags is None else flags)
    cache = net.cache(2, **more)
    feed(net, cache, ids_of(10), 10)
    return net, cache


def test_a_cache_of_other_flags_batch_dtype_or_device_is_refused() -> None:
    net, cache = opened()
    ids = ids_of(3)
    for other, message in (
        (model(HYBRID | {"sliding_window": [5, None]}), "other flags"),
        (net, "batch=2"),
        (model(HYBRID, torch.float32), "dtype=torch.float64.*torch.float32"),
    ):
        with pytest.raises(xattn.ConfigError, match=message), torch.no_grad():
            other(ids[:1] if message == "batch=2" else ids, cache=cache)
    with pytest.raises(xattn.ConfigError, match="device=meta.*cpu"), torch.no_grad():
        net(ids, cache=Cache(net.spec.layers, 2, dtype=torch.float64, device="meta"))
    assert feed(net, cache, ids, 3).isfinite().all(), "a refused call changed the cache"


def test_gradients_empty_calls_and_encoders_are_refused() -> None:
    net, cache = opened()
    with pytest.raises(xattn.ConfigError, match="no_grad"):
        net(ids_of(3), cache=cache)
    with pytest.raises(xattn.TokenError, match="one token or more"), torch.no_grad():
        net(ids_of(3)[:, :0], cache=cache)
    with pytest.raises(xattn.ConfigError, match="causal"):
        model({"causal": False}).cache()
    with pytest.raises(xattn.ConfigError, match="batch=0"):
        net.cache(0)


def test_too_many_tokens_are_refused_before_anything_changes() -> None:
    net, cache = opened(max_len=12)
    with pytest.raises(xattn.TokenError, match="max_len=12.*13 tokens"), torch.no_grad():
        net(ids_of(3), cache=cache)
    assert cache.lengths == [10, 10]
    feed(net, cache, ids_of(2), 1)
    long = net.cache(2)
    feed(net, long, ids_of(128), 128)
    with pytest.raises(xattn.TokenError, match="129 tokens.*max_seq_len=128"), torch.no_grad():
        net(ids_of(1), cache=long)


def test_crop_beyond_what_is_kept_is_refused_and_changes_nothing() -> None:
    for flags, more, length, why in (
        ({"sliding_window": 4}, {}, 9, "ring no longer holds.*rollback .it is 0"),
        ({"sliding_window": 4}, {"rollback": 2}, 7, "ring no longer holds"),
        ({"attn_selective": True}, {}, 9, "F is kept"),
        ({"attn_selective": True}, {"rollback": 2}, 7, "F is kept"),
        ({"attn_selective": True}, {"kv_budget": 20}, 9, "clone"),
        ({}, {}, 11, "only takes tokens back"),
    ):
        net, cache = opened(flags, **more)
        before = cache.clone()
        with pytest.raises(xattn.ConfigError, match=why):
            cache.crop(length)
        assert_exact(feed(net, cache, ids_of(3), 1), feed(net, before, ids_of(3), 1))


def test_what_no_ring_and_no_vote_has_passed_can_always_be_taken_back() -> None:
    for flags in ({}, {"sliding_window": 12}, {"rotary_pos_emb": True, "self_extend_group": 2, "self_extend_window": 3}):
        net, cache = opened(flags)
        cache.crop(2)
        ids = torch.cat([ids_of(10)[:, :2], ids_of(5)], dim=1)
        assert_exact(feed(net, cache, ids_of(5), (2, 3)), net(ids)[:, 2:])


def test_crop_stays_within_the_document() -> None:
    net = model({})
    cache = net.cache(2)
    feed(net, cache, ids_of(10), 10, doc_ids=torch.tensor([[0] * 6 + [1] * 4, [0] * 10]))
    cache.crop(6)
    with pytest.raises(xattn.ConfigError, match="row 0.*document begins after"):
        cache.crop(5)


def test_a_call_that_failed_midway_leaves_no_cache_that_looks_whole() -> None:
    net, cache = opened()
    before, broken = cache.clone(), net.attn_layers.blocks[1].ff.branch
    hook = broken.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
        net(ids_of(3), cache=cache)
    hook.remove()
    with pytest.raises(xattn.ConfigError, match="half written.*clone"), torch.no_grad():
        net(ids_of(3), cache=cache)
    assert feed(net, before, ids_of(3), 3).isfinite().all()


def test_rows_that_do_not_exist_are_refused() -> None:
    _, cache = opened()
    for index in ([2], [-1], []):
        with pytest.raises(xattn.ShapeError, match="0 to 1"):
            cache.reorder(torch.tensor(index, dtype=torch.long))
