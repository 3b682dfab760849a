"""Features: what a spec asks of a back-end, as flag names, derived by comparing every field with its default.

A new field is therefore a new feature, and every back-end refuses it until it names it.
"""

from typing import TYPE_CHECKING

from xattn.spec.part import flags_of

if TYPE_CHECKING:
    from xattn.spec.model import AttentionSpec


def features(spec: "AttentionSpec") -> frozenset[str]:
    """The flags that make this layer differ from plain multi-head attention, and 'causal' or 'bidirectional'."""
    found = {"causal" if spec.pattern.causal else "bidirectional"}
    for part in spec.parts():
        for cls in type(part).__mro__:
            switch = cls.__dict__.get("switch")
            if switch is not None:
                found.add(switch.name)
        found |= {name for name, flag in flags_of(type(part)).items() if getattr(part, name) != flag.default}
    found.discard("causal" if not spec.pattern.causal else "bidirectional")
    if spec.kv_heads != spec.heads:
        found.add("kv_heads")
    if spec.attn_dropout:
        found.add("attn_dropout")
    return frozenset(found)
