"""attend: checks shapes, resolves the back-end, runs it."""

import torch
from torch import Tensor

from xattn.errors import ConfigError, ShapeError
from xattn.ops.backends import Call, resolve
from xattn.ops.layout import Layout
from xattn.shapes import sizes
from xattn.spec.model import AttentionSpec


def attend(
    q_bhid: Tensor,
    k_bgjd: Tensor,
    v_bgjd: Tensor,
    *,
    spec: AttentionSpec,
    layout: Layout | None = None,
    key_layout: Layout | None = None,
    sink_logits_h: Tensor | None = None,
    carry_bj: Tensor | None = None,
    carry_rows: int = 1,
    training: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of queries over keys and values, with everything the spec says, on the back-end that can.

    Args:
        q_bhid: queries (b h i d), not yet rotated. k_bgjd, v_bgjd: keys and values (b g j d), g = kv_heads.
        layout: where the queries stand; default: tokens 0 to i - 1 of one document.
        key_layout: where the keys stand; default: the queries' layout.
        sink_logits_h: the learned sinks (h,), exactly when the spec has sink_logits.
        carry_bj: for attn_selective, the votes that queries before these cast against each key, float32 or better; zeros
            where there were none. Without it the keys are taken to be all there is: no query came before.
        carry_rows: how many of the last queries to return the votes after.
        training: whether attn_dropout drops.
        backend: "auto" or a back-end's name.
    Returns:
        out (b h i d); with carry_bj also the votes (b u j) after each of the last u = carry_rows queries.
    Raises:
        ShapeError: sizes that disagree. ConfigError: sink_logits_h without the flag, or the reverse; attn_selective over
            keys with a layout of their own and no carry_bj; carry_bj without attn_selective.
        UnsupportedFeature: no back-end, or not the named one, can serve the call.
    """
    layout = Layout.plain(q_bhid.shape[2], q_bhid.device) if layout is None else layout
    key_layout = layout if key_layout is None else key_layout
    known = {"h": spec.heads, "g": spec.kv_heads, "d": spec.dim_head, "i": layout.n, "j": key_layout.n}
    tensors = {"q": (q_bhid, "b h i d"), "k": (k_bgjd, "b g j d"), "v": (v_bgjd, "b g j d")}
    if sink_logits_h is not None:
        tensors["sink_logits"] = (sink_logits_h, "h")
    batch = sizes(known, **tensors)["b"]
    for at in (layout, key_layout):
        if at.pos_bn.shape[0] not in (1, batch):
            raise ShapeError(f"a layout has {at.pos_bn.shape[0]} rows for a batch of {batch}; give one row, or one each")
    if carry_bj is not None:
        if spec.selection is None:
            raise ConfigError("carry_bj has no effect: the spec has no attn_selective; drop it")
        sizes({"b": batch, "j": key_layout.n}, carry=(carry_bj, "b j"))
        if not 1 <= carry_rows <= layout.n:
            raise ShapeError(f"carry_rows={carry_rows} must be in 1 to the number of queries, {layout.n}")
    elif spec.selection is not None and layout is not key_layout:
        raise ConfigError(
            "attn_selective over keys that other queries came before needs those queries' votes: pass them as carry_bj "
            "(zeros if there were none), or all queries at once"
        )
    if spec.sink_logits != (sink_logits_h is not None):
        raise ConfigError(
            "the spec has sink_logits: pass sink_logits_h" if spec.sink_logits
            else "sink_logits_h has no effect: the spec has no sink_logits"
        )  # fmt: skip
    given = (q_bhid, k_bgjd, v_bgjd, sink_logits_h, carry_bj)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    call = Call(
        spec=spec, layout_i=layout, layout_j=key_layout, batch=batch, dtype=q_bhid.dtype, device=q_bhid.device,
        carries=carry_bj is not None, learns=learns,
    )  # fmt: skip
    carry = {} if carry_bj is None else {"carry_bj": carry_bj, "carry_rows": carry_rows}
    return resolve(call, backend).run(
        q_bhid, k_bgjd, v_bgjd, spec=spec, layout_i=layout, layout_j=key_layout, sink_logits_h=sink_logits_h,
        dropout_p=spec.attn_dropout if training else 0.0, **carry,
    )  # fmt: skip
