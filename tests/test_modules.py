"""Promises of the modules: what a model of flags computes, refuses, and never lets through."""

import warnings

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compile_utils import fx_graph_cse
from torch.nn.functional import cross_entropy

import xattn
from xattn import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper

SIZES = {"num_tokens": 29, "max_seq_len": 37, "dim": 24, "depth": 3, "heads": 4}
EVERYTHING = {
    "kv_heads": 2, "rotary_pos_emb": True, "attn_selective": True, "sim_head": 1, "sliding_window": 9,
    "window_pattern": "LG", "sink_tokens": 2, "self_extend_group": 2, "self_extend_window": 5, "logit_softcap": 20.0,
    "alibi_pos_bias": True, "sink_logits": True, "qk_rmsnorm": True, "use_rmsnorm": True, "sandwich_norm": True,
    "ff_glu": True, "ff_swish": True, "tie_embedding": True,
}  # fmt: skip


def model_of(**flags):
    torch.manual_seed(0)
    return xattn.build(SIZES | flags).eval()


def ids_of(b=2, n=23, seed=1):
    return torch.randint(0, SIZES["num_tokens"], (b, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("flags", [{}, EVERYTHING, {"rotary_pos_emb": True, "pre_norm": False}], ids=["plain", "all", "post"])
def test_no_logit_depends_on_a_later_token(flags):
    model, ids = model_of(**flags), ids_of()
    changed = ids.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % SIZES["num_tokens"]
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.allclose(before[:, 11:], after[:, 11:])


def test_encoder_sees_both_sides():
    model, ids = model_of(causal=False, rotary_pos_emb=True), ids_of()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % SIZES["num_tokens"]
    assert not torch.allclose(model(ids)[:, 0], model(changed)[:, 0])


@pytest.mark.parametrize("flags", [{"use_abs_pos_emb": True}, EVERYTHING], ids=["learned positions", "all"])
def test_packed_documents_equal_each_document_alone(flags):
    model, ids = model_of(**flags).double(), ids_of(b=1, n=30)
    docs = torch.tensor([[4] * 12 + [9] * 17 + [4]])
    together = model(ids, doc_ids=docs)
    alone = torch.cat([model(ids[:, a:b]) for a, b in ((0, 12), (12, 29), (29, 30))], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("flags", [{"use_abs_pos_emb": True}, EVERYTHING], ids=["learned positions", "all"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(flags, side):
    model, ids = model_of(**flags).double(), ids_of(b=2, n=19)
    filler = torch.full((2, 4), 7)
    padded = torch.cat([filler, ids] if side == "left" else [ids, filler], dim=1)
    mask = torch.cat([filler < 0, ids >= 0] if side == "left" else [ids >= 0, filler < 0], dim=1)
    kept = slice(4, None) if side == "left" else slice(0, 19)
    torch.testing.assert_close(model(padded, mask=mask)[:, kept], model(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "flags",
    [{"ff_glu": True}, {"ff_swish": True}, {"ff_relu_squared": True}, {"ff_mult": 2.0}, {"ff_bias": True},
     {"use_rmsnorm": True}, {"pre_norm": False}, {"sandwich_norm": True}, {"qk_rmsnorm": True}, {"tie_embedding": True},
     {"use_abs_pos_emb": False}, {"dim_head": 8}, {"kv_heads": 2}, {"num_tokens": 31}, {"dim": 32}, {"depth": 2}],
    ids=lambda f: next(iter(f)),
)  # fmt: skip
def test_no_module_flag_is_inert(flags):
    plain, changed = model_of(), model_of(**flags)
    names = {n: p.shape for n, p in plain.named_parameters()}
    if names != {n: p.shape for n, p in changed.named_parameters()}:
        return
    changed.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(ids_of()), changed(ids_of()))


@pytest.mark.parametrize("name", ["attn_dropout", "ff_dropout", "emb_dropout"])
def test_dropout_drops_in_training_only(name):
    model, ids = model_of(**{name: 0.5}), ids_of()
    assert torch.equal(model(ids), model(ids))
    assert torch.equal(model(ids), model_of()(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_loss_is_the_cross_entropy_of_the_next_token_in_nats():
    model, ids = model_of(**EVERYTHING), ids_of()
    loss = AutoregressiveWrapper(model)(ids)
    expected = cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    nll = AutoregressiveWrapper(model).token_nll(ids)
    assert nll.shape == (2, 22)
    torch.testing.assert_close(nll.mean(), expected)


def test_loss_counts_neither_padding_nor_ignored_targets():
    model, ids = model_of(rotary_pos_emb=True), ids_of(b=2, n=20)
    ar = AutoregressiveWrapper(model)
    padded = torch.cat([torch.full((2, 3), 5), ids], dim=1)
    mask = torch.arange(23)[None].expand(2, -1) >= 3
    torch.testing.assert_close(ar(padded, mask=mask), ar(ids))
    ignored = ids.clone()
    ignored[:, 15:] = -100
    torch.testing.assert_close(ar(ignored), ar(ids[:, :15]))


def test_token_nll_switches_dropout_off_and_training_back_on():
    ar = AutoregressiveWrapper(model_of(attn_dropout=0.5)).train()
    assert torch.equal(ar.token_nll(ids_of()), ar.token_nll(ids_of()))
    assert ar.training and ar.net.training


def test_model_trains_and_every_parameter_gets_a_gradient():
    model, ids = model_of(**EVERYTHING).train(), ids_of(b=4, n=24)
    ar, optim = AutoregressiveWrapper(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = ar(ids)
    first.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    for _ in range(30):
        optim.zero_grad()
        loss = ar(ids)
        loss.backward()
        optim.step()
    assert loss < 0.7 * first


def test_initial_loss_is_near_that_of_a_uniform_guess():
    loss = AutoregressiveWrapper(model_of(depth=8, dim=64, rotary_pos_emb=True))(ids_of(b=16, n=37))
    assert abs(loss.item() - torch.tensor(float(SIZES["num_tokens"])).log().item()) < 0.1


def test_rotary_model_may_be_longer_than_trained_only_when_told():
    model, ids = model_of(rotary_pos_emb=True), ids_of(n=50)
    with pytest.raises(xattn.TokenError, match="extrapolate=True"):
        model(ids)
    assert model(ids, extrapolate=True).shape == (2, 50, 29)


def test_learned_positions_are_never_longer_than_trained():
    with pytest.raises(xattn.TokenError, match="max_seq_len=37"):
        model_of()(ids_of(n=50), extrapolate=True)


@pytest.mark.parametrize("bad", [-1, 29, 1000])
def test_token_ids_outside_the_vocabulary_are_named(bad):
    ids = ids_of()
    ids[1, 3] = bad
    with pytest.raises(xattn.TokenError, match="num_tokens=29"):
        model_of()(ids)


def test_wrong_shapes_name_tensor_axis_and_sizes():
    model = model_of()
    with pytest.raises(xattn.ShapeError, match="axis 'n' of mask is 5, but 23"):
        model(ids_of(), mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(xattn.ShapeError, match="separate runs"):
        model(ids_of(n=5), mask=torch.tensor([[1, 0, 1, 1, 1]] * 2).bool())
    with pytest.raises(xattn.TokenError, match="batch, sequence"):
        model(ids_of()[0])
    with pytest.raises(xattn.ShapeError, match="dtype"):
        model(ids_of(), mask=torch.ones(2, 23))


def test_selective_encoder_and_autoregressive_encoder_are_refused():
    with pytest.raises(xattn.ConfigError, match="needs a causal model"):
        Encoder(dim=24, depth=1, heads=4, attn_selective=True)
    with pytest.raises(xattn.ConfigError, match="sees the tokens it should predict"):
        AutoregressiveWrapper(model_of(causal=False))


def test_a_named_backend_that_cannot_serve_is_refused_at_build():
    with pytest.raises(xattn.UnsupportedFeature, match="attn_selective.*reference"):
        Decoder(dim=24, depth=1, heads=4, attn_selective=True, attn_backend="sdpa")
    with pytest.raises(xattn.UnsupportedFeature, match="did you mean sdpa"):
        Decoder(dim=24, depth=1, heads=4, attn_backend="sdap")


def test_explain_names_each_layer_its_flags_its_backend_and_why_others_lost():
    model = model_of(rotary_pos_emb=True, sliding_window=8, window_pattern="LLG", attn_selective=[False, False, True])
    table = model.explain().splitlines()
    assert len(table) == 3
    assert table[1].startswith("0-1") and "sdpa" in table[1] and "sliding_window=8" in table[1]
    assert table[2].startswith("2 ") and "reference" in table[2] and "sdpa does not implement attn_selective" in table[2]
    assert [row["backend"] for row in model.backends()] == ["sdpa", "sdpa", "reference"]


def test_stack_built_from_a_spec_is_the_stack_built_from_flags():
    stack = Decoder(dim=24, depth=2, heads=4, rotary_pos_emb=True, sliding_window=[5, None])
    again = Decoder.from_spec(stack.spec)
    assert again.spec == stack.spec
    with pytest.raises(xattn.ConfigError, match="Encoder needs every layer to be bidirectional"):
        Encoder.from_spec(stack.spec)
    x = torch.randn(2, 11, 24)
    again.load_state_dict(stack.state_dict())
    assert torch.equal(stack(x), again(x))


def test_stack_alone_takes_a_mask():
    stack, x = Encoder(dim=24, depth=1, heads=4), torch.randn(2, 11, 24)
    mask = torch.arange(11)[None].expand(2, -1) < 7
    torch.testing.assert_close(stack(x, mask=mask)[:, :7], stack(x[:, :7]))


def test_with_flags_shares_weights_and_warns_only_about_flags_of_training():
    model, ids = model_of(rotary_pos_emb=True), ids_of(n=37)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extended = model.with_flags(self_extend_group=4, self_extend_window=6)
    assert extended.token_emb.weight is model.token_emb.weight
    assert not torch.allclose(extended(ids), model(ids))
    with pytest.warns(xattn.FlagWarning, match="sliding_window=5 .trained with None"):
        windowed = model.with_flags(sliding_window=5)
    assert not torch.allclose(windowed(ids), model(ids))
    assert windowed.with_flags(sliding_window=5).spec == windowed.spec


def test_autocast_keeps_loss_and_statistics_in_float32():
    ar, ids = AutoregressiveWrapper(model_of(**EVERYTHING)), ids_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ar(ids)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in ar.parameters())
    assert abs(loss.item() - ar(ids).item()) < 0.05


def test_wrapper_refuses_what_is_no_stack():
    with pytest.raises(xattn.ConfigError, match="Decoder or an Encoder"):
        TransformerWrapper(num_tokens=29, max_seq_len=37, attn_layers=torch.nn.Linear(3, 3))


# torch's own tracer instantiates an autograd function, and warns itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("flags", [{"sliding_window": 9, "sink_logits": True, "kv_heads": 2}, {"attn_selective": True}])
def test_model_compiles_without_a_graph_break_and_agrees_with_eager(flags):
    ar, ids = AutoregressiveWrapper(model_of(rotary_pos_emb=True, depth=1, **flags)), ids_of()
    compiled = torch.compile(ar, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), ar(ids))


def test_a_compiled_model_makes_its_rotary_table_once():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    model, ids = model_of(rotary_pos_emb=True, depth=3), ids_of()
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids))
    # equal calls are one after the compiler's own pass over common subexpressions
    names = [str(node.target) for node in fx_graph_cse(graphs[0].graph).nodes]
    assert sum("xattn.rotary_table" in name for name in names) == 1
    assert not any("aten.cos" in name for name in names), "the compiler would repeat it in every kernel that turns a tensor"
