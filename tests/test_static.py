"""Static steps say what the ordinary cache says, leave it as ordinary calls would, and never wait for the host."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case
from measure import FORWARD, assert_exact, error
from test_cache import BYTES, CAUSAL, HYBRID, feed, ids_of, model, of
from test_generate_cached import RAGGED, wrapped
from test_kernels import CUDA, DEVICE, interpreter  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xattn
from xattn import AutoregressiveWrapper, StaticStep, accounting
from xattn.cache import Cache, StaticCache
from xattn.nn.wrapper import TransformerWrapper

LENGTHS = (3, 11, 7)
# every kind of storage: full, ring with and without sinks, F, a budget, raw keys, a mix, learned positions, packed documents
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"rotary_pos_emb": True}, {}),
    "learned": ({}, {}),
    "ring": ({"rotary_pos_emb": True, "sliding_window": 5, "sink_tokens": 2}, {"rollback": 2}),
    "selective": ({"attn_selective": True, "selection_skip": 5.0}, {"rollback": 3}),
    "selective_ring": ({"attn_selective": True, "alibi_pos_bias": True, "sliding_window": 6}, {"rollback": 1}),
    "budget": ({"rotary_pos_emb": True, "attn_selective": True}, {"kv_budget": 9}),
    "budget_window": ({"attn_selective": True, "sliding_window": 12, "sink_tokens": 1}, {"kv_budget": 6}),
    "self_extend": ({"rotary_pos_emb": True, "self_extend_group": 2, "self_extend_window": 4}, {}),
    "mix": (HYBRID, {}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def begun(net: TransformerWrapper, rows: str, n: int = 11, **options: Any) -> Cache:
    """A cache whose three rows have read a prompt: alike, ragged or packed."""
    cache, ids = net.cache(3, **{"max_len": 60, **options}), ids_of(n, 3)
    at = {}
    if rows == "ragged":
        at["mask"] = torch.stack([torch.arange(n) >= n - length for length in LENGTHS])
    if rows == "packed":
        at["doc_ids"] = torch.stack([(torch.arange(n) >= length).long() for length in (4, 20, 9)])
    if n:
        feed(net, cache, ids, (n - 4, 4) if n > 4 else n, **at)
    return cache


def stepped(step: StaticStep, ids: Tensor) -> Tensor:
    """The logits (b n v) of tokens that are read in steps."""
    return torch.stack([step(token_b).clone() for token_b in ids.unbind(dim=1)], dim=1)


@pytest.mark.parametrize("rows", ["alike", "ragged"])
@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_steps_equal_the_ordinary_cache(case: Case, rows: str) -> None:
    net, new = of(case), ids_of(14, 3)
    cache = begun(net, rows)
    other = cache.clone()
    assert_exact(stepped(StaticStep(net, cache), new), feed(net, other, new, 1))
    assert cache.lengths == other.lengths
    assert_exact(feed(net, cache, new, (3, 1, 5)), feed(net, other, new, (3, 1, 5)), "afterwards")


@pytest.mark.parametrize("rows", ["alike", "ragged", "packed"])
@every_kind
def test_every_kind_goes_on_from_every_prompt_and_back(kind: str, rows: str) -> None:
    flags, options = KINDS[kind]
    net, new = model(flags), ids_of(16, 3)
    cache = begun(net, rows, **options)
    other = cache.clone()
    assert_exact(stepped(StaticStep(net, cache), new), feed(net, other, new, 1))
    copy = cache.clone()
    assert_exact(feed(net, copy, new, 2), feed(net, other.clone(), new, 2), "a clone")
    if options.get("rollback"):
        for each in (cache, other):
            each.crop(torch.tensor(other.lengths) - 1)
    # steps again, over what was taken back
    assert_exact(stepped(StaticStep(net, cache), new), feed(net, other, new, 1), "again")
    assert [layer.k_bgsd.shape for layer in cache.layers] == [layer.k_bgsd.shape for layer in begun(net, rows, **options).layers]


@every_kind
def test_steps_may_be_the_first_to_fill_a_cache(kind: str) -> None:
    flags, options = KINDS[kind]
    net, ids = model(flags), ids_of(20, 3)
    want = feed(net, net.cache(3, max_len=60, **options), ids, 1)
    assert_exact(stepped(StaticStep(net, begun(net, "alike", 0, **options)), ids), want)


class NoSync(TorchDispatchMode):
    """Raises where a tensor is read by the host, or a shape would depend on what a tensor holds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2"), name
        assert not (name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are not looked at, as on a GPU."""
    monkeypatch.setattr(TransformerWrapper, "_check_ids", lambda *_: None)


@pytest.mark.parametrize("rows", ["alike", "ragged", "packed"])
@every_kind
@pytest.mark.usefixtures("unchecked")
def test_a_step_never_waits_for_the_host_and_moves_no_storage(kind: str, rows: str) -> None:
    flags, options = KINDS[kind]
    net = model(flags)
    step = StaticStep(net, begun(net, rows, **options))
    homes = [t.data_ptr() for t in step.static.stores()]
    for token_b in ids_of(4, 3).unbind(dim=1):
        step.ids_b1.copy_(token_b[:, None])
        with torch.no_grad(), step.static.step(), NoSync():
            step.compute()
    assert homes == [t.data_ptr() for t in step.static.stores()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("kind", ["mix", "budget", "self_extend"])
def test_compiled_whole_a_step_says_the_same(kind: str) -> None:
    flags, options = KINDS[kind]
    net, new = model(flags), ids_of(4, 3)
    cache = begun(net, "ragged", **options)
    other = cache.clone()
    torch._dynamo.reset()
    step = StaticStep(net, cache).compile(backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = stepped(step, new)
    assert_exact(got, feed(net, other, new, 1))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", ["full", "ring", "selective", "budget", "self_extend"])
def test_steps_through_the_kernels_equal_the_definition(kind: str) -> None:
    flags, options = KINDS[kind]
    net, new = model(flags, torch.float32, depth=1, attn_backend="reference").to(DEVICE), ids_of(5, 3).to(DEVICE)
    ours, double = net.with_flags(attn_backend="triton"), model(flags, depth=1).to(DEVICE)
    ids, outs = ids_of(11, 3).to(DEVICE), []
    mask = torch.stack([torch.arange(11) >= 11 - length for length in LENGTHS]).to(DEVICE)
    for each in (ours, net, double):
        cache = each.cache(3, max_len=40, **options)
        feed(each, cache, ids, (7, 4), mask=mask)
        outs.append(stepped(StaticStep(each, cache), new))
    got, single, right = outs
    assert error(got, right) <= FORWARD * max(error(single, right), 1e-7)


# Generation


@pytest.mark.parametrize("prompts", [ids_of(9, 2), RAGGED], ids=["alike", "ragged"])
@every_kind
def test_static_generation_says_the_same_tokens(kind: str, prompts: Any) -> None:
    flags, options = KINDS[kind]
    ar = wrapped(flags)
    budget = {name: value for name, value in options.items() if name == "kv_budget"}
    for more in ({"temperature": 0}, {"seed": 5, "filter_logits_fn": "top_p", "repetition_penalty": 1.2}):
        one, two = (ar.generate(prompts, 24, static=static, **budget, **more) for static in (True, False))
        assert torch.equal(one, two)
    assert torch.equal(ar.beam_search(prompts, 7, beams=3, static=True), ar.beam_search(prompts, 7, beams=3, static=False))


@pytest.mark.parametrize("every", [1, 3, 16])
def test_ends_are_found_although_they_are_looked_for_seldom(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xattn.generate.sample.CHECK_EVERY", every)
    ar = wrapped()
    free = ar.generate(RAGGED, 30, temperature=0)
    for eos in free[:, 3:9].flatten().tolist():
        one, two = (ar.generate(RAGGED[1], 30, temperature=0, eos_token=eos, static=static) for static in (True, False))
        assert torch.equal(one, two)
        heard: list[Tensor] = []
        ar.generate(RAGGED[1], 30, temperature=0, eos_token=eos, static=True, on_token=heard.append)
        assert len(heard) == len(two), "a listener hears nothing after the end"
    pair = free[1, 2:4].tolist()
    stopped = [ar.generate(RAGGED[1], 30, temperature=0, stop=[pair], static=static) for static in (True, False)]
    assert torch.equal(*stopped) and len(stopped[0]) < 30


def test_steps_are_taken_where_they_are_asked_for_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    call = StaticStep.__call__
    monkeypatch.setattr(StaticStep, "__call__", lambda self, token_b: taken.append(1) or call(self, token_b))
    ar = wrapped()
    for static, steps in ((True, 19), (False, 0), (None, 0)):
        taken.clear()
        ar.generate(ids_of(9), 20, temperature=0, static=static)
        assert len(taken) == steps


def test_a_shared_prompt_of_any_allocation_is_continued_and_left_alone() -> None:
    ar, prefix = wrapped(), ids_of(15, 1)
    for options in ({}, {"max_len": 60}):
        cache = ar.net.cache(**options)
        feed(ar.net, cache, prefix, 6)
        got = ar.generate(RAGGED, 20, temperature=0, cache=cache, static=True)
        assert torch.equal(got, ar.generate(RAGGED, 20, temperature=0, cache=cache, static=False))
        assert cache.lengths == [15]


# What it holds, and what is refused


@pytest.mark.parametrize("flags", BYTES, ids=lambda f: "+".join(f) or "plain")
def test_bytes_are_predicted_exactly(flags: dict[str, Any]) -> None:
    net = model(flags)
    for options in ({}, {"rollback": 2}, {"kv_budget": 9} if "attn_selective" in flags else {}):
        cache = begun(net, "alike", **options)
        StaticStep(net, cache)(ids_of(1, 3)[:, 0])
        at = {"batch": 3, "itemsize": 8, "max_len": 60, **options}
        assert cache.nbytes() == accounting.cache_bytes(net.spec, 12, static=True, **at)
        assert cache.clone().nbytes() == accounting.cache_bytes(net.spec, 12, **at), "a clone has no slot that waits"


def test_what_cannot_be_stepped_is_refused() -> None:
    net, token_b = model(HYBRID), torch.zeros(3, dtype=torch.long)
    with pytest.raises(xattn.ConfigError, match="how long rows will grow.*max_len"):
        StaticStep(net, begun(net, "alike", max_len=None))
    with pytest.raises(xattn.ConfigError, match="max_len=70.*opened for .60"):
        StaticStep(net, begun(net, "alike"), max_len=70)
    with pytest.raises(xattn.TokenError, match="max_seq_len=128"):
        StaticStep(net, begun(net, "alike", max_len=200))
    step = StaticStep(net, begun(net, "alike", max_len=12))
    step(token_b)
    with pytest.raises(xattn.TokenError, match="max_len=12.*13 tokens"):
        step(token_b)
    with pytest.raises(xattn.ShapeError, match="each of 3 rows"):
        step(token_b[:2])
    with pytest.raises(xattn.ConfigError, match="StaticStep"), torch.no_grad():
        net(token_b[:, None], cache=StaticCache(begun(net, "alike")))


def test_steps_over_a_cache_that_has_gone_on_otherwise_are_refused() -> None:
    net, token_b = model(HYBRID), torch.zeros(3, dtype=torch.long)

    def others() -> Iterator[Any]:
        yield lambda cache: feed(net, cache, ids_of(2, 3), 2)
        yield lambda cache: cache.crop(cache.lengths[0] - 1)
        yield lambda cache: cache.reorder(torch.tensor([0, 0, 1]))
        yield lambda cache: StaticStep(net, cache)

    for other in others():
        cache = begun(net, "alike", rollback=2)
        step = StaticStep(net, cache)
        step(token_b)
        other(cache)
        with pytest.raises(xattn.ConfigError, match="gone on by other calls"):
            step(token_b)


def test_a_step_that_failed_midway_leaves_no_cache_that_looks_whole() -> None:
    net = model(HYBRID)
    cache = begun(net, "alike")
    step = StaticStep(net, cache)
    hook = net.attn_layers.blocks[1].ff.branch.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("oh")))
    with pytest.raises(RuntimeError, match="oh"):
        step(torch.zeros(3, dtype=torch.long))
    hook.remove()
    with pytest.raises(xattn.ConfigError, match="half written"):
        feed(net, cache, ids_of(1, 3), 1)


def test_options_that_static_steps_cannot_honour_are_refused() -> None:
    ar = wrapped()
    with pytest.raises(xattn.ConfigError, match="static=True has no effect.*cache_kv"):
        ar.generate(RAGGED, 3, static=True, cache_kv=False)
    hook = ar.net.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(xattn.ConfigError, match="hooks"):
        ar.generate(RAGGED, 3, static=True)
    hook.remove()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", ["mix", "budget"])
def test_a_compiled_step_in_a_graph_says_the_same(kind: str, mode: str) -> None:
    flags, options = KINDS[kind]
    net, ids = model(flags, torch.float32).to("cuda"), ids_of(20, 3).to("cuda")
    outs = []
    for compiled in (True, False):
        torch._dynamo.reset()
        cache = net.cache(3, max_len=60, **options)
        feed(net, cache, ids[:, :11], (7, 4))
        step = StaticStep(net, cache)
        outs.append(stepped(step.compile(mode=mode) if compiled else step, ids[:, 11:]))
    assert error(outs[0], outs[1].double()) < 1e-4 * float(outs[1].abs().max())


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@every_kind
def test_a_replayed_graph_says_what_steps_say(kind: str, backend: str) -> None:
    flags, options = KINDS[kind]
    net, ids = model(flags, torch.float32, attn_backend=backend).to("cuda"), ids_of(30, 3).to("cuda")
    outs = []
    for graph in (True, False):
        cache = net.cache(3, max_len=60, **options)
        feed(net, cache, ids[:, :11], (7, 4))
        step = StaticStep(net, cache)
        step._run = step._run if graph else step.compute
        outs.append(stepped(step, ids[:, 11:]))
        assert (step._graph is not None) == graph
    assert torch.equal(*outs)
    budget = {name: value for name, value in options.items() if name == "kv_budget"}
    ar = AutoregressiveWrapper(net)
    made = [ar.generate(ids[:, :9], 40, temperature=0, static=static, **budget) for static in (None, False)]
    assert torch.equal(*made)
