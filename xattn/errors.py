"""The errors a user can meet; every message says what was given, why it cannot be, and what would work."""

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A flag, or a combination of flags, that cannot be honoured."""


class UnsupportedFeature(ConfigError):
    """A back-end was named, or none was left, that can serve what the spec asks for."""


class ShapeError(ValueError):
    """Tensors whose sizes do not fit each other or the spec."""


class TokenError(ValueError):
    """Token ids or sequence lengths outside what the model was built for."""


class CheckpointError(ValueError):
    """A checkpoint that is corrupt, foreign, or does not fit the flags."""


class FlagWarning(UserWarning):
    """A flag that is honoured, though the weights were not trained with it."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown name, with the nearest known ones."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return f"unknown {what} '{name}'; {hint}"
