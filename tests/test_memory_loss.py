"""The memory loss: the paper's formula, its place in training, and that training by it empties the memory."""

import pytest
import torch
from measure import assert_exact

import xattn
from xattn.ops.layout import Layout
from xattn.ops.memory import live_keys
from xattn.ops.reference import reference
from xattn.spec.flags import parse_attention

MODEL = {"num_tokens": 29, "max_seq_len": 64, "dim": 24, "depth": 3, "heads": 4}
SELECTIVE = [
    {},
    {"sim_head": 2, "kv_heads": 2},
    {"rotary_pos_emb": True, "logit_softcap": 1.5},
    {"sim_head": 3, "alibi_pos_bias": True},
    {"rotary_pos_emb": True, "self_extend_group": 2, "self_extend_window": 4, "sliding_window": 9},
]


@pytest.mark.parametrize("flags", SELECTIVE, ids=lambda f: "+".join(f) or "plain")
def test_live_keys_are_counted_by_the_papers_formula(flags):
    # F is read off the definition: what the votes are before each query
    spec, n = parse_attention(heads=4, dim_head=8, attn_selective=True, **flags), 23
    q, k = (torch.randn(2, heads, n, 8, dtype=torch.float64) for heads in (4, spec.kv_heads))
    at = Layout.plain(n)
    votes = reference(q, k, k, spec=spec, layout_i=at, layout_j=at, carry_rows=n)[1]
    most = torch.zeros(2, dtype=torch.float64)
    for b in range(2):
        for i in range(1, n):
            sight = range(max(0, i - spec.pattern.sliding_window + 1) if spec.pattern.sliding_window else 0, i)
            gone = sum(min(float(votes[b, i - 1, j]), 1.0) for j in sight)
            most[b] = max(most[b], len(sight) - gone)
    head = spec.selection.sim_head
    got = live_keys(q[:, head], k[:, head * spec.kv_heads // 4], spec=spec, layout=at)
    assert_exact(got, most)


def net(**flags):
    torch.manual_seed(2)
    return xattn.AutoregressiveWrapper(xattn.build(MODEL | {"attn_selective": True} | flags).double())


def test_the_loss_is_the_weighted_mean_over_layers_over_tokens_and_only_while_training():
    plain, weighted = net(), net(memory_loss_weight=0.5)
    ids = torch.randint(0, 29, (2, 41))
    mask = torch.ones(2, 41, dtype=torch.bool)
    mask[1, :11] = False
    more = (weighted(ids, mask=mask) - plain(ids, mask=mask)).detach()
    plain.requires_grad_(False)
    _, live = plain.net(ids[:, :-1], mask=mask[:, :-1], return_live=True)
    alone = [plain.net(row[None], return_live=True)[1] for row in (ids[0, :-1], ids[1, 11:-1])]
    assert_exact(live, torch.cat(alone))
    assert bool(((live > 0) & (live < 1)).all())
    assert_exact(more, 0.5 * live.mean())
    assert weighted.eval()(ids) == plain.eval()(ids)


def test_hybrid_models_count_their_selective_layers_alone():
    ids = torch.randint(0, 29, (2, 30))
    model = net(attn_selective=[False, True, False]).net.requires_grad_(False)
    layers = model.attn_layers
    x, live = layers(torch.randn(2, 30, 24, dtype=torch.float64), return_live=True)
    seen = []
    for block, spec in zip(layers.blocks, layers.spec.blocks, strict=True):
        if spec.attention.selection is not None:
            hook = block.attn.branch.register_forward_pre_hook(lambda module, args: seen.append(module.live_keys(*args[:2])))
    assert_exact(layers(torch.zeros(2, 30, 24, dtype=torch.float64), return_live=True)[1], seen[0] / 30)
    hook.remove()
    assert model(ids, return_live=True)[1].shape == (2,) and live.shape == (2,) and x.shape == (2, 30, 24)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_training_by_it_leaves_fewer_keys_needed(checkpoint):
    model = net(memory_loss_weight=5.0)
    model.net.attn_layers.checkpoint_blocks = checkpoint
    ids = torch.randint(0, 29, (4, 33))
    optimiser, before = torch.optim.Adam(model.parameters(), lr=3e-3), model.net(ids, return_live=True)[1].mean()
    for _ in range(25):
        optimiser.zero_grad()
        model(ids).backward()
        optimiser.step()
    assert model.net(ids, return_live=True)[1].mean() < 0.5 * before


def test_a_weight_without_selection_or_out_of_range_is_refused():
    with pytest.raises(xattn.ConfigError, match="memory_loss_weight=0.1 has no effect.*attn_selective"):
        xattn.build(MODEL, memory_loss_weight=0.1)
    with pytest.raises(xattn.ConfigError, match="memory_loss_weight=0.0 must be finite and above 0"):
        xattn.build(MODEL, attn_selective=True, memory_loss_weight=0.0)
    with pytest.raises(xattn.ConfigError, match="no layer has attn_selective"):
        xattn.build(MODEL)(torch.zeros(1, 3, dtype=torch.long), return_live=True)
