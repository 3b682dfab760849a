"""Who is measured: SDPA's back-ends, FlexAttention, x-transformers and ours, each as a closure that returns its output."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from gpu import device, on_gpu
from harness import ROOT  # noqa: F401  (puts this checkout on the path)
from table import CUDNN, FA2, FLEX, OURS, OURS_CAUSAL, OURS_KERNEL, OURS_UNSKIPPED, XT_COMPILED, XT_EAGER, Case
from torch import Tensor

from xattn.ops.layout import Layout
from xattn.spec.flags import parse_attention
from xattn.spec.model import AttentionSpec


@dataclass(frozen=True, kw_only=True)
class Given:
    """One case's tensors: q (b h n d), k, v (b g n d), sink logits (h) or None, dout like q, and where tokens stand."""

    case: Case
    spec: AttentionSpec
    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    dout: Tensor

    @property
    def learned(self) -> tuple[Tensor, ...]:
        """What a backward differentiates by."""
        return (self.q, self.k, self.v) if self.sink is None else (self.q, self.k, self.v, self.sink)


def spec_of(case: Case) -> AttentionSpec:
    """The layer that a case describes."""
    return parse_attention(causal=True, heads=case.h, dim_head=case.d, **case.flags)


def layout_of(case: Case) -> Layout:
    """Where a case's tokens stand; the same in every row of the batch."""
    if not case.documents:
        return Layout.plain(case.n, device())
    ids = torch.cat([torch.full((len(run),), i) for i, run in enumerate(case.runs())])
    return Layout.build(case.n, device=device(), doc_ids_bn=ids.to(device()).expand(case.b, -1).contiguous())


def draw(case: Case, dtype: torch.dtype) -> Given:
    """Normal numbers, the same on every run."""
    torch.manual_seed(0)
    spec = spec_of(case)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device(), dtype=dtype)

    q, dout = (normal(case.b, case.h, case.n, case.d) for _ in range(2))
    k, v = (normal(case.b, spec.kv_heads, case.n, case.d) for _ in range(2))
    if case.live is not None:
        _mark(q, k, case.live)
    sink = normal(case.h).requires_grad_() if spec.sink_logits else None
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return Given(case=case, spec=spec, layout=layout_of(case), q=q, k=k, v=v, sink=sink, dout=dout)


def _mark(q: Tensor, k: Tensor, live: float) -> None:
    """Make head 0 vote .2 a token against every key outside the living blocks of 64, and never against those inside."""
    n, d = q.shape[2:]
    blocks = torch.rand(-(-n // 64), generator=torch.Generator().manual_seed(0)) < live
    alive = blocks.repeat_interleave(64)[:n].to(k.device)
    q[:, 0], k[:, 0] = 0.0, 0.0
    q[:, 0, :, 0] = 1.0
    k[:, 0, :, 0] = torch.where(alive, -0.2, 0.2) * d**0.5


# Ours


def ours(x: Given) -> Callable[[], Tensor]:
    """Our kernels on all that the case asks, rotations included."""
    from xattn.ops.triton import run

    extra = {} if x.sink is None else {"sink_logits_h": x.sink}
    return lambda: run(x.q, x.k, x.v, spec=x.spec, layout_i=x.layout, layout_j=x.layout, **extra)


def ours_causal(x: Given) -> Callable[[], Tensor]:
    """Our kernels at the same sizes without any flag."""
    from xattn.ops.triton import run

    case = replace(x.case, flags={}, documents=0)
    spec, layout, groups = spec_of(case), Layout.plain(case.n, device()), x.q.shape[1] // x.k.shape[1]
    k, v = (x.k, x.v) if groups == 1 else (t.detach().repeat_interleave(groups, 1).requires_grad_() for t in (x.k, x.v))
    work = lambda: run(x.q, k, v, spec=spec, layout_i=layout, layout_j=layout)  # noqa: E731
    work.learned = (x.q, k, v)
    return work


def ours_unskipped(x: Given) -> Callable[[], Tensor]:
    """Our kernels with the same selection, every block visited."""
    flags = {name: value for name, value in x.case.flags.items() if name != "selection_skip"}
    return ours(replace(x, spec=spec_of(replace(x.case, flags=flags))))


def recorded(x: Given) -> tuple[Any, Any]:
    """What the back-end hands to the kernels: (Inputs, Options), tensors rotated."""
    from xattn.kernels import autograd

    seen: list[tuple[Any, Any]] = []

    def record(inputs: Any, options: Any) -> tuple[Tensor, None]:
        seen.append((inputs, options))
        return inputs.q, None

    with mock.patch.object(autograd, "attention", record), torch.no_grad():
        ours(x)()
    return seen[0]


def ours_kernel(x: Given) -> Callable[[], Tensor]:
    """Our kernels on inputs that are rotated already."""
    from xattn.kernels.autograd import attention

    inputs, options = recorded(x)
    return lambda: attention(inputs, options)[0]


# SDPA


def sdpa(name: str) -> Callable[[Given], Callable[[], Tensor]]:
    """One of SDPA's back-ends on plain causal attention, whatever the case's flags."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, name)

    def make(x: Given) -> Callable[[], Tensor]:
        def work() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True)

        return work

    return make


# FlexAttention


def never_dense() -> None:
    """Compiling past the recompile limit is an error: FlexAttention would silently run dense instead."""
    config = torch._dynamo.config
    config.recompile_limit, config.accumulated_recompile_limit = 256, 4096
    if hasattr(config, "fail_on_recompile_limit_hit"):
        config.fail_on_recompile_limit_hit = True


def flex(x: Given, *, compiled: bool = True) -> Callable[[], Tensor]:
    """FlexAttention's way to the case: a mask; with attn_selective a stored F; with Self-Extend two passes and a merge."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    never_dense()

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False) if compiled else function

    attention = compile_(flex_attention)

    def mask(rule: Callable[..., Tensor]) -> Any:
        return create_block_mask(rule, None, None, x.case.n, x.case.n, device=x.q.device)

    flags = x.case.flags
    if "self_extend_group" in flags:
        return _flex_extend(x, attention, mask)
    if "attn_selective" in flags:
        return _flex_select(x, attention, mask, compile_)
    if window := flags.get("sliding_window"):
        block = mask(lambda b, h, i, j: (i >= j) & (i - j < window))
    else:
        block = mask(lambda b, h, i, j: i >= j)
    return lambda: attention(x.q, x.k, x.v, block_mask=block)


def _flex_select(x: Given, attention: Callable, mask: Callable, compile_: Callable) -> Callable[[], Tensor]:
    block, scale = mask(lambda b, h, i, j: i >= j), x.case.d**-0.5

    def penalty(q: Tensor, k: Tensor) -> Tensor:
        votes = F.relu(((q[:, 0] @ k[:, 0].transpose(-1, -2)) * scale).float()).tril(-1)
        votes = torch.cat((torch.zeros_like(votes[:, :, :1]), votes[:, :, 1:]), -1)
        return (votes.cumsum(1) - votes).to(q.dtype)

    penalty = compile_(penalty)

    def work() -> Tensor:
        stored = penalty(x.q, x.k)
        return attention(x.q, x.k, x.v, score_mod=lambda s, b, h, i, j: s - stored[b, i, j], block_mask=block)

    return work


def _flex_extend(x: Given, attention: Callable, mask: Callable) -> Callable[[], Tensor]:
    # forward only: rotated inputs are taken as given
    inputs, _ = recorded(x)
    window = x.case.flags["self_extend_window"]
    near = mask(lambda b, h, i, j: (i >= j) & (i - j < window))
    far = mask(lambda b, h, i, j: i - j >= window)

    def work() -> Tensor:
        a, lse_a = attention(inputs.q, inputs.k, x.v, block_mask=near, return_lse=True)
        b, lse_b = attention(inputs.far_q, inputs.far_k, x.v, block_mask=far, return_lse=True)
        most = torch.maximum(lse_a, lse_b)
        share_a, share_b = (lse_a - most).exp()[..., None], (lse_b - most).exp()[..., None]
        return ((a * share_a + b * share_b) / (share_a + share_b)).to(a.dtype)

    return work


def compiled_graphs() -> int:
    """Graphs that torch.compile has made since the last reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# x-transformers


def x_transformers(compiled: bool) -> Callable[[Given], Callable[[], Tensor]]:
    """x-transformers' attention, which is dense for selective attention."""

    def make(x: Given) -> Callable[[], Tensor]:
        from x_transformers.attend import Attend

        never_dense()
        attend = Attend(causal=True, selective="attn_selective" in x.case.flags, heads=x.case.h).to(x.q.device)
        run = torch.compile(attend, dynamic=False) if compiled else attend
        return lambda: run(x.q, x.k, x.v)[0]

    return make


PEERS: dict[str, Callable[[Given], Callable[[], Tensor]]] = {
    FA2: sdpa("FLASH_ATTENTION"),
    CUDNN: sdpa("CUDNN_ATTENTION"),
    FLEX: flex,
    XT_EAGER: x_transformers(False),
    XT_COMPILED: x_transformers(True),
    OURS: ours,
    OURS_CAUSAL: ours_causal,
    OURS_KERNEL: ours_kernel,
    OURS_UNSKIPPED: ours_unskipped,
}
OWN = (OURS, OURS_CAUSAL, OURS_KERNEL, OURS_UNSKIPPED)


def unable(what: str) -> str | None:
    """Why this machine cannot run a peer; None: it can."""
    if what in (XT_EAGER, XT_COMPILED) and importlib.util.find_spec("x_transformers") is None:
        return "package x-transformers is not installed"
    if what in (FA2, CUDNN, FLEX, XT_COMPILED) and not on_gpu():
        return "needs a CUDA GPU"
    if what == CUDNN and not torch.backends.cudnn.is_available():
        return "torch has no cuDNN"
    return None
