"""The fewest keys with which a selective run still has the baseline's loss: a greedy search over layers, in a process of its own.

    python -m xattn.experiments.search RUN_DIR BASELINE_DIR ASK

The target is the baseline's loss on the same tokens. The search reads several tokens a call, which prunes a little less than
decoding; what it found is judged on all evaluation tokens, one token a call.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import xattn
from xattn import ConfigError
from xattn.budgets import search_budgets
from xattn.experiments import record
from xattn.experiments.compose import USER_ERRORS
from xattn.experiments.configfile import load_config
from xattn.experiments.data import Corpus, eval_blocks
from xattn.experiments.device import evaluating, pick_device, pick_precision
from xattn.experiments.judge import token_nll
from xattn.experiments.kv_budgets import pruned_scores
from xattn.experiments.launch import probe, stopped
from xattn.experiments.schema import BudgetSearchConfig, RunConfig
from xattn.experiments.sources import load_corpus

STATE = "budget_search.state.json"


def needs_search(run_dir: Path, baseline_dir: Path, ask: BudgetSearchConfig) -> bool:
    """Whether both runs are completed, this one is selective, and its search is not done."""
    ours, theirs = record.read_result(run_dir), record.read_result(baseline_dir)
    if ask.step is None or {ours["status"], theirs["status"]} != {record.COMPLETED}:
        return False
    found = record.read_json(run_dir / record.SEARCH)
    selective = ours["flags"]["resolved"].get("attn_selective")
    done = isinstance(found, dict) and found.get("asked") == asdict(ask) and found.get("baseline") == baseline_dir.name
    return any(selective if isinstance(selective, list) else [selective]) and not done


def search_run(run_dir: Path, baseline_dir: Path, ask: BudgetSearchConfig, environment: dict[str, str]) -> None:
    """Search, in a fresh process where runs have one; one that was stopped goes on by the next call."""
    record.say(f"{run_dir.name}: searching the fewest keys for the loss of {baseline_dir.name}")
    if not load_config(run_dir / record.CONFIG).isolate:
        main([str(run_dir), str(baseline_dir), json.dumps(asdict(ask))])
        return
    code, (_, error) = probe(["xattn.experiments.search", str(run_dir), str(baseline_dir), json.dumps(asdict(ask))], environment)
    if code and not stopped():
        record.write_json(run_dir / record.SEARCH, {"error": error})


def search(run_dir: Path, baseline_dir: Path, ask: BudgetSearchConfig) -> dict[str, Any]:
    """Budgets a layer, and what they cost and save.

    Returns: `budgets`, `factor` (KV bytes of all keys over those of the budgets), `target_nats` and `search_nats` on the tokens
        of the search, and on eval.tokens `val_nats`, `unpruned_nats` and `baseline_nats`; or `error`.
    """
    config = load_config(run_dir / record.CONFIG)
    device = pick_device(config.trainer)
    precision = pick_precision(config.trainer, device)
    model, corpus = xattn.load(run_dir / "model").to(device).eval(), load_corpus(config.data)
    baseline = xattn.load(baseline_dir / "model").to(device).eval()
    where = {"device": device, "precision": precision}
    blocks = eval_blocks(corpus, tokens=ask.tokens, length=config.trainer.seq_len, longest=config.trainer.seq_len)
    # As the search reads them: without documents.
    ids_bn = blocks.ids_bn.to(device)
    with evaluating(baseline, device, precision):
        target = float(xattn.AutoregressiveWrapper(baseline).token_nll(ids_bn).double().mean())
    asked = {"asked": asdict(ask), "baseline": baseline_dir.name, "target_nats": target}
    try:
        with evaluating(model, device, precision):
            found = search_budgets(
                model, ids_bn, target=target, step=ask.step, chunk=ask.chunk, path=run_dir / STATE, say=lambda _: None
            )
    except ConfigError as error:
        return asked | {"error": str(error)}
    keys = found["budgets"]
    n = config.trainer.seq_len
    factor = xattn.accounting.kv_bytes(model.spec, n) / xattn.accounting.kv_bytes(model.spec, n, kv_budget=keys)
    judged = _judged(config, model, baseline, corpus, keys, where)
    return asked | {"budgets": keys, "factor": factor, "search_nats": found["loss"]} | judged


def _judged(
    config: RunConfig, model: Any, baseline: Any, corpus: Corpus, keys: list[int | None], where: dict[str, Any]
) -> dict[str, float]:
    n = config.trainer.seq_len
    blocks = eval_blocks(corpus, tokens=config.eval.tokens, length=n, longest=max(config.eval.length_factors) * n)
    tokens = config.eval.batch_tokens
    nats_bn, _ = pruned_scores(model, blocks, keys, chunk=1, batch_tokens=tokens, **where)
    return {
        "val_nats": float(nats_bn.mean()),
        "unpruned_nats": float(token_nll(model, blocks, batch_tokens=tokens, **where).mean()),
        "baseline_nats": float(token_nll(baseline, blocks, batch_tokens=tokens, **where).mean()),
    }


def main(argv: list[str]) -> int:
    """Search, and write what was found into the run directory."""
    run_dir, baseline_dir, ask = Path(argv[0]), Path(argv[1]), BudgetSearchConfig(**json.loads(argv[2]))
    try:
        with torch.no_grad():
            found = search(run_dir, baseline_dir, ask)
    except USER_ERRORS as error:
        found = {"asked": asdict(ask), "baseline": baseline_dir.name, "error": str(error)}
    record.write_json(run_dir / record.SEARCH, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
