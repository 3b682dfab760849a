"""Budgets: how few keys each selective layer needs for a target loss, found greedily, one step at a time.

Source: Leviathan et al., arXiv 2410.02703, context pruning: from no pruning, shrink by a constant step the layer whose
shrinking costs least, until the loss would pass the target (a standard model's, say).
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from xattn.accounting import kv_bytes
from xattn.cache.kind import EXEMPT
from xattn.errors import ConfigError, TokenError
from xattn.nn.wrapper import TransformerWrapper
from xattn.spec.flags import to_flags

Budgets = list[int | None]


@torch.no_grad()
def loss_at(model: TransformerWrapper, ids_bn: Tensor, budgets: Sequence[int | None] | int | None, *, chunk: int = 1) -> float:
    """Mean loss in nats of each token but the first, read over a pruned cache in calls of `chunk` tokens.

    chunk=1 is what decoding does. A larger one is faster, and kinder: within a call nothing is pruned.
    """
    cache = model.cache(len(ids_bn), kv_budget=budgets, max_len=ids_bn.shape[1])
    total = torch.zeros((), dtype=torch.float64, device=ids_bn.device)
    for first in range(0, ids_bn.shape[1] - 1, chunk):
        target_bn = ids_bn[:, first + 1 : first + 1 + chunk]
        logits_bnv = model(ids_bn[:, first : first + target_bn.shape[1]], cache=cache)
        total += cross_entropy(logits_bnv.flatten(0, 1).float(), target_bn.flatten(), reduction="sum")
    return float(total) / ids_bn[:, 1:].numel()


def search_budgets(
    model: TransformerWrapper,
    ids_bn: Tensor,
    *,
    target: float,
    step: int | float,
    chunk: int = 1,
    path: str | Path | None = None,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """The smallest budgets that the greedy search finds within a target loss.

    Args:
        model: with selective layers, in eval mode. ids_bn: validation tokens (b n), read over a cache as `loss_at` does.
        target: nats a token that must not be passed. chunk: as `loss_at`.
        step: keys taken from a layer at a time, as in the paper; below 1: this share of the keys that the layer still has, which
            takes fewer evaluations and is finer where few keys are left.
        path: a JSON file kept up to date after every evaluation; a search that was stopped goes on from it.
        say: takes one line of progress after each step.
    Returns:
        budgets (one a layer, None where nothing is pruned), loss, evaluations, and steps: what each step left.
    Raises:
        ConfigError: no selective layer, a target below the unpruned loss, or a file of another search.
        TokenError: fewer than two tokens a row.
    """
    selective = [block.attention.selection is not None for block in model.spec.layers.blocks]
    if not any(selective):
        raise ConfigError("no layer has attn_selective, so there is nothing to prune; build the model with attn_selective")
    if step <= 0 or (step > 1 and step != int(step)) or chunk < 1:
        raise ConfigError(f"step={step} must be a count of keys or a share below 1, and chunk={chunk} at least 1")
    if ids_bn.ndim != 2 or ids_bn.shape[1] < 2:
        raise TokenError(f"ids have shape {tuple(ids_bn.shape)}; a loss needs (batch, 2 tokens or more)")
    search = _Search(model, ids_bn, target=target, step=step, chunk=chunk, path=None if path is None else Path(path))
    state = search.state
    if not state["steps"]:
        start = [ids_bn.shape[1] if on else None for on in selective]
        loss = search.evaluate(start)
        if loss > target:
            raise ConfigError(f"target={target:.4f} is below the loss without pruning, {loss:.4f}; give one above it")
        state["steps"].append({"budgets": start, "loss": loss})
        search.keep()
        say(f"budgets: loss {loss:.4f} without pruning, target {target:.4f}")
    while not state["done"]:
        now = state["steps"][-1]["budgets"]
        tried = [
            [_smaller(old, step) if j == i else old for j, old in enumerate(now)]
            for i, budget in enumerate(now)
            if budget is not None and budget > EXEMPT
        ]
        losses = [search.evaluate(budgets) for budgets in tried]
        best = min(range(len(tried)), key=losses.__getitem__, default=None)
        if best is None or losses[best] > target:
            state["done"] = True
            search.keep()
            break
        state["steps"].append({"budgets": tried[best], "loss": losses[best]})
        state["tried"] = {}
        search.keep()
        layer = next(i for i in range(len(now)) if now[i] != tried[best][i])
        say(
            f"budgets: step {len(state['steps']) - 1}, layer {layer} {now[layer]} -> {tried[best][layer]} keys, loss "
            f"{losses[best]:.4f} of {target:.4f}, cache {search.share(tried[best]):.1%} of unpruned"
        )
    final = state["steps"][-1]
    say(f"budgets: {final['budgets']}, loss {final['loss']:.4f}, {state['evaluations']} evaluations")
    return {**final, "evaluations": state["evaluations"], "steps": state["steps"]}


def _smaller(budget: int, step: int | float) -> int:
    return max(EXEMPT, budget - (int(step) if step >= 1 else max(round(budget * step), 1)))


class _Search:
    """The state of one search, on disk after every change where there is a path."""

    def __init__(
        self, model: TransformerWrapper, ids_bn: Tensor, *, target: float, step: int | float, chunk: int, path: Path | None
    ) -> None:
        self.model, self.ids_bn, self.chunk, self.path = model, ids_bn, chunk, path
        about = {"target": target, "step": step, "chunk": chunk, "of": _digest(model, ids_bn)}
        self.state: dict[str, Any] = {"about": about, "steps": [], "tried": {}, "evaluations": 0, "done": False}
        if path is not None and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("about") != about:
                raise ConfigError(f"{path} holds a search with other weights, tokens, target, step or chunk; give another path")
            self.state = found

    def evaluate(self, budgets: Budgets) -> float:
        """The loss under these budgets, looked up where this step has tried them already."""
        key = json.dumps(budgets)
        if key not in self.state["tried"]:
            self.state["tried"][key] = loss_at(self.model, self.ids_bn, budgets, chunk=self.chunk)
            self.state["evaluations"] += 1
            self.keep()
        return self.state["tried"][key]

    def keep(self) -> None:
        """Writes the state; the file appears whole or not at all."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.state, indent=1), encoding="utf-8")
            os.replace(unfinished, self.path)

    def share(self, budgets: Budgets) -> float:
        """The bytes of a pruned cache over those of an unpruned one."""
        n = self.ids_bn.shape[1]
        return kv_bytes(self.model.spec, n, kv_budget=budgets) / kv_bytes(self.model.spec, n)


def _digest(model: TransformerWrapper, ids_bn: Tensor) -> str:
    """Tells flags, weights and tokens apart."""
    sums = [float(weight.double().abs().sum()) for weight in model.parameters()]
    told = [to_flags(model.spec), sums, list(ids_bn.shape), ids_bn.flatten().tolist()]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()
