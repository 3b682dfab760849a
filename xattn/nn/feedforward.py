"""Feed-forward layers: GELU, SiLU or squared ReLU, gated or not."""

from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from xattn.spec.model import FeedForwardSpec


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2. Source: Primer, arXiv 2109.08668."""
    return relu(x).square()


class FeedForward(nn.Module):
    """dim -> inner -> dim; gated (GLU, arXiv 2002.05202), one projection makes both halves and the second is the gate."""

    def __init__(self, spec: FeedForwardSpec, *, dim: int) -> None:
        super().__init__()
        self.spec, inner = spec, spec.inner(dim)
        self.activation = silu if spec.ff_swish else relu_squared if spec.ff_relu_squared else gelu
        self.to_inner = nn.Linear(dim, inner * (2 if spec.ff_glu else 1), bias=spec.ff_bias)
        self.dropout = nn.Dropout(spec.ff_dropout)
        self.to_out = nn.Linear(inner, dim, bias=spec.ff_bias)

    def forward(self, x_bnm: Tensor) -> Tensor:
        """(b n m) -> (b n m)."""
        inner = self.to_inner(x_bnm)
        if self.spec.ff_glu:
            value, gate = inner.chunk(2, dim=-1)
            inner = value * self.activation(gate)
        else:
            inner = self.activation(inner)
        return self.to_out(self.dropout(inner))
