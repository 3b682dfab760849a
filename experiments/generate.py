"""xattn-generate: write on from a prompt, with a run's or a checkpoint's model.

xattn-generate runs/quick/dense-seed0 --prompt "ROMEO:" --tokens 200 --temperature 0.8
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import xattn
from xattn import ConfigError
from xattn.experiments import record
from xattn.experiments.compose import command_line
from xattn.experiments.configfile import load_config
from xattn.experiments.schema import DataConfig
from xattn.experiments.sources import load_corpus
from xattn.experiments.tokenise import Tokeniser, tokeniser_for


def main() -> None:
    """Console entry of xattn-generate."""
    command_line(_body)


def _body(argv: list[str]) -> int:
    asked = _parser().parse_args(argv)
    model, encode, decode = _load(Path(asked.model))
    prompt = torch.from_numpy(np.asarray(encode(asked.prompt.encode())).astype(np.int64)).to(asked.device)
    if len(prompt) == 0:
        raise ConfigError("--prompt is empty; give one token or more")
    budget = asked.kv_budget if asked.kv_budget is None or asked.kv_budget < 1 else int(asked.kv_budget)
    new = xattn.AutoregressiveWrapper(model.to(asked.device)).generate(
        prompt, asked.tokens, temperature=asked.temperature, seed=asked.seed, kv_budget=budget,
        filter_logits_fn=None if asked.filter == "none" else asked.filter, repetition_penalty=asked.repetition_penalty,
        extrapolate=asked.extrapolate,
    )  # fmt: skip
    sys.stdout.write(asked.prompt + decode(new.cpu().numpy()) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xattn-generate", description="Write on from a prompt.")
    parser.add_argument("model", help="a run's directory, or a checkpoint (then tokens are bytes)")
    parser.add_argument("--prompt", default="\n", help="text to go on from")
    parser.add_argument("--tokens", type=int, default=200, help="new tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--filter", choices=("top_k", "top_p", "min_p", "none"), default="top_k")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 discourages repetition")
    parser.add_argument("--kv-budget", type=float, help="keys that selective layers keep: a count, or a fraction below 1")
    parser.add_argument("--seed", type=int, help="makes the draw repeatable")
    parser.add_argument("--extrapolate", action="store_true", help="go beyond the trained length")
    parser.add_argument("--device", default="cpu")
    return parser


def _load(path: Path) -> tuple:
    """The model, and how text becomes ids and comes back."""
    if (path / record.CONFIG).is_file() and (path / "model").is_dir():
        corpus = load_corpus(load_config(path / record.CONFIG).data)
        if corpus.encode is None or corpus.decode is None:
            raise ConfigError(f"the tokens of {path} cannot be read back as text; use xattn.load and generate on ids")
        return xattn.load(path / "model"), corpus.encode, corpus.decode
    model = xattn.load(path)
    if model.spec.num_tokens != 256:
        raise ConfigError(f"{path} has num_tokens={model.spec.num_tokens} and no run beside it says what they mean; give a run")
    tokens: Tokeniser = tokeniser_for(DataConfig(tokenizer="bytes"), [], path)
    return model, tokens.encode, tokens.decode


if __name__ == "__main__":
    main()
