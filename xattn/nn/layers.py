"""Blocks and stacks: `Decoder` (causal) and `Encoder`, built from flags or from a spec."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xattn.cache.cache import Cache
from xattn.cache.layer import LayerCache
from xattn.cache.static import StaticCache, StaticLayer
from xattn.errors import ConfigError, TokenError
from xattn.nn.attention import Attention
from xattn.nn.feedforward import FeedForward
from xattn.nn.norm import norm
from xattn.ops.backends import choose, rejected
from xattn.ops.layout import Layout
from xattn.shapes import sizes
from xattn.spec.flags import layer_flags, parse_layers
from xattn.spec.model import EVER, AttentionSpec, BlockSpec, LayersSpec


class Residual(nn.Module):
    """x + branch(x) with the stack's norms: before the branch, after it too (sandwich), or after the sum (post)."""

    def __init__(self, branch: nn.Module, layers: LayersSpec) -> None:
        super().__init__()
        rms, dim = layers.use_rmsnorm, layers.dim
        self.branch = branch
        self.pre_norm = norm(dim, rms=rms) if layers.pre_norm else nn.Identity()
        self.branch_norm = norm(dim, rms=rms) if layers.sandwich_norm else nn.Identity()
        self.post_norm = nn.Identity() if layers.pre_norm else norm(dim, rms=rms)

    def forward(self, x_bnm: Tensor, *args: Any, **more: Any) -> Tensor:
        """(b n m) -> (b n m)."""
        return self.post_norm(x_bnm + self.branch_norm(self.branch(self.pre_norm(x_bnm), *args, **more)))


class Block(nn.Module):
    """Attention, then feed-forward."""

    def __init__(self, spec: BlockSpec, layers: LayersSpec, *, attn_backend: str) -> None:
        super().__init__()
        attention = Attention(
            spec.attention, dim=layers.dim, qk_rmsnorm=spec.qk_rmsnorm, attn_backend=attn_backend
        )
        self.attn = Residual(attention, layers)
        self.ff = Residual(FeedForward(spec.feedforward, dim=layers.dim), layers)

    def forward(
        self, x_bnm: Tensor, layout: Layout, cache: LayerCache | StaticLayer | None = None, *, count_live: bool = False,
        max_len: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """(b n m) -> (b n m), and with count_live the keys that selective attention still needs (b,)."""
        out_bnm = self.ff(self.attn(x_bnm, layout, cache, max_len=max_len))
        if not count_live:
            return out_bnm
        return out_bnm, self.attn.branch.live_keys(self.attn.pre_norm(x_bnm), layout, max_len=max_len)


class AttentionLayers(nn.Module):
    """A stack of blocks over x (b n m), with a final norm when pre-normed. Use `Decoder` or `Encoder`.

    checkpoint_blocks: set it True to keep only each block's input for the backward and compute the rest again there.
    """

    causal: ClassVar[bool | None] = None
    checkpoint_blocks: bool = False

    def __init__(self, *, attn_backend: str = "auto", **flags: Any) -> None:
        if self.causal is None:
            raise TypeError("AttentionLayers does not say whether it is causal; use Decoder or Encoder")
        self._build(parse_layers(flags, causal=self.causal), attn_backend)

    @classmethod
    def from_spec(cls, spec: LayersSpec, *, attn_backend: str = "auto") -> "AttentionLayers":
        """The stack that a spec describes. Raises ConfigError when its layers are not of this class's kind."""
        if cls.causal is None:
            cls = Decoder if spec.causal else Encoder
        if any(block.attention.pattern.causal != cls.causal for block in spec.blocks):
            kind = "causal" if cls.causal else "bidirectional"
            raise ConfigError(f"{cls.__name__} needs every layer to be {kind}; use the other of Decoder and Encoder")
        layers = cls.__new__(cls)
        layers._build(spec, attn_backend)
        return layers

    def _build(self, spec: LayersSpec, attn_backend: str) -> None:
        nn.Module.__init__(self)
        self.spec, self.attn_backend = spec, attn_backend
        self.blocks = nn.ModuleList(Block(block, spec, attn_backend=attn_backend) for block in spec.blocks)
        self.final_norm = norm(spec.dim, rms=spec.use_rmsnorm) if spec.pre_norm else nn.Identity()
        self.apply(_init_linear)
        for block in self.blocks:
            for branch in (block.attn.branch, block.ff.branch):
                # the sum of 2 x depth branches keeps the variance of one: GPT-2, §2.3
                branch.to_out.weight.data.mul_((2 * len(self.blocks)) ** -0.5)

    def forward(
        self,
        x_bnm: Tensor,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        layout: Layout | None = None,
        cache: Cache | StaticCache | None = None,
        max_len: int | None = None,
        return_live: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(b n m) -> (b n m).

        Args:
            mask: bool (b n), True where there is a token. doc_ids: int (b n), runs of equal ids are documents.
            layout: the two above already made into a layout (by `cache.begin`, with a cache); give it instead of them.
            cache: the tokens before these, which it takes in; changed in place.
            max_len: tokens that the sequences will have in all, which settles self_extend_group=auto (default: n).
            return_live: also return the share of a row's tokens (b,) that selective layers still need as keys, on average.
        """
        b, n = sizes({"m": self.spec.dim}, x=(x_bnm, "b n m"))["b"], x_bnm.shape[1]
        self.check_max_len(max_len, n, cache)
        if layout is None and cache is not None:
            layout = cache.begin(self.spec, x_bnm, dtype=self.key_dtype, mask=mask, doc_ids=doc_ids)
        elif layout is None:
            layout = layout_of(b, n, x_bnm, mask=mask, doc_ids=doc_ids)
        elif mask is not None or doc_ids is not None:
            raise ConfigError("layout already says which slots hold tokens; drop mask and doc_ids, or layout")
        again = self.checkpoint_blocks and torch.is_grad_enabled()
        stores = [None] * len(self.blocks) if cache is None else cache.layers
        live: list[Tensor] = []
        for block, spec, store in zip(self.blocks, self.spec.blocks, stores, strict=True):
            count = return_live and spec.attention.selection is not None
            run = partial(checkpoint, block, use_reentrant=False) if again else block
            x_bnm = run(x_bnm, layout, store, count_live=count, max_len=max_len)
            if count:
                x_bnm, live_b = x_bnm
                live.append(live_b)
        if cache is not None:
            cache.commit()
        x_bnm = self.final_norm(x_bnm)
        if not return_live:
            return x_bnm
        if not live:
            raise ConfigError("return_live counts the keys of selective layers, and no layer has attn_selective")
        return x_bnm, torch.stack(live).mean(dim=0) / (layout.pos_bn >= 0).sum(dim=1).clamp(min=1)

    @staticmethod
    def check_max_len(max_len: int | None, n: int, cache: Cache | StaticCache | None) -> None:
        """Raises where max_len says less than n tokens (TokenError), or where a cache has its own (ConfigError)."""
        if max_len is None:
            return
        if cache is not None:
            raise ConfigError(f"max_len={max_len} has no effect with a cache, which has its own ({cache.max_len}); drop it")
        if max_len < n:
            raise TokenError(f"max_len={max_len} is less than the {n} tokens given")

    @property
    def key_dtype(self) -> torch.dtype:
        """The dtype that keys and values have now: the weights', or autocast's where it is on."""
        weight = self.blocks[0].attn.branch.to_v.weight
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def backends(self, max_len: int | None = None) -> list[dict[str, Any]]:
        """One row a layer, for the device that the model is on now: layer, flags, backend, packed, and rejected.

        packed: the back-end of batches with documents or padding. rejected: name -> why it cannot serve the layer.
        max_len: tokens of a sequence, for which self_extend_group=auto is settled: the flags then say what it chose.
        """
        device = next(self.parameters()).device.type
        spec = self.spec if max_len is None else self.spec.settled(max_len)
        attns = [block.attention.settled(EVER) for block in spec.blocks]
        return [
            {
                "layer": i,
                "flags": layer_flags(block),
                "backend": choose(attn, self.attn_backend, device).name,
                "packed": choose(attn, self.attn_backend, device, plain=False).name,
                "rejected": rejected(attn, device_type=device),
            }
            for i, (block, attn) in enumerate(zip(spec.blocks, attns, strict=True))
        ]

    def explain(self, max_len: int | None = None) -> str:
        """A table, layer by layer: attention flags, back-end, and why the others lost; equal layers share a line.

        self_extend_group=auto is shown as it is settled for max_len tokens; without, a line below says what it chooses.
        """
        lines = [("layers", "backend", "attention flags", "why not the others")]
        runs: list[tuple[list[int], tuple[str, str, str]]] = []
        for row in self.backends(max_len):
            flags = ", ".join(f"{k}={v}" for k, v in row["flags"].items() if not k.startswith("ff_"))
            lost = "; ".join(f"{name} {why}" for name, why in row["rejected"].items()) or "-"
            name = row["backend"] if row["packed"] == row["backend"] else f"{row['backend']} (packed: {row['packed']})"
            if not runs or runs[-1][1] != (name, flags, lost):
                runs.append(([], (name, flags, lost)))
            runs[-1][0].append(row["layer"])
        lines += [(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]), *cells) for run, cells in runs]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths)) + "  " + line[3] for line in lines]  # noqa: B905
        if max_len is None:
            # layers that choose alike say so once
            table += dict.fromkeys(_choices(b.attention) for b in self.spec.blocks if b.attention.unsettled)
        return "\n".join(table)


class Decoder(AttentionLayers):
    """A causal stack. `Decoder(dim=512, depth=8, heads=8, rotary_pos_emb=True, sliding_window=256)`; flags in docs/flags.md.

    Raises:
        ConfigError: an unknown, contradictory or inert flag. UnsupportedFeature: attn_backend cannot serve a layer.
    """

    causal = True


class Encoder(AttentionLayers):
    """A bidirectional stack; flags and errors as `Decoder`, and sliding_window reaches both sides."""

    causal = False


def _choices(attn: AttentionSpec) -> str:
    """What self_extend_group=auto chooses in a layer, for some lengths."""
    trained = attn.positions.self_extend_trained_len
    told = []
    for times in (2, 4, 8):
        chosen = attn.settled(times * trained).positions
        group, window = (getattr(chosen, f"self_extend_{name}", None) for name in ("group", "window"))
        told.append(f"{f'group {group}, window {window}' if group else 'plain rotary'} at {times * trained:,}")
    return f"self_extend_group=auto, trained length {trained:,}: {'; '.join(told)} tokens"


def layout_of(b: int, n: int, like: Tensor, *, mask: Tensor | None, doc_ids: Tensor | None) -> Layout:
    """The layout of b rows of n slots, on the device of `like`. Raises ShapeError for a mask or ids of another shape."""
    given = {name: (t, "b n") for name, t in (("mask", mask), ("doc_ids", doc_ids)) if t is not None}
    sizes({"b": b, "n": n}, **given)
    return Layout.build(n, device=like.device, mask_bn=mask, doc_ids_bn=doc_ids)


def _init_linear(module: nn.Module) -> None:
    """std sqrt(1 / (3 fan_in)), which at GPT-2's width of 768 is its 0.02."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=(3 * module.in_features) ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
