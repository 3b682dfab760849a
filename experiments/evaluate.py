"""xattn-eval: judge a finished run again, at other lengths or with evaluation-time flags.

xattn-eval run=runs/quick/dense-seed0 eval.flags.self_extend_group=8 eval.flags.self_extend_window=64
"""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import xattn
from xattn import ConfigError
from xattn.experiments import record
from xattn.experiments.compose import check_flags, command_line, hydra_main, resolve
from xattn.experiments.configfile import load_config, save_config
from xattn.experiments.data import check_corpus
from xattn.experiments.decode import DECODED
from xattn.experiments.device import pick_device, pick_precision
from xattn.experiments.judge import AS_TRAINED, judge_all, with_flags
from xattn.experiments.kv_budgets import judge_budgets
from xattn.experiments.launch import probe_decode
from xattn.experiments.outcome import backend_summary
from xattn.experiments.record import say
from xattn.experiments.schema import EvaluateConfig, RunConfig
from xattn.experiments.sources import load_corpus
from xattn.experiments.tables import MIB

FOLDER = "evaluations"


def main() -> None:
    """Console entry of xattn-eval."""
    command_line(_body)


def _body(argv: list[str]) -> int:
    if not any(arg.startswith("run=") for arg in argv) and not any(arg.startswith("-") for arg in argv):
        raise ConfigError("which run? use xattn-eval run=DIR, a directory that xattn-train or xattn-compare wrote")
    hydra_main(lambda cfg: evaluate(resolve(cfg)), "eval", arguments(argv))
    return 0


def arguments(argv: list[str]) -> list[str]:
    """The command line with the run's own tokens and lengths where it gives none: the scores then stand beside the run's."""
    run = next((arg.removeprefix("run=") for arg in argv if arg.startswith("run=")), None)
    if run is None or not (Path(run) / record.CONFIG).is_file():
        return argv
    own = load_config(Path(run) / record.CONFIG).eval
    inherited = []
    if not _gives(argv, "eval.tokens"):
        inherited.append(f"eval.tokens={own.tokens}")
    if not _gives(argv, "eval.length_factors", "eval"):
        inherited.append(f"eval.length_factors={own.length_factors}")
    return [*inherited, *argv]


def _gives(argv: list[str], *keys: str) -> bool:
    return any(arg.lstrip("+").split("=", 1)[0] in keys for arg in argv)


def evaluate(asked: EvaluateConfig) -> dict[str, Any]:
    """Judge the run's model; print the scores, write them as JSON, return them.

    Raises:
        ConfigError: no finished run there, or flags that cannot be.
    """
    run_dir = Path(asked.run)
    if not (run_dir / record.CONFIG).is_file() or not (run_dir / "model").is_dir():
        raise ConfigError(f"run={run_dir} is no finished run: it has no {record.CONFIG} with a model/ beside it")
    config = load_config(run_dir / record.CONFIG)
    config.eval, config.isolate = asked.eval, True
    config.check()
    check_flags(config)
    device = pick_device(config.trainer)
    corpus = load_corpus(config.data)
    longest = max(asked.eval.length_factors) * config.trainer.seq_len
    check_corpus(
        corpus,
        num_tokens=config.model["num_tokens"],
        trainer=config.trainer,
        longest=longest,
    )
    model = xattn.load(run_dir / "model", attn_backend=config.model.get("attn_backend", "auto")).to(device)
    judged = judge_all(
        model,
        corpus,
        asked.eval,
        seq_len=config.trainer.seq_len,
        device=device,
        precision=pick_precision(config.trainer, device),
    )
    where = {"device": device, "precision": pick_precision(config.trainer, device)}
    judged["kv_budgets"] = judge_budgets(model, corpus, asked.eval, seq_len=config.trainer.seq_len, **where)
    judged["decode"] = _decoded(config)
    # Of the model with the evaluation-time flags: they may need another back-end than it was trained on.
    backends = with_flags(model, asked.eval.flags).backends(longest)
    path = Path(asked.out) if asked.out is not None else _next_path(run_dir / FOLDER)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"run": run_dir.name, "eval": asdict(asked.eval), "backends": backends}
    record.write_json(path, {**about, **judged, **record.provenance()})
    _show(judged, name=config.name, backend=backend_summary(backends), flags=asked.eval.flags)
    say(f"written: {path}")
    return judged


def _decoded(config: RunConfig) -> dict[str, Any] | None:
    """How the model decodes with the flags of this evaluation, from a process of its own."""
    if config.eval.decode.tokens == 0:
        return None
    if config.eval.decode.tokens is None:
        config.eval.decode.tokens = DECODED
    with TemporaryDirectory() as folder:
        save_config(config, Path(folder) / record.CONFIG)
        return probe_decode(Path(folder))


def _show(judged: dict[str, Any], *, name: str, backend: str, flags: dict[str, Any]) -> None:
    given = ", ".join(f"{key}={value}" for key, value in flags.items()) or "as trained"
    say(f"{name} ({backend}), {given}")
    for extension, by_length in judged["val_by_length"].items():
        for length, entry in by_length.items():
            label = "" if extension == AS_TRAINED else f"  {extension}"
            if "error" in entry:
                say(f"  {length:>6} tokens{label}: not possible: {entry['error']}")
                continue
            bits = f"{entry['bpb']:.4f} bits per byte, " if entry["bpb"] is not None else ""
            say(f"  {length:>6} tokens{label}: {bits}perplexity {entry['ppl']:.3f}{_answers(entry)}")
            asked = (judged["passkey"] or {}).get(extension, {}).get(length, {})
            if "error" in asked:
                say(f"  {length:>6} tokens{label}: no pass key: {asked['error']}")
            elif asked:
                shares = ", ".join(f"{found['accuracy']:.0%} at depth {depth}" for depth, found in asked.items())
                say(f"  {length:>6} tokens{label}: pass key found: {shares}")
    for budget, entry in (judged["kv_budgets"] or {}).items():
        if "error" in entry:
            say(f"  kv_budget {budget}: not possible: {entry['error']}")
        else:
            kv = f"{entry['kv_bytes_per_token']:,.0f} KV bytes a token"
            say(f"  kv_budget {budget}: perplexity {entry['ppl']:.3f}{_answers(entry)}, {kv}")
    _show_decode(judged["decode"])


def _answers(entry: dict[str, Any]) -> str:
    if "accuracy" not in entry:
        return ""
    return f", {entry['accuracy']:.1%} of answers right, {entry['exact']:.1%} of sequences wholly"


def _show_decode(decode: dict[str, Any] | None) -> None:
    if decode is None:
        return
    if "error" in decode:
        say(f"  decoding: not possible: {decode['error']}")
        return
    for length, entry in decode["by_length"].items():
        if "error" in entry:
            say(f"  {length:>6} tokens, decoding: not possible: {entry['error']}")
            continue
        read, held = (entry[f"{name}_peak_bytes"] / MIB for name in ("prefill", "decode"))
        say(
            f"  {length:>6} tokens, decoding: {entry['tokens_per_second']:,.0f} tokens/s, peak {read:,.1f} MiB reading the "
            f"prompt, {held:,.1f} decoding, {entry['kv_bytes_per_token']:,.0f} KV bytes a token"
        )


def _next_path(folder: Path) -> Path:
    number = 0
    while (folder / f"{number}.json").exists():
        number += 1
    return folder / f"{number}.json"


if __name__ == "__main__":
    main()
