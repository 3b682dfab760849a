"""Generation: samples tokens one after the other, recomputing the whole sequence each step (the exact, cache-free path).

Letters: p prompt slots.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from xattn.errors import ConfigError, TokenError, unknown

Filter = Callable[..., Tensor]


def top_k(logits_bv: Tensor, *, k: int | None = None, frac_num_tokens: float = 0.1) -> Tensor:
    """Keeps the k largest logits of a row (default: a tenth of the vocabulary), the rest -inf."""
    k = max(1, math.ceil(frac_num_tokens * logits_bv.shape[-1])) if k is None else min(k, logits_bv.shape[-1])
    values, indices = logits_bv.topk(k, dim=-1)
    return torch.full_like(logits_bv, -torch.inf).scatter(-1, indices, values)


def top_p(logits_bv: Tensor, *, thres: float = 0.9) -> Tensor:
    """Keeps the likeliest tokens whose probabilities first reach thres. Source: arXiv 1904.09751."""
    ordered, indices = logits_bv.sort(dim=-1, descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
    ordered = ordered.masked_fill(before >= thres, -torch.inf)
    return torch.empty_like(logits_bv).scatter(-1, indices, ordered)


def min_p(logits_bv: Tensor, *, min_p: float = 0.1) -> Tensor:
    """Keeps tokens at least min_p times as likely as the likeliest. Source: arXiv 2407.01082."""
    probs = logits_bv.softmax(dim=-1)
    return logits_bv.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -torch.inf)


FILTERS: dict[str, Filter] = {"top_k": top_k, "top_p": top_p, "min_p": min_p}


def align(prompts: Tensor | list[Tensor], *, pad_value: int = 0) -> tuple[Tensor, Tensor | None, bool]:
    """Prompts as left-padded ids (b p), their mask (None when nothing is padded), and whether there was no batch axis."""
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (1, 2) or prompts.shape[-1] == 0:
            raise TokenError(f"prompts have shape {tuple(prompts.shape)}; give (tokens,) or (batch, tokens), one token or more")
        return (prompts[None], None, True) if prompts.ndim == 1 else (prompts, None, False)
    if not prompts or any(p.ndim != 1 or len(p) == 0 for p in prompts):
        raise TokenError("prompts must be a list of one-dimensional tensors with one token or more each")
    longest = max(len(p) for p in prompts)
    ids = torch.stack([pad(p, (longest - len(p), 0), value=pad_value) for p in prompts])
    mask = torch.stack([pad(torch.ones_like(p, dtype=torch.bool), (longest - len(p), 0)) for p in prompts])
    return ids, None if bool(mask.all()) else mask, False


@torch.no_grad()
def generate(
    net: nn.Module,
    prompts: Tensor | list[Tensor],
    seq_len: int,
    *,
    temperature: float = 1.0,
    filter_logits_fn: str | Filter | None = "top_k",
    filter_kwargs: dict[str, Any] | None = None,
    eos_token: int | None = None,
    seed: int | None = None,
    pad_value: int = 0,
    extrapolate: bool = False,
) -> Tensor:
    """seq_len new tokens after each prompt.

    Args:
        net: maps ids (b n) to logits (b n v), as `TransformerWrapper`.
        prompts: ids (p,), (b p), or a list of (p_b,) of different lengths.
        temperature: 0 takes the likeliest token. filter_logits_fn: top_k, top_p, min_p, a callable, or None.
        eos_token: a row that reaches it goes on with pad_value; all rows there ends early.
        seed: makes the draw repeatable. extrapolate: allow more than max_seq_len tokens in all.
    Returns:
        only the new tokens, (b, at most seq_len), or (at most seq_len,) for a single prompt.
    Raises:
        TokenError: an empty prompt, or more tokens than the model may be given, before anything is computed.
    """
    if temperature < 0 or seq_len < 0:
        raise ConfigError(f"temperature={temperature} and seq_len={seq_len} must not be negative")
    if isinstance(filter_logits_fn, str):
        if filter_logits_fn not in FILTERS:
            raise ConfigError(unknown("filter_logits_fn", filter_logits_fn, FILTERS))
        filter_logits_fn = FILTERS[filter_logits_fn]
    ids, mask, single = align(prompts, pad_value=pad_value)
    # the last token is drawn, never read
    net.check_length(ids.shape[1] + max(seq_len - 1, 0), extrapolate=extrapolate)
    draw = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    start, done, training = ids.shape[1], torch.zeros(len(ids), dtype=torch.bool, device=ids.device), net.training
    net.eval()
    for _ in range(seq_len):
        logits_bv = net(ids, mask=mask, extrapolate=extrapolate)[:, -1].float()
        if temperature == 0:
            new = logits_bv.argmax(dim=-1)
        else:
            kept = logits_bv if filter_logits_fn is None else filter_logits_fn(logits_bv, **(filter_kwargs or {}))
            new = torch.multinomial((kept / temperature).softmax(dim=-1), 1, generator=draw)[:, 0]
        new = new.masked_fill(done, pad_value)
        ids = torch.cat([ids, new[:, None]], dim=1)
        mask = None if mask is None else pad(mask, (0, 1), value=True)
        if eos_token is not None:
            done |= new == eos_token
            if bool(done.all()):
                break
    net.train(training)
    return ids[0, start:] if single else ids[:, start:]
