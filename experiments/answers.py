"""Judging a model on a task: accuracy on the answer tokens, by length, position, distance and number of pairs.

Letters: b sequences, n positions, a answers of a group of sequences, m model width, v vocabulary.
"""

from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear

from xattn import ConfigError
from xattn.experiments.data import Batch, Corpus, batches, equal_parts, task_blocks
from xattn.experiments.device import evaluating
from xattn.experiments.schema import EvalConfig


def answer_scores(
    model: Any, blocks: Batch, *, batch_tokens: int, device: torch.device, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of each answer, and whether the likeliest token is the right one: float64 and bool on the CPU (b, n), 0 elsewhere."""
    parts = []
    with evaluating(model, device, precision):
        for group in (group.to(device) for group in batches(blocks, batch_tokens)):
            x_bnm = model(group.ids_bn[:, :-1], return_embeddings=True, extrapolate=True)
            counts_bn, target_bn = group.counts_bn[:, 1:], group.ids_bn[:, 1:]
            target_a = target_bn[counts_bn]
            logits_av = linear(x_bnm[counts_bn], model.head_vm).float()
            nats_bn = torch.zeros(target_bn.shape, device=device)
            right_bn = torch.zeros(target_bn.shape, dtype=torch.bool, device=device)
            nats_bn[counts_bn] = cross_entropy(logits_av, target_a, reduction="none")
            right_bn[counts_bn] = logits_av.argmax(dim=-1) == target_a
            parts.append((nats_bn.double().cpu(), right_bn.cpu()))
    nats, right = zip(*parts, strict=True)
    return torch.cat(nats), torch.cat(right)


def score_answers(nll_bn: torch.Tensor, right_bn: torch.Tensor, blocks: Batch) -> dict[str, Any]:
    """loss_nats (mean an answer), ppl, bpb (None: no text), tokens (answers), accuracy, exact.

    `exact` is the share of sequences whose every answer is right.
    """
    counts_bn = blocks.counts_bn[:, 1:]
    answers = int(counts_bn.sum())
    loss = float(nll_bn[counts_bn].sum()) / answers
    return {
        "loss_nats": loss,
        "ppl": float(torch.tensor(loss, dtype=torch.float64).exp()),
        "bpb": None,
        "tokens": answers,
        "accuracy": int(right_bn[counts_bn].sum()) / answers,
        "exact": float((right_bn | ~counts_bn).all(dim=1).double().mean()),
    }


def score_answer_positions(nll_bn: torch.Tensor, right_bn: torch.Tensor, blocks: Batch, *, buckets: int) -> list[dict[str, Any]]:
    """As `score_positions`, over the answers, with their accuracy; a part without answers is left out."""
    counts_bn, found = blocks.counts_bn[:, 1:], []
    for low, high in equal_parts(nll_bn.shape[1], buckets):
        if answers := int(counts_bn[:, low:high].sum()):
            loss, accuracy = (float(t[:, low:high].sum()) / answers for t in (nll_bn, right_bn))
            found.append({"first": low, "last": high - 1, "loss_nats": loss, "accuracy": accuracy})
    return found


def score_distances(right_bn: torch.Tensor, blocks: Batch) -> list[dict[str, Any]]:
    """Accuracy by how far back the token stands that decides an answer: from `first` to `last`, in powers of two."""
    asked_bn, found = blocks.asked_bn[:, 1:], []
    for power in range(int(asked_bn.max()).bit_length()):
        here_bn = (asked_bn >= 2**power) & (asked_bn < 2 ** (power + 1))
        if answers := int(here_bn.sum()):
            right = int((right_bn & here_bn).sum())
            found.append({"first": 2**power, "last": 2 ** (power + 1) - 1, "accuracy": right / answers, "answers": answers})
    return found


def judge_task(model: Any, corpus: Corpus, eval_config: EvalConfig, *, length: int, **where: Any) -> tuple[Any, Any, Any]:
    """The scores of one length: of the whole, by position, and `by_distance` and `by_pairs`.

    `by_pairs`: times eval.pair_factors the trained number of pairs -> score, or {"error": why} where they have no room.
    """
    blocks = task_blocks(corpus, tokens=eval_config.tokens, length=length)
    nll_bn, right_bn = answer_scores(model, blocks, **where)
    positions = score_answer_positions(nll_bn, right_bn, blocks, buckets=eval_config.position_buckets)
    task, by_pairs = corpus.task.config, {}
    for pairs in sorted({factor * task.pairs for factor in eval_config.pair_factors}):
        try:
            task.check_room(length, pairs)
        except ConfigError as error:
            by_pairs[str(pairs)] = {"error": str(error)}
            continue
        others = task_blocks(corpus, tokens=eval_config.tokens, length=length, pairs=pairs)
        by_pairs[str(pairs)] = score_answers(*answer_scores(model, others, **where), others)
    more = {"by_distance": score_distances(right_bn, blocks), "by_pairs": by_pairs}
    return score_answers(nll_bn, right_bn, blocks), positions, more
