"""Sizes predicted from a spec, with nothing built: parameters, FLOPs, cache bytes, activation bytes.

All for one device, in bytes or counts; n is a sequence's length in tokens.
"""

from xattn.cache.kind import KvBudget, kinds
from xattn.ops import sdpa
from xattn.ops.backends import choose
from xattn.ops.layout import Layout
from xattn.spec.model import AttentionSpec, BlockSpec, LayersSpec, ModelSpec
from xattn.spec.pattern import Pattern
from xattn.spec.positions import SelfExtend

POSITION_BYTES = 8


def count_params(spec: ModelSpec) -> int:
    """Trainable parameters of the model; a tied head counts once."""
    m = spec.layers.dim
    tables = spec.num_tokens * (1 if spec.tie_embedding else 2) + (spec.max_seq_len if spec.use_abs_pos_emb else 0)
    norms = m * (1 + spec.layers.sandwich_norm)
    blocks = sum(_linear_params(block, m) + _extra_params(block, m) + 2 * norms for block in spec.layers.blocks)
    return tables * m + blocks + (m if spec.layers.pre_norm else 0)


def _linear_params(block: BlockSpec, m: int) -> int:
    """Weights that multiply every token."""
    attn, ff = block.attention, block.feedforward
    widths = 2 * attn.heads * attn.dim_head + 2 * attn.kv_heads * attn.dim_head
    return m * (widths + ff.inner(m) * (3 if ff.ff_glu else 2))


def _extra_params(block: BlockSpec, m: int) -> int:
    attn, ff = block.attention, block.feedforward
    biases = m + ff.inner(m) * (2 if ff.ff_glu else 1) if ff.ff_bias else 0
    return biases + (2 * attn.dim_head if block.qk_rmsnorm else 0) + (attn.heads if attn.sink_logits else 0)


def visible_pairs(pattern: Pattern, n: int) -> int:
    """Pairs of tokens that attend in one head of n tokens of one document."""
    window = min(pattern.sliding_window or n, n)
    back = window * (window + 1) // 2 + (n - window) * window
    # keys beyond the window among the first tokens: query i still sees min(sinks, i - window + 1) of them
    sinks = min(pattern.sink_tokens, n)
    late = n - window
    back += sum(min(sinks, i + 1) for i in range(late))
    if pattern.causal:
        return back
    ahead = (back if not sinks else window * (window + 1) // 2 + (n - window) * window) - n
    return back + ahead + sum(max(0, sinks - window - i) for i in range(sinks))


def forward_flops(spec: ModelSpec, n: int) -> int:
    """FLOPs (a multiply-add is two) of the matrix products of one forward pass over one sequence, head included."""
    m = spec.layers.dim
    linear = spec.num_tokens * m + sum(_linear_params(block, m) for block in spec.layers.blocks)
    attention = sum(
        2 * block.attention.heads * block.attention.dim_head * visible_pairs(block.attention.pattern, n)
        for block in spec.layers.blocks
    )
    return 2 * (linear * n + attention)


def train_flops(spec: ModelSpec, n: int) -> int:
    """FLOPs of one training step over one sequence: forward, and twice that for the backward."""
    return 3 * forward_flops(spec, n)


def kv_bytes(spec: ModelSpec | LayersSpec, n: int, itemsize: int = 2, kv_budget: KvBudget = None) -> int:
    """Bytes that a cache must hold after n tokens of one sequence, all layers: keys, values, and F of selective layers.

    A window layer keeps its last W - 1 keys and its sink tokens; selective attention keeps one float32 a key (float64
    beside float64 keys), and of its keys a kv_budget, where one is given.
    """
    layers = spec.layers if isinstance(spec, ModelSpec) else spec
    blocks = zip(layers.blocks, kinds(layers, kv_budget=kv_budget, full_len=_full_len(spec)), strict=True)
    return sum(kind.held(n) * kind.slot_bytes(block.attention, itemsize) for block, kind in blocks)


def cache_bytes(
    spec: ModelSpec | LayersSpec, n: int, *, batch: int = 1, itemsize: int = 2, kv_budget: KvBudget = None, rollback: int = 0,
    max_len: int | None = None, static: bool = False,
) -> int:  # fmt: skip
    """Bytes that `Cache.nbytes()` says after n tokens in each row: slots as allocated, with their positions.

    Layers that keep the same tokens share one int64 position a slot for the whole batch while all rows are alike; a pruned
    layer has one for each row. static: once `StaticStep` has begun, each ring has a slot more.
    """
    layers, total, tables = spec.layers if isinstance(spec, ModelSpec) else spec, 0, {}
    full_len = max_len if max_len is not None else _full_len(spec)
    of = kinds(layers, kv_budget=kv_budget, rollback=rollback, full_len=full_len)
    for i, (block, kind) in enumerate(zip(layers.blocks, of, strict=True)):
        slots = kind.capacity(n, max_len if n or static else None) + (static and kind.ring is not None)
        total += batch * slots * kind.slot_bytes(block.attention, itemsize)
        tables[i if kind.budget else (kind.ring, kind.sinks)] = slots * (batch if kind.budget else 1) * POSITION_BYTES
    return total + sum(tables.values())


def _full_len(spec: ModelSpec | LayersSpec) -> int | None:
    return spec.max_seq_len if isinstance(spec, ModelSpec) else None


def activation_bytes(spec: ModelSpec, *, batch: int, n: int, itemsize: int = 4, attn_backend: str = "auto") -> int:
    """Bytes that a training step keeps between forward and backward: what autograd saves, weights excluded.

    For eager torch on the CPU, without dropout, right to within a tenth; scratch space inside kernels is not counted.
    """
    tokens, m, layers = batch * n, spec.layers.dim, spec.layers.settled(n)
    # LayerNorm keeps its input and two statistics; RMSNorm is composite and keeps its normalised input as well
    norm = 2 * m + 1 if spec.layers.use_rmsnorm else m + 2
    per_token = norm + m if spec.layers.pre_norm else m
    for block in layers.blocks:
        per_token += 2 * norm * (1 + spec.layers.sandwich_norm) + _attention_floats(block, m, n, attn_backend)
        per_token += m + _feedforward_floats(block, m)
    masks = {block.attention: _mask_floats(block.attention, batch, n, attn_backend) for block in layers.blocks}
    gradients = spec.num_tokens * m * itemsize
    return int((tokens * per_token + sum(masks.values())) * itemsize) + gradients + 8 * tokens


def _feedforward_floats(block: BlockSpec, m: int) -> int:
    """Floats a token inside the feed-forward: before and after the activation, and the activated gate."""
    inner = block.feedforward.inner(m)
    return inner * (4 if block.feedforward.ff_glu else 2)


def _attention_floats(block: BlockSpec, m: int, n: int, attn_backend: str) -> float:
    """Floats a token of one attention layer: its input, q, k, v, out, and what its back-end keeps besides."""
    attn = block.attention
    q, kv = attn.heads * attn.dim_head, attn.kv_heads * attn.dim_head
    norms = 2 * (q + kv) if block.qk_rmsnorm else 0
    backend = choose(attn, attn_backend).name
    if backend == "triton":
        # rotated queries and keys, once more for Self-Extend's grouped positions, values, output and log-sum-exp
        copies = 2 if isinstance(attn.positions, SelfExtend) else 1
        return m + norms + (1 + copies) * q + (1 + copies) * kv + attn.heads
    if backend != "sdpa":
        # the definition repeats keys and values for every head; Self-Extend rotates queries and keys three times
        rotations = 2 if isinstance(attn.positions, SelfExtend) else 0
        rows = attn.heads * (2 + len(attn.score) + attn.sink_logits) + (attn.selection is not None)
        return m + norms + (4 + 2 * rotations) * q + rows * n
    window = attn.pattern.sliding_window
    copies = 1 if window is None or window >= n else 2 if attn.pattern.causal else 3
    sink = 2 * sdpa.SINK_COLUMNS * (attn.heads + copies * attn.kv_heads) + q if attn.sink_logits else 0
    return m + norms + 2 * q + 2 * kv * copies + attn.heads + sink


def _mask_floats(attn: AttentionSpec, batch: int, n: int, attn_backend: str) -> int:
    """Floats of the mask that all layers of one kind share."""
    if choose(attn, attn_backend).name != "sdpa":
        return 0
    layout = Layout.plain(n)
    return sdpa.mask_bytes(attn, layout, layout, itemsize=1, batch=batch)
