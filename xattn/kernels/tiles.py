"""Tile sizes of every kernel: (queries, keys, warps, pipeline stages), chosen by measurement and never tuned at run time.

Measured on an H100 and an H200 with Triton 3.6, most by benchmarks/tune.py; docs/kernels.md says which are not. Other devices
take the same sizes where these fit, and smaller ones step by step (`fitting`) where they have too little shared memory.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

from triton.runtime.errors import OutOfResources

from xattn.errors import UnsupportedFeature


class Tile(NamedTuple):
    """Rows of queries and of keys in a tile, warps and pipeline stages of the launch."""

    block_i: int
    block_j: int
    warps: int
    stages: int


# (kernel, kind) -> for head widths up to 64, up to 128, and above, in 16 bits
_HALF: dict[tuple[str, str], tuple[Tile, Tile, Tile]] = {
    ("forward", "plain"): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    ("forward", "window"): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    ("forward", "select"): (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 1)),
    ("forward", "extend"): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 8, 1)),
    ("dkdv", "plain"): (Tile(64, 64, 4, 3), Tile(64, 128, 8, 3), Tile(64, 64, 8, 1)),
    ("dkdv", "window"): (Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 64, 8, 1)),
    ("dkdv", "select"): (Tile(64, 64, 4, 3), Tile(64, 128, 8, 3), Tile(64, 64, 8, 1)),
    ("dkdv", "extend"): (Tile(64, 64, 4, 2), Tile(64, 64, 8, 1), Tile(32, 64, 8, 1)),
    ("dq", "plain"): (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 1)),
    ("dq", "window"): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 1)),
    ("dq", "select"): (Tile(64, 64, 4, 2), Tile(128, 64, 8, 3), Tile(64, 64, 8, 1)),
    ("dq", "extend"): (Tile(64, 64, 4, 2), Tile(64, 64, 8, 1), Tile(64, 32, 8, 1)),
}
# float32 runs on the ordinary cores: small tiles, but the packed scratch of selection comes in 64 x 64
_SINGLE = (Tile(64, 64, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1))
_SINGLE_SELECT = (Tile(64, 64, 4, 1), Tile(64, 64, 8, 1))

# what is tried where those do not fit: fewer stages, then smaller tiles
_SMALLER = (Tile(64, 64, 8, 2), Tile(64, 64, 8, 1), Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1))

_override: dict[str, Tile] = {}
_steps: dict[tuple, int] = {}


def tile(kernel: str, *, block_d: int, itemsize: int, select: bool, extend: bool, window: bool, step: int = 0) -> Tile:
    """The tile of one kernel: forward, dkdv or dq. step: how far below the table's, see `fitting`."""
    if kernel in _override:
        return _override[kernel]
    own = _measured(kernel, block_d=block_d, itemsize=itemsize, select=select, extend=extend, window=window)
    # the packed scratch of selection comes in 64 x 64
    smaller = [t for t in _SMALLER if _within(t, own) and not (select and t.block_i < 64)]
    return smaller[min(step, len(smaller)) - 1] if step and smaller else own


def _within(t: Tile, own: Tile) -> bool:
    return t != own and t.block_i <= own.block_i and t.block_j <= own.block_j and t.stages <= own.stages


def _measured(kernel: str, *, block_d: int, itemsize: int, select: bool, extend: bool, window: bool) -> Tile:
    width = 0 if block_d <= 64 else 1 if block_d <= 128 else 2
    if itemsize > 2:
        return (_SINGLE_SELECT if select else _SINGLE)[width]
    if select and extend and kernel != "forward":
        # both scratch and a second copy of keys: the tiles that the scratch comes in, and no deep pipeline
        return Tile(64, 64, 4 if width == 0 else 8, 2 if width == 0 else 1)
    kind = "select" if select else "extend" if extend else "window" if window else "plain"
    return _HALF[kernel, kind][width]


def small(kernel: str, *, block_d: int, itemsize: int, extend: bool, step: int = 0) -> dict[str, int]:
    """How selection's own kernels are launched, whose tiles are always 64 x 64."""
    if kernel in _override:
        return {"num_warps": _override[kernel].warps, "num_stages": _override[kernel].stages}
    narrow = block_d <= 64
    if itemsize > 2 or extend or block_d > 128 or step:
        stages = 1
    else:
        stages = {"fill": 2, "spread": 3 if narrow else 1, "add": 5 if narrow else 3}[kernel]
    return {"num_warps": 4, "num_stages": stages}


def decode_tile(kernel: str, *, rows: int, block_d: int, itemsize: int, extend: bool, split: bool, step: int = 0) -> Tile:
    """The tile of `decode`, whose rows are queries of all heads that share a key head, or of `count`.

    Not tuned: only a window of 1024 was measured, where no other was faster by more than 4 %.

    split: raw keys are turned as two halves.
    """
    if kernel in _override:
        return _override[kernel]
    t = _decoding(kernel, rows=rows, block_d=block_d, itemsize=itemsize, extend=extend, split=split)
    if step:
        t = t._replace(stages=1, block_i=t.block_i if step == 1 else 16, block_j=t.block_j if step <= 2 else 16)
    return t


def _decoding(kernel: str, *, rows: int, block_d: int, itemsize: int, extend: bool, split: bool) -> Tile:
    block_i = 16 if rows <= 16 or itemsize > 2 else 32 if rows <= 32 or kernel == "count" else 64
    if itemsize > 2:
        return Tile(block_i, 32 if block_d <= 128 else 16, 4, 1)
    if extend or block_d > 128:
        # cosines and sines take as much shared memory as keys and values; two programs are to fit a processor
        small = split and kernel == "decode" and block_i == 16 and block_d <= 128
        return Tile(min(block_i, 32), 32, 4, 3 if small else 2)
    return Tile(block_i, 64, 4, 4 if block_d <= 64 else 3)


def pair(*, block_d: int, itemsize: int, heads: int, select: bool, extend: bool) -> int:
    """Query heads that one program of the dQ kernel takes, so that F is read and its gradient written once for both."""
    return 2 if select and not extend and block_d <= 64 and itemsize == 2 and heads % 2 == 0 else 1


def fitting(run: Callable, inputs: Any, options: Any, *more: Any) -> Any:
    """run(inputs, options, *more, step=n) with the largest tiles that the device has the shared memory for.

    What did not fit once is not tried again for such a call.

    Raises:
        UnsupportedFeature: the smallest do not fit.
    """
    q = inputs.q
    kind = (run, q.device, q.dtype, q.shape[-1], options.sim_head >= 0, options.near > 0)
    while True:
        step = _steps.get(kind, 0)
        try:
            return run(inputs, options, *more, step=step)
        except OutOfResources as error:
            if _override:
                raise
            if step == len(_SMALLER):
                what = f"dim_head={q.shape[-1]} in {str(q.dtype).removeprefix('torch.')}"
                raise UnsupportedFeature(
                    f"attn_backend 'triton' does not fit this GPU with {what} and these flags ({error.name}: {error.required:,} "
                    f"needed, {error.limit:,} there); use attn_backend='reference', a smaller dim_head or fewer flags"
                ) from error
            _steps[kind] = step + 1


def overridden() -> tuple[tuple[str, Tile], ...]:
    """The kernels whose tiles a context has replaced."""
    return tuple(_override.items())


@contextmanager
def override(**tiles: Tile):
    """Within this context the named kernels (forward, dkdv, dq, decode, count) take these tiles: for tuning and for tests."""
    before = dict(_override)
    _override.update(tiles)
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)
