"""Tokens to train and judge on, and batches that are a pure function of (seed, step).

Letters: b batch, n sequence. Where texts come from is in sources.py, how they become tokens in tokenise.py.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from xattn import ConfigError
from xattn.experiments.schema import TrainerConfig
from xattn.experiments.tasks import Examples, Task


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tokens in one row. `starts`: where each document begins, ascending from 0; None where they are one document.

    `stride`: training sequences begin at its multiples, so that passages of a fixed size are not cut.
    """

    ids: np.ndarray
    starts: np.ndarray | None = None
    stride: int = 1

    def __len__(self) -> int:
        return len(self.ids)

    def window(self, start: int, size: int) -> tuple[np.ndarray, np.ndarray | None]:
        """`size` tokens from `start`, and the number of the document that each belongs to."""
        ids = self.ids[start : start + size].astype(np.int64)
        if self.starts is None:
            return ids, None
        return ids, np.searchsorted(self.starts, np.arange(start, start + size), side="right")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text's two parts. `token_bytes[v]`: bytes of text that token v stands for; `encode`, `decode`: text to ids and back.

    Each is None where the tokeniser cannot say. `task`: makes the sequences, where they are no text; the parts are empty then.
    `answers(ids_bn, starts_b)`: of sequences that begin at these places of a part, what `Batch.asked_bn` is; None: all counts.
    """

    name: str
    tokenizer: str
    vocabulary: int
    train: Part
    val: Part
    token_bytes: np.ndarray | None
    decode: Callable[[np.ndarray], str] | None = None
    encode: Callable[[bytes], np.ndarray] | None = None
    task: Task | None = None
    answers: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    def bytes_of(self, ids: np.ndarray) -> int | None:
        """Bytes of text behind these ids."""
        return None if self.token_bytes is None else int(self.token_bytes[ids].sum())


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of n inputs and their n targets: ids (b, n + 1) int64, doc_ids alike, or None for one document.

    `asked`, alike: where only answers count, 0 for what is none, else how far back the token stands that decides it.
    """

    ids_bn: torch.Tensor
    doc_ids_bn: torch.Tensor | None = None
    asked_bn: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids_bn)

    @property
    def counts_bn(self) -> torch.Tensor | None:
        """bool (b, n + 1): which tokens the loss counts; None for all."""
        return None if self.asked_bn is None else self.asked_bn > 0

    def rows(self, low: int, high: int) -> "Batch":
        """The sequences from `low` on, up to and without `high`."""
        return self._each(lambda tensor: tensor[low:high])

    def split(self, rows: int) -> Iterator["Batch"]:
        """Groups of `rows` sequences in order; the last may be smaller."""
        for low in range(0, len(self), rows):
            yield self.rows(low, low + rows)

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.ids_bn, self.doc_ids_bn, self.asked_bn

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        ids, docs, asked = (None if tensor is None else change(tensor) for tensor in self.tensors())
        return Batch(ids_bn=ids, doc_ids_bn=docs, asked_bn=asked)


def check_corpus(corpus: Corpus, *, num_tokens: int, trainer: TrainerConfig, longest: int) -> None:
    """Refuse a corpus the run cannot use, before anything is trained.

    Args:
        num_tokens: size of the model's vocabulary.
        longest: longest evaluation length, in tokens.
    Raises:
        ConfigError: empty or too short parts, or ids outside the vocabulary.
    """
    if corpus.task is not None:
        return  # its sizes are settled with the config
    for label, part, needed in (
        ("training", corpus.train, trainer.seq_len + 1),
        ("validation", corpus.val, longest + 1),
    ):
        if len(part) == 0:
            raise ConfigError(f"the {label} part of {corpus.name} is empty; give a text of at least {needed} tokens")
        if len(part) < needed:
            raise ConfigError(
                f"the {label} part of {corpus.name} has {len(part)} tokens and one sequence needs {needed}; "
                "use a longer text, a shorter trainer.seq_len or fewer eval.length_factors"
            )
        top = int(part.ids.max())
        if top >= num_tokens or int(part.ids.min()) < 0:
            raise ConfigError(
                f"the {label} part of {corpus.name} holds token id {top}, outside the vocabulary of "
                f"model.num_tokens={num_tokens}; use model.num_tokens={top + 1} or the tokeniser that made these ids"
            )


def train_batch(corpus: Corpus, *, seed: int, step: int, batch_size: int, seq_len: int) -> Batch:
    """The sequences of one training step.

    A counter-based generator keyed by (seed, step) draws the offsets, so any step can be had without the ones before
    it: resuming needs no loader state, and accumulation or the number of processes changes nothing.
    """
    if corpus.task is not None:
        return _made(corpus.task.train(seed=seed, step=step, rows=batch_size, length=seq_len))
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    stride = corpus.train.stride
    places = generator.integers(0, (len(corpus.train) - seq_len - 1) // stride + 1, size=batch_size)
    return _cut(corpus, corpus.train, places * stride, seq_len)


def eval_blocks(corpus: Corpus, *, tokens: int, length: int, longest: int) -> Batch:
    """Validation sequences that predict the same tokens at every length.

    Block i predicts tokens i*length+1 ... (i+1)*length; the set is cut to a multiple of `longest`, so that no length
    leaves a tail out. Of a task: as many tokens of held-out sequences, others at every length.
    """
    if corpus.task is not None:
        return task_blocks(corpus, tokens=tokens, length=length)
    predicted = max(min(tokens, len(corpus.val) - 1) // longest, 1) * longest
    return _cut(corpus, corpus.val, np.arange(0, predicted, length), length)


def task_blocks(corpus: Corpus, *, tokens: int, length: int, pairs: int | None = None) -> Batch:
    """Held-out sequences of a task, about `tokens` tokens of them; `pairs`: in place of the trained number."""
    assert corpus.task is not None
    return _made(corpus.task.held_out(rows=max(tokens // length, 1), length=length, pairs=pairs))


def _made(examples: Examples) -> Batch:
    ids_bn, asked_bn = map(torch.from_numpy, examples)
    return Batch(ids_bn=ids_bn, asked_bn=asked_bn)


def _cut(corpus: Corpus, part: Part, starts: np.ndarray, seq_len: int) -> Batch:
    windows = [part.window(int(start), seq_len + 1) for start in starts]
    ids = np.stack([ids for ids, _ in windows])
    doc_ids = None if part.starts is None else torch.from_numpy(np.stack([docs for _, docs in windows]))
    asked = None if corpus.answers is None else torch.from_numpy(corpus.answers(ids, starts))
    return Batch(ids_bn=torch.from_numpy(ids), doc_ids_bn=doc_ids, asked_bn=asked)


def batches(blocks: Batch, batch_tokens: int) -> Iterator[Batch]:
    """Groups of about `batch_tokens` tokens; at least one sequence each."""
    return blocks.split(max(batch_tokens // (blocks.ids_bn.shape[1] - 1), 1))


class Seen:
    """A running digest of the tokens trained on: equal digests mean the same tokens in the same order.

    A chain rather than one open hash, so that a checkpoint can hold it as a string.
    """

    def __init__(self, digest: str = "") -> None:
        self.digest = digest

    def update(self, batch: Batch) -> None:
        chain = hashlib.blake2b(self.digest.encode(), digest_size=16)
        for tensor in batch.tensors():
            if tensor is not None:
                chain.update(tensor.numpy().tobytes())
        self.digest = chain.hexdigest()


def equal_parts(n: int, count: int) -> list[tuple[int, int]]:
    """n places in `count` parts, of one size but for rounding, each from low to before high; fewer where n is less."""
    edges = sorted({round(k * n / count) for k in range(count + 1)})
    return list(pairwise(edges))
