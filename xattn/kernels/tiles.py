"""Tile sizes of every kernel: (queries, keys, warps, pipeline stages), chosen by measurement and never tuned at run time.

Measured on an H100 and an H200 with Triton 3.6, most by benchmarks/tune.py; docs/kernels.md says which are not. Other devices
take the same sizes.
"""

from contextlib import contextmanager
from typing import NamedTuple


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

_override: dict[str, Tile] = {}


def tile(kernel: str, *, block_d: int, itemsize: int, select: bool, extend: bool, window: bool) -> Tile:
    """The tile of one kernel: forward, dkdv or dq."""
    if kernel in _override:
        return _override[kernel]
    width = 0 if block_d <= 64 else 1 if block_d <= 128 else 2
    if itemsize > 2:
        return (_SINGLE_SELECT if select else _SINGLE)[width]
    if select and extend and kernel != "forward":
        # both scratch and a second copy of keys: the tiles that the scratch comes in, and no deep pipeline
        return Tile(64, 64, 4 if width == 0 else 8, 2 if width == 0 else 1)
    kind = "select" if select else "extend" if extend else "window" if window else "plain"
    return _HALF[kernel, kind][width]


def small(kernel: str, *, block_d: int, itemsize: int, extend: bool) -> dict[str, int]:
    """How selection's own kernels are launched, whose tiles are always 64 x 64."""
    if kernel in _override:
        return {"num_warps": _override[kernel].warps, "num_stages": _override[kernel].stages}
    narrow = block_d <= 64
    if itemsize > 2 or extend or block_d > 128:
        stages = 1
    else:
        stages = {"fill": 2, "spread": 3 if narrow else 1, "add": 5 if narrow else 3}[kernel]
    return {"num_warps": 4, "num_stages": stages}


def decode_tile(kernel: str, *, rows: int, block_d: int, itemsize: int, extend: bool, split: bool) -> Tile:
    """The tile of `decode`, whose rows are queries of all heads that share a key head, or of `count`.

    Not tuned: only a window of 1024 was measured, where no other was faster by more than 4 %.

    split: raw keys are turned as two halves.
    """
    if kernel in _override:
        return _override[kernel]
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
