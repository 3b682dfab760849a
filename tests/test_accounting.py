"""Promises of accounting: predictions from a spec equal what the built model has and does."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import xattn
from xattn import AutoregressiveWrapper, accounting
from xattn.spec.pattern import Pattern

SIZES = {"num_tokens": 50, "max_seq_len": 128, "dim": 64, "depth": 3, "heads": 4}
VARIANTS = [
    {},
    {"rotary_pos_emb": True, "use_rmsnorm": True},
    {"rotary_pos_emb": True, "use_rmsnorm": True, "ff_glu": True, "ff_swish": True, "sliding_window": 16},
    {"rotary_pos_emb": True, "use_rmsnorm": True, "attn_selective": True},
    {"sandwich_norm": True, "ff_relu_squared": True, "kv_heads": 2, "dim_head": 8},
    {"pre_norm": False, "ff_bias": True, "alibi_pos_bias": True, "qk_rmsnorm": True},
    {"logit_softcap": 20.0, "tie_embedding": True, "ff_mult": 3.0},
    {"rotary_pos_emb": True, "self_extend_group": 2, "self_extend_window": 8},
    {"rotary_pos_emb": True, "sink_logits": True, "sliding_window": 16, "window_pattern": "LG"},
]
names = pytest.mark.parametrize("flags", VARIANTS, ids=lambda f: "+".join(f) or "plain")


@names
def test_parameters_are_predicted_exactly(flags):
    model = xattn.build(SIZES | flags)
    assert accounting.count_params(model.spec) == sum(p.numel() for p in model.parameters())


@names
def test_activation_bytes_are_within_a_tenth_of_what_autograd_keeps(flags):
    model, n, batch = xattn.build(SIZES | flags), 127, 2
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = AutoregressiveWrapper(model)(torch.randint(0, 50, (batch, n + 1)))
    measured = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    predicted = accounting.activation_bytes(model.spec, batch=batch, n=n)
    assert loss.requires_grad and abs(predicted / measured - 1) < 0.1


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 16, 50])
def test_visible_pairs_equal_a_count_of_the_pattern(causal, window):
    for n in (1, 5, 17, 40):
        pos = torch.arange(n)[None]
        for sinks in (0, 1, 3, 30) if window else (0,):
            pattern = Pattern(causal=causal, sliding_window=window, sink_tokens=sinks)
            assert accounting.visible_pairs(pattern, n) == int(pattern.allowed(pos, pos).sum())


def test_flops_equal_torchs_own_count_where_it_counts_all_pairs():
    # torch counts full attention, so the model here is bidirectional, and the reference has countable products
    model = xattn.build(SIZES, causal=False, attn_backend="reference")
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 50, (1, 60)))
    assert accounting.forward_flops(model.spec, 60) == counter.get_total_flops()
    assert accounting.train_flops(model.spec, 60) == 3 * accounting.forward_flops(model.spec, 60)


def test_window_layers_stop_growing_and_selection_adds_one_float_a_key():
    def bytes_at(n, **flags):
        return accounting.kv_bytes(xattn.parse(SIZES | {"rotary_pos_emb": True} | flags), n, itemsize=2)

    key = 2 * 4 * 16 * 2
    assert bytes_at(100) == 3 * 100 * key
    assert bytes_at(100, kv_heads=1) == 3 * 100 * key // 4
    assert bytes_at(100, sliding_window=16) == bytes_at(9000, sliding_window=16) == 3 * 15 * key
    assert bytes_at(100, sliding_window=16, sink_tokens=4) == 3 * 19 * key
    assert bytes_at(10, sliding_window=16, sink_tokens=4) == 3 * 10 * key
    assert bytes_at(100, sliding_window=16, window_pattern="LLG") == (2 * 15 + 100) * key
    assert bytes_at(100, attn_selective=True) == 3 * 100 * (key + 4)
