"""Flags: the one road from keyword arguments, YAML or a saved JSON to a spec, and back.

The table is read off the dataclasses; a flag exists because a field declares it.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from xattn.errors import ConfigError, FlagWarning, unknown
from xattn.spec.model import AttentionSpec, BlockSpec, FeedForwardSpec, LayersSpec, ModelSpec
from xattn.spec.part import PARTS, Flag, Part, flags_of, require
from xattn.spec.pattern import Pattern
from xattn.spec.positions import AUTO

SPELLINGS = {
    "depth": Flag(name="depth", type=int, default=None, help="number of layers", per_layer=False),
    "window_pattern": Flag(
        name="window_pattern",
        type=str,
        default=None,
        help="which layers keep the sliding_window: L local, G global, repeated over depth, as in 'LLLG'",
        gate="sliding_window",
        per_layer=False,
    ),
    "attn_backend": Flag(
        name="attn_backend",
        type=str,
        default="auto",
        help="who computes attention: auto, or the name of a back-end",
        per_layer=False,
        inference=True,
    ),
}
MODEL_ONLY = tuple(flags_of(ModelSpec))
# flags that hold the trained length, and the value of which flag asks for it
TRAINED_LEN = {"rope_original_len": ("rope_scaling", "yarn"), "self_extend_trained_len": ("self_extend_group", AUTO)}
REQUIRED = ("dim", "depth", "num_tokens", "max_seq_len")


def flag_table() -> dict[str, Flag]:
    """Every flag by name: model and stack first, then attention stage by stage, then feed-forward."""
    table = {**flags_of(ModelSpec), **{n: f for n, f in flags_of(LayersSpec).items() if n == "dim"}, **SPELLINGS}
    table |= flags_of(AttentionSpec)
    for parts in PARTS.values():
        for cls in parts:
            table[cls.switch.name] = cls.switch
            table |= flags_of(cls)
    table |= flags_of(Pattern) | flags_of(BlockSpec) | flags_of(FeedForwardSpec) | flags_of(LayersSpec)
    return table


def parse(flags: Mapping[str, Any]) -> ModelSpec:
    """A whole model from one flat mapping of flags; None means not given.

    Raises:
        ConfigError: unknown or doubled flag, wrong type, a flag without effect, or parts that do not fit each other.
    """
    given = canonical(flags)
    given.pop("attn_backend", None)
    causal = given.pop("causal", True)
    model = {name: given.pop(name) for name in MODEL_ONLY if name in given}
    for name in ("num_tokens", "max_seq_len"):
        require(name in model, f"{name} is missing; a model needs {', '.join(REQUIRED)}")
    _give_trained_len(given, model["max_seq_len"])
    return ModelSpec(layers=parse_layers(given, causal=causal), **model)


def _give_trained_len(given: dict[str, Any], trained: int) -> None:
    """Fills in the trained length, which a whole model knows, for the flags that are defined by it, where it is not given."""
    for name, (switch, word) in TRAINED_LEN.items():
        values = given.get(switch)
        if word in _listed(values) and name not in given:
            given[name] = [trained if v == word else None for v in values] if isinstance(values, list) else trained


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def parse_layers(flags: Mapping[str, Any], *, causal: bool) -> LayersSpec:
    """A stack of layers from the flags of `Decoder` (causal) or `Encoder`. Raises as `parse` does."""
    given = canonical(flags)
    stray = sorted({"causal", "attn_backend", *MODEL_ONLY} & set(given))
    where = "causal is chosen by Decoder or Encoder, the rest by TransformerWrapper"
    require(not stray, f"{', '.join(stray)} is no flag of a stack; {where}")
    for name in ("dim", "depth"):
        require(name in given, f"{name} is missing; a stack needs dim and depth")
    require(given["depth"] >= 1, f"depth={given['depth']} must be at least 1")
    rows = per_layer(given)
    own = {name: given[name] for name in flags_of(LayersSpec) if name in given}
    return LayersSpec(blocks=tuple(_block(row, dim=given["dim"], causal=causal) for row in rows), **own)


def parse_attention(*, causal: bool = True, **flags: Any) -> AttentionSpec:
    """One attention layer from its flags; dim_head is needed, and heads defaults to 8."""
    given = canonical(flags)
    known = {*flags_of(AttentionSpec), *flags_of(Pattern), *(n for ps in PARTS.values() for c in ps for n in _names(c))}
    stray = sorted(set(given) - known)
    require(not stray, f"{', '.join(stray)} is no flag of a single attention layer")
    return _attention(per_layer({**given, "depth": 1})[0], causal=causal)


def canonical(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags under their own names with checked types; what is None is dropped."""
    table = flag_table()
    names = {alias: flag.name for flag in table.values() for alias in flag.aliases} | {name: name for name in table}
    given: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for spelling, value in flags.items():
        if spelling not in names:
            raise ConfigError(unknown("flag", spelling, names))
        if value is None:
            continue
        name = names[spelling]
        require(name not in given, f"{spelled.get(name)} and {spelling} are the same flag; give one")
        given[name], spelled[name] = _typed(table[name], value), spelling
    return given


def _typed(flag: Flag, value: Any, depth: int = 0) -> Any:
    """The value, checked against the flag's type; lists are checked entry by entry and become lists."""
    if isinstance(value, (list, tuple)) or (hasattr(value, "__iter__") and not isinstance(value, (str, Mapping))):
        require(flag.per_layer, f"{flag.name}={list(value)} cannot differ by layer; give one value")
        require(depth == 0, f"{flag.name} holds a list within a list; a list gives one value a layer")
        return [None if v is None else _typed(flag, v, depth=1) for v in value]
    if flag.words and isinstance(value, str):
        if value not in flag.words:
            raise ConfigError(unknown(flag.name, value, flag.words))
        return value
    kinds = {int: int, float: (int, float), bool: bool, str: str}[flag.type]
    right = isinstance(value, kinds) and (flag.type is bool or not isinstance(value, bool))
    require(right, f"{flag.name}={value!r} is a {type(value).__name__}; it must be {flag.type.__name__}: {flag.help}")
    if flag.choices and value not in flag.choices:
        raise ConfigError(unknown(flag.name, value, flag.choices))
    return float(value) if flag.type is float else value


def on(value: Any) -> bool:
    """Whether a switch given this value is on."""
    return value is not None and value is not False


def per_layer(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One dict of flags a layer: lists dealt out, the window pattern applied, flags without effect refused."""
    table, depth = flag_table(), given["depth"]
    given = {**given, **_windows(given)}
    for name, value in given.items():
        if isinstance(value, list):
            require(
                len(value) == depth,
                f"{name} has {len(value)} entries for depth={depth}; a list gives one value a layer",
            )
    rows = [
        {name: value[i] if isinstance(value, list) else value for name, value in given.items()} for i in range(depth)
    ]
    for name, value in given.items():
        gate = table[name].gate
        if gate is None or name == "window_pattern":
            continue
        dead = [i for i, row in enumerate(rows) if on(row.get(name)) and not on(row.get(gate))]
        if isinstance(value, list) and dead:
            raise ConfigError(_no_effect(name, value[dead[0]], gate, given, f" in layer {dead[0]}"))
        if len(dead) == depth:
            raise ConfigError(_no_effect(name, value, gate, given, ""))
    # a scalar reaches the layers whose gate is on, and only those; switching one gate off may switch off the next
    for row in rows:
        while closed := [n for n in row if table[n].gate and n != "window_pattern" and not on(row.get(table[n].gate))]:
            for name in closed:
                del row[name]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _windows(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sliding_window of each layer when a window_pattern says which layers keep it."""
    pattern, window = given.get("window_pattern"), given.get("sliding_window")
    if pattern is None:
        return {}
    require(
        pattern != "" and set(pattern) <= {"L", "G"},
        f"window_pattern={pattern!r} must be made of L (local) and G (global), as in 'LLLG'",
    )
    require(window is not None, _no_effect("window_pattern", pattern, "sliding_window", given, ""))
    require(not isinstance(window, list), "window_pattern and a sliding_window list both choose layers; give one")
    letters = [pattern[i % len(pattern)] for i in range(given["depth"])]
    require(
        "L" in letters,
        f"sliding_window={window} has no effect: window_pattern={pattern!r} makes all {given['depth']} layers global",
    )
    return {"sliding_window": [window if letter == "L" else None for letter in letters]}


def _no_effect(name: str, value: Any, gate: str, given: Mapping[str, Any], where: str) -> str:
    state = "is not given" if given.get(gate) is None or isinstance(given[gate], list) else f"is {given[gate]}"
    return f"{name}={value} has no effect{where}: {gate} {state}; set {gate} or drop {name}"


def _names(cls: type[Part]) -> set[str]:
    return {cls.switch.name, *flags_of(cls)} if cls.switch else set(flags_of(cls))


def _build(cls: type, row: Mapping[str, Any], **more: Any) -> Any:
    return cls(**{name: row[name] for name in flags_of(cls) if name in row and name not in more}, **more)


def _stage(family: str, row: Mapping[str, Any]) -> list[Part]:
    """The parts of one family that the row switches on; a part that extends another stands for both."""
    chosen = [cls for cls in PARTS[family] if on(row.get(cls.switch.name))]
    chosen = [cls for cls in chosen if not any(other is not cls and issubclass(other, cls) for other in chosen)]
    names = [cls.switch.name for cls in chosen]
    require(family == "score" or len(chosen) <= 1, f"{' and '.join(names)} both define {family}; keep one")
    return [_build(cls, row) for cls in chosen]


def _attention(row: Mapping[str, Any], *, causal: bool) -> AttentionSpec:
    stages = {family: _stage(family, row) for family in PARTS}
    single = {family: parts[0] for family, parts in stages.items() if parts and family != "score"}
    pattern = _build(Pattern, row, causal=causal)
    return _build(AttentionSpec, row, score=tuple(stages["score"]), pattern=pattern, **single)


def _block(row: Mapping[str, Any], *, dim: int, causal: bool) -> BlockSpec:
    if "dim_head" not in row:
        heads = row.get("heads", AttentionSpec.heads)
        require(heads >= 1, f"heads={heads} must be at least 1")
        require(
            dim % heads == 0, f"dim={dim} is not a multiple of heads={heads}; change one, or give dim_head"
        )
        row = {**row, "dim_head": dim // heads}
    attention = _attention(row, causal=causal)
    return _build(BlockSpec, row, attention=attention, feedforward=_build(FeedForwardSpec, row))


def layer_flags(block: BlockSpec) -> dict[str, Any]:
    """The flags of one layer that differ from their defaults; sizes that follow from others are always there."""
    holders = [block, block.attention, *block.attention.parts(), block.feedforward]
    found: dict[str, Any] = {}
    for holder in holders:
        if isinstance(holder, Part) and holder.switch is not None:
            for cls in type(holder).__mro__:
                switch = cls.__dict__.get("switch")
                if switch is not None and switch.type is bool:
                    found[switch.name] = True
        for name, flag in flags_of(type(holder)).items():
            value = getattr(holder, name)
            if value != flag.default:
                found[name] = value
    found.pop("causal", None)
    if found["kv_heads"] == block.attention.heads:
        del found["kv_heads"]
    found["heads"] = block.attention.heads
    return {name: found[name] for name in flag_table() if name in found}


def to_flags(spec: ModelSpec | LayersSpec) -> dict[str, Any]:
    """Flags from a spec, JSON-able, such that parsing them gives the spec again; per-layer lists only where layers differ."""
    layers = spec.layers if isinstance(spec, ModelSpec) else spec
    table = flag_table()
    flags: dict[str, Any] = {"dim": layers.dim, "depth": len(layers.blocks)}
    if isinstance(spec, ModelSpec):
        flags = {name: getattr(spec, name) for name in MODEL_ONLY if getattr(spec, name) != table[name].default} | flags
        if not layers.causal:
            flags["causal"] = False
    rows = [layer_flags(block) for block in layers.blocks]
    for name in dict.fromkeys(name for row in rows for name in row):
        flag = table[name]
        # None where the gate is off, as a list must say it
        values = [row.get(name, flag.default) if flag.gate is None or on(row.get(flag.gate)) else None for row in rows]
        reached = [v for v, row in zip(values, rows, strict=True) if flag.gate is None or on(row.get(flag.gate))]
        flags[name] = reached[0] if all(v == reached[0] for v in reached) else values
    flags |= {name: getattr(layers, name) for name, f in flags_of(LayersSpec).items() if getattr(layers, name) != f.default}
    return flags


def merge(spec: ModelSpec, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a trained spec with some overridden; None takes one away.

    Warns with `FlagWarning`, by name, about flags that change what the weights were trained for, unless they are meant
    for inference: a window switched on afterwards, say, costs quality.
    """
    trained = to_flags(spec)
    table = flag_table()
    names = {alias: flag.name for flag in table.values() for alias in flag.aliases}
    dropped = {names.get(name, name) for name, value in overrides.items() if value is None}
    canonical(dict.fromkeys(overrides))
    given = canonical(overrides)
    # the length that the weights know, whatever max_seq_len becomes; it goes when a new value of its switch has no use for it
    known = [n for name in TRAINED_LEN for n in _listed(trained.get(name)) if n is not None]
    _give_trained_len(given, known[0] if known else spec.max_seq_len)
    stale = {name for name, (switch, _) in TRAINED_LEN.items() if switch in given and name not in given}
    kept = {name: value for name, value in trained.items() if name not in stale}
    merged = {name: value for name, value in {**kept, **given}.items() if name not in dropped}
    # a flag that came with the weights goes when its gate goes
    while closed := [n for n in merged if n not in given and table[n].gate and not on(merged.get(table[n].gate))]:
        for name in closed:
            del merged[name]
    changed = {
        name: (merged.get(name, table[name].default), trained.get(name, table[name].default))
        for name in (*given, *dropped)
        if not table[name].inference
    }
    foreign = [f"{name}={now} (trained with {then})" for name, (now, then) in changed.items() if now != then]
    if foreign:
        warnings.warn(
            f"the weights were not trained with {', '.join(foreign)}; expect worse predictions", FlagWarning, stacklevel=3
        )
    return merged
