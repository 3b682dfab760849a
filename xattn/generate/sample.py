"""generate: samples tokens one after the other, greedily or by chance."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xattn.cache.cache import Cache
from xattn.cache.kind import KvBudget
from xattn.errors import ConfigError, unknown
from xattn.generate.logits import FILTERS, Filter, contrast, discourage, forbid_ngrams
from xattn.generate.reader import Reader, align, reader_for

# steps after which a static generation looks whether all rows have ended
CHECK_EVERY = 16


@contextmanager
def evaluating(*nets: nn.Module | None) -> Iterator[None]:
    """Dropout off in these models, until it is as it was."""
    training = {net: net.training for net in nets if net is not None}
    for net in training:
        net.eval()
    try:
        yield
    finally:
        for net, was in training.items():
            net.train(was)


@torch.no_grad()
def generate(
    net: nn.Module,
    prompts: Tensor | list[Tensor],
    seq_len: int,
    *,
    temperature: float = 1.0,
    filter_logits_fn: str | Filter | None = "top_k",
    filter_kwargs: dict[str, Any] | None = None,
    eos_token: int | None = None,
    stop: Sequence[Sequence[int]] = (),
    prompt_lens: Tensor | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int | None = None,
    amateur: nn.Module | None = None,
    contrast_alpha: float = 0.1,
    contrast_beta: float = 0.5,
    on_token: Callable[[Tensor], Any] | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    cache_kv: bool = True,
    cache: Cache | None = None,
    kv_budget: KvBudget = None,
    prefill_chunk: int | None = None,
    static: bool | None = None,
    pad_value: int = 0,
    extrapolate: bool = False,
) -> Tensor:
    """seq_len new tokens after each prompt.

    Args:
        net: a causal `TransformerWrapper`.
        prompts: ids (p,), (b p), or a list of (p_b,) of different lengths.
        prompt_lens: (b,) how many tokens of each row of (b p) are its prompt, when rows are padded on the right.
        temperature: 0 takes the likeliest token. filter_logits_fn: top_k, top_p, min_p, a callable, or None.
        eos_token: a row that reaches it goes on with pad_value; all rows there ends early. In a prompt it means nothing.
        stop: token sequences; a row that has made one of them ends likewise.
        repetition_penalty: above 1 makes tokens of the prompt and of the row less likely (CTRL); 1 is off.
        no_repeat_ngram: no n-gram of this size comes twice in prompt and row.
        amateur: a weaker model of the same vocabulary, for contrastive decoding with contrast_alpha and contrast_beta.
        on_token: called with each step's tokens (b,); a true answer ends all rows.
        seed, generator: make the draw repeatable; give one of them.
        cache_kv: keep keys and values; False reads all tokens anew each step. Both give the same tokens.
        cache: the state after what stands before every prompt (one row, or one each), from `model.cache`; left as it is.
        kv_budget: keys that selective layers keep, as for `model.cache`. prefill_chunk: prompt tokens read at a time.
        static: decode in steps of one shape, on a GPU as a CUDA graph (`StaticStep`); default: on a GPU, with a cache, where
            at least 16 steps come after the prompt and no module has forward hooks. The tokens are the same.
        extrapolate: allow more than max_seq_len tokens in all.
    Returns:
        only the new tokens, (b, at most seq_len), or (at most seq_len,) for a single prompt.
    Raises:
        TokenError: an empty prompt, or more tokens than the model may be given, before anything is computed.
        ConfigError: options that have no effect, or are out of range.
    """
    filter_logits_fn = _options(
        temperature, seq_len, filter_logits_fn, repetition_penalty, no_repeat_ngram, contrast_alpha, stop, (seed, generator)
    )
    ids, mask, single = align(prompts, prompt_lens=prompt_lens, pad_value=pad_value)
    # the last token is drawn, never read
    total = ids.shape[1] + max(seq_len - 1, 0)
    how = {"cache_kv": cache_kv, "prefill_chunk": prefill_chunk, "extrapolate": extrapolate}
    how |= {"static": static, "steps": seq_len - 1}
    reader = reader_for(net, len(ids), total, cache=cache, kv_budget=kv_budget, **how)
    if amateur is not None and cache is not None:
        raise ConfigError("cache holds what net has read, and amateur has read nothing; put it into the prompts")
    weaker = None if amateur is None else reader_for(amateur, len(ids), total, **how)
    if seed is not None:
        generator = torch.Generator(ids.device).manual_seed(seed)
    # what nobody sees may go on for a few steps after the end: asking whether all rows are there waits for the device
    unseen = reader.static and on_token is None and (temperature == 0 or seed is not None)
    ending = _Ending(len(ids), ids.device, eos_token, stop, every=CHECK_EVERY if unseen else 1)
    new: list[Tensor] = []
    step, step_mask = ids, mask
    with evaluating(net, amateur):
        while len(new) < seq_len:
            logits_bv = reader.read(step, step_mask)
            if weaker is not None:
                logits_bv = contrast(logits_bv, weaker.read(step, step_mask), alpha=contrast_alpha, beta=contrast_beta)
            logits_bv = _without_repetition(logits_bv, reader, repetition_penalty, no_repeat_ngram)
            if temperature == 0:
                token_b = logits_bv.argmax(dim=-1)
            else:
                kept = logits_bv if filter_logits_fn is None else filter_logits_fn(logits_bv, **(filter_kwargs or {}))
                token_b = torch.multinomial((kept / temperature).softmax(dim=-1), 1, generator=generator)[:, 0]
            token_b = token_b.masked_fill(ending.done_b, pad_value)
            new.append(token_b)
            step, step_mask = token_b[:, None], None
            ended = ending.reached(new)
            if (on_token is not None and on_token(token_b)) or ended:
                break
    made = torch.stack(new[: ending.length(len(new))], dim=1) if new else ids[:, :0]
    return made[0] if single else made


def _options(
    temperature: float, seq_len: int, filter_logits_fn: str | Filter | None, repetition_penalty: float,
    no_repeat_ngram: int | None, contrast_alpha: float, stop: Sequence[Sequence[int]],
    draws: tuple[int | None, torch.Generator | None],
) -> Filter | None:  # fmt: skip
    """The filter that is meant, once all options are in range."""
    if temperature < 0 or seq_len < 0:
        raise ConfigError(f"temperature={temperature} and seq_len={seq_len} must not be negative")
    if repetition_penalty <= 0:
        raise ConfigError(f"repetition_penalty={repetition_penalty} must be above 0; 1.2 is usual, 1 is off")
    if no_repeat_ngram is not None and no_repeat_ngram < 1:
        raise ConfigError(f"no_repeat_ngram={no_repeat_ngram} must be at least 1; 3 is usual")
    if not 0 < contrast_alpha <= 1:
        raise ConfigError(f"contrast_alpha={contrast_alpha} must be in (0, 1]; 0.1 is usual")
    if any(len(sequence) == 0 for sequence in stop):
        raise ConfigError("stop holds an empty sequence, which every row has made already; drop it")
    if None not in draws:
        raise ConfigError("seed and generator both say how to draw; give one")
    if isinstance(filter_logits_fn, str):
        if filter_logits_fn not in FILTERS:
            raise ConfigError(unknown("filter_logits_fn", filter_logits_fn, FILTERS))
        return FILTERS[filter_logits_fn]
    return filter_logits_fn


def _without_repetition(logits_bv: Tensor, reader: Reader, penalty: float, ngram: int | None) -> Tensor:
    if penalty != 1:
        logits_bv = discourage(logits_bv, reader.ids_bt, reader.mask_bt, penalty=penalty)
    return logits_bv if ngram is None else forbid_ngrams(logits_bv, reader.ids_bt, reader.mask_bt, size=ngram)


class _Ending:
    """Which rows have ended, and when all had.

    every: steps between two looks at whether all have, each of which waits for the device.
    """

    def __init__(
        self, batch: int, device: torch.device, eos_token: int | None, stop: Sequence[Sequence[int]], *, every: int
    ) -> None:
        self.done_b = torch.zeros(batch, dtype=torch.bool, device=device)
        self.eos_token, self.every = eos_token, every
        self.stop = [torch.tensor(list(sequence), device=device) for sequence in stop]
        # steps before which some row had not ended
        self._steps = torch.zeros((), dtype=torch.long, device=device)

    def reached(self, new: list[Tensor]) -> bool:
        """Marks rows that the newest token ends; whether all have ended, as far as it looks."""
        if self.eos_token is None and not self.stop:
            return False
        self._steps += ~self.done_b.all()
        if self.eos_token is not None:
            self.done_b |= new[-1] == self.eos_token
        for sequence in self.stop:
            if len(new) >= len(sequence):
                tail = torch.stack(new[-len(sequence) :], dim=1)
                self.done_b |= (tail == sequence).all(dim=1)
        return len(new) % self.every == 0 and bool(self.done_b.all())

    def length(self, made: int) -> int:
        """Of so many steps those that count: up to the one that ended the last row."""
        return made if self.eos_token is None and not self.stop else min(made, int(self._steps))
