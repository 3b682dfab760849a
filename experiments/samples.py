"""Texts that a model writes on from the beginnings of validation text: samples.txt for eyes, the JSONL for programs."""

from pathlib import Path
from typing import Any

import torch

from xattn.experiments.data import Corpus
from xattn.experiments.device import autocast
from xattn.experiments.record import read_metrics
from xattn.experiments.schema import RunConfig
from xattn.generate import generate

FILE = "samples.txt"
_PROMPT_TOKENS, _NEW_TOKENS = 32, 128


def write_samples(model: Any, corpus: Corpus, config: RunConfig, *, device: torch.device, precision: str) -> list[dict[str, str]]:
    """`trainer.samples` continuations [{prompt, text}], the same prompts and draws every time.

    A tokeniser that cannot be read back gives the token ids instead of text. A task has no texts to go on with.
    """
    if corpus.task is not None:
        return []
    trainer = config.trainer
    prompt_tokens = max(min(_PROMPT_TOKENS, trainer.seq_len // 4), 1)
    wanted = trainer.sample_tokens if trainer.sample_tokens is not None else _NEW_TOKENS
    new_tokens = min(wanted, trainer.seq_len - prompt_tokens)
    if not trainer.samples or new_tokens < 1:
        return []
    starts = [i * (len(corpus.val) - prompt_tokens) // trainer.samples for i in range(trainer.samples)]
    prompts = torch.stack([torch.from_numpy(corpus.val.window(start, prompt_tokens)[0]) for start in starts])
    with autocast(device, precision):
        new = generate(model, prompts.to(device), new_tokens, seed=config.seed)
    return [{"prompt": _text(corpus, prompt), "text": _text(corpus, ids)} for prompt, ids in zip(prompts, new.cpu(), strict=True)]


def keep_samples(run_dir: Path) -> None:
    """Write samples.txt from the rows of metrics.jsonl, so that a resumed run repeats none."""
    blocks = [
        f"=== step {row['step']}, sample {number}\n{sample['prompt']}⟶{sample['text']}\n"
        for row in read_metrics(run_dir)
        for number, sample in enumerate(row.get("samples", ()), start=1)
    ]
    (run_dir / FILE).write_text("\n".join(blocks), encoding="utf-8")


def _text(corpus: Corpus, ids: torch.Tensor) -> str:
    return corpus.decode(ids.numpy()) if corpus.decode is not None else " ".join(map(str, ids.tolist()))
