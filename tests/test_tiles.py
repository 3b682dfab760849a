"""Tiles that do not fit a device give way to smaller ones, with the same results."""

from typing import Any

import pytest
import torch
from test_again import Jitted, call, remembered  # noqa: F401
from test_kernels import DEVICE, interpreter  # noqa: F401
from triton.runtime.errors import OutOfResources

from xattn.errors import UnsupportedFeature
from xattn.kernels import tiles
from xattn.kernels.tiles import Tile, decode_tile, small, tile

SIZES = [
    dict(block_d=d, itemsize=itemsize, select=select, extend=extend)
    for d in (64, 128, 256) for itemsize in (2, 4) for select in (False, True) for extend in (False, True)
    if not (select and itemsize == 4 and d > 128)
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq"])
def test_every_step_is_no_larger_and_selection_keeps_its_64(kernel: str, size: dict[str, Any]) -> None:
    steps = [tile(kernel, **size, window=False, step=step) for step in range(len(tiles._SMALLER) + 1)]
    for before, after in zip(steps, steps[1:], strict=False):
        assert after.block_i <= before.block_i and after.block_j <= before.block_j
    assert not size["select"] or all(t.block_i % 64 == t.block_j % 64 == 0 for t in steps)
    assert size["select"] or size["itemsize"] > 2 or steps[-1].block_i * steps[-1].block_j < 64 * 64


def test_selections_own_kernels_and_decoding_step_down_too() -> None:
    assert small("add", block_d=64, itemsize=2, extend=False, step=1)["num_stages"] == 1
    how = dict(rows=64, block_d=128, itemsize=2, extend=False, split=False)
    found = [decode_tile("decode", **how, step=step) for step in range(4)]
    assert [t.stages for t in found] == [3, 1, 1, 1] and found[-1][:2] == (16, 16) and found[0][:2] == found[1][:2]


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which tiles of more than 32 queries or keys do not fit, as far as Triton is asked."""
    monkeypatch.setattr(tiles, "_steps", {})
    launch = Jitted.__getitem__

    def limited(self: Jitted, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            P = named["P"] if "P" in named else None
            if self.kernel.__name__ in ("forward", "find_dq", "find_dkdv") and max(P.block_i, P.block_j) > 32:
                raise OutOfResources(10**6, 10**5, "shared memory")
            return launch(self, grid)(*args, **named)

        return run

    monkeypatch.setattr(Jitted, "__getitem__", limited)


@pytest.mark.skipif(DEVICE != "cpu", reason="the small device is made of the interpreter")
def test_a_call_steps_down_until_it_fits_and_remembers_it(remembered: dict, little: None, monkeypatch) -> None:  # noqa: F811
    found = call()
    assert sorted(tiles._steps.values()) == [2, 2]
    asked = Jitted.asked
    again = call()
    assert Jitted.asked == asked and all(a.equal(b) for a, b in zip(again, found, strict=True))
    monkeypatch.undo()
    whole = call()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(whole, found, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="the small device is made of the interpreter")
def test_what_fits_in_no_tile_says_what_to_do(remembered: dict, little: None) -> None:  # noqa: F811
    with pytest.raises(UnsupportedFeature, match="with dim_head=16 in float32 .*shared memory: 1,000,000 needed, 100,000"):
        call(attn_selective=True)
    tiles._steps.clear()
    with tiles.override(forward=Tile(64, 64, 4, 1)), pytest.raises(OutOfResources):
        call()
    assert not tiles._steps
