"""Tasks: every answer is right by a slow reading of the sequence, streams repeat and never meet, and answers alone count."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import xattn
from xattn import ConfigError
from xattn.experiments import compare, record
from xattn.experiments.answers import answer_scores, score_answers, score_distances
from xattn.experiments.compose import complete_model
from xattn.experiments.data import Batch, Corpus, Seen, eval_blocks, train_batch
from xattn.experiments.schema import TASKS, DataConfig, EvalConfig, PasskeyConfig, RunConfig, TaskConfig, TrainerConfig
from xattn.experiments.sources import load_corpus
from xattn.experiments.task_tables import spans

CPU = torch.device("cpu")
CONFIGS = {
    "mqar": TaskConfig(name="mqar", pairs=5, vocabulary=24),
    "variable_assignment": TaskConfig(name="variable_assignment", pairs=3, vocabulary=12),
    "copy": TaskConfig(name="copy", vocabulary=7),
    "parity": TaskConfig(name="parity", bits=2),
}
LENGTHS = (20, 37, 64)


def corpus_of(name: str, **sizes: int) -> Corpus:
    return load_corpus(DataConfig(source="task", task=replace(CONFIGS[name], **sizes)))


def answers_of(config: TaskConfig, ids: list[int]) -> dict[int, tuple[int, int]]:
    """Place of each answer -> (the answer, the place of what decides it), by reading the sequence from left to right."""
    if config.name in ("mqar", "variable_assignment"):
        return _looked_up(config, ids)
    found: dict[int, tuple[int, int]] = {}
    if config.name == "copy":
        mark = ids.index(config.vocabulary)
        return {mark + 1 + place: (ids[place], place) for place in range(mark)}
    state, before = 0, None
    for place, token in enumerate(ids):
        if place % (config.bits + 1) == config.bits:
            found[place] = (2 + state, place - config.bits if before is None else before)
            before = place
        else:
            state ^= token
    return found


def _looked_up(config: TaskConfig, ids: list[int]) -> dict[int, tuple[int, int]]:
    said: dict[int, tuple[int, int]] = {}
    found, asking = {}, False
    for place, (name, value) in enumerate(zip(ids, ids[1:], strict=False)):
        asking |= name == config.vocabulary
        if name >= config.vocabulary // 2:
            continue
        if asking or (config.name == "mqar" and name in said):
            found[place + 1] = said[name]
        else:
            said[name] = (value, place + 1)
    return found


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TASKS)
def test_every_answer_is_what_a_slow_reading_finds(name: str, length: int) -> None:
    corpus = corpus_of(name)
    for batch in (
        train_batch(corpus, seed=3, step=1, batch_size=40, seq_len=length),
        eval_blocks(corpus, tokens=40 * length, length=length, longest=length),
    ):
        assert batch.ids_bn.shape == batch.asked_bn.shape == (40, length + 1)
        assert 0 <= int(batch.ids_bn.min()) and int(batch.ids_bn.max()) < corpus.vocabulary
        for ids, asked in zip(batch.ids_bn.tolist(), batch.asked_bn.tolist(), strict=True):
            expected = answers_of(CONFIGS[name], ids)
            assert {place: place - distance for place, distance in enumerate(asked) if distance} == {
                place: source for place, (_, source) in expected.items()
            }
            assert all(ids[place] == answer for place, (answer, _) in expected.items())
        assert (batch.asked_bn[:, 0] == 0).all(), "the first token is never predicted"


def test_sequences_have_as_many_answers_as_their_sizes_say() -> None:
    asked = {name: int(corpus_of(name).task.held_out(rows=1, length=64)[1].astype(bool).sum()) for name in TASKS}
    assert asked == {"mqar": 5, "variable_assignment": 3, "copy": 32, "parity": 21}
    for pairs in (1, 9, 12):
        ids, asked = corpus_of("mqar").task.held_out(rows=7, length=48, pairs=pairs)
        assert (asked > 0).sum(axis=1).tolist() == [pairs] * 7
        assert all(len(set(row[: 2 * pairs : 2])) == pairs for row in ids.tolist())


def test_a_key_is_asked_for_soon_more_often_than_late_and_late_too() -> None:
    _, asked = corpus_of("mqar", pairs=1).task.held_out(rows=4_000, length=41)
    slot = (asked.max(axis=1) - 2) // 2
    counts = np.bincount(slot, minlength=20)
    expected = np.arange(1, 21) ** -0.99
    assert len(counts) == 20 and np.abs(counts / 4_000 - expected / expected.sum()).max() < 0.03


@pytest.mark.parametrize("name", TASKS)
def test_streams_are_functions_of_seed_and_step_and_never_what_is_held_out(name: str) -> None:
    corpus = corpus_of(name)

    def rows(seed: int, step: int) -> set[tuple[int, ...]]:
        batch = train_batch(corpus, seed=seed, step=step, batch_size=64, seq_len=64)
        return {tuple(row) for row in batch.ids_bn.tolist()}

    first = rows(0, 1)
    rows(7, 7)
    assert rows(0, 1) == first and len(first) > 30
    held_out = {tuple(row) for row in eval_blocks(corpus, tokens=64 * 64, length=64, longest=64).ids_bn.tolist()}
    again = {tuple(row) for row in eval_blocks(corpus, tokens=64 * 64, length=64, longest=256).ids_bn.tolist()}
    assert held_out == again
    for seed, step in ((0, 0), (1, 1), (2**32 - 1, 64), (64, 5)):
        others = rows(seed, step)
        assert not others & first and not others & held_out


def test_the_loss_is_of_the_answers_alone() -> None:
    corpus = corpus_of("mqar")
    batch = train_batch(corpus, seed=0, step=0, batch_size=6, seq_len=37)
    model = xattn.build(num_tokens=corpus.vocabulary, max_seq_len=37, dim=16, depth=1, heads=2, rotary_pos_emb=True)
    loss = xattn.AutoregressiveWrapper(model)(batch.ids_bn, target_mask=batch.counts_bn).detach()
    logits_bnv = model(batch.ids_bn[:, :-1]).detach()
    targets = batch.ids_bn[:, 1:].masked_fill(batch.asked_bn[:, 1:] == 0, -100)
    assert float(loss) == pytest.approx(float(cross_entropy(logits_bnv.transpose(1, 2), targets)), rel=1e-5)
    nll_bn, right_bn = answer_scores(model, batch, batch_tokens=80, device=CPU, precision="fp32")
    scored = score_answers(nll_bn, right_bn, batch)
    assert scored["loss_nats"] == pytest.approx(float(loss), rel=1e-5) and scored["tokens"] == 30
    right = (logits_bnv.argmax(dim=-1) == targets).sum()
    assert scored["accuracy"] == float(right) / 30
    with pytest.raises(xattn.ShapeError, match="target_mask"):
        xattn.AutoregressiveWrapper(model)(batch.ids_bn, target_mask=batch.counts_bn[:, 1:])


def test_distances_of_few_answers_are_not_shown() -> None:
    by = [{"first": 1, "last": 1, "accuracy": 1.0, "answers": 10}, {"first": 2, "last": 3, "accuracy": 0.0, "answers": 9}]
    assert spans({"by_distance": by}) == by[:1] and spans({}) == []


def test_accuracy_by_distance_and_exact_match_count_what_they_say() -> None:
    asked = torch.tensor([[0, 1, 0, 3], [0, 2, 8, 0]])
    batch = Batch(ids_bn=torch.zeros(2, 4, dtype=torch.int64), asked_bn=asked)
    right = torch.tensor([[True, False, True], [True, False, False]])
    assert score_distances(right, batch) == [
        {"first": 1, "last": 1, "accuracy": 1.0, "answers": 1},
        {"first": 2, "last": 3, "accuracy": 1.0, "answers": 2},
        {"first": 8, "last": 15, "accuracy": 0.0, "answers": 1},
    ]
    scored = score_answers(torch.tensor([[1.0, 0, 1], [2, 4, 0]]), right, batch)
    assert (scored["accuracy"], scored["exact"], scored["loss_nats"]) == (0.75, 0.5, 2.0)


def test_rows_of_a_batch_and_its_digest_know_their_answers() -> None:
    batch = train_batch(corpus_of("copy"), seed=0, step=0, batch_size=6, seq_len=20)
    parts = list(batch.split(4))
    assert torch.equal(torch.cat([part.asked_bn for part in parts]), batch.asked_bn)
    digests = []
    for asked in (batch.asked_bn, torch.zeros_like(batch.asked_bn)):
        seen = Seen()
        seen.update(replace(batch, asked_bn=asked))
        digests.append(seen.digest)
    assert digests[0] != digests[1]


def test_sizes_that_are_not_given_follow_the_trained_length() -> None:
    config = RunConfig(data=DataConfig(source="task"), trainer=TrainerConfig(seq_len=32), model={"dim": 16})
    complete_model(config)
    assert config.data.task == TaskConfig(name="mqar", pairs=4, vocabulary=256) and config.model["num_tokens"] == 256


def task(**given) -> DataConfig:
    return DataConfig(source="task", task=TaskConfig(**given))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (RunConfig(data=task(name="sort")), "data.task.name=sort is not known; use one of mqar, variable_assignment"),
        (RunConfig(data=task(pairs=65)), "needs 260 tokens, and a sequence has 256; use data.task.pairs=64 or fewer"),
        (RunConfig(data=task(pairs=8, vocabulary=10)), "5 names for 8 pairs; use data.task.vocabulary=16 or more"),
        (RunConfig(data=task(pairs=8, vocabulary=16), eval=EvalConfig(pair_factors=[1, 2])), "use data.task.vocabulary=32"),
        (RunConfig(data=task(pairs=0)), "data.task.pairs=0 is not positive"),
        (RunConfig(data=task(name="copy", pairs=4)), "data.task.pairs=4 has no effect: data.task.name is copy"),
        (RunConfig(data=task(name="parity", bits=300)), "data.task.bits=300 needs 300 tokens.*use data.task.bits=1, or a longer"),
        (RunConfig(data=task(name="copy"), trainer=TrainerConfig(seq_len=1)), "data.task.name=copy needs 2.*use a longer"),
        (RunConfig(data=task(bits=2)), "use data.task.name=parity"),
        (RunConfig(data=DataConfig(task=TaskConfig(pairs=4))), "data.source is shakespeare; use data=mqar"),
        (RunConfig(eval=EvalConfig(pair_factors=[2])), "the data has no pairs"),
        (RunConfig(data=task(name="copy"), eval=EvalConfig(pair_factors=[2])), "the data has no pairs"),
        (RunConfig(data=task(), eval=EvalConfig(pair_factors=[0])), "must be 1 or more each"),
        (RunConfig(data=task(), eval=EvalConfig(passkey=PasskeyConfig(trials=2))), "eval.passkey.trials=2 is for texts"),
        (RunConfig(data=DataConfig(source="task", path="x")), "data.source is task"),
        (RunConfig(data=DataConfig(source="task", max_train_tokens=9)), "data.max_train_tokens=9 has no effect"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(config: RunConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.check()


TINY = [
    "+size=tiny", "isolate=false", "tracking.mode=disabled", "seed=0,1", "model.dim=16", "model.heads=2", "trainer.steps=4",
    "trainer.seq_len=32", "trainer.batch_size=4", "trainer.threads=1", "trainer.device=cpu", "eval.tokens=512", "eval.every=2",
    "eval.length_factors=[1,2,4]",
]  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_a_study_of_a_task_shows_its_accuracies(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["xattn-compare", f"+experiment=study/tasks_{name}", "dir=study", "plots=false", *TINY])
    seeds = [] if name == "mqar" else ["seed=0"]
    sys.argv += [*seeds, *(["plots=true", "eval.tokens=2048"] if name == "mqar" else [])]
    with pytest.raises(SystemExit) as exit_:
        compare.main()
    assert exit_.value.code == 0
    text = (tmp_path / "study" / "report.md").read_text()
    assert "Answers right" in text and "not possible" not in text and "not comparable:" not in text
    with open(tmp_path / "study" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 5 and all(0 <= float(row["val_accuracy"]) <= 1 for row in rows)
    result = record.read_result(tmp_path / "study" / "dense-seed0")
    by_length = result["val_by_length"]["none"]
    assert set(by_length) == set(result["task"]["none"]) == {"32", "64", "128"}
    assert all({"accuracy", "exact"} <= set(entry) for entry in by_length.values())
    rows = record.read_metrics(tmp_path / "study" / "dense-seed0")
    assert [row["step"] for row in rows if "val/accuracy" in row] == [2, 4]
    if name == "mqar":
        assert (tmp_path / "study" / "task.png").is_file()
        assert " pairs |" in text and "tokens back" in text and " ± " in text
        pairs = result["task"]["none"]["32"]["by_pairs"]
        assert "accuracy" in pairs["8"] and "needs 64 tokens" in pairs["16"]["error"]
