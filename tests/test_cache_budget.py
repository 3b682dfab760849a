"""Context pruning: a pruned cache equals the greedy rule applied row by row, and its budget is honest."""

from typing import Any

import pytest
import torch
from cases import Case
from measure import assert_exact
from test_cache import SELECTIVE, chunk_sizes, feed, ids_of, model, of
from torch import Tensor

import xattn
from xattn import accounting
from xattn.cache.layer import LayerCache
from xattn.cache.pruned import PrunedLayer
from xattn.ops.attention import attend
from xattn.ops.layout import Layout
from xattn.ops.reference import reference
from xattn.spec.model import AttentionSpec


def greedy(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sinks: Tensor | None, budget: int) -> tuple[Tensor, list[Any]]:
    """The rule of the paper in plain Python lists, one row and one token after the other: (out, keys kept by row)."""
    batch, n = q.shape[0], q.shape[2]
    window, pinned = spec.pattern.sliding_window or n, spec.pattern.sink_tokens
    outs, kept = torch.zeros_like(q), []
    for b in range(batch):
        live: list[int] = []
        votes: dict[int, float] = {}
        for i in range(n):
            if len(live) == budget:
                hidden = [j for j in live if i - j >= window and j >= pinned]
                # what the window hides is of no use to anybody; else the most voted against, the oldest of equals
                leaving = hidden[0] if hidden else max((j for j in live if j != 0), key=lambda j: (votes[j], -j))
                live.remove(leaving)
            live.append(i)
            votes[i] = 0.0
            out, total = reference(
                q[b : b + 1, :, i : i + 1], k[b : b + 1, :, live], v[b : b + 1, :, live], spec=spec, sink_logits_h=sinks,
                layout_i=Layout(torch.tensor([[i]])), layout_j=Layout(torch.tensor([live])),
                carry_bj=torch.tensor([[votes[j] for j in live]], dtype=q.dtype),
            )  # fmt: skip
            votes = dict(zip(live, total[0].tolist(), strict=True))
            outs[b, :, i] = out[0, :, 0]
        kept.append(sorted(live))
    return outs, kept


class Head:
    """One attention layer over a cache, without a model: queries, keys and values as they are."""

    def __init__(self, case: Case, budget: int, batch: int = 2) -> None:
        from xattn.cache import Cache
        from xattn.spec.model import BlockSpec, FeedForwardSpec, LayersSpec

        block = BlockSpec(attention=case.spec, feedforward=FeedForwardSpec())
        layers = LayersSpec(dim=8, blocks=(block,))
        self.spec, self.layers = case.spec, layers
        self.cache = Cache(layers, batch, dtype=torch.float64, kv_budget=budget)

    @property
    def store(self) -> LayerCache:
        """The layer's cache."""
        return self.cache.layers[0]

    @torch.no_grad()
    def feed(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """The output of one call."""
        layout = self.cache.begin(self.layers, q[:, 0], dtype=torch.float64)
        view = self.store.extend(k, v)
        out, votes = attend(
            q, view.k_bgjd, view.v_bgjd, spec=self.spec, layout=layout, key_layout=view.layout, sink_logits_h=sinks,
            carry_bj=view.carry_bj, carry_rows=self.store.carry_rows,
        )  # fmt: skip
        self.store.retain(votes)
        self.cache.commit()
        return out

    def kept(self) -> list[Any]:
        """Positions held, by row."""
        return [sorted(p for p in row if p >= 0) for row in self.store.slots.pos_rs.tolist()]


def raw(case: Case) -> bool:
    """Whether the layer stores keys as they come, so that no module needs to turn them first."""
    return case.spec.positions.__class__.__name__ != "Rope"


@pytest.mark.parametrize("budget", [2, 3, 6, 12, 40])
@pytest.mark.parametrize("case", [c for c in SELECTIVE if raw(c)], ids=str)
def test_a_pruned_cache_equals_the_greedy_rule_row_by_row(case: Case, budget: int) -> None:
    n, spec = 48, case.spec
    given = {name: torch.randn(2, heads, n, spec.dim_head, dtype=torch.float64)
             for name, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads))}  # fmt: skip
    sinks = torch.randn(spec.heads, dtype=torch.float64) if spec.sink_logits else None
    head, outs = Head(case, budget), []
    for i in range(n):
        outs.append(head.feed(*(given[name][:, :, i : i + 1] for name in "qkv"), sinks))
    truth, kept = greedy(*given.values(), spec, sinks, budget)
    assert_exact(torch.cat(outs, dim=2), truth)
    if isinstance(head.store, PrunedLayer):
        assert head.kept() == kept
        assert head.store.k_bgsd.shape[2] == budget
    whole = reference(*given.values(), spec=spec, layout_i=Layout.plain(n), layout_j=Layout.plain(n), sink_logits_h=sinks)[0]
    sight = min(n, (spec.pattern.sliding_window or n) + spec.pattern.sink_tokens)
    if budget >= sight:
        assert_exact(torch.cat(outs, dim=2), whole)
    elif budget < sight // 2:
        assert float((truth - whole).abs().max()) > 1e-3, "nothing was pruned"


@pytest.mark.parametrize("case", SELECTIVE, ids=str)
def test_a_budget_of_all_keys_prunes_nothing_in_any_chunking(case: Case) -> None:
    net, ids = of(case), ids_of(37)
    for size in chunk_sizes(case.flags):
        cache = net.cache(2, kv_budget=37)
        assert_exact(feed(net, cache, ids, size), net(ids), f"chunks of {size}")


def test_a_pruned_run_in_chunks_keeps_its_budget_and_the_newest_and_first_token() -> None:
    net = model({"attn_selective": True, "rotary_pos_emb": True})
    for sizes in ((20, 1), (3,), (1, 7), 37):
        cache = net.cache(2, kv_budget=9)
        feed(net, cache, ids_of(37), sizes)
        for layer in cache.layers:
            for row in layer.slots.pos_rs.tolist():
                assert len(set(row)) == 9 and {0, 36} <= set(row)


def test_each_row_is_pruned_for_itself_padded_or_packed() -> None:
    net, lengths = model({"attn_selective": True, "rotary_pos_emb": True, "sliding_window": [12, None]}), (5, 14, 20)
    ids, new = ids_of(20, 3), ids_of(12, 3)
    mask = torch.stack([torch.arange(20) >= 20 - n for n in lengths])
    docs = torch.stack([(torch.arange(20) >= 20 - n).long() for n in lengths])
    for rows in ({"mask": mask}, {"doc_ids": docs}):
        cache = net.cache(3, kv_budget=6)
        feed(net, cache, ids, 1, **rows)
        got = feed(net, cache, new, 1)
        for row, n in enumerate(lengths):
            alone = net.cache(1, kv_budget=6)
            whole = torch.cat([ids[row, 20 - n :], new[row]])[None]
            assert_exact(got[row : row + 1], feed(net, alone, whole, 1)[:, n:], f"{[*rows]} row {row}")


def test_pruned_beams_and_requests_go_on_from_copies() -> None:
    net, ids = model({"attn_selective": True}), ids_of(20)
    cache = net.cache(2, kv_budget=6)
    feed(net, cache, ids, 1)
    twin, swapped = cache.clone(), cache.repeat(2)
    swapped.reorder(torch.tensor([3, 0]))
    truth = feed(net, cache, ids_of(5), 1)
    assert_exact(feed(net, twin, ids_of(5), 1), truth)
    assert_exact(feed(net, swapped, ids_of(5).flip(0), 1), truth.flip(0))


def test_budgets_are_counts_fractions_or_one_a_layer() -> None:
    net = model({"attn_selective": [True, False, True], "rotary_pos_emb": True}, depth=3)

    def budgets(value: Any, **more: Any) -> list[int | None]:
        return [kind.budget for kind in net.cache(1, kv_budget=value, **more).kinds]

    assert budgets(7) == [7, None, 7]
    assert budgets([5, None, 8]) == [5, None, 8]
    assert budgets(0.25) == [32, None, 32]  # of max_seq_len=128
    assert budgets(0.25, max_len=30) == [8, None, 8]
    assert budgets([None, None, 0.5]) == [None, None, 64]
    for value, message in (
        (1, "kv_budget=1 is smaller than the 2 keys"),
        ([5, 5, 5], "no effect in layer 1"),
        ([5, None], "2 entries for depth=3"),
        (1.5, "fraction"),
        (True, "number of keys"),
    ):
        with pytest.raises(xattn.ConfigError, match=message):
            net.cache(1, kv_budget=value)
    with pytest.raises(xattn.ConfigError, match="no layer has attn_selective"):
        model({}).cache(1, kv_budget=8)
    with pytest.raises(xattn.ConfigError, match="rollback=2 with kv_budget=8"):
        net.cache(1, kv_budget=8, rollback=2)


def test_bytes_of_a_budget_do_not_grow() -> None:
    net = model({"attn_selective": True}, torch.bfloat16)
    cache = net.cache(1, kv_budget=16)
    feed(net, cache, ids_of(30, 1), 4)
    before = cache.nbytes()
    feed(net, cache, ids_of(90, 1), 4)
    assert cache.nbytes() == before == 2 * 16 * (2 * 6 * 16 * 2 + 4 + 8)
    assert accounting.kv_bytes(net.spec, 120, kv_budget=16) == 2 * 16 * (2 * 6 * 16 * 2 + 4)


