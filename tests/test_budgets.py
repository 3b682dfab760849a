"""The search for budgets: each step takes what costs least, the target holds, and a stopped search goes on."""

import json

import pytest
import torch
from test_cache import ids_of, model
from torch.nn.functional import cross_entropy

import xattn
from xattn.budgets import loss_at, search_budgets

FLAGS = {"attn_selective": [True, False, True], "rotary_pos_emb": True}


def net():
    return model(FLAGS, torch.float32, depth=3)


@pytest.mark.parametrize("chunk", [1, 4, 24])
def test_the_loss_without_pruning_is_the_models_own(chunk):
    ids = ids_of(24)
    whole = cross_entropy(net()(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for budgets in (None, [24, None, 24]):
        assert abs(loss_at(net(), ids, budgets, chunk=chunk) - float(whole)) < 1e-5
    assert loss_at(net(), ids, 2, chunk=1) != pytest.approx(float(whole), abs=1e-3)


def test_each_step_shrinks_the_layer_that_costs_least_until_the_target(tmp_path):
    ids, lines = ids_of(24), []
    target = loss_at(net(), ids, None) + 0.05
    found = search_budgets(net(), ids, target=target, step=6, say=lines.append)
    assert found["steps"][0]["budgets"] == [24, None, 24] and found["loss"] <= target
    assert len(found["steps"]) > 2, "a search without steps shows nothing"
    for now, after in zip(found["steps"], found["steps"][1:], strict=False):
        options = {}
        for layer in (0, 2):
            if now["budgets"][layer] > 2:
                tried = list(now["budgets"])
                tried[layer] = max(2, tried[layer] - 6)
                options[tuple(tried)] = loss_at(net(), ids, tried)
        assert tuple(after["budgets"]) == min(options, key=options.get)
        assert after["loss"] == pytest.approx(min(options.values()), abs=1e-9)
    last = found["budgets"]
    beyond = [[max(2, b - 6) if i == j and b else b for i, b in enumerate(last)] for j in (0, 2) if last[j] > 2]
    assert all(loss_at(net(), ids, tried) > target for tried in beyond)
    assert len(lines) == len(found["steps"]) + 1 and "layer" in lines[1] and "of unpruned" in lines[1]


def test_a_stopped_search_goes_on_without_trying_anything_twice(tmp_path, monkeypatch):
    ids, path, calls = ids_of(24), tmp_path / "deep" / "budgets.json", []
    target = loss_at(net(), ids, None) + 0.05
    whole = search_budgets(net(), ids, target=target, step=6, say=lambda _: None)

    def counted(*args, **more):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(args[2])
        return loss_at(*args, **more)

    monkeypatch.setattr("xattn.budgets.loss_at", counted)
    with pytest.raises(KeyboardInterrupt):
        search_budgets(net(), ids, target=target, step=6, path=path, say=lambda _: None)
    assert len(json.loads(path.read_text())["steps"]) >= 2
    monkeypatch.setattr("xattn.budgets.loss_at", loss_at)
    assert search_budgets(net(), ids, target=target, step=6, path=path, say=lambda _: None) == whole
    with pytest.raises(xattn.ConfigError, match="other weights, tokens, target, step"):
        search_budgets(net(), ids, target=target, step=5, path=path)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(xattn.ConfigError, match="no layer has attn_selective"):
        search_budgets(model({}, torch.float32), ids_of(9), target=9.0, step=1)
    with pytest.raises(xattn.ConfigError, match="below the loss without pruning"):
        search_budgets(net(), ids_of(9), target=0.1, step=1, say=lambda _: None)
    with pytest.raises(xattn.ConfigError, match="step=0"):
        search_budgets(net(), ids_of(9), target=9.0, step=0)
    with pytest.raises(xattn.TokenError, match="2 tokens"):
        search_budgets(net(), ids_of(9)[:, :1], target=9.0, step=1)
