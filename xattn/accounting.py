"""Sizes predicted from a spec, with nothing built: parameters, FLOPs, activation bytes, cache bytes."""
from xattn.spec.model import ModelSpec
