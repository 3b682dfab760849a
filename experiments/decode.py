"""Decoding over a cache, measured in a fresh process: peak memory of reading a prompt and of going on, and tokens a second.

    python -m xattn.experiments.decode RUN_DIR OUT.json

At each evaluation length the last eval.decode.tokens tokens (half of it at most) are decoded one by one, greedily, as `generate`
does (on a GPU in static steps), and what stands before them is the prompt. Weights are freshly initialised, under eval.flags,
and nothing is compiled. Memory is counted as in memory.py; weights and cache are part of it.
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import xattn
from xattn import ConfigError
from xattn.experiments.configfile import load_config
from xattn.experiments.device import evaluating, pick_device, pick_precision, synchronise
from xattn.experiments.memory import give_back, method, peak_bytes, reset_peak
from xattn.experiments.record import CONFIG, write_json
from xattn.experiments.schema import RunConfig
from xattn.generate.reader import Reader
from xattn.generate.static import is_static

# new tokens where eval.decode.tokens does not say
DECODED = 32


def measure(config: RunConfig) -> dict[str, Any]:
    """Decoding at every length of eval.length_factors.

    Returns: `batch`, `new_tokens`, `method`, and `by_length`, length -> `prompt_tokens`, `prefill_peak_bytes`, `prefill_seconds`,
    `decode_peak_bytes`, `cache_bytes` (as allocated at the end), `kv_bytes_per_token` (predicted, 16-bit, of one sequence of
    that length, over it), `tokens_per_second` (of the batch, by the median step); or `error` where the model cannot.
    """
    device = pick_device(replace(config.trainer, strategy="none", processes=1))
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    tokens = DECODED if config.eval.decode.tokens is None else config.eval.decode.tokens
    lengths = sorted({factor * config.trainer.seq_len for factor in config.eval.length_factors})
    # libraries, thread pools and kernels stay resident for ever and belong to no length
    _decode(config, device, length=min(lengths[0], 16), tokens=2)
    by_length: dict[str, Any] = {}
    for length in lengths:
        try:
            by_length[str(length)] = _decode(config, device, length=length, tokens=tokens)
        except (ConfigError, xattn.TokenError, xattn.UnsupportedFeature) as error:
            by_length[str(length)] = {"error": str(error)}
        except torch.OutOfMemoryError as error:
            by_length[str(length)] = {"error": f"out of memory: {str(error).splitlines()[0]}"}
    how = method(device, config.trainer, "infer")
    return {"batch": config.eval.decode.batch, "new_tokens": tokens, "method": how, "by_length": by_length}


def _decode(config: RunConfig, device: torch.device, *, length: int, tokens: int) -> dict[str, Any]:
    batch, flags = config.eval.decode.batch, config.model | config.eval.flags
    give_back(device)
    baseline = reset_peak(device)
    model = xattn.build(flags).to(device)
    with evaluating(model, device, pick_precision(config.trainer, device)):
        new = max(min(tokens, length // 2), 1)
        prompt = max(length - new, 1)
        cache = model.cache(batch, max_len=prompt + new)
        static = is_static(None, model, cached=True, steps=new)
        reader = Reader(model, cache=cache, extrapolate=True, static=static)
        started = _now(device)
        token_b = reader.read(torch.zeros(batch, prompt, dtype=torch.int64, device=device)).argmax(dim=-1)
        prefill_seconds = _now(device) - started
        prefill_peak = peak_bytes(device) - baseline
        give_back(device)
        reset_peak(device)
        steps = []
        for _ in range(new):
            started = _now(device)
            token_b = reader.read(token_b[:, None]).argmax(dim=-1)
            steps.append(_now(device) - started)
        return {
            "prompt_tokens": prompt,
            "prefill_peak_bytes": max(prefill_peak, 0),
            "prefill_seconds": prefill_seconds,
            "decode_peak_bytes": max(peak_bytes(device) - baseline, 0),
            "cache_bytes": cache.nbytes(),
            "kv_bytes_per_token": xattn.accounting.kv_bytes(model.spec, length) / length,
            "tokens_per_second": batch / statistics.median(steps),
        }


def _now(device: torch.device) -> float:
    synchronise(device)
    return time.perf_counter()


def main(argv: list[str]) -> int:
    """Measure the model of a run directory's config, and write what was found."""
    write_json(Path(argv[1]), measure(load_config(Path(argv[0]) / CONFIG)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
