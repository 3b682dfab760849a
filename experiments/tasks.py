"""Tasks that tell variants apart where perplexity hardly does, made up as they are needed: only answers are learned and judged.

`mqar`: pairs of a key and its value, then every key once more, among filler; its value is the answer. `variable_assignment`:
variables are assigned values again and again, then each is asked for once; its last value is the answer, the earlier ones are
stale. `copy`: a string, a mark, the string again. `parity`: after every few bits the parity of all bits so far, which follows
from the state before and the bits since; earlier states are stale.

Letters: b sequences, n positions, p pairs, a assignments, s states. A sequence of length n holds n + 1 ids, as in data.py.
Source: mqar: Zoology, arXiv 2312.04927, section 3 and appendix. variable_assignment, parity: the examples that motivate
    selective attention, arXiv 2410.02703, section 1. copy: arXiv 2402.01032, section 2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xattn.experiments.schema import TaskConfig

# Where a key is asked again: at gap x with a probability ~ x ** (_POWER - 1), as in Zoology; most soon, some late.
_POWER = 0.01
# Beyond any seed of a run, so that no training stream is the one that is held out.
_HELD_OUT = 2**32
EVEN = 2  # parity: ids of the states are 2 (even) and 3 (odd), of the bits 0 and 1

# ids (b, n + 1) int64, and, alike: 0 where a token is no answer, else how far back the token stands that decides it.
Examples = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of settled sizes. Every sequence is a function of (seed, step), or, held out, of its length and pairs."""

    config: TaskConfig

    @property
    def vocabulary(self) -> int:
        return ids_of(self.config)

    def train(self, *, seed: int, step: int, rows: int, length: int) -> Examples:
        """The sequences of one training step."""
        generator = np.random.Generator(np.random.Philox(key=[seed, step]))
        return _MAKERS[self.config.name](generator, self.config, rows, length, False)

    def held_out(self, *, rows: int, length: int, pairs: int | None = None) -> Examples:
        """Sequences to judge on, from a stream that no seed trains on; `pairs`: in place of the trained number."""
        config = self.config if pairs is None else TaskConfig(**vars(self.config) | {"pairs": pairs})
        generator = np.random.Generator(np.random.Philox(key=[_HELD_OUT + length, config.pairs or 0]))
        return _MAKERS[config.name](generator, config, rows, length, True)


def ids_of(config: TaskConfig) -> int:
    """How many ids a task has: its vocabulary and, where there is one, the mark behind it."""
    if config.name == "parity":
        return EVEN + 2
    return config.settled().vocabulary + (config.name != "mqar")


def mqar(generator: np.random.Generator, config: TaskConfig, rows: int, length: int, whole: bool) -> Examples:
    """Multi-query associative recall: p pairs, then slots of two tokens, in p of which a key stands again with its value.

    Keys are ids below half of the vocabulary, values the others; no sequence has one twice among its pairs.
    Differs: Zoology leaves the answer out of the sequence, here it follows its key; filler is any value but never a key, where
    Zoology draws any id, so that no answer is doubtful in a small vocabulary.
    """
    half, pairs = config.vocabulary // 2, config.pairs
    keys, values = _distinct(generator, rows, half, pairs), _distinct(generator, rows, half, pairs) + half
    ids = generator.integers(half, config.vocabulary, size=(rows, length + 1))
    asked = np.zeros_like(ids)
    first = 2 * np.arange(pairs)
    ids[:, first], ids[:, first + 1] = keys, values
    slots = (length + 1) // 2 - pairs
    # The largest of log p + Gumbel noise are draws by p without replacement.
    rank = (_POWER - 1) * np.log(np.arange(1, slots + 1)) + generator.gumbel(size=(rows, slots))
    at = 2 * pairs + 2 * (-rank).argsort(axis=1)[:, :pairs]
    np.put_along_axis(ids, at, keys, axis=1)
    np.put_along_axis(ids, at + 1, values, axis=1)
    np.put_along_axis(asked, at + 1, at - first, axis=1)
    return ids, asked


def variable_assignment(generator: np.random.Generator, config: TaskConfig, rows: int, length: int, whole: bool) -> Examples:
    """As many assignments (variable, value) as fit, a mark, and every variable once, in any order, with its last value.

    Each of the p variables of a sequence is assigned once at least, and otherwise all are as likely.
    """
    half, mark, pairs = config.vocabulary // 2, config.vocabulary, config.pairs
    assignments = length // 2 - pairs
    ids = np.full((rows, length + 1), mark)
    asked = np.zeros_like(ids)
    names = _distinct(generator, rows, half, pairs)
    once = np.broadcast_to(np.arange(pairs), (rows, pairs))
    which = np.concatenate([once, generator.integers(0, pairs, size=(rows, assignments - pairs))], axis=1)
    which = generator.permuted(which, axis=1)
    values = generator.integers(half, mark, size=(rows, assignments))
    ids[:, 0 : 2 * assignments : 2], ids[:, 1 : 2 * assignments : 2] = np.take_along_axis(names, which, axis=1), values
    order = generator.permuted(once, axis=1)
    is_last = which[:, ::-1, None] == order[:, None, :]
    last = assignments - 1 - is_last.argmax(axis=1)
    at = 2 * assignments + 1 + 2 * np.arange(pairs)
    ids[:, at], ids[:, at + 1] = np.take_along_axis(names, order, axis=1), np.take_along_axis(values, last, axis=1)
    asked[:, at + 1] = at - 2 * last
    return ids, asked


def copy(generator: np.random.Generator, config: TaskConfig, rows: int, length: int, whole: bool) -> Examples:
    """A string of uniform ids, a mark, and the string again, which is the answer; marks to the end.

    The string is as long as fits; for training of any length up to that, the same for all sequences of a step, so that
    micro-batches weigh alike.
    """
    size = length // 2 if whole else int(generator.integers(1, length // 2 + 1))
    ids = np.full((rows, length + 1), config.vocabulary)
    asked = np.zeros_like(ids)
    ids[:, :size] = ids[:, size + 1 : 2 * size + 1] = generator.integers(0, config.vocabulary, size=(rows, size))
    asked[:, size + 1 : 2 * size + 1] = size + 1
    return ids, asked


def parity(generator: np.random.Generator, config: TaskConfig, rows: int, length: int, whole: bool) -> Examples:
    """`bits` uniform bits, the parity of all bits so far, and so on; the parities are the answers."""
    unit = config.bits + 1
    states = (length + 1) // unit
    ids = generator.integers(0, 2, size=(rows, length + 1))
    asked = np.zeros_like(ids)
    units = ids[:, : states * unit].reshape(rows, states, unit)
    units[:, :, -1] = EVEN + units[:, :, :-1].sum(axis=2).cumsum(axis=1) % 2
    ids[:, : states * unit] = units.reshape(rows, -1)
    at = unit * np.arange(1, states + 1) - 1
    # The first state follows from its bits alone.
    asked[:, at] = np.minimum(at, unit)
    return ids, asked


_MAKERS: dict[str, Callable[[np.random.Generator, TaskConfig, int, int, bool], Examples]] = {
    "mqar": mqar,
    "variable_assignment": variable_assignment,
    "copy": copy,
    "parity": parity,
}


def _distinct(generator: np.random.Generator, rows: int, size: int, count: int) -> np.ndarray:
    """`count` different numbers below `size` a row, in any order."""
    smallest = generator.random((rows, size)).argpartition(count - 1, axis=1)[:, :count]
    return generator.permuted(smallest, axis=1)
