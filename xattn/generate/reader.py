"""Reader: what a model makes of tokens that come bit by bit; prompts made ready for it.

Letters: p prompt slots.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from xattn.cache.cache import Cache
from xattn.cache.kind import KvBudget
from xattn.errors import ConfigError, ShapeError, TokenError
from xattn.generate.static import StaticStep, is_static


def align(
    prompts: Tensor | list[Tensor], *, prompt_lens: Tensor | None = None, pad_value: int = 0
) -> tuple[Tensor, Tensor | None, bool]:
    """Prompts as left-padded ids (b p), their mask (None when nothing is padded), and whether there was no batch axis.

    Args:
        prompt_lens: (b,) tokens of each row of prompts (b p) that count, from its first; the rest is padding.
    """
    if prompt_lens is not None:
        if not isinstance(prompts, Tensor) or prompts.ndim != 2 or prompt_lens.shape != prompts.shape[:1]:
            raise ShapeError("prompt_lens says how many tokens of each row count; give prompts (b, tokens) and prompt_lens (b,)")
        low, high = (int(x) for x in prompt_lens.aminmax())
        if low < 1 or high > prompts.shape[1]:
            raise TokenError(f"prompt_lens span {low} to {high}; they must be in 1 to {prompts.shape[1]}")
        prompts = [row[:n] for row, n in zip(prompts, prompt_lens.tolist(), strict=True)]
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (1, 2) or 0 in prompts.shape:
            raise TokenError(f"prompts have shape {tuple(prompts.shape)}; give (tokens,) or (batch, tokens), one token or more")
        return (prompts[None], None, True) if prompts.ndim == 1 else (prompts, None, False)
    if not prompts or any(p.ndim != 1 or len(p) == 0 for p in prompts):
        raise TokenError("prompts must be a list of one-dimensional tensors with one token or more each")
    longest = max(len(p) for p in prompts)
    ids = torch.stack([pad(p, (longest - len(p), 0), value=pad_value) for p in prompts])
    mask = torch.stack([pad(torch.ones_like(p, dtype=torch.bool), (longest - len(p), 0)) for p in prompts])
    return ids, None if bool(mask.all()) else mask, False


class Reader:
    """The tokens of a batch so far, and the logits of what comes next.

    Args:
        net: a `TransformerWrapper`. cache: where it keeps what it has read; None reads everything anew each time.
        prefill_chunk: tokens read at a time, with a cache (default: all that are given).
        max_len: tokens that there will be in all, where the cache does not know it.
        static: read what comes after the prompt in static steps, over a cache allocated for max_len.
    """

    def __init__(
        self, net: nn.Module, *, cache: Cache | None, extrapolate: bool = False, prefill_chunk: int | None = None,
        max_len: int | None = None, static: bool = False,
    ) -> None:  # fmt: skip
        self.net, self.cache, self.extrapolate, self.prefill_chunk = net, cache, extrapolate, prefill_chunk
        self.max_len, self.static = max_len, static
        self._step: StaticStep | None = None
        self._read: list[Tensor] = []
        self._mask_bp: Tensor | None = None

    @property
    def ids_bt(self) -> Tensor:
        """The tokens read so far, for the uncached path and for what looks at repetition."""
        self._read = [torch.cat(self._read, dim=1)]
        return self._read[0]

    @property
    def mask_bt(self) -> Tensor | None:
        """Which of them are tokens; None for all."""
        if self._mask_bp is None:
            return None
        return pad(self._mask_bp, (0, self.ids_bt.shape[1] - self._mask_bp.shape[1]), value=True)

    def read(self, ids_bn: Tensor, mask_bn: Tensor | None = None) -> Tensor:
        """Logits (b v), float32 or better, of the token after these; the last slot of every row is a token."""
        begun = bool(self._read)
        self._mask_bp = self._mask_bp if begun else mask_bn
        self._read.append(ids_bn)
        if self.static and begun:
            return self._steps(ids_bn)
        if self.cache is None:
            logits_bnv = self.net(self.ids_bt, mask=self.mask_bt, max_len=self.max_len, extrapolate=self.extrapolate)
        else:
            # the head is for the last token alone
            last = ids_bn.shape[1] - 1
            for first in range(0, last, self.prefill_chunk or max(last, 1)):
                here = slice(first, min(first + (self.prefill_chunk or last), last))
                self._call(ids_bn[:, here], None if mask_bn is None else mask_bn[:, here], return_embeddings=True)
            logits_bnv = self._call(ids_bn[:, last:], None, return_embeddings=False)
        logits_bv = logits_bnv[:, -1]
        return logits_bv.to(torch.promote_types(logits_bv.dtype, torch.float32))

    def reorder(self, index_b: Tensor) -> None:
        """Row r goes on as row index[r] did."""
        self._read = [self.ids_bt[index_b]]
        self._mask_bp = None if self._mask_bp is None else self._mask_bp[index_b]
        if self._step is not None:
            self._step.reorder(index_b)
        elif self.cache is not None:
            self.cache.reorder(index_b)

    def _call(self, ids_bn: Tensor, mask_bn: Tensor | None, *, return_embeddings: bool) -> Tensor:
        return self.net(
            ids_bn, mask=mask_bn, cache=self.cache, return_embeddings=return_embeddings, extrapolate=self.extrapolate
        )

    def _steps(self, ids_bn: Tensor) -> Tensor:
        """As `read`, token by token."""
        if self._step is None:
            self._step = StaticStep(self.net, self.cache, max_len=self.max_len, extrapolate=self.extrapolate)
        for token_b in ids_bn.unbind(dim=1):
            logits_bv = self._step(token_b)
        return logits_bv


def reader_for(
    net: nn.Module, batch: int, total: int, *, cache_kv: bool, cache: Cache | None = None, kv_budget: KvBudget = None,
    prefill_chunk: int | None = None, extrapolate: bool = False, static: bool | None = None, steps: int = 0,
) -> Reader:  # fmt: skip
    """A reader of `batch` rows of at most `total` tokens, of which `steps` come after the prompt, one by one.

    Args:
        cache: what was read before; it is copied, for every row where it holds one row. cache_kv: keep keys and values.
        static: as for `generate`.
    Raises:
        ConfigError: cache, kv_budget or prefill_chunk without cache_kv, or a cache of another batch.
        TokenError: more tokens than the model may be given.
    """
    given = [name for name, v in (("cache", cache), ("kv_budget", kv_budget), ("prefill_chunk", prefill_chunk)) if v is not None]
    if given and not cache_kv:
        raise ConfigError(f"{', '.join(given)} has no effect: cache_kv is False; set it or drop {', '.join(given)}")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ConfigError(f"prefill_chunk={prefill_chunk} must be at least 1")
    net.check_length(total + (cache.rows.reach if cache is not None else 0), extrapolate=extrapolate)
    if cache is not None:
        if kv_budget is not None:
            raise ConfigError("the cache has a budget already, or none; open it with kv_budget, or drop kv_budget")
        if cache.batch not in (1, batch):
            raise ConfigError(f"the cache holds {cache.batch} rows for {batch} prompts; it must hold one, or one each")
        cache = cache.repeat(batch // cache.batch)
    elif cache_kv:
        cache = net.cache(batch, kv_budget=kv_budget, max_len=max(total, 1))
    static = is_static(static, net, cached=cache_kv, steps=steps)
    max_len = max(total, 1) if cache is None else None
    if static:
        # an own cache was opened for all tokens; one with a prompt in it takes them beside what it holds
        max_len = cache.rows.longest + max(total, 1)
        max_len = max_len if cache.max_len is None else min(max_len, cache.max_len)
    return Reader(
        net, cache=cache, extrapolate=extrapolate, prefill_chunk=prefill_chunk, max_len=max_len, static=static
    )
