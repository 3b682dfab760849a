"""Tokens to train and judge on: a corpus of two token arrays, and batches that are a pure function of (seed, step).

Letters: b batch, n sequence.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xattn import ConfigError
from xattn.experiments.schema import DataConfig, TrainerConfig

CORPORA = Path(__file__).resolve().parent / "corpora"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens of the two parts. `token_bytes[v]` is how many bytes of text token v stands for (None: unknown)."""

    name: str
    tokenizer: str
    vocabulary: int
    train: np.ndarray
    val: np.ndarray
    token_bytes: np.ndarray | None

    def bytes_of(self, ids: np.ndarray) -> int | None:
        """Bytes of text behind these ids; None where the tokeniser cannot say."""
        return None if self.token_bytes is None else int(self.token_bytes[ids].sum())


def load_corpus(data: DataConfig) -> Corpus:
    """Read and tokenise the configured source.

    Raises:
        ConfigError: the source is missing, empty or cannot be decoded.
    """
    if data.source == "shakespeare":
        return _from_text(data, (CORPORA / "tinyshakespeare.txt").read_bytes(), None)
    if data.source == "text":
        val = _read_text(data.val_path) if data.val_path is not None else None
        return _from_text(data, _read_text(data.path), val)
    raise ConfigError(f"data.source={data.source} is not built in yet; use data.source=shakespeare or text")


def check_corpus(corpus: Corpus, *, num_tokens: int, trainer: TrainerConfig, longest: int) -> None:
    """Refuse a corpus the run cannot use, before anything is trained.

    Args:
        num_tokens: size of the model's vocabulary.
        longest: longest evaluation length, in tokens.
    Raises:
        ConfigError: empty or too short parts, or ids outside the vocabulary.
    """
    for part, ids, needed in (("training", corpus.train, trainer.seq_len + 1), ("validation", corpus.val, longest + 1)):
        if len(ids) == 0:
            raise ConfigError(f"the {part} part of {corpus.name} is empty; give a text of at least {needed} tokens")
        if len(ids) < needed:
            raise ConfigError(
                f"the {part} part of {corpus.name} has {len(ids)} tokens and one sequence needs {needed}; "
                "use a longer text, a shorter trainer.seq_len or fewer eval.length_factors"
            )
        top = int(ids.max())
        if top >= num_tokens or int(ids.min()) < 0:
            raise ConfigError(
                f"the {part} part of {corpus.name} holds token id {top}, outside the vocabulary of "
                f"model.num_tokens={num_tokens}; use model.num_tokens={top + 1} or the tokeniser that made these ids"
            )


def train_batch(corpus: Corpus, *, seed: int, step: int, batch_size: int, seq_len: int) -> torch.Tensor:
    """The sequences of one training step.

    A counter-based generator keyed by (seed, step) draws the offsets, so any step can be had without the ones before
    it: resuming needs no loader state, and accumulation or the number of processes changes nothing.

    Returns: ids of shape (b, n + 1), int64: n inputs and their n targets.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, len(corpus.train) - seq_len, size=batch_size)
    return torch.from_numpy(np.stack([corpus.train[s : s + seq_len + 1].astype(np.int64) for s in starts]))


def eval_blocks(corpus: Corpus, *, tokens: int, length: int, longest: int) -> torch.Tensor:
    """Validation sequences that predict the same tokens at every length.

    Block i predicts ids i*length+1 ... (i+1)*length; the set is cut to a multiple of `longest`, so that no length
    leaves a tail out.

    Returns: ids of shape (blocks, length + 1), int64.
    """
    predicted = max(min(tokens, len(corpus.val) - 1) // longest, 1) * longest
    ids = corpus.val[: predicted + 1].astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length]
    return torch.from_numpy(np.ascontiguousarray(windows))


def batches(blocks: torch.Tensor, batch_tokens: int) -> Iterator[torch.Tensor]:
    """Split blocks (b, n + 1) into groups of about `batch_tokens` tokens; at least one sequence each."""
    return iter(blocks.split(max(batch_tokens // (blocks.shape[1] - 1), 1)))


class Seen:
    """A running digest of the tokens trained on: equal digests mean the same tokens in the same order.

    A chain rather than one open hash, so that a checkpoint can hold it as a string.
    """

    def __init__(self, digest: str = "") -> None:
        self.digest = digest

    def update(self, ids: torch.Tensor) -> None:
        chain = hashlib.blake2b(self.digest.encode(), digest_size=16)
        chain.update(ids.numpy().tobytes())
        self.digest = chain.hexdigest()


def _from_text(data: DataConfig, train: bytes, val: bytes | None) -> Corpus:
    if data.tokenizer != "bytes":
        raise ConfigError(f"data.tokenizer={data.tokenizer} is not built in yet; use data.tokenizer=bytes")
    name = "Tiny Shakespeare" if data.source == "shakespeare" else str(data.path)
    ids = np.frombuffer(train, dtype=np.uint8)
    if val is None:
        cut = int(len(ids) * (1.0 - data.val_fraction))
        ids, val_ids = ids[:cut], ids[cut:]
    else:
        val_ids = np.frombuffer(val, dtype=np.uint8)
    if data.max_train_tokens is not None:
        ids = ids[: data.max_train_tokens]
    return Corpus(name=name, tokenizer="bytes", vocabulary=256, train=ids, val=val_ids, token_bytes=np.ones(256, dtype=np.int64))


def _read_text(path: str | None) -> bytes:
    try:
        return Path(str(path)).read_bytes()
    except OSError as error:
        raise ConfigError(f"data.path={path} cannot be read: {error.strerror}; use the path of a text file") from None
