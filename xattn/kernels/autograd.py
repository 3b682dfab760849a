"""The kernels as custom operators of torch, with fake and autograd registrations: torch.compile goes through without a break."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from xattn.kernels.call import LOG2E, Inputs, Options
from xattn.kernels.launch import carry_shape, run_backward, run_forward
from xattn.kernels.launch_decode import Decoding, run_decode

_TENSORS = tuple(f.name for f in fields(Inputs))
_OPTIONS = tuple(f.name for f in fields(Options))
_DECODING = tuple(f.name for f in fields(Decoding))
# inputs that have a gradient, in the order in which the backward operator returns them
_LEARNED = ("q", "k", "v", "far_q", "ahead_q", "far_k", "sink")


def _run(what, given, *results):
    """Call run_forward or run_backward on the operator's flat arguments."""
    inputs = Inputs(**dict(zip(_TENSORS, given, strict=False)))
    with on(inputs.q.device):
        return what(inputs, Options(**dict(zip(_OPTIONS, given[len(_TENSORS) :], strict=True))), *results)


def on(device: torch.device) -> AbstractContextManager:
    """Within this kernels are launched where the tensors are: Triton's own choice is the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _backward(out: Tensor, lse: Tensor, carry: Tensor, dout: Tensor, dlse: Tensor | None, *given) -> list[Tensor]:
    grads = _run(run_backward, given, out, lse, carry, dout, dlse)
    return [grads[name] for name in _LEARNED if name in grads]


# of this module, so that loading it again defines its operators anew
_library = torch.library.Library("xattn", "FRAGMENT")


def _operator(make: Callable) -> Any:
    """The function as an operator xattn::NAME of torch; torch's own decorator makes one whose calls take twice as long."""
    name = make.__name__.removeprefix("_")
    _library.define(name + torch.library.infer_schema(make, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, make, device)
    return getattr(torch.ops.xattn, name).default


@_operator
def _attention(
    q: Tensor, k: Tensor, v: Tensor, far_q: Tensor | None, ahead_q: Tensor | None, far_k: Tensor | None,
    sink: Tensor | None, slopes: Tensor | None, dead: Tensor | None, pos_i: Tensor | None, pos_j: Tensor | None,
    doc_i: Tensor | None, doc_j: Tensor | None, walk_i: Tensor | None, walk_j: Tensor | None, causal: bool, window: int,
    sinks: int, cap: float, near: int, group: int, sim_head: int, scale: float, scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = (
        q, k, v, far_q, ahead_q, far_k, sink, slopes, dead, pos_i, pos_j, doc_i, doc_j, walk_i, walk_j, causal, window, sinks,
        cap, near, group, sim_head, scale, scratch_bytes,
    )  # fmt: skip
    return _run(run_forward, given)


@torch.library.register_fake(_attention, lib=_library)
def _(q, k, v, *rest):
    b, h, n, d = q.shape
    given = dict(zip((*_TENSORS, *_OPTIONS), (q, k, v, *rest), strict=True))
    carry = carry_shape(b, n, select=given["sim_head"] >= 0, skip=given["dead"] is not None)
    numbers = [q.new_empty(shape, dtype=torch.float32) for shape in ((b, h, n), carry)]
    return q.new_empty(b, n, h, d).transpose(1, 2), *numbers


@_operator
def _attention_backward(
    out: Tensor, lse: Tensor, carry: Tensor, dout: Tensor, dlse: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, far_q: Tensor | None, ahead_q: Tensor | None, far_k: Tensor | None,
    sink: Tensor | None, slopes: Tensor | None, dead: Tensor | None, pos_i: Tensor | None, pos_j: Tensor | None,
    doc_i: Tensor | None, doc_j: Tensor | None, walk_i: Tensor | None, walk_j: Tensor | None, causal: bool, window: int,
    sinks: int, cap: float, near: int, group: int, sim_head: int, scale: float, scratch_bytes: int,
) -> list[Tensor]:  # fmt: skip
    return _backward(
        out, lse, carry, dout, dlse, q, k, v, far_q, ahead_q, far_k, sink, slopes, dead, pos_i, pos_j, doc_i, doc_j, walk_i,
        walk_j, causal, window, sinks, cap, near, group, sim_head, scale, scratch_bytes,
    )  # fmt: skip


@torch.library.register_fake(_attention_backward, lib=_library)
def _(out, lse, carry, dout, dlse, q, k, v, far_q, ahead_q, far_k, sink, *_):
    def like(x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return x.new_empty(b, n, h, d).transpose(1, 2)

    grads = [like(x) for x in (q, k, v, far_q, ahead_q, far_k) if x is not None]
    return grads if sink is None else [*grads, torch.empty_like(sink)]


def _remember(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[: len(_TENSORS)], inputs[len(_TENSORS) :]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, dout, dlse, _, backward=_attention_backward):
    *tensors, out, lse, carry = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    # the backward counts in natural units
    dlse = None if dlse is None else dlse * LOG2E
    grads = backward(out, lse, carry, dout, dlse, *tensors, *ctx.options)
    names = [name for name, t in zip(_TENSORS, tensors, strict=True) if name in _LEARNED and t is not None]
    found = dict(zip(names, grads, strict=True))
    return *(found.get(name) for name in _TENSORS), *(None for _ in ctx.options)


torch.library.register_autograd(_attention, _differentiate, setup_context=_remember, lib=_library)


class _Eager(torch.autograd.Function):
    """The same without the operator, whose checks cost more than a small kernel."""

    @staticmethod
    def forward(ctx, *given):
        output = _run(run_forward, given)
        _remember(ctx, given, output)
        ctx.mark_non_differentiable(output[2])
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse, dcarry):
        return _differentiate(ctx, dout, dlse, dcarry, _backward)


def attention(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Fused attention: out (b h i d) in q's dtype, and the base-2 log-sum-exp (b h i) float32; both can be differentiated."""
    operator = _attention if torch.compiler.is_compiling() else _Eager.apply
    out, lse, _ = operator(*(getattr(inputs, name) for name in _TENSORS), *(getattr(options, name) for name in _OPTIONS))
    return out, lse


@_operator
def _decode(
    q: Tensor, k: Tensor, v: Tensor, far_q: Tensor | None, ahead_q: Tensor | None, far_k: Tensor | None,
    sink: Tensor | None, slopes: Tensor | None, dead: Tensor | None, pos_i: Tensor | None, pos_j: Tensor | None,
    doc_i: Tensor | None, doc_j: Tensor | None, walk_i: Tensor | None, walk_j: Tensor | None, causal: bool, window: int,
    sinks: int, cap: float, near: int, group: int, sim_head: int, scale: float, scratch_bytes: int, plain: bool,
    carry: Tensor | None, rows: int, turn: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = (
        q, k, v, far_q, ahead_q, far_k, sink, slopes, dead, pos_i, pos_j, doc_i, doc_j, walk_i, walk_j, causal, window, sinks,
        cap, near, group, sim_head, scale, scratch_bytes,
    )  # fmt: skip
    more = Decoding(plain=plain, carry=carry, rows=rows, turn=turn)
    return _run(run_decode, given, more)


@torch.library.register_fake(_decode, lib=_library)
def _(q, k, v, *rest):
    b, h, n, d = q.shape
    carry, rows = rest[-3:-1]
    after = (0,) if carry is None else (b, rows, k.shape[2])
    return q.new_empty(b, n, h, d).transpose(1, 2), q.new_empty(after, dtype=torch.float32)


def decode(inputs: Inputs, options: Options, more: Decoding) -> tuple[Tensor, Tensor]:
    """Attention of few queries, or of any number with carried votes; no gradient: see `run_decode`."""
    if not torch.compiler.is_compiling():
        with on(inputs.q.device):
            return run_decode(inputs, options, more)
    given = [(inputs, _TENSORS), (options, _OPTIONS), (more, _DECODING)]
    return _decode(*(getattr(holder, name) for holder, names in given for name in names))
