"""Reader: what a model makes of tokens that come bit by bit; prompts made ready for it.

Letters: p prompt slots.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from xattn.cache.cache import Cache
from xattn.cache.kind import KvBudget
from xattn.errors import ConfigError, ShapeError, TokenError


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
        max_len: tokens that there will be in all, where no cache knows it.
    """

    def __init__(
        self, net: nn.Module, *, cache: Cache | None, extrapolate: bool = False, prefill_chunk: int | None = None,
        max_len: int | None = None,
    ) -> None:  # fmt: skip
        self.net, self.cache, self.extrapolate, self.prefill_chunk = net, cache, extrapolate, prefill_chunk
        self.max_len = max_len
        self.ids_bt: Tensor | None = None
        self.mask_bt: Tensor | None = None

    def read(self, ids_bn: Tensor, mask_bn: Tensor | None = None) -> Tensor:
        """Logits (b v), float32 or better, of the token after these; the last slot of every row is a token."""
        self._keep(ids_bn, mask_bn)
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
        self.ids_bt = self.ids_bt[index_b]
        self.mask_bt = None if self.mask_bt is None else self.mask_bt[index_b]
        if self.cache is not None:
            self.cache.reorder(index_b)

    def _call(self, ids_bn: Tensor, mask_bn: Tensor | None, *, return_embeddings: bool) -> Tensor:
        return self.net(
            ids_bn, mask=mask_bn, cache=self.cache, return_embeddings=return_embeddings, extrapolate=self.extrapolate
        )

    def _keep(self, ids_bn: Tensor, mask_bn: Tensor | None) -> None:
        """The tokens read so far, for the uncached path and for what looks at repetition."""
        if self.ids_bt is None:
            self.ids_bt, self.mask_bt = ids_bn, mask_bn
            return
        self.ids_bt = torch.cat([self.ids_bt, ids_bn], dim=1)
        self.mask_bt = None if self.mask_bt is None else pad(self.mask_bt, (0, ids_bn.shape[1]), value=True)


def reader_for(
    net: nn.Module, batch: int, total: int, *, cache_kv: bool, cache: Cache | None = None, kv_budget: KvBudget = None,
    prefill_chunk: int | None = None, extrapolate: bool = False,
) -> Reader:  # fmt: skip
    """A reader of `batch` rows of at most `total` tokens.

    Args:
        cache: what was read before; it is copied, for every row where it holds one row. cache_kv: keep keys and values.
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
    return Reader(
        net, cache=cache, extrapolate=extrapolate, prefill_chunk=prefill_chunk, max_len=None if cache_kv else max(total, 1)
    )
