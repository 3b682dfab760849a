"""Perplexity under each of eval.kv_budgets: the fixed validation tokens at the trained length, read over a pruned cache."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import xattn
from xattn import ConfigError
from xattn.cache.kind import kinds
from xattn.experiments.data import Batch, Corpus, batches, eval_blocks
from xattn.experiments.device import evaluating
from xattn.experiments.judge import score, with_flags
from xattn.experiments.schema import EvalConfig


def judge_budgets(
    model: Any,
    corpus: Corpus,
    eval_config: EvalConfig,
    *,
    seq_len: int,
    device: torch.device,
    precision: str,
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """The score under each budget, on the same tokens as `val`; None where no budget is asked for.

    Returns: budget -> score, with `budgets` (keys a layer; null: all) and `kv_bytes_per_token` (predicted, 16-bit cache of one
    sequence of the trained length, over that length). Where the model cannot be pruned so, {"error": why} stands in.
    """
    if not eval_config.kv_budgets:
        return None
    longest = max(eval_config.length_factors) * seq_len
    blocks = eval_blocks(corpus, tokens=eval_config.tokens, length=seq_len, longest=longest)
    found = {}
    for budget in eval_config.kv_budgets:
        before_each()
        try:
            judged = with_flags(model, eval_config.flags)
            keys = [kind.budget for kind in kinds(judged.spec.layers, kv_budget=budget, full_len=seq_len)]
            how = {"chunk": eval_config.kv_budget_chunk, "batch_tokens": eval_config.batch_tokens}
            nll_bn = pruned_nll(judged, blocks, keys, **how, device=device, precision=precision)
        except (ConfigError, xattn.TokenError) as error:
            found[name_of(budget)] = {"error": str(error)}
            continue
        bytes_held = xattn.accounting.kv_bytes(judged.spec, seq_len, kv_budget=keys)
        found[name_of(budget)] = score(nll_bn, blocks.ids_bn[:, 1:], corpus) | {
            "budgets": keys, "kv_bytes_per_token": bytes_held / seq_len,
        }  # fmt: skip
    return found


def name_of(budget: Any) -> str:
    """A budget as the key of its score."""
    return json.dumps(list(budget) if isinstance(budget, list | tuple) else budget)


def pruned_nll(
    model: Any, blocks: Batch, keys: list[int | None], *, chunk: int, batch_tokens: int, device: torch.device, precision: str
) -> torch.Tensor:
    """Nats of each predicted token, float64 on the CPU (b n), read in calls of `chunk` tokens over caches of these budgets."""
    n, parts = blocks.ids_bn.shape[1] - 1, []
    with evaluating(model, device, precision):
        for group in (group.to(device) for group in batches(blocks, batch_tokens)):
            cache, nats = model.cache(len(group.ids_bn), kv_budget=keys, max_len=n), []
            for first in range(0, n, chunk):
                here = slice(first, min(first + chunk, n))
                doc_ids = None if group.doc_ids_bn is None else group.doc_ids_bn[:, here]
                logits_bcv = model(group.ids_bn[:, here], doc_ids=doc_ids, cache=cache, extrapolate=True).float()
                target_bc = group.ids_bn[:, here.start + 1 : here.stop + 1]
                nats.append(cross_entropy(logits_bcv.transpose(1, 2), target_bc, reduction="none").double().cpu())
            parts.append(torch.cat(nats, dim=1))
    return torch.cat(parts)
