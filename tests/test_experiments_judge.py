"""Scores: perplexity is exp of the mean nat, bits per byte count bytes, and no batching or device choice moves a number."""

import math

import numpy as np
import pytest
import torch

import xattn
from xattn.experiments.data import Corpus, Part, eval_blocks
from xattn.experiments.judge import judge_all, score, score_positions, token_nll
from xattn.experiments.optim import build_optimiser, lr_factor
from xattn.experiments.schema import EvalConfig, OptimConfig, ScheduleConfig

FLAGS = dict(num_tokens=50, max_seq_len=16, dim=24, depth=2, heads=2, rotary_pos_emb=True)
CPU = torch.device("cpu")


def corpus(token_bytes: np.ndarray | None = None) -> Corpus:
    ids = np.random.default_rng(0).integers(0, 50, size=600)
    part = Part(ids=ids)
    return Corpus(name="random", tokenizer="bpe", vocabulary=50, train=part, val=part, token_bytes=token_bytes)


def judged(model, **config):
    return judge_all(model, corpus(), EvalConfig(tokens=128, **config), seq_len=16, device=CPU, precision="fp32")


def test_perplexity_is_exp_of_the_mean_over_all_tokens() -> None:
    nll = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 8.0]], dtype=torch.float64)
    scored = score(nll, torch.zeros(2, 3, dtype=torch.int64), corpus())
    assert scored == {"loss_nats": 3.0, "ppl": math.exp(3.0), "bpb": None, "tokens": 6}


def test_bits_per_byte_divide_by_the_bytes_of_the_predicted_text() -> None:
    token_bytes = np.arange(50)
    scored = score(torch.full((1, 3), math.log(2)), torch.tensor([[1, 4, 5]]), corpus(token_bytes))
    assert scored["bpb"] == pytest.approx(3 / 10)


def test_scores_agree_with_the_models_own_logits() -> None:
    model = xattn.build(FLAGS)
    blocks = eval_blocks(corpus(), tokens=128, length=16, longest=64).ids_bn
    logits = model(blocks[:, :-1]).detach()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    assert judged(model)["val"]["loss_nats"] == pytest.approx(float(loss), rel=1e-5)


def test_the_size_of_a_batch_moves_no_score() -> None:
    model = xattn.build(FLAGS)
    blocks = eval_blocks(corpus(), tokens=128, length=16, longest=16)
    one, many = (token_nll(model, blocks, batch_tokens=t, device=CPU, precision="fp32") for t in (16, 4096))
    torch.testing.assert_close(one, many)


def test_judging_switches_dropout_off_and_leaves_the_mode_alone() -> None:
    model = xattn.build(FLAGS | {"attn_dropout": 0.5, "ff_dropout": 0.5}).train()
    assert judged(model)["val"] == judged(model)["val"]
    assert model.training


def test_an_extension_is_judged_at_every_length_and_changes_the_longer_ones() -> None:
    extended = {"self_extend": {"self_extend_group": 4, "self_extend_window": 8}}
    scores = judged(xattn.build(FLAGS), length_factors=[1, 2, 4], extensions=extended)["val_by_length"]
    assert {name: list(by) for name, by in scores.items()} == dict.fromkeys(("none", "self_extend"), ["16", "32", "64"])
    assert len({by["64"]["tokens"] for by in scores.values()} | {scores["none"]["16"]["tokens"]}) == 1
    assert scores["none"]["64"]["loss_nats"] != scores["self_extend"]["64"]["loss_nats"]


def test_evaluation_time_flags_reach_every_score() -> None:
    model = xattn.build(FLAGS)
    flags = {"self_extend_group": 4, "self_extend_window": 8}
    alone = judged(model, length_factors=[1, 4], flags=flags)["val_by_length"]["none"]["64"]
    named = judged(model, length_factors=[1, 4], extensions={"x": flags})["val_by_length"]["x"]["64"]
    assert alone == named


def test_what_a_model_cannot_do_is_a_reason_and_not_an_end() -> None:
    learned = xattn.build({k: v for k, v in FLAGS.items() if k != "rotary_pos_emb"} | {"use_abs_pos_emb": True})
    extended = {"self_extend": {"self_extend_group": 4, "self_extend_window": 8}}
    scores = judged(learned, length_factors=[1, 2], extensions=extended)["val_by_length"]
    assert "positions" in scores["none"]["32"]["error"]
    assert "self_extend_group" in scores["self_extend"]["16"]["error"]
    assert scores["none"]["16"]["loss_nats"] > 0


def test_buckets_of_positions_cover_the_length_once_and_average_to_the_loss() -> None:
    nll = torch.rand(3, 37, dtype=torch.float64)
    buckets = score_positions(nll, buckets=5)
    assert [b["first"] for b in buckets[1:]] == [b["last"] + 1 for b in buckets[:-1]]
    assert (buckets[0]["first"], buckets[-1]["last"]) == (0, 36)
    mean = sum(b["loss_nats"] * (b["last"] - b["first"] + 1) for b in buckets) / 37
    assert mean == pytest.approx(float(nll.mean()))


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedules_warm_up_to_one_and_end_where_they_say(name: str) -> None:
    schedule = ScheduleConfig(name=name, warmup_tokens=100, final_factor=0.1)
    factors = [lr_factor(t, total=1_000, schedule=schedule) for t in range(1_001)]
    assert factors[0] < 0.02 and factors[100] == 1.0 and max(factors) == 1.0
    assert all(a <= b for a, b in zip(factors[:100], factors[1:101], strict=True))
    assert all(a >= b for a, b in zip(factors[100:], factors[101:], strict=False))
    assert factors[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert (factors[790] == 1.0) == (name in ("wsd", "constant"))


def test_weight_decay_spares_vectors() -> None:
    model = xattn.build(FLAGS)
    groups = build_optimiser(model, OptimConfig(weight_decay=0.3)).param_groups
    assert {(p.ndim >= 2, g["weight_decay"]) for g in groups for p in g["params"]} == {(True, 0.3), (False, 0.0)}
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
