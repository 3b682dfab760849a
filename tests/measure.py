"""The measuring stick: how far a result may lie from the float64 definition. No test has a tolerance of its own.

float64 must agree to 1e-12. Below that, a result may be at most 2 times (a gradient 3 times) as far from float64 as the
reference itself is when it runs in the same low precision, each at its worst over the same few draws. Where the reference
happens to be exact (one key in sight has weight 1), its error on plain attention stands in.
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


def errors(got: list[dict[str, Tensor]], truth: list[dict[str, Tensor]]) -> dict[str, float]:
    """The worst error of each named result over several draws."""
    assert len(got) == len(truth) and all(g.keys() == t.keys() for g, t in zip(got, truth, strict=True))
    return {name: max(error(g[name], t[name]) for g, t in zip(got, truth, strict=True)) for name in truth[0]}


def assert_as_good(off: dict[str, float], eager: dict[str, float], plain: dict[str, float]) -> None:
    """Errors of a low-precision result against the reference's own in that precision, here and on plain attention."""
    for name, value in off.items():
        stick, factor = eager[name] or plain.get(name, 0.0), FORWARD if name == "out" else GRADIENT
        assert value <= factor * stick, f"{name}: off by {value:.2e}, above {factor:g} x the reference's {stick:.2e}"


def forward_and_gradients(
    run: Callable[..., Tensor], given: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output of run(q, k, v, sink_logits_h=...) and the gradient of sum(out * dout) by each input, all in dtype."""
    leaves = {name: t.to(dtype).requires_grad_() for name, t in given.items() if name != "dout"}
    out = run(leaves["q"], leaves["k"], leaves["v"], sink_logits_h=leaves.get("sink_logits"))
    dout = given["dout"][:, :, -out.shape[2] :].to(dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
