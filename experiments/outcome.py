"""The end of a run: its weights are judged and saved, and result.json says what was trained, how, and how good it is."""

import itertools
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import xattn
from xattn.experiments import record
from xattn.experiments.data import Corpus, eval_blocks
from xattn.experiments.judge import judge, judge_all, with_flags
from xattn.experiments.kv_budgets import judge_budgets
from xattn.experiments.memory import MAXRSS_UNIT
from xattn.experiments.record import say
from xattn.experiments.samples import write_samples
from xattn.experiments.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training hands over. `average`: the averaged weights, which then are the ones judged and saved.

    `seen` is the digest of the tokens trained on, `memory` the training process's own peak, and `facts` are the fields of
    result.json that only the trainer can tell.
    """

    config: RunConfig
    run_dir: Path
    model: Any
    average: Any | None
    corpus: Corpus
    device: torch.device
    precision: str
    seen: str
    memory: dict[str, Any]
    facts: dict[str, Any]

    @property
    def judged(self) -> Any:
        return self.model if self.average is None else self.average


def conclude(
    trained: Trained,
    *,
    tell: Callable[[dict[str, Any]], None],
    keep: Callable[[list[dict[str, str]]], None],
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Judge the weights, save them as `model/`, and return what result.json holds.

    Args:
        tell: takes the row of final scores. keep: takes the text samples.
        before_each: called before each evaluation; it may raise to stop.
    """
    config, where = trained.config, {"device": trained.device, "precision": trained.precision}
    seq_len = config.trainer.seq_len
    judged = judge_all(trained.judged, trained.corpus, config.eval, seq_len=seq_len, before_each=before_each, **where)
    pruned = judge_budgets(trained.judged, trained.corpus, config.eval, seq_len=seq_len, before_each=before_each, **where)
    raw = None if trained.average is None else _judge_raw(trained)
    place = {"step": config.trainer.steps, "tokens": config.trainer.tokens}
    tell(place | val_row(judged["val"], "val/") | (val_row(raw, "val/raw_") if raw is not None else {}))
    keep(write_samples(trained.judged, trained.corpus, config, **where))
    _save_model(trained.judged, trained.run_dir / "model")
    if raw is not None:
        say(f"model/ holds the average of the weights: {judged['val'].get('loss_nats')} nats, raw {raw['loss_nats']}")
    return _result(trained, judged | {"kv_budgets": pruned}, raw)


def _judge_raw(trained: Trained) -> dict[str, Any]:
    """The score of the weights that the average stands in for."""
    config, seq_len = trained.config.eval, trained.config.trainer.seq_len
    blocks = eval_blocks(trained.corpus, tokens=config.tokens, length=seq_len, longest=max(config.length_factors) * seq_len)
    model = with_flags(trained.model, config.flags)
    return judge(model, blocks, trained.corpus, config, device=trained.device, precision=trained.precision)


def _result(trained: Trained, judged: dict[str, Any], raw: dict[str, Any] | None) -> dict[str, Any]:
    config, trainer, spec = trained.config, trained.config.trainer, trained.model.spec
    memory = record.read_json(trained.run_dir / record.MEMORY) or {"error": "not measured"}
    memory |= trained.memory
    memory["kv_bytes_per_token"] = xattn.accounting.kv_bytes(spec, trainer.seq_len) / trainer.seq_len
    return {
        "status": record.COMPLETED,
        "name": config.name,
        "seed": config.seed,
        "flags": {"given": config.model, "resolved": xattn.to_flags(spec)},
        "backends": trained.model.backends(),
        "tokens": trainer.tokens,
        **judged,
        "weights": "raw" if raw is None else "ema",
        "ema": None if raw is None else {"decay": trainer.ema_decay, "val": judged["val"], "raw_val": raw},
        **trained.facts,
        "memory": memory,
        "decode": record.read_json(trained.run_dir / record.DECODE),
        "train_flops": xattn.accounting.train_flops(spec, trainer.seq_len) * trainer.steps * trainer.batch_size,
        "device": str(trained.device),
        "precision": trained.precision,
        "activation_checkpointing": trainer.activation_checkpointing,
        "compile": trainer.compile,
        "optimiser": config.optim.name,
        "strategy": trainer.strategy,
        "processes": trainer.processes,
        "data": {
            "corpus": trained.corpus.name,
            "tokenizer": trained.corpus.tokenizer,
            "tokens_seen_digest": trained.seen,
        },
        **record.provenance(),
    }


def own_memory(device: torch.device) -> dict[str, Any]:
    """The peak of this very process so far, everything in it included; the probes compare better."""
    if device.type == "cuda":
        return {
            "run_peak_bytes": torch.cuda.max_memory_allocated(device),
            "run_reserved_bytes": torch.cuda.max_memory_reserved(device),
            "run_method": "cuda max_memory_allocated of the training process",
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
    return {"run_peak_bytes": peak, "run_method": "ru_maxrss of the training process, interpreter and corpus included"}


def val_row(scored: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A score as columns of metrics.jsonl; None for what it has no number for. Of a task, its accuracies too."""
    answers = tuple(name for name in ("accuracy", "exact") if name in scored)
    return {f"{prefix}{name}": scored.get(name) for name in ("loss_nats", "ppl", "bpb", *answers)}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a result that W&B shows beside a run."""
    flat = {f"final/{name}": value for name, value in result["val"].items()}
    flat |= {f"mem/{name}": value for name, value in result["memory"].items() if isinstance(value, int | float)}
    return flat | {"perf/tokens_per_second_median": result["tokens_per_second"], "params": result["params"]}


def backend_summary(backends: list[dict[str, Any]]) -> str:
    """`sdpa`, or, where layers differ, `sdpa 0-2, reference 3`: which back-end each layer runs on."""
    names = [str(row["backend"]) for row in backends]
    if len(set(names)) == 1:
        return names[0]
    parts, first = [], 0
    for name, group in itertools.groupby(names):
        last = first + len(list(group)) - 1
        parts.append(f"{name} {first}" if first == last else f"{name} {first}-{last}")
        first = last + 1
    return ", ".join(parts)


def _save_model(model: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    xattn.save(model, temporary)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
