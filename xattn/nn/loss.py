"""Cross-entropy of a linear head, chunk by chunk, so that the logits of all tokens never exist at once.

Letters: t tokens (batch and sequence flattened), c tokens of one chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xattn.shapes import sizes

# 64 MiB of float32 logits a chunk
CHUNK_ELEMENTS = 2**24


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy whose gradients are made in the forward, while a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, x_tm: Tensor, weight_vm: Tensor, target_t: Tensor, ignore_index: int, chunk: int) -> Tensor:
        exact = torch.promote_types(x_tm.dtype, torch.float32)
        valid_t = target_t != ignore_index
        count = valid_t.sum().clamp(min=1)
        loss = torch.zeros((), dtype=exact, device=x_tm.device)
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x_tm) if need_x else None
        grad_weight = torch.zeros_like(weight_vm, dtype=exact) if need_weight else None
        for start in range(0, x_tm.shape[0], chunk):
            at = slice(start, start + chunk)
            x_cm, valid_c1 = x_tm[at], valid_t[at, None]
            target_c1 = target_t[at, None].where(valid_c1, 0)
            logits_cv = (x_cm @ weight_vm.T).to(exact)
            lse_c1 = logits_cv.logsumexp(dim=-1, keepdim=True)
            loss += ((lse_c1 - logits_cv.gather(1, target_c1)) * valid_c1).sum()
            if not (need_x or need_weight):
                continue
            grad_cv = logits_cv.sub_(lse_c1).exp_()
            grad_cv.scatter_add_(1, target_c1, torch.full_like(lse_c1, -1.0))
            grad_cv = grad_cv.mul_(valid_c1.to(exact) / count).to(x_cm.dtype)
            if need_x:
                torch.mm(grad_cv, weight_vm, out=grad_x[at])
            if need_weight:
                grad_weight += grad_cv.T @ x_cm
        ctx.save_for_backward(grad_x, None if grad_weight is None else grad_weight.to(weight_vm.dtype))
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        scaled = (g if g is None else g * grad.to(g.dtype) for g in (grad_x, grad_weight))
        return (*scaled, None, None, None)


def linear_cross_entropy(
    x_tm: Tensor, weight_vm: Tensor, target_t: Tensor, *, ignore_index: int = -100, chunk: int | None = None
) -> Tensor:
    """Mean cross-entropy in nats of x @ weight.T against target; softmax and sums in float32 or better.

    Args:
        x_tm: (t m). weight_vm: (v m). target_t: int64 (t); entries equal to ignore_index do not count.
        chunk: tokens whose logits exist at a time (default: 64 MiB worth).
    Returns:
        a scalar, 0 when no target counts. Not twice differentiable.
    """
    x_tm, weight_vm = _autocast(x_tm), _autocast(weight_vm)
    sizes(x=(x_tm, "t m"), weight=(weight_vm, "v m"), target=(target_t, "t"))
    return _LinearCrossEntropy.apply(x_tm, weight_vm, target_t, ignore_index, chunk or _chunk(weight_vm))


@torch.no_grad()
def token_cross_entropy(x_tm: Tensor, weight_vm: Tensor, target_t: Tensor) -> Tensor:
    """Cross-entropy in nats of each token (t), float32 or better, without gradients; chunked as the mean is."""
    x_tm, weight_vm = _autocast(x_tm), _autocast(weight_vm)
    exact = torch.promote_types(x_tm.dtype, torch.float32)
    parts = []
    for x_cm, target_c in zip(x_tm.split(_chunk(weight_vm)), target_t.split(_chunk(weight_vm)), strict=True):
        logits_cv = (x_cm @ weight_vm.T).to(exact)
        parts.append(torch.nn.functional.cross_entropy(logits_cv, target_c, reduction="none"))
    return torch.cat(parts)


def _chunk(weight_vm: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // weight_vm.shape[0])


def _autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where that is on: a custom function is not cast by itself."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x
