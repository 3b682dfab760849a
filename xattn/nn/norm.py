"""Norms: RMSNorm or LayerNorm without bias, in float32 or better inside."""

from torch import Tensor, nn
from torch.nn.functional import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with the gain in the input's dtype, without which autocast falls back to a slow path."""

    def forward(self, x: Tensor) -> Tensor:
        """(... dim) -> (... dim) in x's dtype."""
        return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def norm(dim: int, *, rms: bool) -> nn.Module:
    """RMSNorm(dim) or a bias-free LayerNorm(dim), with a gain starting at one. Source: arXiv 1910.07467, 1607.06450."""
    return RMSNorm(dim, eps=1e-6) if rms else nn.LayerNorm(dim, bias=False)
