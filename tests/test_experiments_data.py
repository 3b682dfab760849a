"""Data: batches are a function of (seed, step) alone, every length is judged on the same tokens, every source reads."""

import gzip
import itertools
import json
import lzma
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from xattn import ConfigError
from xattn.experiments.compose import complete_model
from xattn.experiments.data import Corpus, Part, Seen, batches, check_corpus, eval_blocks, train_batch
from xattn.experiments.schema import DataConfig, RunConfig, TrainerConfig
from xattn.experiments.sources import load_corpus, split_off, write_token_files


@pytest.fixture(scope="module")
def shakespeare() -> Corpus:
    return load_corpus(DataConfig())


@pytest.fixture
def counting() -> Corpus:
    """Token i is i mod 251, so that any slice tells where it was cut."""
    part = Part(ids=np.arange(1_000) % 251)
    return Corpus(name="counting", tokenizer="bytes", vocabulary=256, train=part, val=part, token_bytes=None)


def test_the_embedded_corpus_is_whole_and_split_nine_to_one(shakespeare: Corpus) -> None:
    assert len(shakespeare.train) + len(shakespeare.val) == 1_115_394
    assert len(shakespeare.val) == 111_540
    assert bytes(shakespeare.train.ids[:14]) == b"First Citizen:"


def test_a_batch_depends_on_seed_and_step_only(shakespeare: Corpus) -> None:
    def batch(seed: int, step: int) -> torch.Tensor:
        return train_batch(shakespeare, seed=seed, step=step, batch_size=3, seq_len=17).ids_bn

    first = batch(5, 2)
    batch(5, 7), torch.rand(3), np.random.default_rng().random()
    assert torch.equal(first, batch(5, 2))
    assert not torch.equal(first, batch(5, 3))
    assert not torch.equal(first, batch(6, 2))
    assert first.shape == (3, 18) and first.dtype == torch.int64


def test_batches_are_slices_of_the_text_and_reach_its_last_token() -> None:
    part = Part(ids=np.arange(19))
    short = Corpus(name="s", tokenizer="bytes", vocabulary=256, train=part, val=part, token_bytes=None)
    drawn = torch.cat([train_batch(short, seed=0, step=s, batch_size=4, seq_len=17).ids_bn for s in range(8)])
    assert {tuple(row.tolist()) for row in drawn} == {tuple(range(18)), tuple(range(1, 19))}


@pytest.mark.parametrize("length", [8, 16, 32])
def test_every_length_predicts_the_same_tokens(counting: Corpus, length: int) -> None:
    blocks = eval_blocks(counting, tokens=100, length=length, longest=32).ids_bn
    assert blocks.shape == (96 // length, length + 1)
    assert blocks[:, 1:].flatten().tolist() == list(range(1, 97))
    assert torch.equal(blocks[1:, 0], blocks[:-1, -1])


def test_evaluation_takes_what_there_is_when_the_text_is_short(counting: Corpus) -> None:
    assert eval_blocks(counting, tokens=10**9, length=64, longest=64).ids_bn.numel() == (999 // 64) * 65


def test_groups_of_blocks_lose_and_repeat_nothing(counting: Corpus) -> None:
    blocks = eval_blocks(counting, tokens=100, length=8, longest=8)
    for batch_tokens in (1, 8, 24, 1_000):
        parts = list(batches(blocks, batch_tokens))
        assert torch.equal(torch.cat([part.ids_bn for part in parts]), blocks.ids_bn)
        assert all(len(part) * 8 <= max(batch_tokens, 8) for part in parts)


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
    corpus = replace(counting, **{part: Part(ids=np.array(ids, dtype=np.int64))})
    with pytest.raises(ConfigError, match=says):
        check_corpus(corpus, num_tokens=256, trainer=TrainerConfig(seq_len=8), longest=32)


def text(path, **more) -> DataConfig:
    return DataConfig(source="text", path=str(path), **more)


def test_a_text_of_ones_own_is_read_and_split(tmp_path) -> None:
    (tmp_path / "mine.txt").write_bytes(bytes(range(100)))
    corpus = load_corpus(text(tmp_path / "mine.txt", val_fraction=0.25))
    assert (len(corpus.train), corpus.val.ids.tolist()) == (75, list(range(75, 100)))
    (tmp_path / "other.txt").write_bytes(b"held out")
    held = load_corpus(text(tmp_path / "mine.txt", val_path=str(tmp_path / "other.txt")))
    assert (len(held.train), bytes(held.val.ids)) == (100, b"held out")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.xz"])
def test_documents_are_read_separated_and_masked(tmp_path, ending: str) -> None:
    path = tmp_path / f"mine.{ending}"
    opener = {"jsonl": open, "jsonl.gz": gzip.open, "jsonl.xz": lzma.open}[ending]
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": i, "body": word}) + "\n" for i, word in enumerate(["ab", "çd", "e", "fgh"]))
    corpus = load_corpus(text(path, text_field="body", val_fraction=0.3))
    assert bytes(corpus.train.ids) == "ab\0çd\0e\0".encode()
    assert bytes(corpus.val.ids) == b"fgh"
    assert corpus.train.window(1, 7)[1].tolist() == [1, 1, 2, 2, 2, 2, 3]
    assert corpus.bytes_of(corpus.train.ids) == 6, "separators stand for no bytes of text"
    batch = train_batch(corpus, seed=0, step=0, batch_size=2, seq_len=4)
    assert batch.doc_ids_bn.shape == batch.ids_bn.shape == (2, 5)
    assert load_corpus(text(path, text_field="body", document_mask=False)).train.starts is None


def test_whole_documents_are_held_out_when_there_are_several() -> None:
    train, val = split_off([b"a" * 50, b"b" * 40, b"c" * 5, b"d" * 5], 0.08)
    assert ([d[:1] for d in train], [d[:1] for d in val]) == ([b"a", b"b"], [b"c", b"d"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.txt", None, "gone.txt cannot be read"),
        ("*.text", None, "matches no file"),
        ("empty.txt", b"", "is empty"),
        ("bad.jsonl", b'{"text": "fine"}\nnot json\n', "line 2"),
        ("bad.jsonl", b'{"words": "fine"}\n', "data.text_field=NAME"),
        ("bad.txt.xz", b"not xz", "cannot be read"),
        ("bad.txt.gz", b"not gz", "cannot be read"),
    ],
)
def test_a_text_that_cannot_be_read_says_why(tmp_path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_corpus(text(tmp_path / name))


def test_token_files_read_back_as_they_were_written(shakespeare: Corpus, tmp_path) -> None:
    write_token_files(shakespeare, tmp_path / "bin")
    data = DataConfig(source="bin", path=str(tmp_path / "bin"))
    again = load_corpus(data)
    assert np.array_equal(again.train.ids, shakespeare.train.ids) and len(again.val) == len(shakespeare.val)
    assert (again.tokenizer, again.bytes_of(again.val.ids)) == ("bytes", len(shakespeare.val))
    config = RunConfig(data=data)
    complete_model(config)
    assert config.model["num_tokens"] == 256
    (tmp_path / "bin" / "meta.json").unlink()
    with pytest.raises(ConfigError, match="model.num_tokens"):
        complete_model(RunConfig(data=data))
    assert len(load_corpus(replace(data, max_train_tokens=100)).train) == 100
    (tmp_path / "bin" / "val.bin").unlink()
    with pytest.raises(ConfigError, match="val.bin"):
        load_corpus(data)


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ('{"vocab_size": 100, "dtype": "O"}', "dtype 'O' is not known; use one of uint8"),
        ('{"vocab_size": 100, "dtype": ["<u2"]}', "is not known"),
        ('{"vocab_size": "many"}', "vocab_size 'many' is no count"),
        ("[1]", "model.num_tokens"),
    ],
)
def test_token_files_of_a_stranger_are_integers_or_refused(tmp_path, meta: str, says: str) -> None:
    for label in ("train", "val"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / f"{label}.bin")
    (tmp_path / "meta.json").write_text(meta)
    data = DataConfig(source="bin", path=str(tmp_path))
    with pytest.raises(ConfigError, match=says):
        complete_model(RunConfig(data=data))
        load_corpus(data)


def test_a_bpe_is_trained_once_and_counts_the_bytes_it_stands_for(tmp_path, shakespeare: Corpus) -> None:
    words = bytes(shakespeare.train.ids[:60_000]).decode()
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": words[i : i + 20_000]}) + "\n" for i in range(0, 60_000, 20_000)))
    data = text(path, tokenizer="bpe", vocab_size=400, cache=str(tmp_path / "cache"), val_fraction=0.3)
    first = load_corpus(data)
    assert first.train.ids.max() < 400 and len(first.train) < 0.7 * 40_000
    assert first.bytes_of(first.train.ids) == len(words[:40_000].encode())
    assert len(first.train.starts) == 2
    cached = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    second = load_corpus(data)
    assert np.array_equal(first.train.ids, second.train.ids)
    assert cached == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}


def test_a_bpe_that_cannot_be_kept_says_where_to(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("to be or not to be " * 200)
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(ConfigError, match="use data.cache=FOLDER"):
        load_corpus(text(tmp_path / "mine.txt", tokenizer="bpe", vocab_size=300, cache=str(tmp_path / "taken")))


def hugging_face(monkeypatch, answer) -> None:
    """A stand-in for the package `datasets`; `answer(name, **asked)` is its load_dataset."""
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, config, **asked: answer(name, **asked)
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_data_set_is_streamed_until_there_is_enough(monkeypatch) -> None:
    taken = []

    def rows(name: str, *, split: str, streaming: bool):
        assert (name, split, streaming) == ("someone/something", "train", True)
        for number in itertools.count():
            taken.append(number)
            yield {"text": f"document {number:03d}"}

    hugging_face(monkeypatch, rows)
    corpus = load_corpus(DataConfig(source="hf", path="someone/something", max_train_tokens=100))
    assert len(corpus.train) == 100 and bytes(corpus.train.ids[:26]) == b"document 000\0document 001\0"
    held = bytes(corpus.val.ids).decode().strip("\0").split("\0")
    assert held == [f"document {number:03d}" for number in taken[-len(held) :]] and len(taken) < 20


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_package_itself_streams_a_folder_of_files(tmp_path, ending: str) -> None:
    pytest.importorskip("datasets")
    words = [f"document {number:03d} " + "word " * (number % 7) for number in range(200)]
    if ending == "jsonl":
        (tmp_path / "part.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in words))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"body": words}), tmp_path / "part.parquet")
    data = DataConfig(source="hf", path=str(tmp_path), text_field="body", max_train_tokens=1_000)
    corpus = load_corpus(data)
    assert len(corpus.train) == 1_000, "as many tokens as were asked for"
    assert bytes(corpus.train.ids).decode() == ("\0".join(words) + "\0")[:1_000]
    held = bytes(corpus.val.ids).decode().strip("\0").split("\0")
    assert set(held) < set(words)
    every = load_corpus(replace(data, max_train_tokens=10**6))
    assert len(every.train) + len(every.val) == sum(map(len, words)) + len(words)
    with pytest.raises(ConfigError, match="column 'text' is not there; use data.text_field=body"):
        load_corpus(replace(data, text_field="text"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"label": 3, "body": "words"}, "column 'text' is not there; use data.text_field=body"),
        ({"text": 3, "title": "a", "body": "b"}, "column 'text' holds int, not text; use data.text_field=title or body"),
        ({"text": ["a", "b"]}, "column 'text' holds list, not text; none of its columns .text. is text"),
    ],
)
def test_a_column_that_is_no_text_is_named_with_those_that_are(monkeypatch, row: dict, says: str) -> None:
    hugging_face(monkeypatch, lambda name, **_: itertools.repeat(row, 3))
    with pytest.raises(ConfigError, match=f"someone/something: {says}"):
        load_corpus(DataConfig(source="hf", path="someone/something", max_train_tokens=100))


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach the Hub"), FileNotFoundError("no such data set"), None])
def test_an_online_source_without_a_network_names_the_offline_choice(monkeypatch, error: Exception | None) -> None:
    def refuse(name: str, **_):
        raise error

    hugging_face(monkeypatch, refuse)
    if error is None:
        monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="data=shakespeare") as raised:
        load_corpus(DataConfig(source="hf", path="someone/something", max_train_tokens=100))
    assert (str(error) if error is not None else "pip install 'xattn[data]'") in str(raised.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(val_path="x.txt"), "data.val_path=x.txt has no effect: data.source is shakespeare"),
        (dict(hf_config="en"), "use data.source=hf"),
        (dict(text_field="body"), "data.text_field=body has no effect"),
        (dict(source="bin", path="x", tokenizer="bpe"), "data.tokenizer=bpe has no effect: data.source is bin"),
        (dict(source="bin", path="x", document_mask=False), "data.document_mask=False has no effect"),
        (dict(source="text", path="x", val_path="y", val_fraction=0.2), "data.val_path is given"),
        (dict(vocab_size=1000), "data.vocab_size=1000 has no effect: data.tokenizer is bytes"),
        (dict(tokenizer="bpe", vocab_size=100), "256 bytes and a separator"),
    ],
)
def test_a_data_field_that_nothing_reads_is_refused(given: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DataConfig(**given).check()
