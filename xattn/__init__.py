"""xattn: build Transformers from attention flags, train them small, and see what each flag costs and buys."""

from xattn import accounting
from xattn.checkpoint import load, save
from xattn.errors import (
    CheckpointError,
    ConfigError,
    FlagWarning,
    ShapeError,
    TokenError,
    UnsupportedFeature,
)
from xattn.generate.static import StaticStep
from xattn.nn.layers import Decoder, Encoder
from xattn.nn.wrapper import AutoregressiveWrapper, TransformerWrapper, build
from xattn.ops.attention import attend
from xattn.ops.backends import dense_limit
from xattn.ops.layout import Layout
from xattn.ops.triton import scratch_limit
from xattn.spec.flags import flag_table, parse, parse_attention, to_flags

__version__ = "0.1.0"

__all__ = [
    "AutoregressiveWrapper",
    "CheckpointError",
    "ConfigError",
    "Decoder",
    "Encoder",
    "FlagWarning",
    "Layout",
    "ShapeError",
    "StaticStep",
    "TokenError",
    "TransformerWrapper",
    "UnsupportedFeature",
    "accounting",
    "attend",
    "build",
    "dense_limit",
    "flag_table",
    "load",
    "parse",
    "parse_attention",
    "save",
    "scratch_limit",
    "to_flags",
]
