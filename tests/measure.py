"""The measuring stick: how far a result may lie from the float64 definition. No test has a tolerance of its own.

float64 must agree to 1e-12. Below that, a result may be at most 2 times (a gradient 3 times) as far from float64 as the
reference itself is when it runs in the same low precision.
"""

from collections.abc import Callable

import torch
from torch import Tensor

EXACT, FORWARD, GRADIENT = 1e-12, 2.0, 3.0


def error(got: Tensor, truth: Tensor) -> float:
    """max|got - truth|; infinite where the shapes differ or a number is missing."""
    if got.shape != truth.shape or not bool(got.isfinite().all()):
        return float("inf")
    return float((got.double() - truth.double()).abs().max()) if got.numel() else 0.0


def assert_exact(got: Tensor, truth: Tensor, what: str = "result") -> None:
    """float64 results agree to 1e-12 of the largest number among them (of 1, when all are smaller)."""
    assert got.dtype == truth.dtype == torch.float64, f"{what}: {got.dtype} and {truth.dtype} are not float64"
    bound = EXACT * max(1.0, float(truth.abs().max())) if truth.numel() else 0.0
    assert error(got, truth) <= bound, f"{what}: off by {error(got, truth):.1e}, above {bound:.1e}"


def assert_as_good(got: Tensor, truth: Tensor, eager: Tensor, *, factor: float, what: str = "result") -> None:
    """A low-precision result is at most `factor` times as far from the truth as the eager one of its precision."""
    assert got.dtype == eager.dtype, f"{what}: {got.dtype}, but the reference gives {eager.dtype}"
    off, bound = error(got, truth), factor * error(eager, truth)
    assert off <= bound, f"{what}: off by {off:.2e}, above {factor:g} x the reference's {bound / factor:.2e}"


def forward_and_gradients(
    run: Callable[..., Tensor], given: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output of run(q, k, v, sink_logits_h=...) and the gradient of sum(out * dout) by each input, all in dtype."""
    leaves = {name: t.to(dtype).requires_grad_() for name, t in given.items() if name != "dout"}
    out = run(leaves["q"], leaves["k"], leaves["v"], sink_logits_h=leaves.get("sink_logits"))
    dout = given["dout"][:, :, -out.shape[2] :].to(dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_parity(got: dict[str, Tensor], truth: dict[str, Tensor], eager: dict[str, Tensor] | None = None) -> None:
    """Output and every gradient: exact without an eager result (float64), else by the stick."""
    assert got.keys() == truth.keys()
    for name in truth:
        if eager is None:
            assert_exact(got[name], truth[name], name)
        else:
            factor = FORWARD if name == "out" else GRADIENT
            assert_as_good(got[name], truth[name], eager[name], factor=factor, what=name)
