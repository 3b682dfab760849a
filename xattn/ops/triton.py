"""Back-end over xattn's own Triton kernels: every part in one fused forward and backward, memory linear in length.

Imports the kernels, and with them triton, when they are first needed. With TRITON_INTERPRET=1 in the environment before
that, they run on the CPU too (slowly: for tests).
"""

import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xattn.ops.layout import Layout
from xattn.spec.model import AttentionSpec
from xattn.spec.positions import Rope, SelfExtend
from xattn.spec.score import Alibi, Softcap

if TYPE_CHECKING:
    from xattn.ops.backends import Call

SUPPORTS = frozenset(
    "causal bidirectional kv_heads padding documents free_positions cross_length "
    "rotary_pos_emb rotary_base rotary_emb_dim rope_scaling rope_scaling_factor rope_original_len "
    "self_extend_group self_extend_window logit_softcap alibi_pos_bias sliding_window sink_tokens sink_logits "
    "attn_selective sim_head selection_skip".split()
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 256
# what selection may hold at once, in bytes: F, and in the backward its gradient
SCRATCH_BYTES = 256 * 2**20
LOG2E = 1.4426950408889634
_scratch_bytes = SCRATCH_BYTES


def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def lacks(device_type: str) -> str | None:
    """What the machine, or a device of that type, lacks to run the kernels; None: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton; pip install triton"
    if interpreted():
        return None if device_type == "cpu" else "runs on the CPU only while TRITON_INTERPRET=1"
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    return None if device_type == "cuda" else "needs a CUDA GPU"


def limits(call: "Call") -> list[str]:
    """Why this very call is out of the kernels' reach; empty: it is not."""
    reasons = [] if (lacking := lacks(call.device.type)) is None else [lacking]
    if call.dtype not in DTYPES:
        reasons.append(f"computes in bfloat16, float16 or float32, not {str(call.dtype).removeprefix('torch.')}")
    d = call.spec.dim_head
    if d > MAX_WIDTH:
        reasons.append(f"takes dim_head up to {MAX_WIDTH}, not {d}")
    if call.spec.selection is not None:
        if d > 128 and call.dtype == torch.float32:
            reasons.append(f"takes attn_selective in float32 with dim_head up to 128, not {d}")
        if "free" in (call.layout_i.kind, call.layout_j.kind):
            reasons.append("takes attn_selective where slots stand in order of their positions, not in any order")
    return reasons


def run(
    q_bhid: Tensor,
    k_bgjd: Tensor,
    v_bgjd: Tensor,
    *,
    spec: AttentionSpec,
    layout_i: Layout,
    layout_j: Layout,
    sink_logits_h: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention as `reference` defines it; out (b h i d)."""
    return with_lse(
        q_bhid, k_bgjd, v_bgjd, spec=spec, layout_i=layout_i, layout_j=layout_j, sink_logits_h=sink_logits_h
    )[0]


def with_lse(
    q_bhid: Tensor,
    k_bgjd: Tensor,
    v_bgjd: Tensor,
    *,
    spec: AttentionSpec,
    layout_i: Layout,
    layout_j: Layout,
    sink_logits_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, and each row's log2 of the sum of 2^logit, float32 (b h i); -inf for a row that sees nothing."""
    from xattn.kernels.autograd import attention
    from xattn.kernels.launch import Inputs, Options

    positions, pattern = spec.positions, spec.pattern
    scale, far = spec.scale, {}
    near = positions.self_extend_window if isinstance(positions, SelfExtend) else 0
    if isinstance(positions, Rope):
        scale *= positions.temperature
        if near:
            far = _grouped(q_bhid, k_bgjd, spec, layout_i, layout_j)
        q_bhid, k_bgjd = (_rotated(x, positions, at) for x, at in ((q_bhid, layout_i), (k_bgjd, layout_j)))
    dead = None
    if spec.selection is not None and spec.selection.selection_skip is not None:
        # the kernels count in units of log2
        dead = (spec.selection.threshold(spec.reach(q_bhid, k_bgjd), layout_j.n) * LOG2E).float().reshape(1)
    cap = next((part.logit_softcap for part in spec.score if isinstance(part, Softcap)), 0.0)
    alibi = any(isinstance(part, Alibi) for part in spec.score)
    inputs = Inputs(
        q=q_bhid, k=k_bgjd, v=v_bgjd, **far, sink=sink_logits_h,
        slopes=_slopes(spec.heads, layout_i) if alibi else None, dead=dead, **_places(spec, layout_i, layout_j, near),
    )  # fmt: skip
    options = Options(
        causal=pattern.causal, window=pattern.sliding_window or 0, sinks=pattern.sink_tokens, cap=cap, near=near,
        group=positions.self_extend_group if near else 0,
        sim_head=spec.selection.sim_head if spec.selection is not None else -1, scale=scale, scratch_bytes=_scratch_bytes,
    )  # fmt: skip
    return attention(inputs, options)


def _rotated(x_bhnd: Tensor, rope: Rope, layout: Layout, *, grouped: bool = False, shift: int = 0) -> Tensor:
    """x turned to its positions, or to its grouped ones plus a shift; stored as b n h d."""
    dim_head, dtype = x_bhnd.shape[-1], x_bhnd.dtype

    def make() -> tuple[Tensor, Tensor]:
        pos_bn = rope.grouped(layout.pos_bn) + shift if grouped else layout.pos_bn
        return rope.table(pos_bn, dim_head, dtype)

    cos, sin = layout.memo(("rope", rope, dim_head, dtype, grouped, shift), make)
    x_bnhd = rope.rotate(x_bhnd.transpose(1, 2), (cos.transpose(1, 2), sin.transpose(1, 2)))
    return x_bnhd.transpose(1, 2)


def _grouped(q: Tensor, k: Tensor, spec: AttentionSpec, layout_i: Layout, layout_j: Layout) -> dict[str, Tensor]:
    """Queries and keys at Self-Extend's grouped positions; both ways, queries for the keys ahead of them too."""
    rope = spec.positions
    far = {
        "far_q": _rotated(q, rope, layout_i, grouped=True, shift=rope.shift),
        "far_k": _rotated(k, rope, layout_j, grouped=True),
    }
    if not spec.pattern.causal:
        far["ahead_q"] = _rotated(q, rope, layout_i, grouped=True, shift=-rope.shift)
    return far


def _slopes(heads: int, layout: Layout) -> Tensor:
    def make() -> Tensor:
        # the kernels count in units of log2
        return (Alibi.slopes(heads, layout.pos_bn.device) * LOG2E).float()

    return layout.memo(("slopes", heads), make)


def _places(spec: AttentionSpec, layout_i: Layout, layout_j: Layout, near: int) -> dict[str, Tensor]:
    """Positions, documents and walks of the layouts; nothing where slot i of both simply holds token i."""
    if layout_i is layout_j and layout_i.kind == "plain":
        return {}
    from xattn.kernels.walk import table

    pattern = spec.pattern

    def make() -> tuple[Tensor, Tensor]:
        return table(
            layout_i.pos_bn, layout_j.pos_bn, layout_i.doc_bn, layout_j.doc_bn, causal=pattern.causal,
            window=pattern.sliding_window or 0, sinks=pattern.sink_tokens, near=near,
            ordered=layout_i is layout_j and layout_i.kind != "free",
        )  # fmt: skip

    walk_i, walk_j = layout_i.memo(("walk", pattern, near, layout_j), make)
    places = {"walk_i": walk_i, "walk_j": walk_j}
    for name, layout in (("i", layout_i), ("j", layout_j)):
        places[f"pos_{name}"] = layout.memo("pos", lambda layout=layout: layout.pos_bn.to(torch.int32).contiguous())
        if layout.doc_bn is not None:
            places[f"doc_{name}"] = layout.memo("doc", lambda layout=layout: layout.doc_bn.to(torch.int32).contiguous())
    return places
