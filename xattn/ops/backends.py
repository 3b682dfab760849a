"""Who can compute what: a back-end names the features it honours; the resolver compares, and never drops one."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.errors import UnsupportedFeature, unknown
from xattn.ops import sdpa, triton
from xattn.ops.layout import Layout
from xattn.ops.reference import reference
from xattn.spec.model import AttentionSpec

GIB = 2**30
_dense_limit = 4 * GIB


@contextmanager
def dense_limit(limit_bytes: int):
    """Within this context, n x n logits or masks of one layer may take up to limit_bytes (default 4 GiB)."""
    global _dense_limit
    before, _dense_limit = _dense_limit, limit_bytes
    try:
        yield
    finally:
        _dense_limit = before


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of attention, as far as a back-end may care.

    carries: it takes the votes of earlier queries and returns them. learns: its gradient will be asked for.
    """

    spec: AttentionSpec
    layout_i: Layout
    layout_j: Layout
    batch: int
    dtype: torch.dtype
    device: torch.device
    carries: bool = False
    learns: bool = False

    @property
    def features(self) -> frozenset[str]:
        """What the call asks beyond the spec."""
        found = {"carried_votes"} if self.carries else set()
        if self.layout_i is not self.layout_j:
            found.add("cross_length")
        for layout in (self.layout_i, self.layout_j):
            if layout.kind == "free":
                found.add("free_positions")
            if layout.doc_bn is not None:
                found.add("documents")
            elif layout.kind == "runs":
                found.add("padding")
        return frozenset(found)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A way to compute attention.

    supports: features it honours, or None for all that exist. limits: reasons why a call is out of its reach.
    run: (q, k, v, *, spec, layout_i, layout_j, sink_logits_h, dropout_p) -> out; with carried_votes also carry_bj and
    carry_rows -> (out, votes (b u j) after each of the last u = carry_rows queries).
    lacks: what it needs that this machine, or a device of that type, has not; None for nothing.
    """

    name: str
    supports: frozenset[str] | None
    limits: Callable[[Call], list[str]]
    run: Callable[..., Tensor]
    lacks: Callable[[str], str | None] = lambda device_type: None

    def missing(self, wanted: frozenset[str]) -> list[str]:
        """Features wanted that this back-end does not honour."""
        return [] if self.supports is None else sorted(wanted - self.supports)


def _dense(what: str, size: int) -> list[str]:
    if size <= _dense_limit:
        return []
    return [
        f"would hold {what} of {size / GIB:.1f} GiB a layer, above the limit of {_dense_limit / GIB:.1f} GiB; "
        "allow it with xattn.dense_limit(bytes)"
    ]


def _reference_limits(call: Call) -> list[str]:
    itemsize = max(4, call.dtype.itemsize)
    return _dense("n x n logits", call.batch * call.spec.heads * call.layout_i.n * call.layout_j.n * itemsize)


def _sdpa_limits(call: Call) -> list[str]:
    size = sdpa.mask_bytes(call.spec, call.layout_i, call.layout_j, call.dtype.itemsize, batch=call.batch)
    return _dense("an n x n mask", size)


def _run_reference(*tensors: Tensor, carry_bj: Tensor | None = None, **call: object) -> Tensor | tuple[Tensor, Tensor]:
    out, carry = reference(*tensors, carry_bj=carry_bj, **call)
    return out if carry_bj is None else (out, carry)


REFERENCE = Backend(name="reference", supports=None, limits=_reference_limits, run=_run_reference)
SDPA = Backend(name="sdpa", supports=sdpa.SUPPORTS, limits=_sdpa_limits, run=sdpa.run)
TRITON = Backend(name="triton", supports=triton.SUPPORTS, limits=triton.limits, run=triton.run, lacks=triton.lacks)
BACKENDS: tuple[Backend, ...] = (SDPA, TRITON, REFERENCE)


def order(spec: AttentionSpec, device_type: str, *, plain: bool) -> tuple[Backend, ...]:
    """The back-ends as auto asks them, by measurement (benchmarks/attention.py); plain: no padding, no documents.

    On a GPU torch's own kernels (cuDNN's on a Hopper) are the fastest for plain attention and ours for all else, since
    there torch needs an n x n mask. On the CPU ours are for tests, by name only.
    """
    if device_type != "cuda":
        return tuple(sorted(BACKENDS, key=lambda backend: backend is TRITON))
    torch_is_fused = plain and sdpa.fused(spec)
    return tuple(sorted(BACKENDS, key=lambda backend: backend is not (SDPA if torch_is_fused else TRITON)))


def named(name: str) -> Backend:
    """The back-end of that name. Raises UnsupportedFeature for an unknown one."""
    by_name = {backend.name: backend for backend in BACKENDS}
    if name not in by_name:
        raise UnsupportedFeature(unknown("attn_backend", name, ["auto", *by_name]))
    return by_name[name]


def rejected(
    spec: AttentionSpec, call_features: frozenset[str] = frozenset(), device_type: str = "cpu"
) -> dict[str, str]:
    """Why each back-end that cannot serve the spec on such a device cannot: name -> reason."""
    wanted = spec.features | call_features
    reasons = {}
    for backend in BACKENDS:
        names = backend.missing(wanted)
        lacking = [f"does not implement {', '.join(names)}"] if names else []
        lacking += [need] if (need := backend.lacks(device_type)) else []
        if lacking:
            reasons[backend.name] = "; ".join(lacking)
    return reasons


def choose(spec: AttentionSpec, name: str = "auto", device_type: str = "cpu", *, plain: bool = True) -> Backend:
    """The back-end that a layer will run on, as far as its spec says; `resolve` adds what only a call knows.

    A named back-end is judged by what the machine has, not by where the model is now: it may be moved.

    Raises:
        UnsupportedFeature: the named back-end lacks a feature; the message lists all, and who could serve the layer.
    """
    if name == "auto":
        features = frozenset() if plain else frozenset({"padding", "documents"})
        reasons = rejected(spec, features, device_type)
        return next(backend for backend in order(spec, device_type, plain=plain) if backend.name not in reasons)
    chosen = named(name)
    here = "cuda" if torch.cuda.is_available() else device_type
    reasons = rejected(spec, device_type=here)
    if name in reasons:
        could = ", ".join(backend.name for backend in BACKENDS if backend.name not in reasons)
        raise UnsupportedFeature(f"attn_backend='{name}' {reasons[name]}; use attn_backend='auto' or one of: {could}")
    return chosen


def resolve(call: Call, name: str = "auto") -> Backend:
    """The back-end that runs this very call. Raises UnsupportedFeature when the named one, or every one, cannot."""
    reasons = dict(rejected(call.spec, call.features, call.device.type))
    asked = order(call.spec, call.device.type, plain=not call.features) if name == "auto" else (named(name),)
    for backend in asked:
        if backend.name not in reasons:
            limits = backend.limits(call)
            if not limits:
                return backend
            reasons[backend.name] = "; ".join(limits)
    could = [b.name for b in BACKENDS if b.name not in reasons and not b.limits(call)]
    cure = f"; use attn_backend='auto' or one of: {', '.join(could)}" if could else ""
    raise UnsupportedFeature("; ".join(f"attn_backend '{b.name}' {reasons[b.name]}" for b in asked) + cure)
