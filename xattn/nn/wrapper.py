"""Models over tokens: `TransformerWrapper` (embedding, stack, head) and `AutoregressiveWrapper` (loss and generation)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from xattn.cache.cache import Cache
from xattn.cache.kind import KvBudget
from xattn.cache.static import StaticCache
from xattn.errors import ConfigError, TokenError
from xattn.generate import beam_search, generate
from xattn.nn.layers import AttentionLayers, layout_of
from xattn.nn.loss import linear_cross_entropy, token_cross_entropy
from xattn.ops.layout import Layout
from xattn.shapes import sizes
from xattn.spec.flags import merge, parse
from xattn.spec.model import LayersSpec, ModelSpec


class TransformerWrapper(nn.Module):
    """Token ids to logits.

    Args:
        num_tokens: size of the vocabulary. max_seq_len: longest sequence it is trained at.
        attn_layers: a `Decoder` or `Encoder`.
        tie_embedding: the head shares the embedding's weights. emb_dropout: dropout on the embeddings.
        use_abs_pos_emb: learned absolute positions (default: only where no layer has rotary positions or ALiBi).
        memory_loss_weight: what the share of keys that selective layers still need weighs in `AutoregressiveWrapper`'s loss.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: AttentionLayers,
        tie_embedding: bool = False,
        use_abs_pos_emb: bool | None = None,
        emb_dropout: float = 0.0,
        memory_loss_weight: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(attn_layers, AttentionLayers):
            raise ConfigError(f"attn_layers is a {type(attn_layers).__name__}; give a Decoder or an Encoder")
        self.spec = ModelSpec(
            num_tokens=num_tokens, max_seq_len=max_seq_len, layers=attn_layers.spec, tie_embedding=tie_embedding,
            use_abs_pos_emb=use_abs_pos_emb, emb_dropout=emb_dropout, memory_loss_weight=memory_loss_weight,
        )  # fmt: skip
        # worked out once: compiled code cannot walk over a spec's fields
        self._reach = self.spec.max_positions()
        dim = attn_layers.spec.dim
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(max_seq_len, dim) if self.spec.use_abs_pos_emb else None
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.attn_layers = attn_layers
        self.to_logits = None if tie_embedding else nn.Linear(dim, num_tokens, bias=False)
        for table in (self.token_emb, self.pos_emb, self.to_logits):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    @classmethod
    def from_spec(cls, spec: ModelSpec, *, attn_backend: str = "auto") -> "TransformerWrapper":
        """The model that a spec describes, freshly initialised."""
        return cls(
            num_tokens=spec.num_tokens, max_seq_len=spec.max_seq_len, tie_embedding=spec.tie_embedding,
            use_abs_pos_emb=spec.use_abs_pos_emb, emb_dropout=spec.emb_dropout, memory_loss_weight=spec.memory_loss_weight,
            attn_layers=AttentionLayers.from_spec(spec.layers, attn_backend=attn_backend),
        )  # fmt: skip

    @property
    def head_vm(self) -> Tensor:
        """The weights (v m) that turn embeddings into logits."""
        return self.token_emb.weight if self.to_logits is None else self.to_logits.weight

    def forward(
        self,
        ids_bn: Tensor,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: Cache | StaticCache | None = None,
        max_len: int | None = None,
        return_embeddings: bool = False,
        return_live: bool = False,
        extrapolate: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (b n v), or the embeddings (b n m) before the head.

        Args:
            ids_bn: int64 (b n). mask: bool (b n), True where there is a token; padding stands left or right.
            doc_ids: int (b n); runs of equal ids are documents, which neither see each other nor share positions.
            cache: the tokens before these, from `self.cache`; takes these in, in place. Without doc_ids each row's document
                goes on; with a mask, rows may have had different numbers of tokens.
            max_len: tokens that the sequences will have in all, which settles self_extend_group=auto (default: n).
            return_live: also return the share of a row's tokens (b,) that selective layers still need as keys, on average.
            extrapolate: let a sequence be longer than `max_positions()`; impossible with learned positions.
        Raises:
            ConfigError: a cache opened for other flags, another batch, dtype or device, or with gradients on.
            TokenError: too long a sequence, or (checked on the CPU) an id outside the vocabulary.
        """
        if ids_bn.ndim != 2:
            raise TokenError(f"ids have shape {tuple(ids_bn.shape)}; they must be (batch, sequence)")
        b, n = ids_bn.shape
        self.check_length(max(n, max_len or 0) if cache is None else cache.reach + n, extrapolate=extrapolate)
        self._check_ids(ids_bn)
        self.attn_layers.check_max_len(max_len, n, cache)
        if cache is None:
            layout = layout_of(b, n, ids_bn, mask=mask, doc_ids=doc_ids)
        else:
            layout = cache.begin(self.spec.layers, ids_bn, dtype=self.attn_layers.key_dtype, mask=mask, doc_ids=doc_ids)
        how = {"layout": layout, "cache": cache, "max_len": max_len, "return_live": return_live}
        x_bnm = self.attn_layers(self._embed(ids_bn, layout), **how)
        x_bnm, live = x_bnm if return_live else (x_bnm, None)
        out = x_bnm if return_embeddings else linear(x_bnm, self.head_vm)
        return (out, live) if return_live else out

    def cache(
        self,
        batch: int = 1,
        *,
        dtype: torch.dtype | None = None,
        kv_budget: KvBudget = None,
        rollback: int = 0,
        max_len: int | None = None,
    ) -> Cache:
        """An empty cache of this model for `model(ids, cache=cache)`; see `xattn.cache.Cache`.

        Args:
            dtype: of keys and values (default: the parameters', or autocast's where it is on).
            kv_budget: keys that selective layers keep; a fraction is one of max_len, or of the model's max_seq_len.
            max_len: tokens a row that it is allocated for and refuses to exceed; self_extend_group=auto is settled by it.
        """
        return Cache(
            self.spec.layers, batch, dtype=self.attn_layers.key_dtype if dtype is None else dtype, device=self.head_vm.device,
            kv_budget=kv_budget, rollback=rollback, max_len=max_len,
            full_len=max_len if max_len is not None else self.spec.max_seq_len,
        )  # fmt: skip

    def _embed(self, ids_bn: Tensor, layout: Layout) -> Tensor:
        x_bnm = self.token_emb(ids_bn)
        if self.pos_emb is not None:
            x_bnm = x_bnm + self.pos_emb(layout.pos_bn.clamp(min=0))
        return self.emb_dropout(x_bnm)

    def check_length(self, n: int, *, extrapolate: bool = False) -> None:
        """Raises TokenError when n tokens are more than the model may be given."""
        longest = self.max_positions()
        if longest is None or n <= longest or (extrapolate and self.pos_emb is None):
            return
        rotary = any("rotary_pos_emb" in block.attention.features for block in self.spec.layers.blocks)
        cure = (
            "its learned positions end there (use_abs_pos_emb=True)" if self.pos_emb is not None
            else "pass extrapolate=True to go beyond the trained length on purpose"
            + (", or extend it with self_extend_group='auto'" if rotary else "")
        )  # fmt: skip
        reach = f"max_seq_len={self.spec.max_seq_len}"
        reach += "" if longest == self.spec.max_seq_len else f", extended to {longest}"
        raise TokenError(f"the sequence has {n} tokens, and {reach}: {cure}")

    def max_positions(self) -> int | None:
        """Tokens of a sequence that it reaches without meeting distances it was not trained for; None for no limit.

        max_seq_len, or what rope_scaling and Self-Extend make of it in the layer that reaches least.
        """
        return self._reach

    def _check_ids(self, ids_bn: Tensor) -> None:
        # on a GPU reading the ids would wait for the device; there the embedding's own device assert speaks
        if ids_bn.device.type != "cpu" or ids_bn.numel() == 0 or torch.compiler.is_compiling():
            return
        low, high = ids_bn.aminmax()
        if low < 0 or high >= self.spec.num_tokens:
            raise TokenError(
                f"token ids span {int(low)} to {int(high)}, outside the vocabulary 0 to {self.spec.num_tokens - 1} "
                f"(num_tokens={self.spec.num_tokens})"
            )

    def backends(self, max_len: int | None = None) -> list[dict[str, Any]]:
        """One row a layer: layer, flags (with max_len as settled for it), backend, rejected (name -> why)."""
        return self.attn_layers.backends(max_len)

    def explain(self, max_len: int | None = None) -> str:
        """A table, layer by layer: attention flags, back-end, and why the others lost; max_len: for that many tokens."""
        return self.attn_layers.explain(max_len)

    def with_flags(self, **overrides: Any) -> "TransformerWrapper":
        """The same parameters (shared, not copied) under other flags, as in `with_flags(self_extend_group=8, ...)`.

        None takes a flag away. Warns, by name, about flags the weights were not trained with unless they are meant for
        inference. Raises ConfigError for flags that need other weights.
        """
        flags = merge(self.spec, overrides)
        backend = flags.pop("attn_backend", self.attn_layers.attn_backend)
        with torch.device("meta"):
            model = TransformerWrapper.from_spec(parse(flags), attn_backend=backend)
        adopt(model, self.state_dict(keep_vars=True), overrides)
        return model.train(self.training)


def adopt(model: nn.Module, weights: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> None:
    """Makes the weights the model's own tensors. Raises ConfigError, naming the overrides, when they do not fit."""
    own = model.state_dict()
    wrong = [f"lacks {name}" for name in own if name not in weights]
    wrong += [f"has {name} to spare" for name in weights if name not in own]
    wrong += [
        f"has {name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own if name in weights and own[name].shape != weights[name].shape
    ]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        given = ", ".join(f"{k}={v}" for k, v in overrides.items()) or "the flags"
        raise ConfigError(f"{given} asks for other weights than there are: the checkpoint {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(weights, assign=True)


def build(flags: Mapping[str, Any] | None = None, **more: Any) -> TransformerWrapper:
    """A model from one flat set of flags, as YAML holds them: num_tokens, max_seq_len, dim, depth, and any other.

    Raises:
        ConfigError: an unknown, contradictory or inert flag. UnsupportedFeature: attn_backend cannot serve a layer.
    """
    flags = {**(flags or {}), **more}
    return TransformerWrapper.from_spec(parse(flags), attn_backend=flags.get("attn_backend") or "auto")


class AutoregressiveWrapper(nn.Module):
    """Next-token loss and generation over a causal model.

    Args:
        net: a `TransformerWrapper` over a `Decoder`.
        ignore_index: targets of this value do not count. pad_value: what stands in for them as inputs.
    """

    def __init__(self, net: TransformerWrapper, *, ignore_index: int = -100, pad_value: int = 0) -> None:
        super().__init__()
        layers: LayersSpec = net.spec.layers
        if not layers.causal:
            raise ConfigError("a model with Encoder layers sees the tokens it should predict; build it over a Decoder")
        self.net, self.ignore_index, self.pad_value = net, ignore_index, pad_value

    def forward(
        self,
        ids_bn: Tensor,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        target_mask: Tensor | None = None,
        extrapolate: bool = False,
    ) -> Tensor:
        """Mean loss in nats a token; ids (b n) hold input and target, so n - 1 tokens a row are predicted.

        While training, memory_loss_weight * (share of keys that selective layers still need, mean over rows) comes on top:
        eps * sum_l max_i M_i / (L n), of arXiv 2410.02703, with L the number of selective layers and n a row's tokens.

        Args:
            mask: bool (b n), True where there is a token; doc_ids: int (b n), as in `TransformerWrapper`.
            target_mask: bool (b n), True where a token counts as a target; all are inputs. A row's first is never a target.
        """
        weight = self.net.spec.memory_loss_weight if self.training else None
        x_tm, target_t, live_b = self._inputs(ids_bn, mask, doc_ids, extrapolate, return_live=weight is not None)
        if target_mask is not None:
            sizes(ids=(ids_bn, "b n"), target_mask=(target_mask, "b n"))
            target_t = target_t.masked_fill(~target_mask[:, 1:].flatten(), self.ignore_index)
        loss = linear_cross_entropy(x_tm, self.net.head_vm, target_t, ignore_index=self.ignore_index)
        return loss if weight is None else loss + weight * live_b.mean()

    @torch.no_grad()
    def token_nll(
        self, ids_bn: Tensor, *, mask: Tensor | None = None, doc_ids: Tensor | None = None, extrapolate: bool = False
    ) -> Tensor:
        """Loss in nats of each predicted token, (b n - 1), 0 where none counts; switches dropout off meanwhile."""
        training = self.training
        self.eval()
        try:
            x_tm, target_t, _ = self._inputs(ids_bn, mask, doc_ids, extrapolate)
        finally:
            self.train(training)
        counts = target_t != self.ignore_index
        nll_t = token_cross_entropy(x_tm, self.net.head_vm, target_t.where(counts, 0)) * counts
        return nll_t.view(ids_bn.shape[0], -1)

    def _inputs(
        self, ids_bn: Tensor, mask: Tensor | None, doc_ids: Tensor | None, extrapolate: bool, *, return_live: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embeddings (t m) of the inputs, the targets (t,), and with return_live the share of keys still needed (b,)."""
        if ids_bn.ndim != 2 or ids_bn.shape[1] < 2:
            raise TokenError(f"ids have shape {tuple(ids_bn.shape)}; a loss needs (batch, 2 tokens or more)")
        ids_in, target = ids_bn[:, :-1], ids_bn[:, 1:]
        ids_in = ids_in.masked_fill(ids_in == self.ignore_index, self.pad_value)
        if mask is not None:
            # an empty slot predicts nothing, not even a first token
            target = target.masked_fill(~(mask[:, 1:] & mask[:, :-1]), self.ignore_index)
            mask = mask[:, :-1]
        x_bnm = self.net(
            ids_in, mask=mask, doc_ids=None if doc_ids is None else doc_ids[:, :-1], return_embeddings=True,
            return_live=return_live, extrapolate=extrapolate,
        )  # fmt: skip
        x_bnm, live_b = x_bnm if return_live else (x_bnm, None)
        return x_bnm.flatten(0, 1), target.flatten(), live_b

    def generate(self, prompts: Tensor | list[Tensor], seq_len: int, **options: Any) -> Tensor:
        """New tokens after the prompts; see `xattn.generate.generate` for the options."""
        return generate(self.net, prompts, seq_len, pad_value=self.pad_value, **options)

    def beam_search(self, prompts: Tensor | list[Tensor], seq_len: int, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """The likeliest new tokens that a beam finds; see `xattn.generate.beam_search` for the options."""
        return beam_search(self.net, prompts, seq_len, pad_value=self.pad_value, **options)
