"""What a part is: a frozen dataclass in one of attention's stages, switched on by a gate flag; and the registry of them.

A part's fields are flags: the field's name is the flag's name, so the two are written once.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from xattn.errors import ConfigError

FAMILIES = ("positions", "score", "selection", "normaliser")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag: its name, type, default, what it does, and what it depends on.

    gate: the flag without which this one has no effect. inference: meant to be switched on for trained weights.
    per_layer: a list gives one value a layer. words: accepted instead of a number. aliases: other accepted spellings.
    """

    name: str
    type: type
    default: Any
    help: str
    gate: str | None = None
    inference: bool = False
    per_layer: bool = True
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


def flag(kind: type, default: Any, help: str, **more: Any) -> Any:
    """A dataclass field that is a flag; `more` are further fields of `Flag`."""
    return field(default=default, metadata={"flag": {"type": kind, "help": help, **more}})


def flags_of(cls: type) -> dict[str, Flag]:
    """The flags that a dataclass declares, by name."""
    return {
        f.name: Flag(name=f.name, default=f.default, **f.metadata["flag"])
        for f in dataclasses.fields(cls)
        if "flag" in f.metadata
    }


class Part:
    """Base of all parts. `switch` is the flag that puts the part into a layer: one of its fields, or a bool of its own.

    None is for what is always there; a subclass that does not say is a feature under its class's name.
    """

    family: ClassVar[str]
    switch: ClassVar[Flag | None] = None


PARTS: dict[str, list[type[Part]]] = {family: [] for family in FAMILIES}


def part(*, switch: str | Flag) -> Callable[[type[Part]], type[Part]]:
    """Class decorator: freezes the part, and registers it under its family so that its flags exist everywhere.

    Args:
        switch: the name of the field whose presence switches the part on, or a bool `Flag` of its own.
    """

    def register(cls: type[Part]) -> type[Part]:
        cls = dataclass(frozen=True, kw_only=True)(cls)
        cls.switch = flags_of(cls)[switch] if isinstance(switch, str) else switch
        PARTS[cls.family].append(cls)
        return cls

    return register


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)
