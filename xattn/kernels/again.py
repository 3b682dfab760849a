"""Launching again what was launched before.

At every launch Triton asks of every argument which compiled kernel it calls for, which takes the host several times as long as
the launch itself. A call of the same shapes calls for the same kernels, so that is asked once for each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import triton
from torch import Tensor

from xattn.kernels import backward, decode, forward, scratch, selection, stages, tiles, walk
from xattn.kernels.call import INTERPRETED

# kinds of calls that are remembered; where every call has a length of its own, they would fill memory
_MOST = 4096


@dataclass(frozen=True)
class _Kind:
    """Of all calls alike: their kernels with the constants of each, in order of launch, and what else is the same in each."""

    launches: list[tuple[Any, tuple]] = field(default_factory=list)
    facts: dict[Any, Any] = field(default_factory=dict)


_known: dict[tuple, _Kind] = {}


class Launches:
    """The launches of one call, made in one order.

    decided_by: whatever decides which kernels the call launches, in what order, and what they are specialised for: whether
    a pointer or a number is a multiple of 16, or a number 1. Of a tensor that is its layout, dtype, device and alignment;
    memory that the call itself allocates is always aligned.
    """

    def __init__(self, *decided_by: Any) -> None:
        self._key = None if INTERPRETED else (tiles.overridden(), *map(_layout, decided_by))
        known = _known.get(self._key)
        self._again, self._kind = (None, _Kind()) if known is None else (iter(known.launches), known)

    def __call__(self, kernel: Any, grid: tuple[int, int, int], *args: Any, **named: Any) -> None:
        """As kernel[grid](*args, **named); what is named are constants and how to launch."""
        if self._again is not None:
            found, constants = next(self._again)
            found[grid](*args, *constants)
            return
        name_kernels()
        found = kernel[grid](*args, **named)
        if self._key is not None:
            self._kind.launches.append((found, tuple(named[name] for name in kernel.arg_names[len(args) :])))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gave the first call of this kind: sizes, structure, and nothing that holds a tensor."""
        facts = self._kind.facts
        if name not in facts:
            facts[name] = make()
        return facts[name]

    def done(self) -> None:
        """The call has made all its launches: the next of its kind repeats them."""
        if self._again is None and self._key is not None:
            if len(_known) >= _MOST:
                _known.clear()
            _known[self._key] = self._kind


@cache
def name_kernels() -> None:
    """Ask for the names under which Triton keeps compiled kernels on disk, of helpers first.

    Triton 3.6 gives a kernel one name or another by whether its helpers had theirs, so that a process would find what another
    compiled only where both began with the same kernels.
    """
    for module in (stages, walk, scratch, forward, backward, selection, decode):
        for helper in vars(module).values():
            if isinstance(helper, triton.JITFunction) and helper.fn.__module__ == module.__name__:
                helper.cache_key  # noqa: B018


def _layout(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.dtype, x.device, x.shape, x.stride(), x.data_ptr() % 16 == 0
