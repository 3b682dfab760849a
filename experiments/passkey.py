"""Passkey retrieval: a key is planted among filler, the end of the prompt asks for it, and the model must say it.

Text form, where the corpus is text: `The pass key is 12345. Remember it.` stands in validation text, and the prompt ends with
`The pass key is `. Token form, for models trained on data=passkey: a pair (key, value) stands among filler and other pairs, and
the prompt ends with the key. Perplexity hardly tells a model that looks far back from one that cannot; this does.

Letters: b prompts, n positions, a positions of the answers, t answer tokens, v vocabulary.
Source: Mohtashami and Jaggi, arXiv 2305.16300, section 4.2; token form after MQAR, arXiv 2312.04927.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, linear

from xattn import ConfigError
from xattn.experiments.data import Batch, Corpus, Part, batches
from xattn.experiments.device import evaluating
from xattn.experiments.schema import PasskeyConfig

# The vocabulary of the token form: filler first, then keys, then values.
FILLERS, KEYS, VALUES = 8, 8, 16
VOCABULARY = FILLERS + KEYS + VALUES
TOKENIZER = "passkey"
# One pair for so many tokens of a passage, said so often: at most half of a passage is pairs.
_TOKENS_A_PAIR, _TIMES = 16, 4
_VAL_TOKENS = 200_000
_TRAIN, _VAL, _ASKED = 1, 2, 3
_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of n tokens with their answers: ids (b, n + 1) int64, of whose targets the last `answers[b]` are the answer."""

    ids_bn: torch.Tensor
    answers: list[int]


def passkey_corpus(*, tokens: int, passage: int) -> Corpus:
    """A corpus of passages of `passage` tokens in which keys are asked for, `tokens` of them to train on; always the same one.

    Only `answers` count, in training and in judging.

    Raises:
        ConfigError: a passage too short for a pair.
    """
    parts = {}
    for label, stream, wanted in (("train", _TRAIN, tokens), ("val", _VAL, _VAL_TOKENS)):
        generator = np.random.Generator(np.random.Philox(key=[stream, passage]))
        ids = passages(generator, count=math.ceil(wanted / passage) + 1, length=passage)
        parts[label] = Part(ids=ids.astype(np.uint8).reshape(-1), stride=passage)
    return Corpus(
        name="passkeys", tokenizer=TOKENIZER, vocabulary=VOCABULARY, token_bytes=None, decode=_spell,
        answers=partial(answers, passage=passage), **parts,
    )  # fmt: skip


def answers(ids_bn: np.ndarray, starts_b: np.ndarray, *, passage: int) -> np.ndarray:
    """For each value that its passage has said before, how far back it did last; 0 elsewhere. int64 (b, n).

    starts_b: where in the corpus the sequences begin. Only these can be known: among all tokens they drown in filler, and a
    tiny model that is taught by all of them looks for a key with one seed in three.
    """
    places = starts_b[:, None] + np.arange(ids_bn.shape[1])
    key = np.roll(ids_bn, 1, axis=1) - FILLERS
    said = (ids_bn >= FILLERS + KEYS) & (key >= 0) & (key < KEYS)
    said[:, 0] = False
    at = np.flatnonzero(said)
    # the sequence, the passage in it, the key
    rows = np.repeat(np.arange(len(ids_bn)), said.sum(axis=1))
    which = (rows * (places.max() // passage + 1) + places.flat[at] // passage) * KEYS + key.flat[at]
    order = np.argsort(which, kind="stable")
    again = which[order[1:]] == which[order[:-1]]
    asked = np.zeros_like(ids_bn)
    asked.flat[at[order[1:]][again]] = (at[order[1:]] - at[order[:-1]])[again]
    return asked


def _spell(ids: np.ndarray) -> str:
    """`.` for filler, `k3` for a key, `v5` for a value."""
    names = ["."] * FILLERS + [f"k{i}" for i in range(KEYS)] + [f"v{i}" for i in range(VALUES)]
    return " ".join(names[i] for i in ids.tolist())


def passages(generator: np.random.Generator, *, count: int, length: int) -> np.ndarray:
    """Passages of the token form, int64 (count, length): filler, and pairs of a key and its value, each in several places.

    The first time a value cannot be known; from then on it can be looked up. No key has two values in a passage.
    """
    pairs = min(max(length // _TOKENS_A_PAIR, 1), KEYS)
    said = _TIMES * pairs
    if length < 2 * said:
        raise ConfigError(f"data.passage_tokens={length} is too short for a pair said {_TIMES} times; use {2 * _TIMES} or more")
    # A pair is one unit until the end, where it becomes two tokens: every row has as many pairs, and so as many tokens.
    shape = (count, length - said)
    rank = generator.random(shape).argsort(axis=1)
    is_pair = rank < said
    which = np.where(is_pair, rank // _TIMES, 0)
    keys = generator.random((count, KEYS)).argsort(axis=1)[:, :pairs] + FILLERS
    values = generator.integers(0, VALUES, size=(count, pairs)) + FILLERS + KEYS
    first = np.where(is_pair, np.take_along_axis(keys, which, axis=1), generator.integers(0, FILLERS, size=shape))
    units = np.stack([first, np.take_along_axis(values, which, axis=1)], axis=2)
    return units[np.stack([np.ones(shape, dtype=bool), is_pair], axis=2)].reshape(count, length)


def prompts(corpus: Corpus, config: PasskeyConfig, *, length: int, depth: float) -> Prompts:
    """The prompts of one length and depth, int64 (trials, length + 1): a function of the seed, in the form of the corpus.

    Keys and filler are the same at every depth.

    Raises:
        ConfigError: no room for key and question, or a corpus that is neither passages nor text.
    """
    generator = np.random.Generator(np.random.Philox(key=[config.seed, _ASKED + length]))
    if corpus.tokenizer == TOKENIZER:
        return _token_prompts(generator, trials=config.trials, length=length, passage=corpus.val.stride, depth=depth)
    if corpus.encode is None:
        raise ConfigError(f"{corpus.name} has no tokeniser to write a pass key with; use eval.passkey.trials=0")
    return _text_prompts(generator, corpus, trials=config.trials, length=length, depth=depth)


def _token_prompts(generator: np.random.Generator, *, trials: int, length: int, passage: int, depth: float) -> Prompts:
    at = _place(depth, room=length - 1, needle=2, length=length)
    many = math.ceil(length / passage)
    ids = passages(generator, count=trials * many, length=passage).reshape(trials, many * passage)[:, :length]
    key, value = generator.integers(0, KEYS, size=trials), generator.integers(0, VALUES, size=trials) + FILLERS + KEYS
    # Elsewhere the asked key is replaced, so that its value is said once.
    ids = np.where(ids == key[:, None] + FILLERS, (key[:, None] + 1) % KEYS + FILLERS, ids)
    ids[:, at], ids[:, at + 1], ids[:, -1] = key + FILLERS, value, key + FILLERS
    return Prompts(ids_bn=torch.from_numpy(np.concatenate([ids, value[:, None]], axis=1)), answers=[1] * trials)


def _text_prompts(generator: np.random.Generator, corpus: Corpus, *, trials: int, length: int, depth: float) -> Prompts:
    rows, answers = [], []
    for _ in range(trials):
        key = generator.integers(10 ** (_DIGITS - 1), 10**_DIGITS)
        start = generator.integers(0, len(corpus.val) - length)
        needle = corpus.encode(f"\nThe pass key is {key}. Remember it.\n".encode())
        asked, whole = (corpus.encode(f"\nThe pass key is {end}".encode()) for end in ("", key))
        room = length + 1 - len(whole)
        at = _place(depth, room=room, needle=len(needle), length=length)
        filler = corpus.val.ids[start : start + room - len(needle)]
        rows.append(np.concatenate([filler[:at], needle, filler[at:], whole]).astype(np.int64))
        # A tokeniser may draw the space into the answer: the answer is what the question has not said yet.
        answers.append(len(whole) - _common(asked, whole))
    return Prompts(ids_bn=torch.from_numpy(np.stack(rows)), answers=answers)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    size = min(len(a), len(b))
    return int(np.append(a[:size] == b[:size], False).argmin())


def _place(depth: float, *, room: int, needle: int, length: int) -> int:
    """Where in `room` tokens the needle begins: first at depth 0, as late as it can at depth 1."""
    if room < needle:
        raise ConfigError(
            f"a prompt of {length} tokens has no room for a pass key and its question; use a longer trainer.seq_len"
        )
    return round(depth * (room - needle))


def retrieve(
    model: Any,
    corpus: Corpus,
    config: PasskeyConfig,
    *,
    length: int,
    batch_tokens: int,
    device: torch.device,
    precision: str,
) -> dict[str, dict[str, float]]:
    """How well a model finds keys in prompts of `length` tokens.

    Returns: depth -> `accuracy`, the share of prompts at whose every answer token the likeliest token is the right one, which
        is what greedy decoding would say; and `answer_nats`, the mean over prompts of the whole answer's nats.
    Raises:
        ConfigError: as `prompts`. TokenError: a model that cannot be given so many tokens.
    """
    found = {}
    for depth in config.depths:
        asked = prompts(corpus, config, length=length, depth=depth)
        most = max(asked.answers)
        parts = []
        with evaluating(model, device, precision):
            for group in batches(Batch(ids_bn=asked.ids_bn), batch_tokens):
                ids_bn = group.ids_bn.to(device)
                x_bnm = model(ids_bn[:, :-1], return_embeddings=True, extrapolate=True)
                logits_bav = linear(x_bnm[:, -most:], model.head_vm).float()
                nats_ba = cross_entropy(logits_bav.transpose(1, 2), ids_bn[:, -most:], reduction="none")
                right_ba = logits_bav.argmax(dim=-1) == ids_bn[:, -most:]
                parts.append(torch.stack([nats_ba.double(), right_ba.double()]).cpu())
        nats_ba, right_ba = torch.cat(parts, dim=1)
        answer_ba = torch.arange(most, 0, -1) <= torch.tensor(asked.answers)[:, None]
        found[f"{depth:g}"] = {
            "accuracy": float((right_ba.bool() | ~answer_ba).all(dim=1).double().mean()),
            "answer_nats": float((nats_ba * answer_ba).sum(dim=1).mean()),
        }
    return found
