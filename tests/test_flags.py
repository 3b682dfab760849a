"""Flags: everything said is honoured or refused by name, and a spec survives the trip to flags and back."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xattn.errors import ConfigError
from xattn.spec.features import features
from xattn.spec.flags import flag_table, parse, parse_attention, parse_layers, to_flags
from xattn.spec.model import AttentionSpec, BlockSpec, ModelSpec
from xattn.spec.part import PARTS, flags_of
from xattn.spec.positions import NoPositions, Rope, SelfExtend
from xattn.spec.score import Alibi, Softcap

MODEL = {"num_tokens": 259, "max_seq_len": 128, "dim": 48, "depth": 3, "heads": 6}


def model(**flags: Any) -> ModelSpec:
    """A small model with these flags."""
    return parse(MODEL | flags)


def layers(**flags: Any) -> list[AttentionSpec]:
    """The attention layers of a small model."""
    return [block.attention for block in model(**flags).layers.blocks]


# Bad input

BAD = {
    # unknown and doubled
    "typo": ({"sliding_windw": 8}, ["sliding_windw", "did you mean", "sliding_window"]),
    "typo_of_alias": ({"attn_sliding_windw": 8}, ["attn_sliding_windw", "attn_sliding_window"]),
    "unheard_of": ({"zzz": 1}, ["zzz", "known:", "heads"]),
    "alias_and_name": ({"sliding_window": 8, "attn_sliding_window": 8}, ["sliding_window", "attn_sliding_window"]),
    "missing_tokens": ({"num_tokens": None}, ["num_tokens", "missing"]),
    "missing_length": ({"max_seq_len": None}, ["max_seq_len", "missing"]),
    "missing_dim": ({"dim": None}, ["dim", "missing"]),
    "missing_depth": ({"depth": None}, ["depth", "missing"]),
    # types
    "window_is_text": ({"sliding_window": "8"}, ["sliding_window", "'8'", "str", "int"]),
    "window_is_float": ({"sliding_window": 8.0}, ["sliding_window", "8.0", "float", "int"]),
    "window_is_bool": ({"sliding_window": True}, ["sliding_window", "True", "bool", "int"]),
    "bool_is_int": ({"attn_selective": 1}, ["attn_selective", "1", "int", "bool"]),
    "bool_is_text": ({"rotary_pos_emb": "false"}, ["rotary_pos_emb", "'false'", "str", "bool"]),
    "float_is_bool": ({"logit_softcap": True}, ["logit_softcap", "True", "bool", "float"]),
    "mapping": ({"sliding_window": {"layer": 8}}, ["sliding_window", "dict", "int"]),
    "text_in_list": ({"sliding_window": [8, "x", None]}, ["sliding_window", "'x'", "int"]),
    "nested_list": ({"sliding_window": [[8], None, None]}, ["sliding_window"]),
    # values
    "no_heads": ({"heads": 0}, ["heads=0", "at least 1"]),
    "kv_heads": ({"kv_heads": 4}, ["heads=6", "kv_heads=4", "(1, 2, 3, 6)"]),
    "kv_heads_none": ({"kv_heads": 0}, ["kv_heads=0", "(1, 2, 3, 6)"]),
    "kv_heads_above": ({"kv_heads": 12}, ["kv_heads=12", "(1, 2, 3, 6)"]),
    "uneven_dim": ({"dim": 50}, ["dim=50", "heads=6", "dim_head"]),
    "dim_head": ({"dim_head": 0}, ["dim_head=0", "at least 1"]),
    "no_dim": ({"dim": 0, "dim_head": 8}, ["dim=0", "at least 1"]),
    "no_depth": ({"depth": 0}, ["depth=0", "at least 1"]),
    "no_tokens": ({"num_tokens": 0}, ["num_tokens=0", "at least 1"]),
    "no_length": ({"max_seq_len": 0}, ["max_seq_len=0", "at least 1"]),
    "window_zero": ({"sliding_window": 0}, ["sliding_window=0", "at least 1", "self included", "leave it out"]),
    "window_negative": ({"sliding_window": -1}, ["sliding_window=-1", "at least 1"]),
    "sinks_negative": ({"sliding_window": 8, "sink_tokens": -1}, ["sink_tokens=-1", "at least 0"]),
    "dropout_one": ({"attn_dropout": 1.0}, ["attn_dropout=1.0", "[0, 1)"]),
    "dropout_negative": ({"attn_dropout": -0.1}, ["attn_dropout=-0.1", "[0, 1)"]),
    "dropout_nan": ({"attn_dropout": float("nan")}, ["attn_dropout", "[0, 1)"]),
    "emb_dropout": ({"emb_dropout": 1.0}, ["emb_dropout=1.0", "[0, 1)"]),
    "ff_dropout": ({"ff_dropout": 2.0}, ["ff_dropout=2.0", "[0, 1)"]),
    "ff_mult": ({"ff_mult": 0.0}, ["ff_mult=0.0", "above 0"]),
    "ff_mult_leaves_nothing": ({"ff_mult": 0.001}, ["ff_mult=0.001"]),
    "ff_mult_infinite": ({"ff_mult": float("inf")}, ["ff_mult=inf"]),
    "softcap_zero": ({"logit_softcap": 0.0}, ["logit_softcap=0.0", "above 0"]),
    "softcap_negative": ({"logit_softcap": -5}, ["logit_softcap=-5", "above 0"]),
    "softcap_nan": ({"logit_softcap": float("nan")}, ["logit_softcap=nan"]),
    "softcap_infinite": ({"logit_softcap": float("inf")}, ["logit_softcap=inf"]),
    "sim_head_above": ({"attn_selective": True, "sim_head": 6}, ["sim_head=6", "0 to 5"]),
    "sim_head_negative": ({"attn_selective": True, "sim_head": -1}, ["sim_head=-1", "at least 0"]),
    "rotary_base": ({"rotary_pos_emb": True, "rotary_base": 1.0}, ["rotary_base=1.0", "above 1"]),
    "rotary_base_infinite": ({"rotary_pos_emb": True, "rotary_base": float("inf")}, ["rotary_base=inf"]),
    "rotary_dim_odd": ({"rotary_pos_emb": True, "rotary_emb_dim": 3}, ["rotary_emb_dim=3", "even"]),
    "rotary_dim_zero": ({"rotary_pos_emb": True, "rotary_emb_dim": 0}, ["rotary_emb_dim=0", "at least 2"]),
    "rotary_dim_wide": ({"rotary_pos_emb": True, "rotary_emb_dim": 10}, ["rotary_emb_dim=10", "dim_head=8"]),
    "rotary_odd_head": ({"rotary_pos_emb": True, "dim_head": 7}, ["rotary_pos_emb", "dim_head=7", "rotary_emb_dim"]),
    "scaling_unknown": (
        {"rotary_pos_emb": True, "rope_scaling": "yarm", "rope_scaling_factor": 2.0},
        ["rope_scaling", "yarm", "did you mean yarn"],
    ),
    "scaling_no_factor": ({"rotary_pos_emb": True, "rope_scaling": "ntk"}, ["rope_scaling=ntk", "rope_scaling_factor"]),
    "scaling_shrinks": (
        {"rotary_pos_emb": True, "rope_scaling": "ntk", "rope_scaling_factor": 0.5},
        ["rope_scaling_factor=0.5", "at least 1"],
    ),
    "scaling_infinite": (
        {"rotary_pos_emb": True, "rope_scaling": "linear", "rope_scaling_factor": float("inf")},
        ["rope_scaling_factor=inf"],
    ),
    "length_of_linear": (
        {"rotary_pos_emb": True, "rope_scaling": "linear", "rope_scaling_factor": 2.0, "rope_original_len": 64},
        ["rope_original_len=64", "no effect", "linear"],
    ),
    "group_zero": (
        {"rotary_pos_emb": True, "self_extend_group": 0, "self_extend_window": 4},
        ["self_extend_group=0", "at least 1"],
    ),
    "group_alone_near": (
        {"rotary_pos_emb": True, "self_extend_group": 2},
        ["self_extend_group=2", "self_extend_window"],
    ),
    "group_window_zero": (
        {"rotary_pos_emb": True, "self_extend_group": 2, "self_extend_window": 0},
        ["self_extend_window=0", "at least 1"],
    ),
    # without effect
    "sim_head_alone": ({"sim_head": 2}, ["sim_head=2", "no effect", "attn_selective"]),
    "sim_head_off": ({"sim_head": 2, "attn_selective": False}, ["sim_head=2", "attn_selective is False"]),
    "sinks_alone": ({"sink_tokens": 4}, ["sink_tokens=4", "no effect", "sliding_window"]),
    "base_alone": ({"rotary_base": 500.0}, ["rotary_base=500.0", "no effect", "rotary_pos_emb"]),
    "width_alone": ({"rotary_emb_dim": 4}, ["rotary_emb_dim=4", "no effect", "rotary_pos_emb"]),
    "scaling_alone": ({"rope_scaling": "ntk", "rope_scaling_factor": 2.0}, ["no effect", "rotary_pos_emb"]),
    "factor_alone": ({"rotary_pos_emb": True, "rope_scaling_factor": 2.0}, ["rope_scaling_factor=2.0", "rope_scaling"]),
    "group_alone": ({"self_extend_group": 2, "self_extend_window": 4}, ["no effect", "rotary_pos_emb"]),
    "near_alone": ({"rotary_pos_emb": True, "self_extend_window": 4}, ["self_extend_window=4", "self_extend_group"]),
    "self_extend_in_window": (
        {"rotary_pos_emb": True, "self_extend_group": 2, "self_extend_window": 8, "sliding_window": 8},
        ["self_extend_group=2", "self_extend_window=8", "sliding_window=8", "no effect"],
    ),
    "pattern_alone": ({"window_pattern": "LG"}, ["window_pattern=LG", "no effect", "sliding_window"]),
    "pattern_all_global": ({"window_pattern": "G", "sliding_window": 8}, ["sliding_window=8", "no effect", "global"]),
    "pattern_beyond_depth": (
        {"window_pattern": "GGGL", "sliding_window": 8},
        ["sliding_window=8", "no effect", "3 layers"],
    ),
    "gated_list_off": (
        {"attn_selective": [True, False, True], "sim_head": [1, 2, 1]},
        ["sim_head=2", "no effect", "layer 1", "attn_selective"],
    ),
    # between parts
    "selective_encoder": ({"causal": False, "attn_selective": True}, ["attn_selective", "causal"]),
    "two_activations": ({"ff_swish": True, "ff_relu_squared": True}, ["ff_swish", "ff_relu_squared"]),
    "sandwich_post_norm": ({"sandwich_norm": True, "pre_norm": False}, ["sandwich_norm", "pre_norm"]),
    # lists and patterns
    "short_list": ({"sliding_window": [8, None]}, ["sliding_window", "2 entries", "depth=3"]),
    "long_list": ({"heads": [6, 6, 6, 6]}, ["heads", "4 entries", "depth=3"]),
    "list_of_model": ({"num_tokens": [259, 259, 259]}, ["num_tokens", "cannot differ by layer"]),
    "list_of_dim": ({"dim": [48, 48, 48]}, ["dim", "cannot differ by layer"]),
    "list_of_causal": ({"causal": [True, True, False]}, ["causal", "cannot differ by layer"]),
    "pattern_letters": ({"window_pattern": "LX", "sliding_window": 8}, ["window_pattern", "'LX'", "L", "G"]),
    "pattern_empty": ({"window_pattern": "", "sliding_window": 8}, ["window_pattern", "L", "G"]),
    "pattern_and_list": (
        {"window_pattern": "LG", "sliding_window": [8, None, 8]}, ["window_pattern", "sliding_window", "list"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name_with_what_would_work(name: str) -> None:
    flags, words = BAD[name]
    with pytest.raises(ConfigError) as caught:
        model(**flags)
    told = str(caught.value)
    assert all(word in told for word in words), told


def test_a_single_layer_refuses_flags_of_the_model() -> None:
    for name, value in {"num_tokens": 5, "ff_mult": 2.0, "window_pattern": "LG", "qk_rmsnorm": True}.items():
        with pytest.raises(ConfigError, match=name):
            parse_attention(heads=6, dim_head=8, **{name: value})
    with pytest.raises(ConfigError, match="dim_head"):
        parse_attention(heads=6)


@pytest.mark.parametrize("name", ["causal", "num_tokens", "max_seq_len", "tie_embedding", "attn_backend"])
def test_a_stack_refuses_flags_of_the_model(name: str) -> None:
    value = {"causal": False, "tie_embedding": True, "attn_backend": "sdpa"}.get(name, 5)
    with pytest.raises(ConfigError, match=name):
        parse_layers({"dim": 48, "depth": 2, name: value}, causal=True)


def test_yarn_on_one_layer_asks_for_the_trained_length() -> None:
    flags = {"heads": 6, "dim_head": 8, "rotary_pos_emb": True, "rope_scaling": "yarn", "rope_scaling_factor": 2.0}
    with pytest.raises(ConfigError, match="rope_original_len"):
        parse_attention(**flags)


# Good input


def test_none_means_not_given() -> None:
    assert model(sliding_window=None, sim_head=None, attn_selective=None, window_pattern=None) == model()


def test_every_alias_is_its_flag() -> None:
    values = {"logit_softcap": 5.0, "sliding_window": 8, "sink_tokens": 2, "sim_head": 3, "sink_logits": True,
              "heads": 6, "kv_heads": 2, "dim_head": 16, "qk_rmsnorm": True, "selection_skip": 20.0}  # fmt: skip
    needs = {"sink_tokens": {"sliding_window": 8}, "sim_head": {"attn_selective": True},
             "selection_skip": {"attn_selective": True}}  # fmt: skip
    aliased = {name: flag.aliases for name, flag in flag_table().items() if flag.aliases}
    assert aliased.keys() <= values.keys(), "an alias without a value here"
    for name, aliases in aliased.items():
        want = model(**needs.get(name, {}), **{name: values[name]})
        assert want != model(**needs.get(name, {})) or name == "heads"
        for alias in aliases:
            base = {key: value for key, value in MODEL.items() if key != name}
            assert parse(base | needs.get(name, {}) | {alias: values[name]}) == want


def test_the_brief_spellings_exist() -> None:
    assert {"attn_selective", "sim_head", "sliding_window", "self_extend_group"} <= flag_table().keys()


def test_parts_stand_where_their_flags_put_them() -> None:
    (layer, *_) = layers(
        rotary_pos_emb=True, rotary_base=500.0, logit_softcap=30, alibi_pos_bias=True, sliding_window=8, sink_tokens=1,
        attn_selective=True, sim_head=3, sink_logits=True, kv_heads=2,
    )  # fmt: skip
    assert type(layer.positions) is Rope and layer.positions.rotary_base == 500.0
    assert layer.score == (Softcap(logit_softcap=30.0), Alibi())
    assert (layer.pattern.causal, layer.pattern.sliding_window, layer.pattern.sink_tokens) == (True, 8, 1)
    assert layer.selection.sim_head == 3 and layer.sink_logits and layer.kv_heads == 2
    (layer, *_) = layers(rotary_pos_emb=True, self_extend_group=2, self_extend_window=4, causal=False)
    assert type(layer.positions) is SelfExtend and not layer.pattern.causal
    (layer, *_) = layers()
    assert type(layer.positions) is NoPositions and layer.selection is None and layer.score == () and not layer.sink_logits


def test_a_window_pattern_repeats_over_the_depth() -> None:
    windows = [layer.pattern.sliding_window for layer in layers(depth=7, sliding_window=8, window_pattern="LLG")]
    assert windows == [8, 8, None, 8, 8, None, 8]
    sinks = [layer.pattern.sink_tokens for layer in layers(sliding_window=8, window_pattern="LG", sink_tokens=2)]
    assert sinks == [2, 0, 2], "a scalar reaches the layers whose gate is on"


def test_a_window_pattern_is_the_list_it_spells() -> None:
    assert model(sliding_window=8, window_pattern="LG") == model(sliding_window=[8, None, 8])


def test_a_list_gives_one_value_a_layer() -> None:
    got = layers(attn_selective=[True, False, True], sim_head=[3, None, 0], kv_heads=[6, 2, 1], logit_softcap=[5, None, 7])
    assert [layer.selection and layer.selection.sim_head for layer in got] == [3, None, 0]
    assert [layer.kv_heads for layer in got] == [6, 2, 1]
    assert [layer.score[0].logit_softcap if layer.score else None for layer in got] == [5.0, None, 7.0]
    assert layers(sliding_window=(8, None, 8)) == layers(sliding_window=[8, None, 8])


def test_yarn_takes_the_models_length() -> None:
    flags = {"rotary_pos_emb": True, "rope_scaling": "yarn", "rope_scaling_factor": 2.0}
    assert layers(**flags)[0].positions.rope_original_len == 128
    assert layers(**flags, rope_original_len=64)[0].positions.rope_original_len == 64
    mixed = layers(**flags | {"rope_scaling": ["yarn", "ntk", None], "rope_scaling_factor": [2.0, 2.0, None]})
    assert [layer.positions.rope_original_len for layer in mixed] == [128, None, None]


def test_positions_are_learned_only_where_nothing_else_orders_tokens() -> None:
    assert model().use_abs_pos_emb and not model(rotary_pos_emb=True).use_abs_pos_emb
    assert not model(alibi_pos_bias=True).use_abs_pos_emb
    assert not model(rotary_pos_emb=True, self_extend_group=2, self_extend_window=4).use_abs_pos_emb
    assert not model(use_abs_pos_emb=False).use_abs_pos_emb
    assert model(rotary_pos_emb=True, use_abs_pos_emb=True).use_abs_pos_emb


def test_flags_say_nothing_about_defaults() -> None:
    assert to_flags(model()).keys() == {
        "num_tokens",
        "max_seq_len",
        "dim",
        "depth",
        "heads",
        "dim_head",
        "use_abs_pos_emb",
    }


def test_every_part_is_built_on_flags_of_the_table() -> None:
    table = flag_table()
    for parts in PARTS.values():
        for cls in parts:
            assert {cls.switch.name, *flags_of(cls)} <= table.keys()
    for name, flag in table.items():
        assert flag.name == name and flag.help
        assert flag.gate is None or flag.gate in table


# Round trip


@st.composite
def layer_flags(draw: st.DrawFn, causal: bool) -> dict[str, Any]:
    """Flags of one valid layer of a model 48 wide, only those that are given."""

    def maybe(values: st.SearchStrategy, chance: int = 3) -> Any:
        return draw(values) if draw(st.integers(1, chance)) == 1 else None

    f: dict[str, Any] = {"heads": maybe(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))}
    heads = f["heads"] or 8
    if 48 % heads == 0:
        f["dim_head"] = maybe(st.sampled_from([4, 7, 16]))
    dim_head = f["dim_head"] or 48 // heads
    f["kv_heads"] = maybe(st.sampled_from([g for g in range(1, heads + 1) if heads % g == 0]), 2)
    f["attn_dropout"] = maybe(st.sampled_from([0.0, 0.1, 0.5]))
    f["sliding_window"] = maybe(st.sampled_from([6, 8, 100]), 2)
    if f["sliding_window"] is not None:
        f["sink_tokens"] = maybe(st.sampled_from([0, 1, 4]), 2)
    f["logit_softcap"] = maybe(st.sampled_from([5.0, 50.0, 30]))
    f["alibi_pos_bias"] = maybe(st.booleans())
    f["sink_logits"] = maybe(st.booleans())
    if causal:
        f["attn_selective"] = maybe(st.booleans(), 2)
        if f["attn_selective"]:
            f["sim_head"] = maybe(st.integers(0, heads - 1), 2)
            f["selection_skip"] = maybe(st.sampled_from([20.0, 3, "bound"]), 2)
    f["rotary_pos_emb"] = maybe(st.booleans(), 2)
    if f["rotary_pos_emb"]:
        f["rotary_base"] = maybe(st.sampled_from([10000.0, 500.0, 1000000]))
        f["rotary_emb_dim"] = draw(st.sampled_from([2, 4])) if dim_head % 2 else maybe(st.sampled_from([2, 4]))
        f["rope_scaling"] = maybe(st.sampled_from(["linear", "ntk", "yarn"]), 2)
        if f["rope_scaling"] is not None:
            f["rope_scaling_factor"] = draw(st.sampled_from([1.0, 2.0, 8]))
            if f["rope_scaling"] == "yarn":
                f["rope_original_len"] = draw(st.sampled_from([64, 512]))
        # auto is inert in a window without sinks that shows no more than the trained length
        far = f["sliding_window"] is None or (f["rope_scaling"] is None and (f["sink_tokens"] or f["sliding_window"] == 100))
        f["self_extend_group"] = maybe(st.sampled_from([1, 2, 8, "auto"] if far else [1, 2, 8]), 2)
        if f["self_extend_group"] is not None:
            f["self_extend_window"] = draw(st.sampled_from([1, 4]))
        if f["self_extend_group"] == "auto":
            f["self_extend_trained_len"] = 16
            f["self_extend_window"] = maybe(st.just(f["self_extend_window"]))
    f["qk_rmsnorm"] = maybe(st.booleans())
    f["ff_mult"] = maybe(st.sampled_from([4.0, 2.0, 1]))
    f["ff_glu"] = maybe(st.booleans())
    activation = maybe(st.sampled_from(["ff_swish", "ff_relu_squared"]))
    if activation:
        f[activation] = True
    f["ff_dropout"] = maybe(st.sampled_from([0.0, 0.1]))
    f["ff_bias"] = maybe(st.booleans())
    return {name: value for name, value in f.items() if value is not None}


@st.composite
def model_flags(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Flags of a valid model, and what each of its layers was given."""
    causal = draw(st.booleans())
    kinds = draw(st.lists(layer_flags(causal), min_size=1, max_size=3))
    rows = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    flags: dict[str, Any] = {"num_tokens": 259, "max_seq_len": 128, "dim": 48, "depth": len(rows)}
    if not causal or draw(st.booleans()):
        flags["causal"] = causal
    table = flag_table()
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        alike = all(value == values[0] and type(value) is type(values[0]) for value in values)
        spelling = draw(st.sampled_from([name, *table[name].aliases]))
        kind = draw(st.sampled_from([list, tuple]))
        flags[spelling] = values[0] if alike and draw(st.booleans()) else kind(values)
    for name in ("use_rmsnorm", "sandwich_norm", "tie_embedding", "use_abs_pos_emb"):
        if draw(st.booleans()):
            flags[name] = draw(st.booleans())
    if not flags.get("sandwich_norm") and draw(st.booleans()):
        flags["pre_norm"] = draw(st.booleans())
    if draw(st.booleans()):
        flags["emb_dropout"] = draw(st.sampled_from([0.0, 0.2]))
    if any(row.get("attn_selective") for row in rows) and draw(st.booleans()):
        flags["memory_loss_weight"] = draw(st.sampled_from([0.1, 2]))
    return flags, rows


def said_by(block: BlockSpec) -> dict[str, Any]:
    """Every flag that a block holds, by name, read off its fields and the kinds of its parts."""
    found: dict[str, Any] = {}
    for holder in (block, block.attention, *block.attention.parts(), block.feedforward):
        found |= {f.name: getattr(holder, f.name) for f in dataclasses.fields(holder) if "flag" in f.metadata}
    for parts in PARTS.values():
        for cls in parts:
            if cls.switch.type is bool:
                found[cls.switch.name] = any(isinstance(held, cls) for held in block.attention.parts())
    return found


@given(model_flags())
def test_every_flag_given_is_held_by_its_layer_and_no_other_is(drawn: tuple[dict, list[dict]]) -> None:
    flags, rows = drawn
    spec, table = parse(flags), flag_table()
    for block, row in zip(spec.layers.blocks, rows, strict=True):
        held = said_by(block)
        want = {name: flag.default for name, flag in table.items()} | row
        want["heads"] = row.get("heads", 8)
        want["kv_heads"] = row.get("kv_heads", want["heads"])
        want["dim_head"] = row.get("dim_head", 48 // want["heads"])
        want["causal"] = flags.get("causal", True)
        if not row.get("rotary_pos_emb"):
            want["rotary_pos_emb"] = False
        for name, value in held.items():
            assert value == want[name], name
        assert set(row) <= set(held)


@given(model_flags())
def test_a_model_survives_the_trip_to_flags_and_back(drawn: tuple[dict, list[dict]]) -> None:
    spec = parse(drawn[0])
    flags = to_flags(spec)
    assert parse(json.loads(json.dumps(flags))) == spec
    assert to_flags(parse(flags)) == flags, "one spelling of a spec"


@given(model_flags())
def test_a_stack_survives_the_trip_to_flags_and_back(drawn: tuple[dict, list[dict]]) -> None:
    spec = parse(drawn[0]).layers
    assert parse_layers(json.loads(json.dumps(to_flags(spec))), causal=spec.causal) == spec


@given(model_flags())
def test_equal_specs_are_one_key_and_differing_flags_are_not(drawn: tuple[dict, list[dict]]) -> None:
    one, two = parse(drawn[0]), parse(dict(drawn[0]))
    assert one == two and hash(one) == hash(two)
    for block in one.layers.blocks:
        assert features(block.attention) <= set(flag_table()) | {"bidirectional"}


def test_round_trips_cover_every_flag() -> None:
    """A new flag needs a strategy above."""
    seen: set[str] = set()

    @settings(max_examples=300)
    @given(model_flags())
    def collect(drawn: tuple[dict, list[dict]]) -> None:
        seen.update(drawn[0], *drawn[1])

    collect()
    # window_pattern is a spelling of sliding_window, and attn_backend is no part of a spec
    assert set(flag_table()) - seen == {"window_pattern", "attn_backend"}


@pytest.mark.parametrize(
    "flags",
    [
        {"attn_selective": [True, True, False], "sim_head": [0, 2, None]},
        {"sliding_window": [8, 6, None], "sink_tokens": [0, 2, None]},
        {"rotary_pos_emb": [True, True, False], "rotary_base": [500.0, None, None]},
        {"rotary_pos_emb": True, "rope_scaling": ["yarn", None, "ntk"], "rope_scaling_factor": [2.0, None, 4.0]},
        {"rotary_pos_emb": True, "self_extend_group": [None, 2, 4], "self_extend_window": [None, 4, 2]},
        {"heads": [6, 8, 12], "kv_heads": [1, 8, 3]},
        {"heads": [6, 8, 12], "dim_head": 8},
        {"logit_softcap": [None, None, 5.0], "alibi_pos_bias": [False, True, False]},
        {"ff_glu": [True, False, False], "ff_dropout": [0.0, 0.1, 0.0]},
    ],
    ids=str,
)
def test_layers_that_differ_survive_the_trip(flags: dict[str, Any]) -> None:
    spec = model(**flags)
    assert parse(json.loads(json.dumps(to_flags(spec)))) == spec
