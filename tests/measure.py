"""The measuring stick: how far a result may lie from the float64 definition. No test has a tolerance of its own.

float64 must agree to 1e-12. Below that, an output may be at most 2 times and a gradient at most 3 times as far from
float64 as the reference itself is, run eagerly in the same precision. The maximum of one draw is luck, above all over
six sink logits: so the reference counts at its worst over all seatings of a case, and its gradients share one stick.
Where the reference happens to be exact (the only key in sight has weight 1), its error on plain attention stands in.
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


def errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The error of each named result."""
    assert got.keys() == truth.keys()
    return {name: error(got[name], truth[name]) for name in truth}


def sticks(eager: list[dict[str, float]]) -> dict[str, float]:
    """How long the stick is for the output, and for every gradient, given the reference's own errors."""
    outs = [e["out"] for e in eager]
    grads = [value for e in eager for name, value in e.items() if name != "out"]
    return {"out": FORWARD * max(outs), "gradient": GRADIENT * max(grads)}


def assert_within(off: dict[str, float], stick: dict[str, float], plain: dict[str, float]) -> None:
    """Errors of a low-precision result by the sticks of its case, or of plain attention where those have no length."""
    for name, value in off.items():
        kind = "out" if name == "out" else "gradient"
        bound = stick[kind] or plain[kind]
        assert value <= bound, f"{name}: off by {value:.2e}, above the stick's {bound:.2e}"


def forward_and_gradients(run: Callable[..., Tensor], given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The output of run(q, k, v, sink_logits_h=...) and the gradient of sum(out * dout) by each input, all in dtype."""
    leaves = {name: t.to(dtype).requires_grad_() for name, t in given.items() if name != "dout"}
    out = run(leaves["q"], leaves["k"], leaves["v"], sink_logits_h=leaves.get("sink_logits"))
    dout = given["dout"][:, :, -out.shape[2] :].to(dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
