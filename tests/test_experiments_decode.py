"""Decoding: what a probe says of a cache is what the cache is, and a budget's perplexity is that of the pruned model."""

import json
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_experiments_tasks import corpus_of

import xattn
from xattn import ConfigError
from xattn.budgets import loss_at
from xattn.experiments import decode, evaluate, plots, record
from xattn.experiments.configfile import save_config
from xattn.experiments.data import Corpus, Part, eval_blocks
from xattn.experiments.figure import Looks
from xattn.experiments.gather import Row, Run
from xattn.experiments.judge import judge_all
from xattn.experiments.kv_budgets import judge_budgets
from xattn.experiments.launch import probe_decode
from xattn.experiments.passkey import passkey_corpus
from xattn.experiments.report import _csv
from xattn.experiments.schema import DecodeConfig, EvalConfig, RunConfig, TrainerConfig
from xattn.experiments.tables import budget_table, decode_table

matplotlib.use("Agg")
FLAGS = dict(num_tokens=50, max_seq_len=16, dim=24, depth=2, heads=2, rotary_pos_emb=True, attn_selective=True)
TRAINER = TrainerConfig(seq_len=16, batch_size=2, threads=1, precision="fp32", device="cpu")
CPU = {"device": torch.device("cpu"), "precision": "fp32"}


def config(flags: dict | None = None, **asked) -> RunConfig:
    asked.setdefault("decode", DecodeConfig(tokens=3))
    return RunConfig(model=FLAGS | (flags or {}), trainer=TRAINER, eval=EvalConfig(length_factors=[1, 4], **asked))


def corpus(documents: bool = False) -> Corpus:
    ids = np.random.default_rng(0).integers(0, 50, size=600)
    part = Part(ids=ids, starts=np.array([0, 21, 130, 300])) if documents else Part(ids=ids)
    return Corpus(name="random", tokenizer="bpe", vocabulary=50, train=part, val=part, token_bytes=np.ones(50))


def model(**flags) -> xattn.TransformerWrapper:
    torch.manual_seed(0)
    net = xattn.build(FLAGS | flags).eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    return net


@pytest.mark.parametrize("flags", [{}, {"sliding_window": 5, "sink_tokens": 1}, {"self_extend_group": "auto"}], ids=str)
def test_the_probe_reads_the_cache_that_accounting_predicts(flags: dict) -> None:
    asked = config(decode=DecodeConfig(tokens=3, batch=2), flags=flags)
    found = decode.measure(asked)
    assert (found["batch"], found["new_tokens"]) == (2, 3) and found["method"]
    spec = xattn.parse(FLAGS | flags)
    for n in (16, 64):
        entry = found["by_length"][str(n)]
        assert entry["prompt_tokens"] == n - 3
        assert entry["cache_bytes"] == xattn.accounting.cache_bytes(spec, n, batch=2, itemsize=4, max_len=n)
        assert entry["kv_bytes_per_token"] == xattn.accounting.kv_bytes(spec, n) / n
        assert entry["tokens_per_second"] > 0 and entry["prefill_seconds"] > 0


def test_a_length_that_cannot_be_decoded_says_why() -> None:
    found = decode.measure(config({"use_abs_pos_emb": True}, decode=DecodeConfig(tokens=30)))["by_length"]
    assert found["16"]["prompt_tokens"] == 8, "half of a short context"
    assert "learned positions" in found["64"]["error"]


def test_a_fresh_process_measures_the_prompt_above_the_decoding_that_follows(tmp_path: Path) -> None:
    trainer = TrainerConfig(seq_len=512, threads=1, precision="fp32", device="cpu")
    asked = EvalConfig(length_factors=[1], decode=DecodeConfig(tokens=2))
    wide = FLAGS | {"dim": 128, "max_seq_len": 514, "attn_selective": False}
    save_config(RunConfig(model=wide, trainer=trainer, eval=asked), tmp_path / record.CONFIG)
    entry = probe_decode(tmp_path)["by_length"]["512"]
    weights = 4 * xattn.accounting.count_params(xattn.parse(wide))
    assert weights + entry["cache_bytes"] < 1.1 * entry["decode_peak_bytes"] < 1.1 * entry["prefill_peak_bytes"]
    assert [path.name for path in tmp_path.iterdir()] == [record.CONFIG]
    save_config(RunConfig(model=wide | {"dim": 2**20, "dim_head": 64}, trainer=trainer, eval=asked), tmp_path / record.CONFIG)
    assert "memory" in probe_decode(tmp_path)["error"]


def test_a_budget_scores_what_the_pruned_cache_says() -> None:
    net, asked = model(), EvalConfig(tokens=128, kv_budgets=[5, 0.25, [None, 3], 16])
    found = judge_budgets(net, corpus(), asked, seq_len=16, **CPU)
    val = judge_all(net, corpus(), asked, seq_len=16, **CPU)["val"]
    assert list(found) == ["5", "0.25", "[null, 3]", "16"]
    assert [entry["budgets"] for entry in found.values()] == [[5, 5], [4, 4], [None, 3], [16, 16]]
    blocks = eval_blocks(corpus(), tokens=128, length=16, longest=64).ids_bn
    for entry in found.values():
        assert entry["loss_nats"] == pytest.approx(loss_at(net, blocks, entry["budgets"]), rel=1e-5)
        assert entry["ppl"] == pytest.approx(math.exp(entry["loss_nats"])) and entry["tokens"] == val["tokens"]
        held = xattn.accounting.kv_bytes(net.spec, 16, kv_budget=entry["budgets"]) / 16
        assert entry["kv_bytes_per_token"] == held
    assert found["16"]["loss_nats"] == pytest.approx(val["loss_nats"], rel=1e-5)
    assert abs(found["0.25"]["loss_nats"] - val["loss_nats"]) > 1e-3, "a budget that changes nothing shows nothing"


def test_a_budget_moves_with_the_chunk_and_not_with_the_batch() -> None:
    def loss(documents: bool = False, **asked) -> float:
        asked = EvalConfig(tokens=128, kv_budgets=[4], **asked)
        return judge_budgets(model(), corpus(documents), asked, seq_len=16, **CPU)["4"]["loss_nats"]

    assert loss(batch_tokens=16) == pytest.approx(loss(), rel=1e-5)
    assert loss(kv_budget_chunk=5) != pytest.approx(loss(), rel=1e-4)
    assert loss(documents=True) != pytest.approx(loss(), rel=1e-4)


@pytest.mark.parametrize("source", ["passkey", "task"])
def test_under_a_budget_too_only_answers_count(source: str) -> None:
    """A budget of all keys says what the whole sequence says; one of a few does not."""
    made = passkey_corpus(tokens=256, passage=16) if source == "passkey" else corpus_of("parity")
    net, asked = model(num_tokens=made.vocabulary), EvalConfig(tokens=512, kv_budgets=[16, 2])
    val = judge_all(net, made, asked, seq_len=16, **CPU)["val"]
    found = judge_budgets(net, made, asked, seq_len=16, **CPU)
    for name in ("accuracy", "exact", "tokens"):
        assert found["16"][name] == val[name]
    assert found["16"]["loss_nats"] == pytest.approx(val["loss_nats"], rel=1e-5) and found["16"]["bpb"] is None
    assert abs(found["2"]["loss_nats"] - val["loss_nats"]) > 1e-4 and found["2"]["tokens"] == val["tokens"] < 512


def test_what_cannot_be_pruned_says_why_and_what_is_not_asked_is_none() -> None:
    dense = xattn.build(FLAGS | {"attn_selective": False})
    found = judge_budgets(dense, corpus(), EvalConfig(tokens=64, kv_budgets=[4]), seq_len=16, **CPU)
    assert "no layer has attn_selective" in found["4"]["error"]
    found = judge_budgets(model(), corpus(), EvalConfig(tokens=64, kv_budgets=[1, [3]]), seq_len=16, **CPU)
    assert "never evicted" in found["1"]["error"] and "depth=2" in found["[3]"]["error"]
    assert judge_budgets(dense, corpus(), EvalConfig(), seq_len=16, **CPU) is None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"decode": DecodeConfig(tokens=-1)}, "eval.decode.tokens=-1 is negative"),
        ({"decode": DecodeConfig(tokens=3, batch=0)}, "eval.decode.batch=0 is not positive"),
        ({"decode": DecodeConfig(tokens=0, batch=2)}, "eval.decode.batch=2 has no effect"),
        ({"kv_budget_chunk": 2}, "eval.kv_budget_chunk=2 has no effect"),
        ({"kv_budgets": [2], "kv_budget_chunk": 0}, "eval.kv_budget_chunk=0 is not positive"),
    ],
)
def test_bad_values_are_refused_with_what_would_work(asked: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**asked).check()
    together = config()
    together.isolate = False
    with pytest.raises(ConfigError, match="eval.decode.tokens=3 starts a process"):
        together.check()


def test_an_evaluation_prints_and_keeps_both(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    trained = RunConfig(model=FLAGS | {"num_tokens": 256}, trainer=TRAINER)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    save_config(trained, run_dir / record.CONFIG)
    xattn.save(xattn.build(trained.model), run_dir / "model")
    argv = ["eval.tokens=64", "eval.length_factors=[1,2]", "eval.kv_budgets=[4,[null,0.5]]", "eval.decode.tokens=2"]
    monkeypatch.setattr(sys, "argv", ["xattn-eval", f"run={run_dir}", *argv])
    with pytest.raises(SystemExit) as exit_:
        evaluate.main()
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    kept = json.loads((run_dir / "evaluations" / "0.json").read_text())
    for budget, entry in kept["kv_budgets"].items():
        assert f"kv_budget {budget}: perplexity {entry['ppl']:.3f}, {entry['kv_bytes_per_token']:,.0f} KV bytes a token" in told
    assert list(kept["decode"]["by_length"]) == ["16", "32"] and kept["decode"]["new_tokens"] == 2
    for length, entry in kept["decode"]["by_length"].items():
        assert f"{length} tokens, decoding: {entry['tokens_per_second']:,.0f} tokens/s" in told


def rows(folder: Path) -> list[Row]:
    """A dense and a pruned variant of two seeds."""
    made = []
    for name, budgets in (("dense", {"0.5": {"error": "no layer has attn_selective"}}), ("pruned", {"0.5": 3.0, "8": 4.0})):
        runs = []
        for seed in (0, 1):
            scores = {
                b: e if isinstance(e, dict) else {"ppl": e + seed, "kv_bytes_per_token": 16 * e} for b, e in budgets.items()
            }
            entry = {"prefill_peak_bytes": 3 * 2**20, "decode_peak_bytes": 2**20, "tokens_per_second": 50.0 + seed,
                     "kv_bytes_per_token": 64.0}  # fmt: skip
            result = {
                "status": "completed", "val": {"ppl": 2.0 + seed, "bpb": 1.0, "loss_nats": 1.0}, "kv_budgets": scores,
                "memory": {"kv_bytes_per_token": 128.0},
                "decode": {"batch": 1, "new_tokens": 5, "by_length": {"16": entry, "64": {"error": "why"}}},
            }  # fmt: skip
            runs.append(Run(path=folder / name, config=RunConfig(name=name, seed=seed), result=result))
        made.append(Row(name=name, runs=runs))
    return made


def test_tables_and_the_csv_show_means_over_seeds(tmp_path: Path) -> None:
    table = decode_table(rows(tmp_path))
    assert table.cells[0] == ["dense", "3.0", "1.0", "50", "-", "64", "-"] and "last 5 tokens" in table.title
    table = budget_table(rows(tmp_path))
    assert table.header == ["variant", "all keys", "kv_budget 0.5", "kv_budget 8"]
    assert table.cells == [["pruned", "2.500 (128)", "3.500 (48)", "4.500 (64)"]]
    line = _csv(rows(tmp_path)).splitlines()
    assert "prefill_peak_bytes,decode_peak_bytes,decode_tokens_per_second" in line[0] and ",3145728,1048576,50.0," in line[1]
    answered = rows(tmp_path)
    for run in answered[1].runs:
        for score in (run.result["val"], *run.result["kv_budgets"].values()):
            score["accuracy"] = score["ppl"] / 8
    table = budget_table(answered)
    assert "answers right" in table.title and table.cells == [["pruned", "0.312 (128)", "0.438 (48)", "0.562 (64)"]]
    old = rows(tmp_path)
    for run in (run for row in old for run in row.runs):
        del run.result["decode"], run.result["kv_budgets"]
    assert decode_table(old) is None and budget_table(old) is None and _csv(old)


def test_the_picture_goes_down_the_budgets_of_a_variant(tmp_path: Path) -> None:
    figure, made = Figure(layout="constrained"), rows(tmp_path)
    assert plots.paint_kv_bytes(figure, made, Looks(row.name for row in made))
    lines = {shown[0].get_color(): shown[0] for shown in figure.axes[0].containers}
    dense, pruned = lines.values()
    assert list(dense.get_xdata()) == [128] and list(pruned.get_xdata()) == [48, 64, 128]
    assert list(pruned.get_ydata()) == [3.5, 4.5, 2.5]
    assert not plots.paint_kv_bytes(Figure(), made[:1], Looks(["dense"])), "nothing was pruned"
