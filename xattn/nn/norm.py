"""Norms: RMSNorm or LayerNorm without bias, in float32 or better inside."""

from torch import nn


def norm(dim: int, *, rms: bool) -> nn.Module:
    """RMSNorm(dim) or a bias-free LayerNorm(dim), with a gain starting at one."""
    return nn.RMSNorm(dim, eps=1e-6) if rms else nn.LayerNorm(dim, bias=False)
