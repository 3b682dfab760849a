"""Right before fast: ours against the float64 definition by the measuring stick of the tests, on small cases."""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from harness import ROOT
from peers import Given, draw
from table import Case
from torch import Tensor

from xattn.ops.reference import reference
from xattn.ops.triton import scratch_limit

sys.path.append(str(ROOT / "tests"))
from measure import errors, forward_and_gradients, sticks  # noqa: E402


class WrongResult(AssertionError):
    """A result lies outside the measuring stick: its time is worth nothing."""


class Truth:
    """A small case, its float64 results, and how far eager low precision lies from them."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        x = self.x = draw(case, dtype)
        given = {"q": x.q, "k": x.k, "v": x.v, "dout": x.dout} | ({} if x.sink is None else {"sink_logits": x.sink})
        self.given = {name: t.detach() for name, t in given.items()}
        self.right = forward_and_gradients(self._reference, self.given, torch.float64)
        eager = errors(forward_and_gradients(self._reference, self.given, dtype), self.right)
        long = sticks([eager])
        self.stick = {name: long["out" if name == "out" else "gradient"] for name in eager}

    def _reference(self, q: Tensor, k: Tensor, v: Tensor, *, sink_logits_h: Tensor | None = None) -> Tensor:
        x = self.x
        return reference(q, k, v, spec=x.spec, layout_i=x.layout, layout_j=x.layout, sink_logits_h=sink_logits_h)[0]

    def compare(self, make: Callable[[Given], Callable[[], Tensor]]) -> dict[str, float]:
        """Each result's error over its stick: all at most 1. Raises WrongResult."""

        def run(q: Tensor, k: Tensor, v: Tensor, *, sink_logits_h: Tensor | None = None) -> Tensor:
            return make(replace(self.x, q=q, k=k, v=v, sink=sink_logits_h))()

        off = errors(forward_and_gradients(run, self.given, self.dtype), self.right)
        shares = {name: value / self.stick[name] if value else 0.0 for name, value in off.items()}
        wrong = [f"{name} off by {off[name]:.2e}, {share:.2f} sticks" for name, share in shares.items() if not share <= 1]
        if wrong:
            raise WrongResult(f"{self.case.name}: {'; '.join(wrong)}")
        return shares


_checked: dict[tuple[str, torch.dtype], float] = {}


def check(case: Case, dtype: torch.dtype, make: Callable[[Given], Callable[[], Tensor]], *, n: int | None = None) -> float:
    """The worst share of its stick that a small twin of the case takes up, once for all lengths. Raises WrongResult."""
    selective = "attn_selective" in case.flags
    # two segments of the scratch, so that carries matter
    small = case.small(n or (1024 if selective else 512))
    key = (small.name, dtype)
    if key not in _checked:
        truth = Truth(small, dtype)
        worst = max(truth.compare(make).values())
        if selective:
            # in several chunks too, as long sequences are
            with scratch_limit(64 * 1024):
                worst = max(worst, *truth.compare(make).values())
        _checked[key] = worst
    return _checked[key]
