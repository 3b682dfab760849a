"""Specs: frozen data that says what a layer, a stack and a model are. What must hold between parts is written here, once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from xattn.spec.features import features
from xattn.spec.normaliser import SinkSoftmax, Softmax
from xattn.spec.part import Part, flag, require
from xattn.spec.pattern import Pattern
from xattn.spec.positions import NoPositions, SelfExtend
from xattn.spec.score import Score, Softcap
from xattn.spec.selection import Selection


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One attention layer: sizes, and one part for each of the five stages (score is a chain of parts)."""

    heads: int = flag(int, 8, "query heads", aliases=("attn_heads",))
    kv_heads: int | None = flag(
        int, None, "key and value heads, a divisor of heads (GQA; 1 is MQA; default: heads)", aliases=("attn_kv_heads",)
    )
    dim_head: int | None = flag(int, None, "width of a head (default: dim / heads)", aliases=("attn_dim_head",))
    attn_dropout: float = flag(float, 0.0, "dropout on the attention weights while training", inference=True)
    positions: NoPositions = field(default_factory=NoPositions)
    score: tuple[Score, ...] = ()
    pattern: Pattern = field(default_factory=Pattern)
    selection: Selection | None = None
    normaliser: Softmax = field(default_factory=Softmax)

    def __post_init__(self) -> None:
        heads, kv_heads = self.heads, self.kv_heads
        require(heads >= 1, f"heads={heads} must be at least 1")
        if kv_heads is None:
            object.__setattr__(self, "kv_heads", heads)
        divisors = tuple(g for g in range(1, heads + 1) if heads % g == 0)
        require(
            self.kv_heads in divisors, f"heads={heads} is not a multiple of kv_heads={kv_heads}; use kv_heads in {divisors}"
        )
        require(self.dim_head is not None and self.dim_head >= 1, f"dim_head={self.dim_head} must be at least 1")
        require(0 <= self.attn_dropout < 1, f"attn_dropout={self.attn_dropout} must be in [0, 1)")
        self._laws_between_parts()
        # not a field: it follows from them, and compiled code can read it where it cannot walk over fields
        object.__setattr__(self, "features", features(self))

    def _laws_between_parts(self) -> None:
        if self.selection is not None:
            require(
                self.pattern.causal,
                "attn_selective=True needs a causal model: a token can only hide others from later ones; use Decoder",
            )
            require(
                self.selection.sim_head < self.heads,
                f"sim_head={self.selection.sim_head} is out of range: the layer has heads 0 to {self.heads - 1}",
            )
        width = getattr(self.positions, "rotary_emb_dim", None)
        require(
            width is None or width <= self.dim_head,
            f"rotary_emb_dim={width} is wider than a head (dim_head={self.dim_head}); give at most dim_head",
        )
        if hasattr(self.positions, "rotary_emb_dim"):
            require(
                width is not None or self.dim_head % 2 == 0,
                f"rotary_pos_emb turns pairs, but dim_head={self.dim_head} is odd; set an even rotary_emb_dim",
            )
        window = self.pattern.sliding_window
        if isinstance(self.positions, SelfExtend) and window is not None:
            near = self.positions.near
            if self.positions.unsettled and self.pattern.sink_tokens == 0:
                trained = self.positions.stretched(self.positions.self_extend_trained_len)
                require(
                    trained < window,
                    f"self_extend_group=auto has no effect: sliding_window={window} shows nothing beyond the trained length, "
                    f"{trained}; give self_extend_group a list with None for the windowed layers",
                )
            require(
                near < window,
                f"self_extend_group={self.positions.self_extend_group} has no effect: self_extend_window={near} covers "
                f"everything that sliding_window={window} shows; make it smaller, or give self_extend_group a list "
                "with None for the windowed layers",
            )

    @property
    def unsettled(self) -> bool:
        """Whether the length to come must be known before this layer can run: self_extend_group=auto."""
        return self.positions.unsettled

    def settled(self, n: int) -> "AttentionSpec":
        """The layer for sequences of at most n tokens, all calls of one sequence together; itself unless it is unsettled."""
        return _settled(self, n) if self.unsettled else self

    def max_positions(self, trained: int) -> int | None:
        """Tokens of a sequence whose distances are all known to a model trained at that length; None for no limit."""
        window = self.pattern.sliding_window
        within = window is not None and window <= trained and self.pattern.sink_tokens == 0
        return None if within else self.positions.max_positions(trained)

    @property
    def scale(self) -> float:
        """What dot products are multiplied by: dim_head ** -0.5."""
        return self.dim_head**-0.5

    def reach(self, q_bhid: Tensor, k_bgjd: Tensor) -> Tensor:
        """A bound on the logits' size from the longest query and key (ALiBi, which only lowers them, aside); a number."""
        longest = [x.detach().norm(dim=-1).amax().to(torch.promote_types(x.dtype, torch.float32)) for x in (q_bhid, k_bgjd)]
        reach = longest[0] * longest[1] * self.scale * getattr(self.positions, "temperature", 1.0)
        caps = [part.logit_softcap for part in self.score if isinstance(part, Softcap)]
        return reach.clamp(max=min(caps)) if caps else reach

    @property
    def sink_logits(self) -> bool:
        """Whether the layer owns a learned sink logit for each head."""
        return isinstance(self.normaliser, SinkSoftmax)

    def parts(self) -> Iterator[Part]:
        """The layer's parts in the order of the stages."""
        yield self.positions
        yield from self.score
        yield self.pattern
        if self.selection is not None:
            yield self.selection
        yield self.normaliser


# a length that stands for any: what a back-end must honour does not depend on how far self_extend_group=auto goes
EVER = 1 << 40


@lru_cache(maxsize=256)
def _settled(spec: AttentionSpec, n: int) -> AttentionSpec:
    # a window without sinks shows no distance beyond it
    far = n if spec.pattern.sliding_window is None or spec.pattern.sink_tokens else min(n, spec.pattern.sliding_window)
    return replace(spec, positions=spec.positions.settled(far))


@dataclass(frozen=True, kw_only=True)
class FeedForwardSpec:
    """One feed-forward layer: dim -> ff_mult * dim -> dim."""

    ff_mult: float = flag(float, 4.0, "inner width of the feed-forward over dim")
    ff_glu: bool = flag(bool, False, "gated: the activation of one half multiplies the other (GEGLU; SwiGLU with ff_swish)")
    ff_swish: bool = flag(bool, False, "SiLU instead of GELU")
    ff_relu_squared: bool = flag(bool, False, "squared ReLU instead of GELU")
    ff_dropout: float = flag(float, 0.0, "dropout after the activation while training", inference=True)
    ff_bias: bool = flag(bool, False, "biases in the feed-forward")

    def __post_init__(self) -> None:
        require(0 < self.ff_mult < math.inf, f"ff_mult={self.ff_mult} must be finite and above 0; 4 is usual")
        require(
            not (self.ff_swish and self.ff_relu_squared), "ff_swish and ff_relu_squared are two activations; keep one"
        )
        require(0 <= self.ff_dropout < 1, f"ff_dropout={self.ff_dropout} must be in [0, 1)")

    def inner(self, dim: int) -> int:
        """Inner width of the layer."""
        return int(dim * self.ff_mult)


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One block: attention, then feed-forward."""

    attention: AttentionSpec
    feedforward: FeedForwardSpec
    qk_rmsnorm: bool = flag(bool, False, "RMSNorm with a gain on each query and key head", aliases=("attn_qk_rmsnorm",))


@dataclass(frozen=True, kw_only=True)
class LayersSpec:
    """A stack of blocks over a residual stream of width dim."""

    dim: int = flag(int, None, "width of the model", per_layer=False)
    blocks: tuple[BlockSpec, ...]
    use_rmsnorm: bool = flag(bool, False, "RMSNorm instead of LayerNorm", per_layer=False)
    pre_norm: bool = flag(bool, True, "norm before each branch and once at the end; False: after each sum", per_layer=False)
    sandwich_norm: bool = flag(bool, False, "a second norm on each branch's output (with pre_norm)", per_layer=False)

    def __post_init__(self) -> None:
        require(self.dim >= 1, f"dim={self.dim} must be at least 1")
        require(len(self.blocks) >= 1, "depth=0 leaves no layer; depth must be at least 1")
        narrow = [b.feedforward.ff_mult for b in self.blocks if b.feedforward.inner(self.dim) < 1]
        require(not narrow, f"ff_mult={narrow and narrow[0]} leaves nothing of dim={self.dim}; give at least 1 / dim")
        require(
            self.pre_norm or not self.sandwich_norm,
            "sandwich_norm=True needs pre_norm=True: it adds a norm after each branch; drop one of the two",
        )

    @property
    def causal(self) -> bool:
        """Whether every layer is causal."""
        return all(block.attention.pattern.causal for block in self.blocks)

    @property
    def unsettled(self) -> bool:
        """Whether any layer needs the length to come; see `AttentionSpec.unsettled`."""
        return any(block.attention.unsettled for block in self.blocks)

    def settled(self, n: int) -> "LayersSpec":
        """The stack for sequences of at most n tokens; itself unless it is unsettled."""
        if not self.unsettled:
            return self
        blocks = tuple(replace(block, attention=block.attention.settled(n)) for block in self.blocks)
        return replace(self, blocks=blocks)

    def max_positions(self, trained: int) -> int | None:
        """Tokens of a sequence whose distances are all known to every layer; None for no limit.

        Without rope_scaling or Self-Extend in any layer it is the trained length, whatever windows or ALiBi may allow.
        """
        extended = {"rope_scaling", "self_extend_group"}
        if not any(extended & block.attention.features for block in self.blocks):
            return trained
        reached = [block.attention.max_positions(trained) for block in self.blocks]
        return min((n for n in reached if n is not None), default=None)

    @property
    def orders_tokens(self) -> bool:
        """Whether any layer has rotary positions or ALiBi, so that learned positions are not needed."""
        names = {part.switch.name for block in self.blocks for part in block.attention.parts() if part.switch}
        return bool(names & {"rotary_pos_emb", "self_extend_group", "alibi_pos_bias"})


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A token model: embedding, stack, final norm and head."""

    num_tokens: int = flag(int, None, "size of the vocabulary", per_layer=False)
    max_seq_len: int = flag(int, None, "longest sequence the model is trained at", per_layer=False, inference=True)
    layers: LayersSpec
    tie_embedding: bool = flag(bool, False, "the head shares the embedding's weights", per_layer=False)
    use_abs_pos_emb: bool | None = flag(
        bool, None, "learned absolute positions (default: only without rotary and ALiBi)", per_layer=False
    )
    emb_dropout: float = flag(float, 0.0, "dropout on the embeddings while training", per_layer=False, inference=True)
    memory_loss_weight: float | None = flag(
        float, None, "selective attention: weight of the share of keys still needed in the training loss (0.1 in the paper)",
        per_layer=False, gate="attn_selective", inference=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        weight = self.memory_loss_weight
        require(weight is None or 0 < weight < math.inf, f"memory_loss_weight={weight} must be finite and above 0; 0.1 is usual")
        require(
            weight is None or any(block.attention.selection is not None for block in self.layers.blocks),
            f"memory_loss_weight={weight} has no effect: no layer has attn_selective; set attn_selective or drop it",
        )
        require(self.num_tokens >= 1, f"num_tokens={self.num_tokens} must be at least 1")
        require(self.max_seq_len >= 1, f"max_seq_len={self.max_seq_len} must be at least 1")
        require(0 <= self.emb_dropout < 1, f"emb_dropout={self.emb_dropout} must be in [0, 1)")
        if self.use_abs_pos_emb is None:
            object.__setattr__(self, "use_abs_pos_emb", not self.layers.orders_tokens)

    def max_positions(self) -> int | None:
        """Tokens of a sequence that the model reaches without meeting distances it was not trained for; None for no limit."""
        return self.max_seq_len if self.use_abs_pos_emb else self.layers.max_positions(self.max_seq_len)
