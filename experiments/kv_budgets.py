"""Scores under each of eval.kv_budgets: the fixed validation tokens at the trained length, read over a pruned cache.

Letters: b sequences, n positions, c positions of a chunk, v vocabulary.
"""

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
from xattn.experiments.judge import score_blocks, with_flags
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
            nll_bn, right_bn = pruned_scores(judged, blocks, keys, **how, device=device, precision=precision)
        except (ConfigError, xattn.TokenError) as error:
            found[name_of(budget)] = {"error": str(error)}
            continue
        bytes_held = xattn.accounting.kv_bytes(judged.spec, seq_len, kv_budget=keys)
        held = {"budgets": keys, "kv_bytes_per_token": bytes_held / seq_len}
        found[name_of(budget)] = score_blocks(nll_bn, right_bn, blocks, corpus) | held
    return found


def name_of(budget: Any) -> str:
    """A budget as the key of its score."""
    return json.dumps(list(budget) if isinstance(budget, list | tuple) else budget)


def pruned_scores(
    model: Any, blocks: Batch, keys: list[int | None], *, chunk: int, batch_tokens: int, device: torch.device, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each predicted token, read in calls of `chunk` tokens over caches of these budgets, on the CPU (b n).

    Returns: its nats, float64, and whether it was held the likeliest, bool.
    """
    n, nats, right = blocks.ids_bn.shape[1] - 1, [], []
    with evaluating(model, device, precision):
        for group in (group.to(device) for group in batches(blocks, batch_tokens)):
            cache, target_bn = model.cache(len(group.ids_bn), kv_budget=keys, max_len=n), group.ids_bn[:, 1:]
            nats_bn = torch.zeros(target_bn.shape, dtype=torch.float64, device=device)
            right_bn = torch.zeros(target_bn.shape, dtype=torch.bool, device=device)
            for first in range(0, n, chunk):
                here = slice(first, min(first + chunk, n))
                doc_ids = None if group.doc_ids_bn is None else group.doc_ids_bn[:, here]
                logits_bcv = model(group.ids_bn[:, here], doc_ids=doc_ids, cache=cache, extrapolate=True).float()
                nats_bn[:, here] = cross_entropy(logits_bcv.transpose(1, 2), target_bn[:, here], reduction="none").double()
                right_bn[:, here] = logits_bcv.argmax(dim=-1) == target_bn[:, here]
            nats.append(nats_bn.cpu())
            right.append(right_bn.cpu())
    return torch.cat(nats), torch.cat(right)
