"""A call of a kind seen before launches the same kernels with the same constants, and a call of another kind does not."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import tensors
from test_kernels import DEVICE, interpreter, spec_of  # noqa: F401
from torch import Tensor

from xattn.ops.attention import attend
from xattn.ops.layout import Layout
from xattn.ops.triton import scratch_limit

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 20, "sink_tokens": 2, "sink_logits": True},
    "selective": {"attn_selective": True},
    "skipping": {"attn_selective": True, "selection_skip": 6.0},
    "extend": {"rotary_pos_emb": True, "self_extend_group": 2, "self_extend_window": 30, "attn_selective": True},
}


class Jitted:
    """Stands in for Triton's function, whose launch gives the compiled kernel: here the interpreted one."""

    asked = 0

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **named: Any) -> "Compiled":
            Jitted.asked += 1
            self.kernel[grid](*args, **named)
            return Compiled(self.kernel)

        return launch


class Compiled:
    """Stands in for a compiled kernel, which takes constants in their places."""

    launched = 0

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*args: Any) -> None:
            assert len(grid) == 3 and len(args) == len(self.kernel.arg_names)
            Compiled.launched += 1
            self.kernel[grid](*args)

        return launch


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """Calls are remembered under the interpreter too, from an empty memory."""
    from xattn.kernels import again, backward, forward, selection

    monkeypatch.setattr(again, "INTERPRETED", False)
    monkeypatch.setattr(again, "_known", {})
    if DEVICE == "cpu":
        kernels = {forward: ["forward"], backward: ["find_delta", "find_dkdv", "find_dq", "sum_after", "sum_columns"]}
        kernels[selection] = ["add_dk", "add_dq", "count_votes", "fill", "find_live", "spread"]
        for module, names in kernels.items():
            for name in names:
                monkeypatch.setattr(module, name, Jitted(getattr(module, name)))
    Jitted.asked = Compiled.launched = 0
    yield again._known


def call(n: int = 70, *, skew: int = 0, **flags: Any) -> list[Tensor]:
    """Output and gradients; skew: how many numbers q lies off an aligned address."""
    torch.manual_seed(0)
    spec = spec_of(**flags)
    given = {name: t.float() for name, t in tensors(spec, n, device=DEVICE).items()}
    q = given["q"]
    given["q"] = torch.empty(q.numel() + skew, device=DEVICE)[skew:].view_as(q).copy_(q)
    names = [name for name in ("q", "k", "v", "sink_logits") if name in given]
    leaves = [given[name].clone().requires_grad_() if name != "q" else given[name].requires_grad_() for name in names]
    sink = leaves[3] if len(leaves) > 3 else None
    out = attend(*leaves[:3], spec=spec, backend="triton", **({} if sink is None else {"sink_logits_h": sink}))
    return [out.detach(), *torch.autograd.grad(out, leaves, given["dout"])]


@pytest.mark.parametrize("flags", CALLS.values(), ids=CALLS)
def test_a_call_of_a_known_kind_asks_triton_nothing_and_gives_the_same(flags: dict[str, Any], remembered: dict) -> None:
    first = call(**flags)
    asked = Jitted.asked
    again = call(**flags)
    assert len(remembered) == 2 and Jitted.asked == asked, "forward and backward are known"
    assert all(a.equal(b) for a, b in zip(again, first, strict=True))
    if DEVICE == "cpu":
        assert Compiled.launched == asked > 2


@pytest.mark.parametrize(
    "other", [{"n": 71}, {"skew": 1}, {"sliding_window": 30}, {"logit_softcap": 9.0}, {"heads": 4}, {"dim_head": 32}], ids=str
)
def test_whatever_decides_on_kernels_makes_another_kind(other: dict[str, Any], remembered: dict) -> None:
    call()
    known = len(remembered)
    call(**other)
    assert len(remembered) > known


def test_tiles_and_the_cap_of_scratch_make_another_kind(remembered: dict) -> None:
    from xattn.kernels import tiles

    call(attn_selective=True)
    with scratch_limit(1):
        call(attn_selective=True)
    assert len(remembered) == 4
    with tiles.override(forward=tiles.Tile(64, 64, 4, 1)):
        call(attn_selective=True)
    assert len(remembered) == 6


def test_a_call_that_broke_off_is_not_remembered(remembered: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn.kernels import launch

    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(launch._Call, "fill", broken)
        with pytest.raises(MemoryError):
            call(attn_selective=True)
    assert not remembered
    call(attn_selective=True)
    assert len(remembered) == 2


def test_kernels_are_launched_where_the_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn.kernels.autograd import on

    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(entered.append(device)))
    for name in ("cpu", "cuda:0", "cuda:1"):
        with on(torch.device(name)):
            pass
    assert entered == [torch.device("cuda:1")]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu_runs_there() -> None:
    spec = spec_of(attn_selective=True, rotary_pos_emb=True)
    given = {name: t.float() for name, t in tensors(spec, 70, device="cpu").items()}
    found = []
    for device in ("cuda:0", "cuda:1"):
        leaves = [given[name].to(device).requires_grad_() for name in ("q", "k", "v")]
        out = attend(*leaves, spec=spec, backend="triton")
        grads = torch.autograd.grad(out, leaves, given["dout"].to(device))
        found.append([t.cpu() for t in (out.detach(), *grads)])
        with torch.no_grad():
            at = {"layout": Layout(torch.tensor([[69]], device=device)), "key_layout": Layout.plain(70, device)}
            last = attend(leaves[0][:, :, -1:], *leaves[1:], spec=spec_of(), backend="triton", **at)
        found[-1].append(last.cpu())
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_memory_of_kinds_is_bounded(remembered: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn.kernels import again

    monkeypatch.setattr(again, "_MOST", 4)
    for n in (16, 17, 18, 19):
        call(n)
    assert 0 < len(remembered) <= 4


ORDERS = """
import sys
from xattn.kernels import again, backward, decode, forward
again.name_kernels()
kernels = [forward.forward, backward.find_dkdv, decode.decode]
print(sorted((kernel.fn.__name__, kernel.cache_key) for kernel in kernels[:: int(sys.argv[1])]))
"""


def test_processes_find_what_others_compiled_whatever_they_began_with() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    names = {subprocess.check_output([sys.executable, "-c", ORDERS, step], env=env) for step in ("1", "-1")}
    assert len(names) == 1 and b"forward" in names.pop()
