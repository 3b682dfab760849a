"""Passkey retrieval: a perfect memory finds every key, one that ends too early finds none beyond it, and the score counts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_experiments_run import tiny

import xattn
from xattn import ConfigError
from xattn.experiments import passkey, record
from xattn.experiments.data import Corpus, eval_blocks, train_batch
from xattn.experiments.judge import judge_all
from xattn.experiments.launch import launch
from xattn.experiments.passkey import FILLERS, KEYS, VOCABULARY, passkey_corpus, prompts, retrieve
from xattn.experiments.schema import BudgetSearchConfig, CompareConfig, DataConfig, EvalConfig, PasskeyConfig, RunConfig
from xattn.experiments.sources import load_corpus

CPU = torch.device("cpu")
DEPTHS = [0.0, 0.3, 1.0]
ASKED = PasskeyConfig(trials=7, depths=DEPTHS)


class Memory(torch.nn.Module):
    """Says again what followed the longest repetition of its last tokens within the last `window` ones: no weights, no error.

    `slips_at`: the prediction, counted from the end, at which it says another token.
    """

    def __init__(self, vocabulary: int, *, window: int | None = None, slips_at: int | None = None) -> None:
        super().__init__()
        self.head_vm = torch.eye(vocabulary)
        self.window, self.slips_at = window, slips_at

    def forward(self, ids_bn: torch.Tensor, **_: bool) -> torch.Tensor:
        n = ids_bn.shape[1]
        x_bnm = torch.zeros(*ids_bn.shape, len(self.head_vm))
        for row, ids in enumerate(ids_bn.tolist()):
            # Only the last predictions are asked for.
            for end in range(max(n - 6, 1), n + 1):
                seen = ids[max(0, end - self.window) if self.window else 0 : end]
                x_bnm[row, end - 1, self._next(seen)] = 50.0
        if self.slips_at is not None:
            x_bnm[:, n - self.slips_at] = x_bnm[:, n - self.slips_at].roll(1, dims=-1)
        return x_bnm

    @staticmethod
    def _next(seen: list[int]) -> int:
        for size in range(min(20, len(seen) - 1), 0, -1):
            for start in range(len(seen) - size - 1, -1, -1):
                if seen[start : start + size] == seen[-size:]:
                    return seen[start + size]
        return 0


class Uniform(Memory):
    """Holds every token for equally likely."""

    def forward(self, ids_bn: torch.Tensor, **_: bool) -> torch.Tensor:
        return torch.zeros(*ids_bn.shape, len(self.head_vm))


@pytest.fixture(scope="module")
def corpora() -> dict[str, Corpus]:
    return {"text": load_corpus(DataConfig()), "token": passkey_corpus(tokens=2_000, passage=64)}


def found(model: torch.nn.Module, corpus: Corpus, length: int, config: PasskeyConfig = ASKED) -> dict[str, dict[str, float]]:
    return retrieve(model, corpus, config, length=length, batch_tokens=1_000, device=CPU, precision="fp32")


def accuracies(*args, **options) -> list[float]:
    return [entry["accuracy"] for entry in found(*args, **options).values()]


@pytest.mark.parametrize("form", ["text", "token"])
@pytest.mark.parametrize("length", [128, 256])
def test_a_perfect_memory_finds_every_key_and_a_short_one_only_those_it_can_see(corpora, form: str, length: int) -> None:
    corpus = corpora[form]
    assert list(found(Memory(corpus.vocabulary), corpus, length)) == ["0", "0.3", "1"]
    assert accuracies(Memory(corpus.vocabulary), corpus, length) == [1.0, 1.0, 1.0]
    # Windows that begin where the key of the middle depth does, and right after it.
    needle, question = (37, 22) if form == "text" else (2, 2)
    start = round(0.3 * (length + 1 - question - needle))
    with_it = accuracies(Memory(corpus.vocabulary, window=length - start), corpus, length)
    without = accuracies(Memory(corpus.vocabulary, window=length - start - needle), corpus, length)
    assert with_it[0] < 0.5 and with_it[1:] == [1.0, 1.0]
    assert without[0] < 0.5 and without[1] < 0.5 and without[2] == 1.0


@pytest.mark.parametrize(("form", "answer"), [("text", 5), ("token", 1)])
def test_an_answer_with_one_wrong_token_does_not_count(corpora, form: str, answer: int) -> None:
    corpus = corpora[form]
    for place in range(1, answer + 1):
        assert accuracies(Memory(corpus.vocabulary, slips_at=place), corpus, 128) == [0.0, 0.0, 0.0]
    # A slip in the question is none of the answer's.
    assert accuracies(Memory(corpus.vocabulary, slips_at=answer + 1), corpus, 128) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("form", "answer"), [("text", 5), ("token", 1)])
def test_answer_nats_are_those_of_the_whole_answer(corpora, form: str, answer: int) -> None:
    corpus = corpora[form]
    for entry in found(Uniform(corpus.vocabulary), corpus, 100).values():
        assert entry["answer_nats"] == pytest.approx(answer * math.log(corpus.vocabulary))


def test_the_sentence_stands_at_its_depth_in_validation_text_and_is_asked_for(corpora) -> None:
    corpus = corpora["text"]
    texts = {}
    for depth in DEPTHS:
        asked = prompts(corpus, ASKED, length=256, depth=depth)
        assert asked.ids_bn.shape == (7, 257)
        texts[depth] = [bytes(row.tolist()).decode() for row in asked.ids_bn.to(torch.uint8)]
    validation = bytes(corpus.val.ids).decode()
    for first, middle, last in zip(*texts.values(), strict=True):
        key = first[-5:]
        sentence, question = f"\nThe pass key is {key}. Remember it.\n", f"\nThe pass key is {key}"
        places = [text.index(sentence) for text in (first, middle, last)]
        room = 257 - len(sentence) - len(question)
        assert places == [0, round(0.3 * room), room] and key.isdigit()
        assert all(text.endswith(question) for text in (first, middle, last))
        rest = {text.removesuffix(question).replace(sentence, "") for text in (first, middle, last)}
        assert len(rest) == 1 and rest.pop() in validation, "the filler changed with the depth"


def test_a_tokeniser_that_draws_the_space_into_a_number_is_asked_for_that_token() -> None:
    numbers: dict[bytes, int] = {}

    def encode(text: bytes) -> np.ndarray:
        pieces = text.replace(b" ", b"\0 ").replace(b".", b"\0.").split(b"\0")
        return np.array([numbers.setdefault(piece, len(numbers)) for piece in pieces])

    ids = encode(b"what comes before and after is of no account at all " * 40)
    words = replace(load_corpus(DataConfig()), tokenizer="words", encode=encode)
    words = replace(words, val=replace(words.val, ids=ids))
    asked = prompts(words, ASKED, length=50, depth=0.5)
    names = {number: piece for piece, number in numbers.items()}
    assert asked.answers == [1] * 7
    for row in asked.ids_bn.tolist():
        assert names[row[-1]][1:].isdigit() and names[row[-2]] == b" is" and row.count(row[-1]) == 2
    assert accuracies(Memory(len(numbers)), words, 50) == [1.0, 1.0, 1.0]


def test_prompts_are_a_function_of_the_seed(corpora) -> None:
    for corpus in corpora.values():
        first, again = (prompts(corpus, ASKED, length=100, depth=0.3).ids_bn for _ in range(2))
        other = prompts(corpus, replace(ASKED, seed=1), length=100, depth=0.3).ids_bn
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert len({tuple(row) for row in first.tolist()}) == 7


def test_the_asked_key_is_said_once_before_the_question_and_with_one_value(corpora) -> None:
    for depth in DEPTHS:
        for row in prompts(corpora["token"], ASKED, length=200, depth=depth).ids_bn.tolist():
            *prompt, key, value = row
            assert FILLERS <= key < FILLERS + KEYS <= value < VOCABULARY
            at = [i for i, token in enumerate(prompt) if token == key]
            assert at == [round(depth * 197)] and prompt[at[0] + 1] == value


@pytest.mark.parametrize("length", [8, 63, 64, 500])
def test_a_passage_says_every_pair_again_with_the_same_value(length: int) -> None:
    rows = passkey.passages(np.random.default_rng(0), count=50, length=length)
    assert rows.shape == (50, length) and rows.min() >= 0 and rows.max() < VOCABULARY
    for row in rows.tolist():
        pairs = [(a, b) for a, b in zip(row, row[1:], strict=False) if FILLERS <= a < FILLERS + KEYS]
        assert len({key for key, _ in pairs}) == len(set(pairs)) == min(max(length // 16, 1), KEYS)
        assert all(pairs.count(pair) == 4 and pair[1] >= FILLERS + KEYS for pair in pairs)
        assert sum(token >= FILLERS + KEYS for token in row) == len(pairs)


def test_sequences_to_train_on_are_whole_passages() -> None:
    corpus = load_corpus(DataConfig(source="passkey", passage_tokens=40, max_train_tokens=1_000))
    rows = corpus.train.ids.reshape(-1, 40).tolist()
    batch = train_batch(corpus, seed=0, step=0, batch_size=64, seq_len=40).ids_bn
    starts = [rows.index(row[:40]) for row in batch.tolist()]
    assert len(set(starts)) > 20 and min(starts) == 0
    assert corpus.decode(np.array([0, FILLERS, FILLERS + KEYS])) == ". k0 v0"


@pytest.mark.parametrize("length", [32, 64, 256])
def test_only_values_that_their_passage_has_said_before_are_answers(corpora, length: int) -> None:
    corpus = corpora["token"]
    blocks = eval_blocks(corpus, tokens=1024, length=length, longest=256)
    for number, (ids, asked) in enumerate(zip(blocks.ids_bn.tolist(), blocks.asked_bn.tolist(), strict=True)):
        last: dict[tuple[int, int], int] = {}
        for i, (token, back) in enumerate(zip(ids, asked, strict=True)):
            pair = ((number * length + i) // 64, ids[i - 1])
            is_value = i > 0 and token >= FILLERS + KEYS > ids[i - 1] >= FILLERS
            assert back == (i - last[pair] if is_value and pair in last else 0)
            if is_value:
                last[pair] = i
    batch = train_batch(corpus, seed=0, step=0, batch_size=8, seq_len=64)
    # a pair for 16 tokens, said four times: three of them can be known
    assert (batch.counts_bn[:, :64].sum(dim=1) == 4 * 3).all()


def test_no_room_for_a_key_says_what_to_do(corpora) -> None:
    with pytest.raises(ConfigError, match="use a longer trainer.seq_len"):
        prompts(corpora["text"], ASKED, length=40, depth=0.5)
    with pytest.raises(ConfigError, match="use 8 or more"):
        passkey_corpus(tokens=100, passage=7)
    with pytest.raises(ConfigError, match="no tokeniser"):
        prompts(replace(corpora["text"], encode=None), ASKED, length=100, depth=0.5)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (RunConfig(eval=EvalConfig(passkey=PasskeyConfig(trials=-1))), "eval.passkey.trials=-1"),
        (RunConfig(eval=EvalConfig(passkey=PasskeyConfig(trials=1, depths=[]))), r"use \[0,0.5,1\]"),
        (RunConfig(eval=EvalConfig(passkey=PasskeyConfig(trials=1, depths=[50.0]))), "depth from 0 to 1"),
        (RunConfig(eval=EvalConfig(passkey=PasskeyConfig(seed=3))), "eval.passkey.seed has no effect"),
        (RunConfig(data=DataConfig(source="bin", path="x"), eval=EvalConfig(passkey=ASKED)), "data.source=text"),
        (RunConfig(data=DataConfig(source="passkey", path="x")), "data.source is passkey"),
        (RunConfig(data=DataConfig(passage_tokens=64)), "data.passage_tokens=64 has no effect"),
        (CompareConfig(data=DataConfig(source="passkey"), budget_search=BudgetSearchConfig(step=0.5)), "use eval.kv_budgets"),
        (RunConfig(data=DataConfig(source="passkey", tokenizer="bpe")), "data.tokenizer=bpe has no effect"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(config: RunConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.check()


def test_a_run_records_retrieval_with_and_without_each_extension(tmp_path) -> None:
    config = tiny(seq_len=32, samples=1)
    config.model |= {"num_tokens": VOCABULARY, "max_seq_len": 32}
    config.data = DataConfig(source="passkey", passage_tokens=32)
    config.eval.passkey = PasskeyConfig(trials=5, depths=[0.0, 1.0])
    config.eval.extensions = {
        "self_extend": {"self_extend_group": 4, "self_extend_window": 8},
        "impossible": {"self_extend_group": 4},
    }
    result = launch(config, tmp_path)
    assert result["passkey"] == record.read_result(tmp_path)["passkey"] and result["data"]["tokenizer"] == "passkey"
    lengths = result["passkey"]["none"]
    assert 0 <= result["val"]["accuracy"] <= 1 and result["val"]["tokens"] < 0.4 * config.eval.tokens
    assert set(result["passkey"]) == {"none", "self_extend", "impossible"} and set(lengths) == {"32", "64"}
    for name in ("none", "self_extend"):
        for entry in result["passkey"][name].values():
            assert set(entry) == {"0", "1"} and all(0 < cell["answer_nats"] < 10 for cell in entry.values())
    assert lengths["64"] != result["passkey"]["self_extend"]["64"]
    assert "self_extend_window" in result["passkey"]["impossible"]["64"]["error"]


def test_a_length_without_room_is_a_reason_and_the_longer_ones_are_judged(corpora) -> None:
    model = xattn.build(num_tokens=256, max_seq_len=32, dim=16, depth=1, heads=2, rotary_pos_emb=True)
    config = EvalConfig(tokens=128, length_factors=[1, 4], passkey=ASKED)
    judged = judge_all(model, corpora["text"], config, seq_len=32, device=CPU, precision="fp32")
    assert "no room" in judged["passkey"]["none"]["32"]["error"] and judged["val"]["loss_nats"] > 0
    assert set(judged["passkey"]["none"]["128"]) == {"0", "0.3", "1"}
    unasked = judge_all(
        model, corpora["text"], replace(config, passkey=PasskeyConfig()), seq_len=32, device=CPU, precision="fp32"
    )
    assert unasked["passkey"] is None and unasked["val"] == judged["val"]
