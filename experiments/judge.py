"""Judging a trained model on a fixed token set: nats, perplexity, bits per byte, by length, position and extension.

Letters: b blocks, n positions. Perplexity is exp(sum of nats / sum of tokens), never a mean over batches.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

import xattn
from xattn import ConfigError
from xattn.experiments.answers import answer_scores, judge_task, score_answer_positions, score_answers
from xattn.experiments.data import Batch, Corpus, batches, equal_parts, eval_blocks
from xattn.experiments.device import evaluating
from xattn.experiments.passkey import retrieve
from xattn.experiments.schema import EvalConfig

AS_TRAINED = "none"


def judge_all(
    model: Any,
    corpus: Corpus,
    eval_config: EvalConfig,
    *,
    seq_len: int,
    device: torch.device,
    precision: str,
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Judge at every length, as trained and with every extension; `before_each` is called before each of them.

    Returns: `val` (trained length, no extension), `val_by_length` {extension: {length: score}}, `val_by_position`
    {extension: {length: [score of each bucket]}} and `passkey` {extension: {length: {depth: found}}}, which is None where
    eval.passkey.trials is 0; and `task` {extension: {length: {by_distance, by_pairs}}}, which is None where the data is no task.
    Where the model cannot do what was asked, {"error": why} stands in.
    """
    by_length: dict[str, dict[str, Any]] = {}
    by_position: dict[str, dict[str, Any]] = {}
    passkey: dict[str, dict[str, Any]] = {}
    task: dict[str, dict[str, Any]] = {}
    longest = max(eval_config.length_factors) * seq_len
    where = {"batch_tokens": eval_config.batch_tokens, "device": device, "precision": precision}
    for name, flags in {AS_TRAINED: {}, **eval_config.extensions}.items():
        by_length[name], by_position[name], passkey[name], task[name] = {}, {}, {}, {}
        for length in sorted({factor * seq_len for factor in eval_config.length_factors}):
            before_each()
            blocks = eval_blocks(corpus, tokens=eval_config.tokens, length=length, longest=longest)
            try:
                judged = with_flags(model, eval_config.flags | flags)
                if corpus.task is not None:
                    scores = judge_task(judged, corpus, eval_config, length=length, **where)
                    by_length[name][str(length)], by_position[name][str(length)], task[name][str(length)] = scores
                    continue
                by_length[name][str(length)], by_position[name][str(length)] = _scored(judged, blocks, corpus, eval_config, where)
            except (ConfigError, xattn.TokenError) as error:
                by_length[name][str(length)] = passkey[name][str(length)] = task[name][str(length)] = {"error": str(error)}
                continue
            if eval_config.passkey.trials:
                before_each()
                passkey[name][str(length)] = _retrieved(judged, corpus, eval_config, length=length, **where)
    return {
        "val": by_length[AS_TRAINED][str(seq_len)],
        "val_by_length": by_length,
        "val_by_position": by_position,
        "passkey": passkey if eval_config.passkey.trials else None,
        "task": task if corpus.task is not None else None,
    }


def _scored(model: Any, blocks: Batch, corpus: Corpus, eval_config: EvalConfig, where: dict[str, Any]) -> tuple[Any, Any]:
    """The score of these blocks, and the scores of its positions."""
    buckets = eval_config.position_buckets
    if blocks.asked_bn is None:
        nll_bn = token_nll(model, blocks, **where)
        return score_blocks(nll_bn, None, blocks, corpus), score_positions(nll_bn, buckets=buckets)
    nll_bn, right_bn = answer_scores(model, blocks, **where)
    return score_blocks(nll_bn, right_bn, blocks, corpus), score_answer_positions(nll_bn, right_bn, blocks, buckets=buckets)


def score_blocks(nll_bn: torch.Tensor, right_bn: torch.Tensor | None, blocks: Batch, corpus: Corpus) -> dict[str, Any]:
    """The score of all tokens or, where only answers count, of those; `right_bn`, which of them are right, is wanted then."""
    if blocks.asked_bn is None:
        return score(nll_bn, blocks.ids_bn[:, 1:], corpus)
    return score_answers(nll_bn, right_bn, blocks)


def _retrieved(model: Any, corpus: Corpus, eval_config: EvalConfig, **how: Any) -> dict[str, Any]:
    try:
        return retrieve(model, corpus, eval_config.passkey, **how)
    except ConfigError as error:  # a prompt too short for key and question
        return {"error": str(error)}


def judge(
    model: Any, blocks: Batch, corpus: Corpus, eval_config: EvalConfig, *, device: torch.device, precision: str
) -> dict[str, Any]:
    """The score of a model, as it is, on these blocks."""
    where = {"batch_tokens": eval_config.batch_tokens, "device": device, "precision": precision}
    return _scored(model, blocks, corpus, eval_config, where)[0]


def token_nll(model: Any, blocks: Batch, *, batch_tokens: int, device: torch.device, precision: str) -> torch.Tensor:
    """Nats of each predicted token, float64 on the CPU, shape (b, n); the blocks hold n + 1 ids."""
    ar = xattn.AutoregressiveWrapper(model)
    with evaluating(model, device, precision):
        parts = [
            ar.token_nll(group.ids_bn, doc_ids=group.doc_ids_bn, extrapolate=True).double().cpu()
            for group in (group.to(device) for group in batches(blocks, batch_tokens))
        ]
    return torch.cat(parts)


def score(nll_bn: torch.Tensor, targets_bn: torch.Tensor, corpus: Corpus) -> dict[str, Any]:
    """loss_nats (mean a token), ppl, bpb (sum of nats / ln 2 / bytes of the predicted text; None: unknown), tokens."""
    total, tokens = float(nll_bn.sum()), nll_bn.numel()
    text_bytes = corpus.bytes_of(targets_bn.numpy())
    return {
        "loss_nats": total / tokens,
        "ppl": _exp(total / tokens),
        "bpb": total / math.log(2) / text_bytes if text_bytes else None,
        "tokens": tokens,
    }


def score_positions(nll_bn: torch.Tensor, *, buckets: int) -> list[dict[str, Any]]:
    """Mean nats in `buckets` equal parts of the length; positions `first` to `last`, 0 being the first prediction."""
    return [
        {"first": low, "last": high - 1, "loss_nats": float(nll_bn[:, low:high].mean())}
        for low, high in equal_parts(nll_bn.shape[1], buckets)
    ]


def with_flags(model: Any, flags: dict[str, Any]) -> Any:
    """The model under evaluation-time flags: itself where there are none. That it was trained otherwise is the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", xattn.FlagWarning)
        return model.with_flags(**flags) if flags else model


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
