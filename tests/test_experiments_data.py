"""Data: batches are a function of (seed, step) alone, and every length is judged on the same tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from xattn import ConfigError
from xattn.experiments.data import Corpus, Seen, batches, check_corpus, eval_blocks, load_corpus, train_batch
from xattn.experiments.schema import DataConfig, TrainerConfig


@pytest.fixture(scope="module")
def shakespeare() -> Corpus:
    return load_corpus(DataConfig())


@pytest.fixture
def counting() -> Corpus:
    """Token i is i mod 251, so that any slice tells where it was cut."""
    ids = np.arange(1_000) % 251
    return Corpus(name="counting", tokenizer="bytes", vocabulary=256, train=ids, val=ids, token_bytes=None)


def test_the_embedded_corpus_is_whole_and_split_nine_to_one(shakespeare: Corpus) -> None:
    assert len(shakespeare.train) + len(shakespeare.val) == 1_115_394
    assert len(shakespeare.val) == 111_540
    assert bytes(shakespeare.train[:14]) == b"First Citizen:"


def test_a_batch_depends_on_seed_and_step_only(shakespeare: Corpus) -> None:
    def batch(seed: int, step: int) -> torch.Tensor:
        return train_batch(shakespeare, seed=seed, step=step, batch_size=3, seq_len=17)

    first = batch(5, 2)
    batch(5, 7), torch.rand(3), np.random.default_rng().random()
    assert torch.equal(first, batch(5, 2))
    assert not torch.equal(first, batch(5, 3))
    assert not torch.equal(first, batch(6, 2))
    assert first.shape == (3, 18) and first.dtype == torch.int64


def test_batches_are_slices_of_the_text_and_reach_its_last_token() -> None:
    short = Corpus(name="s", tokenizer="bytes", vocabulary=256, train=np.arange(19), val=np.arange(19), token_bytes=None)
    drawn = torch.cat([train_batch(short, seed=0, step=s, batch_size=4, seq_len=17) for s in range(8)])
    assert {tuple(row.tolist()) for row in drawn} == {tuple(range(18)), tuple(range(1, 19))}


@pytest.mark.parametrize("length", [8, 16, 32])
def test_every_length_predicts_the_same_tokens(counting: Corpus, length: int) -> None:
    blocks = eval_blocks(counting, tokens=100, length=length, longest=32)
    assert blocks.shape == (96 // length, length + 1)
    assert blocks[:, 1:].flatten().tolist() == list(range(1, 97))
    assert torch.equal(blocks[1:, 0], blocks[:-1, -1])


def test_evaluation_takes_what_there_is_when_the_text_is_short(counting: Corpus) -> None:
    assert eval_blocks(counting, tokens=10**9, length=64, longest=64).numel() == (999 // 64) * 65


def test_groups_of_blocks_lose_and_repeat_nothing(counting: Corpus) -> None:
    blocks = eval_blocks(counting, tokens=100, length=8, longest=8)
    for batch_tokens in (1, 8, 24, 1_000):
        parts = list(batches(blocks, batch_tokens))
        assert torch.equal(torch.cat(parts), blocks)
        assert all(part.shape[0] * 8 <= max(batch_tokens, 8) for part in parts)


def test_the_digest_tells_order_and_continues_from_a_checkpoint(shakespeare: Corpus) -> None:
    parts = [train_batch(shakespeare, seed=0, step=s, batch_size=2, seq_len=5) for s in range(3)]

    def digest(order: list[int], start: str = "") -> str:
        seen = Seen(start)
        for i in order:
            seen.update(parts[i])
        return seen.digest

    assert digest([0, 1, 2]) == digest([2], start=digest([0, 1]))
    assert len({digest([0, 1, 2]), digest([1, 0, 2]), digest([0, 1])}) == 3


@pytest.mark.parametrize(
    ("part", "ids", "says"),
    [
        ("train", [], "training part of counting is empty"),
        ("val", [], "validation part of counting is empty"),
        ("train", [1] * 8, "has 8 tokens and one sequence needs 9"),
        ("val", [1] * 32, "has 32 tokens and one sequence needs 33"),
        ("train", [1] * 50 + [300], "token id 300, outside the vocabulary of model.num_tokens=256"),
    ],
)
def test_a_corpus_that_cannot_serve_is_refused(counting: Corpus, part: str, ids: list[int], says: str) -> None:
    corpus = replace(counting, **{part: np.array(ids, dtype=np.int64)})
    with pytest.raises(ConfigError, match=says):
        check_corpus(corpus, num_tokens=256, trainer=TrainerConfig(seq_len=8), longest=32)


def test_a_text_of_ones_own_is_read_split_and_refused_when_missing(tmp_path) -> None:
    (tmp_path / "mine.txt").write_bytes(bytes(range(100)))
    corpus = load_corpus(DataConfig(source="text", path=str(tmp_path / "mine.txt"), val_fraction=0.25))
    assert (len(corpus.train), corpus.val.tolist()) == (75, list(range(75, 100)))
    (tmp_path / "other.txt").write_bytes(b"held out")
    held = load_corpus(DataConfig(source="text", path=str(tmp_path / "mine.txt"), val_path=str(tmp_path / "other.txt")))
    assert (len(held.train), bytes(held.val.astype(np.uint8))) == (100, b"held out")
    with pytest.raises(ConfigError, match="nowhere.txt"):
        load_corpus(DataConfig(source="text", path="nowhere.txt"))
