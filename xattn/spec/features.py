"""Features: what a spec asks of a back-end, as flag names, derived by comparing every field with its default.

A new field is therefore a new feature, and every back-end refuses it until it names it.
"""

import dataclasses
from typing import TYPE_CHECKING

from xattn.spec.part import FAMILIES

if TYPE_CHECKING:
    from xattn.spec.model import AttentionSpec


def features(spec: "AttentionSpec") -> frozenset[str]:
    """The flags that make this layer differ from plain multi-head attention, and 'causal' or 'bidirectional'."""
    found = {"causal" if spec.pattern.causal else "bidirectional"}
    for part in spec.parts():
        found |= {_name(cls) for cls in type(part).__mro__ if dataclasses.is_dataclass(cls)} - {None}
        found |= _changed(part) - {"causal"}
    # heads and dim_head are sizes, the families are asked above, and kv_heads counts only when they are shared
    found |= _changed(spec) - {"heads", "dim_head", "kv_heads", *FAMILIES, "pattern"}
    return frozenset(found | ({"kv_heads"} if spec.kv_heads != spec.heads else set()))


def _name(cls: type) -> str | None:
    """What a part's class adds to plain attention: its switch, nothing for what is always there, or its own name."""
    if "switch" not in cls.__dict__:
        return cls.__name__
    return cls.switch.name if cls.switch is not None else None


def _changed(holder: object) -> set[str]:
    """Fields that differ from their defaults, or have none."""
    return {f.name for f in dataclasses.fields(holder) if getattr(holder, f.name) != f.default}
