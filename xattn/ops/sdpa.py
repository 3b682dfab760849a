"""Back-end over torch's scaled_dot_product_attention: fused where torch has a kernel, blocked where a window allows.

Three plans: plain (torch's causal or full kernel, memory linear), blocked (a window as blocks that see their neighbours,
memory n x 2W), masked (one dense mask). Letters: t blocks, c queries a block, l keys near a block, s sink tokens.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from xattn.ops.layout import Layout
from xattn.ops.rotary import turned
from xattn.spec.model import AttentionSpec
from xattn.spec.positions import Rope

SUPPORTS = frozenset(
    "causal bidirectional kv_heads attn_dropout padding documents free_positions cross_length "
    "rotary_pos_emb rotary_base rotary_emb_dim rope_scaling rope_scaling_factor rope_original_len "
    "alibi_pos_bias sliding_window sink_tokens sink_logits".split()
)
# GPU kernels take head widths in multiples of 8
SINK_COLUMNS = 8


def plan(spec: AttentionSpec, layout_i: Layout, layout_j: Layout) -> str:
    """Which of the three plans serves the call: plain, blocked or masked."""
    window, n = spec.pattern.sliding_window, layout_i.n
    own = layout_i is layout_j
    if not spec.score and own and layout_i.kind == "plain" and (window is None or window >= n):
        return "plain"
    # sinks of packed or padded rows are not in the first slots
    sinks_in_front = spec.pattern.sink_tokens == 0 or layout_i.kind == "plain"
    seen = (1 if spec.pattern.causal else 2) * (window or n)
    if own and layout_i.kind != "free" and sinks_in_front and seen < n:
        return "blocked"
    return "masked"


def fused(spec: AttentionSpec) -> bool:
    """Whether torch has a fused kernel for the spec on a GPU, given tokens of one document and no padding."""
    return not spec.score and spec.pattern.sliding_window is None and not spec.sink_logits


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
    """Attention as `reference` defines it; out (b h i d). Masks and rotary tables are made once for each layout."""
    scale = spec.scale
    if isinstance(spec.positions, Rope):
        scale *= spec.positions.temperature
        q_bhid, k_bgjd = (turned(x, spec.positions, at) for x, at in ((q_bhid, layout_i), (k_bgjd, layout_j)))
    dim_head = q_bhid.shape[-1]
    if sink_logits_h is not None:
        q_bhid = torch.cat([q_bhid, _sink_query(q_bhid, sink_logits_h / scale)], dim=-1)
        k_bgjd, v_bgjd = pad(k_bgjd, (0, SINK_COLUMNS)), pad(v_bgjd, (0, SINK_COLUMNS))
    chosen = {"plain": _plain, "blocked": _blocked, "masked": _masked}[plan(spec, layout_i, layout_j)]
    out = chosen(
        q_bhid, k_bgjd, v_bgjd, spec=spec, layout_i=layout_i, layout_j=layout_j,
        sink=sink_logits_h is not None, scale=scale, dropout_p=dropout_p,
    )  # fmt: skip
    return out[..., :dim_head]


def mask_bytes(spec: AttentionSpec, layout_i: Layout, layout_j: Layout, itemsize: int, *, batch: int = 1) -> int:
    """Bytes of the mask that the call would hold."""
    chosen = plan(spec, layout_i, layout_j)
    if chosen == "plain":
        return 0
    column = (spec.heads if spec.score else 1) * itemsize
    if chosen == "masked":
        rows = max(layout_i.pos_bn.shape[0], layout_j.pos_bn.shape[0])
        return rows * layout_i.n * (layout_j.n + spec.sink_logits) * column
    c = block_size(spec)
    keys = (2 if spec.pattern.causal else 3) * c + min(spec.pattern.sink_tokens, layout_i.n) + spec.sink_logits
    return batch * -(-layout_i.n // c) * c * keys * column


def _sink_query(q_bhid: Tensor, value_h: Tensor) -> Tensor:
    """Extra query columns whose product with the sink's key is the sink logit, and with any other key zero."""
    column = repeat(value_h.to(q_bhid.dtype), "h -> b h i 1", b=q_bhid.shape[0], i=q_bhid.shape[2])
    return pad(column, (0, SINK_COLUMNS - 1))


def _with_sink(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (... j d) with the sink in front: its key answers only the extra column, its value is zero."""
    sink_k = torch.zeros_like(k[..., :1, :])
    sink_k[..., k.shape[-1] - SINK_COLUMNS] = 1.0
    return torch.cat([sink_k, k], dim=-2), torch.cat([torch.zeros_like(v[..., :1, :]), v], dim=-2)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float, dropout_p: float) -> Tensor:
    """torch's attention with keys and values shared by groups of query heads."""
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout_p, enable_gqa=q.shape[1] != k.shape[1]
    )


def _plain(
    q: Tensor, k: Tensor, v: Tensor, *, spec: AttentionSpec, layout_i: Layout, layout_j: Layout, sink: bool, scale: float,
    dropout_p: float,
) -> Tensor:  # fmt: skip
    causal = spec.pattern.causal
    if sink:
        k, v = _with_sink(k, v)
        if causal:
            # torch's causal mask is square: a dummy first query keeps the diagonal where it was
            q = torch.cat([torch.zeros_like(q[:, :, :1]), q], dim=2)
    out = _attend(q, k, v, mask=None, causal=causal, scale=scale, dropout_p=dropout_p)
    return out[:, :, 1:] if sink and causal else out


def _masked(
    q: Tensor, k: Tensor, v: Tensor, *, spec: AttentionSpec, layout_i: Layout, layout_j: Layout, sink: bool, scale: float,
    dropout_p: float,
) -> Tensor:  # fmt: skip
    key = ("mask", spec.pattern, spec.positions, spec.score, spec.heads, q.dtype, sink, layout_j)
    mask, seen = layout_i.memo(
        key,
        lambda: _mask(
            spec, layout_i.pos_bn, layout_j.pos_bn, layout_i.doc_bn, layout_j.doc_bn, sink=sink, dtype=q.dtype
        ),
    )
    if sink:
        k, v = _with_sink(k, v)
    out = _attend(q, k, v, mask=mask, causal=False, scale=scale, dropout_p=dropout_p)
    return out.masked_fill(~seen, 0.0)


def _mask(
    spec: AttentionSpec,
    pos_bi: Tensor,
    pos_bj: Tensor,
    doc_bi: Tensor | None,
    doc_bj: Tensor | None,
    *,
    sink: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """torch's additive mask (b 1|h i j), and which queries see anything (b 1 i 1).

    A query that sees nothing is let see everything, so that no kernel divides by zero; the caller blanks its output.
    Additive, since torch turns a bool mask into one again in every layer, and keeps each for the backward.
    """
    allowed_bij = spec.pattern.allowed(pos_bi, pos_bj, doc_bi, doc_bj)
    seen = allowed_bij.any(dim=-1)[:, None, :, None]
    heads = spec.heads if spec.score else 1
    bias = torch.zeros(1, heads, 1, 1, dtype=torch.promote_types(dtype, torch.float32), device=allowed_bij.device)
    distance_bij = spec.positions.distance(pos_bi, pos_bj)
    for part in spec.score:
        bias = part.modify(bias, distance_bij)
    mask = bias.masked_fill(~(allowed_bij[:, None] | ~seen), float("-inf")).to(dtype)
    return pad(mask, (1, 0)) if sink else mask, seen


def _blocked(
    q: Tensor, k: Tensor, v: Tensor, *, spec: AttentionSpec, layout_i: Layout, layout_j: Layout, sink: bool, scale: float,
    dropout_p: float,
) -> Tensor:  # fmt: skip
    b, n = q.shape[0], q.shape[2]
    c, sinks, both_sides = block_size(spec), min(spec.pattern.sink_tokens, n), not spec.pattern.causal
    key = ("blocks", spec.pattern, spec.positions, spec.score, spec.heads, q.dtype, sink, b)
    mask, seen = layout_i.memo(key, lambda: _block_mask(spec, layout_i, b=b, sink=sink, dtype=q.dtype))

    q = rearrange(pad(q, (0, 0, 0, -n % c)), "b h (t c) d -> (b t) h c d", c=c)
    fronts = [x[:, :, :sinks] for x in (k, v)]
    k, v = (_stretches(x, c, both_sides=both_sides) for x in (k, v))
    if sinks:
        t = k.shape[0] // b
        k, v = (
            torch.cat([repeat(front, "b g s d -> (b t) g s d", t=t), x], dim=2)
            for front, x in zip(fronts, (k, v), strict=True)
        )
    if sink:
        k, v = _with_sink(k, v)
    out = _attend(q, k, v, mask=mask, causal=False, scale=scale, dropout_p=dropout_p)
    if layout_i.kind != "plain":
        out = out.masked_fill(~seen, 0.0)
    return rearrange(out, "(b t) h c d -> b h (t c) d", b=b)[:, :, :n]


def block_size(spec: AttentionSpec) -> int:
    """Queries a block: the window, in kernels' favourite multiple of 8; the window's keys lie within one block more."""
    return max(16, -(-spec.pattern.sliding_window // 8) * 8)


def _stretches(x_bgnd: Tensor, c: int, *, both_sides: bool, value: float = 0) -> Tensor:
    """The keys near each block of c slots, ((b t) g l d): the block before, the block, and the block after if both_sides."""
    n = x_bgnd.shape[2]
    padded = pad(x_bgnd, (0, 0, c, -n % c + (c if both_sides else 0)), value=value)
    blocks = rearrange(padded, "b g (t c) d -> b g t c d", c=c)
    t = -(-n // c)
    stretch = torch.cat([blocks[:, :, i : i + t] for i in range(3 if both_sides else 2)], dim=3)
    return rearrange(stretch, "b g t l d -> (b t) g l d")


def _block_mask(spec: AttentionSpec, layout: Layout, *, b: int, sink: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mask of every block ((b t) 1|h c l) and which of its queries see anything."""
    c, both_sides = block_size(spec), not spec.pattern.causal

    def near(x_bn: Tensor) -> Tensor:
        return _stretches(x_bn[:, None, :, None], c, both_sides=both_sides, value=-1)[:, 0, :, 0]

    pos_j, doc_j = near(layout.pos_bn), None if layout.doc_bn is None else near(layout.doc_bn)
    # a block's own slots are the second c of its stretch
    pos_i, doc_i = pos_j[:, c : 2 * c], None if doc_j is None else doc_j[:, c : 2 * c]
    sinks = min(spec.pattern.sink_tokens, layout.n)
    if sinks:
        # the sinks stand in front of each block; where the stretch holds them again they must not count twice
        pos_j = torch.where(pos_j < sinks, -1, pos_j)
        front = torch.arange(sinks, device=pos_j.device).expand(pos_j.shape[0], -1)
        pos_j = torch.cat([front, pos_j], dim=1)
    mask, seen = _mask(spec, pos_i, pos_j, doc_i, doc_j, sink=sink, dtype=dtype)
    if layout.pos_bn.shape[0] == b:
        return mask, seen
    return repeat(mask, "t h c l -> (b t) h c l", b=b), repeat(seen, "t h c l -> (b t) h c l", b=b)
