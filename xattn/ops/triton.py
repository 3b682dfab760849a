"""Back-end over xattn's own Triton kernels: every part in one fused forward and backward, memory linear in length.

Imports the kernels, and with them triton, when they are first needed. With TRITON_INTERPRET=1 in the environment before
that, they run on the CPU too (slowly: for tests).
"""

import importlib.util
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xattn.ops.layout import Layout
from xattn.spec.model import AttentionSpec
from xattn.spec.positions import Rope, SelfExtend
from xattn.spec.score import Alibi, Softcap

if TYPE_CHECKING:
    from xattn.kernels.call import Options
    from xattn.ops.backends import Call

SUPPORTS = frozenset(
    "causal bidirectional kv_heads padding documents free_positions cross_length "
    "rotary_pos_emb rotary_base rotary_emb_dim rope_scaling rope_scaling_factor rope_original_len "
    "self_extend_group self_extend_window logit_softcap alibi_pos_bias sliding_window sink_tokens sink_logits "
    "attn_selective sim_head selection_skip carried_votes".split()
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 256
LOG2E = 1.4426950408889634
# without a gradient, so many queries or fewer go to the decode kernel
DECODE_QUERIES = 16
_scratch_bytes = SCRATCH_BYTES = 256 * 2**20
# asked once, here: inside a function torch.compile would break its graph at the question
_INSTALLED = importlib.util.find_spec("triton") is not None


@contextmanager
def scratch_limit(limit_bytes: int):
    """Within this context, selection's penalties, in the backward with their gradients, take up to limit_bytes at once (256 MiB).

    Queries are taken in as many chunks as that needs, of 512 queries at least; fewer chunks are faster. Results are the same
    to rounding.
    """
    global _scratch_bytes
    before, _scratch_bytes = _scratch_bytes, limit_bytes
    try:
        yield
    finally:
        _scratch_bytes = before


def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def lacks(device_type: str) -> str | None:
    """What the machine, or a device of that type, lacks to run the kernels; None: nothing."""
    if not _INSTALLED:
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
    if call.carries:
        if call.learns:
            reasons.append("takes carried votes forward only; call it under torch.no_grad()")
    elif call.spec.selection is not None:
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
    carry_bj: Tensor | None = None,
    carry_rows: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as `reference` defines it; out (b h i d), with carry_bj also the votes (b u j)."""
    given = (q_bhid, k_bgjd, v_bgjd)
    at = {"spec": spec, "layout_i": layout_i, "layout_j": layout_j, "sink_logits_h": sink_logits_h}
    if carry_bj is not None:
        return _carried(*given, **at, carry_bj=carry_bj, carry_rows=carry_rows)
    few = layout_i.n <= DECODE_QUERIES and spec.selection is None
    if few and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*given, sink_logits_h))):
        return _decoded(*given, **at)[0]
    return with_lse(*given, **at)[0]


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
    from xattn.kernels.call import Inputs

    far = {}
    if _near(spec):
        far = _grouped_queries(q_bhid, spec, layout_i)
        far["far_k"] = _rotated(k_bgjd, spec.positions, layout_j, grouped=True)
    q, k = q_bhid, k_bgjd
    if isinstance(spec.positions, Rope):
        q, k = (_rotated(x, spec.positions, at) for x, at in ((q, layout_i), (k, layout_j)))
    inputs = Inputs(
        q=q, k=k, v=v_bgjd, **far, sink=sink_logits_h, slopes=_slopes(spec, layout_i),
        dead=_dead(q, k, spec, layout_j), **_places(spec, layout_i, layout_j, _near(spec)),
    )  # fmt: skip
    return attention(inputs, _options(spec))


def _decoded(
    q_bhid: Tensor,
    k_bgjd: Tensor,
    v_bgjd: Tensor,
    *,
    spec: AttentionSpec,
    layout_i: Layout,
    layout_j: Layout,
    sink_logits_h: Tensor | None = None,
    carry_bj: Tensor | None = None,
    carry_rows: int = 1,
) -> tuple[Tensor, Tensor]:
    """Attention without a gradient, and the votes (b u j) float32 where there is a carry; queries in order of positions."""
    from xattn.kernels.autograd import decode
    from xattn.kernels.call import Inputs
    from xattn.kernels.launch_decode import Decoding

    rope, far, turn = spec.positions, {}, None
    q, k = q_bhid, k_bgjd
    if isinstance(rope, Rope):
        q = _rotated(q, rope, layout_i)
        if _near(spec):
            # keys stay as they are, and the kernel turns them
            far, turn = _grouped_queries(q_bhid, spec, layout_i), _turns(rope, layout_j, spec.dim_head, k.dtype)
        else:
            k = _rotated(k, rope, layout_j)
    places = {"pos_i": _stored(layout_i, "pos"), "doc_i": _stored(layout_i, "doc")}
    plain = layout_j.kind == "plain"
    if not plain:
        places |= {"pos_j": _stored(layout_j, "pos"), "doc_j": _stored(layout_j, "doc")}
    inputs = Inputs(
        q=q, k=k, v=v_bgjd, **far, sink=sink_logits_h, slopes=_slopes(spec, layout_i),
        dead=_dead(q_bhid, k_bgjd, spec, layout_j), **places,
    )  # fmt: skip
    return decode(inputs, _options(spec), Decoding(plain=plain, carry=carry_bj, rows=carry_rows, turn=turn))


def _carried(
    q_bhid: Tensor, k_bgjd: Tensor, v_bgjd: Tensor, *, layout_i: Layout, carry_bj: Tensor, **call: object
) -> tuple[Tensor, Tensor]:
    """Attention and the votes after it, in the carry's dtype: a query's penalty has the votes of all at earlier positions."""
    order_bi = layout_i.order_bn
    if order_bi is not None:
        layout_i = Layout(*(None if t is None else t.gather(1, order_bi) for t in (layout_i.pos_bn, layout_i.doc_bn)))
        rows = order_bi[:, None, :, None].expand_as(q_bhid)
        q_bhid = q_bhid.gather(2, rows)
    out, after_buj = _decoded(q_bhid, k_bgjd, v_bgjd, layout_i=layout_i, carry_bj=carry_bj, **call)
    if order_bi is not None:
        out = torch.empty_like(out).scatter_(2, rows, out)
    return out, after_buj.to(torch.promote_types(carry_bj.dtype, torch.float32))


def _near(spec: AttentionSpec) -> int:
    """Self-Extend's neighbour window; 0 without it."""
    return spec.positions.self_extend_window if isinstance(spec.positions, SelfExtend) else 0


def _options(spec: AttentionSpec) -> "Options":
    """The numbers of a call."""
    from xattn.kernels.call import Options

    positions, pattern, near = spec.positions, spec.pattern, _near(spec)
    return Options(
        causal=pattern.causal, window=pattern.sliding_window or 0, sinks=pattern.sink_tokens,
        cap=next((part.logit_softcap for part in spec.score if isinstance(part, Softcap)), 0.0), near=near,
        group=positions.self_extend_group if near else 0,
        sim_head=spec.selection.sim_head if spec.selection is not None else -1,
        scale=spec.scale * (positions.temperature if isinstance(positions, Rope) else 1.0), scratch_bytes=_scratch_bytes,
    )  # fmt: skip


def _dead(q: Tensor, k: Tensor, spec: AttentionSpec, layout_j: Layout) -> Tensor | None:
    """The penalty at which a key is dead, in units of log2, as the kernels count."""
    if spec.selection is None or spec.selection.selection_skip is None:
        return None
    return (spec.selection.threshold(spec.reach(q, k), layout_j.n) * LOG2E).float().reshape(1)


def _rotated(x_bhnd: Tensor, rope: Rope, layout: Layout, *, grouped: bool = False, shift: int = 0) -> Tensor:
    """x turned to its positions, or to its grouped ones plus a shift; stored as b n h d."""
    dim_head, dtype = x_bhnd.shape[-1], x_bhnd.dtype

    def make() -> tuple[Tensor, Tensor]:
        pos_bn = rope.grouped(layout.pos_bn) + shift if grouped else layout.pos_bn
        return rope.table(pos_bn, dim_head, dtype)

    cos, sin = layout.memo(("rope", rope, dim_head, dtype, grouped, shift), make)
    x_bnhd = rope.rotate(x_bhnd.transpose(1, 2), (cos.transpose(1, 2), sin.transpose(1, 2)))
    return x_bnhd.transpose(1, 2)


def _grouped_queries(q: Tensor, spec: AttentionSpec, layout: Layout) -> dict[str, Tensor]:
    """Queries at Self-Extend's grouped positions; both ways, queries for the keys ahead of them too."""
    rope = spec.positions
    far = {"far_q": _rotated(q, rope, layout, grouped=True, shift=rope.shift)}
    if not spec.pattern.causal:
        far["ahead_q"] = _rotated(q, rope, layout, grouped=True, shift=-rope.shift)
    return far


def _turns(rope: SelfExtend, layout: Layout, dim_head: int, dtype: torch.dtype) -> Tensor:
    """cos and sin of each slot's position, then of its grouped one: (b 4 n half) float32."""

    def make() -> Tensor:
        tables = (rope.table(pos_bn, dim_head, dtype) for pos_bn in (layout.pos_bn, rope.grouped(layout.pos_bn)))
        return torch.cat([part for table in tables for part in table], dim=1)

    return layout.memo(("turns", rope, dim_head, dtype), make)


def _slopes(spec: AttentionSpec, layout: Layout) -> Tensor | None:
    if not any(isinstance(part, Alibi) for part in spec.score):
        return None

    def make() -> Tensor:
        # the kernels count in units of log2
        return (Alibi.slopes(spec.heads, layout.pos_bn.device) * LOG2E).float()

    return layout.memo(("slopes", spec.heads), make)


def _stored(layout: Layout, what: str) -> Tensor | None:
    """Positions ("pos") or documents ("doc") as kernels read them."""
    stored = layout.pos_bn if what == "pos" else layout.doc_bn
    return None if stored is None else layout.memo(what, lambda: stored.to(torch.int32).contiguous())


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
        places[f"pos_{name}"] = _stored(layout, "pos")
        if layout.doc_bn is not None:
            places[f"doc_{name}"] = _stored(layout, "doc")
    return places
