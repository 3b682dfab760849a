"""What happens to logits before a token is drawn: filters, repetition, and contrast with a weaker model.

Letters: t tokens of a row so far, l length of an n-gram.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

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


def discourage(logits_bv: Tensor, seen_bt: Tensor, mask_bt: Tensor | None, *, penalty: float) -> Tensor:
    """Logits of tokens that a row holds already are divided by penalty where positive, multiplied where negative.

    Source: CTRL, arXiv 1909.05858 §4.1. mask: which of seen are tokens; None for all.
    """
    held_bv = torch.zeros_like(logits_bv)
    ones = torch.ones_like(seen_bt, dtype=logits_bv.dtype) if mask_bt is None else mask_bt.to(logits_bv.dtype)
    held_bv.scatter_add_(1, seen_bt, ones)
    return torch.where(held_bv > 0, torch.where(logits_bv > 0, logits_bv / penalty, logits_bv * penalty), logits_bv)


def forbid_ngrams(logits_bv: Tensor, seen_bt: Tensor, mask_bt: Tensor | None, *, size: int) -> Tensor:
    """-inf for every token that would make an n-gram of that size which the row holds already.

    A row whose every token would is left as it is.
    """
    if seen_bt.shape[1] < size:
        return logits_bv
    grams_btl = seen_bt.unfold(1, size, 1)
    repeats_bt = (grams_btl[..., :-1] == seen_bt[:, None, seen_bt.shape[1] - size + 1 :]).all(dim=-1)
    if mask_bt is not None:
        repeats_bt &= mask_bt.unfold(1, size, 1).all(dim=-1)
    banned_bv = torch.zeros_like(logits_bv).scatter_add_(1, grams_btl[..., -1], repeats_bt.to(logits_bv.dtype)) > 0
    return logits_bv.masked_fill(banned_bv & ~banned_bv.all(dim=-1, keepdim=True), -torch.inf)


def contrast(expert_bv: Tensor, amateur_bv: Tensor, *, alpha: float = 0.1, beta: float = 0.5) -> Tensor:
    """(1 + beta) * expert - beta * amateur, among tokens at least alpha times as likely as the expert's likeliest.

    Source: Li et al., arXiv 2210.15097; on logits, as O'Brien and Lewis, 2309.09117 §2.
    """
    unlikely = expert_bv < math.log(alpha) + expert_bv.amax(dim=-1, keepdim=True)
    return ((1 + beta) * expert_bv - beta * amateur_bv).masked_fill(unlikely, -torch.inf)
