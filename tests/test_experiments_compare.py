"""The comparison: one command gives a table one can trust, marks what may not be compared, and hides no failure."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from xattn import ConfigError
from xattn.experiments import compare, evaluate, record
from xattn.experiments.configfile import save_config
from xattn.experiments.gather import Run, delta, estimate, find_runs, gather
from xattn.experiments.page import page
from xattn.experiments.report import notes
from xattn.experiments.schema import CompareConfig, EvalConfig, OptimConfig, RunConfig, TrainerConfig
from xattn.experiments.tables import Table, length_table, main_table, passkey_table, tables

FLAGS = dict(num_tokens=256, max_seq_len=16, dim=16, depth=2, heads=2, rotary_pos_emb=True)


def main(monkeypatch, entry, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    with pytest.raises(SystemExit) as exit_:
        entry()
    return exit_.value.code


TINY = [
    "+sweep=quick", "isolate=false", "tracking.mode=disabled", "dir=study", "seed=0,1", "model.dim=16", "model.depth=4",
    "model.heads=2", "trainer.steps=4", "trainer.seq_len=16", "trainer.batch_size=2", "trainer.threads=1",
    "trainer.log_every=1", "trainer.memory=false", "eval.tokens=256", "variants.window.sliding_window=4",
    "variants.hybrid_LLLG.sliding_window=4", "eval.extensions.self_extend.self_extend_window=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick study itself, at a toy size, from its command line to its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("compare"))
        assert main(patch, compare.main, *TINY) == 0
        return Path.cwd() / "study"


def test_the_quick_study_leaves_table_plots_and_numbers(study: Path) -> None:
    names = {path.name for path in study.iterdir() if path.is_file()}
    assert names == {
        "study.json", "report.html", "report.md", "results.csv", "results.json", "loss.png", "length.png", "position.png",
        "memory.png", "kv_bytes.png",
    }  # fmt: skip
    text = (study / "report.md").read_text()
    words = ("dense", "window", "hybrid_LLLG", "selective", "self_extend", "yarn_4x", "baseline", "64 (4x)", "kv_budget 0.25")
    for word in words:
        assert word in text
    backends = record.read_result(study / "selective-seed0")["backends"]
    assert f"| {backends[0]['backend']} |" in text
    with open(study / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in rows][:3] == [("dense", "0"), ("dense", "1"), ("window", "0")]
    assert len(rows) == 8 and all(float(row["val_bpb"]) > 0 for row in rows)
    assert all(row["not_comparable"] == "" for row in rows)


def test_the_page_stands_alone_and_runs_nothing(study: Path) -> None:
    text = (study / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 5 and text.count("<table>") == 3
    for foreign in ("<script", "http:", "https:", 'src="/', "@import"):
        assert foreign not in text


def test_names_and_reasons_are_text_and_never_markup(tmp_path: Path) -> None:
    table = Table(title="<b>", header=["variant", "x"], cells=[["<script>alert(1)</script>", "a & b"]])
    text = page(title="<i>", description="<u>", tables=[table], notes=["<s>"], folder=tmp_path, pictures=[])
    assert "&lt;script&gt;" in text and "a &amp; b" in text
    for tag in ("<script", "<b>", "<i>", "<u>", "<s>"):
        assert tag not in text


def test_a_finished_study_is_reported_again_without_training(study: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(study.parent)
    before = {path: path.stat().st_mtime_ns for path in study.rglob("result.json")}
    assert main(monkeypatch, compare.main, *TINY) == 0
    assert capsys.readouterr().out.count("finished before") == 8
    assert before == {path: path.stat().st_mtime_ns for path in study.rglob("result.json")}


def test_a_changed_study_in_the_same_directory_is_refused_before_anything(study: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(study.parent)
    assert main(monkeypatch, compare.main, *TINY, "optim.lr=0.5") == 2
    assert "optim.lr: 0.003 there, 0.5 now" in capsys.readouterr().err


def test_a_report_needs_run_directories_and_nothing_else(study: Path, monkeypatch, capsys) -> None:
    first = (study / "results.csv").read_text()
    (study / "results.csv").unlink()
    assert main(monkeypatch, compare.main, f"runs={study}", "baseline=dense") == 0
    assert (study / "results.csv").read_text() == first


def test_a_run_can_be_judged_again_with_evaluation_time_flags(study: Path, monkeypatch, capsys) -> None:
    run_dir = study / "dense-seed0"
    flags = ["eval.flags.self_extend_group=8", "eval.flags.self_extend_window=4"]
    assert main(monkeypatch, evaluate.main, f"run={run_dir}", "eval.tokens=256", *flags) == 0
    again = json.loads((run_dir / "evaluations" / "0.json").read_text())
    known = record.read_result(run_dir)["val_by_length"]["self_extend"]
    assert again["val_by_length"]["none"]["64"]["loss_nats"] == pytest.approx(known["64"]["loss_nats"], rel=1e-6)
    assert {layer["backend"] for layer in again["backends"]} == {"reference"}, "the fused kernel has no Self-Extend"
    assert "dense (reference), self_extend_group=8" in capsys.readouterr().out


def test_a_directory_without_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("wandb_version: 1\n")
    with pytest.raises(ConfigError, match="holds no run of xattn"):
        find_runs(tmp_path)


def made(tmp_path: Path, name: str, *, seed: int = 0, bpb: float = 2.0, status: str = "completed", **changes) -> None:
    """A run directory with the numbers that a test needs, as a worker would have left it."""
    flags = changes.pop("flags", {})
    config = RunConfig(name=name, seed=seed, model=FLAGS | flags, trainer=TrainerConfig(seq_len=16), **changes.pop("config", {}))
    run_dir = tmp_path / f"{name}-{seed}"
    run_dir.mkdir()
    save_config(config, run_dir / "config.yaml")
    scores = {"loss_nats": bpb, "ppl": 4.0, "bpb": bpb, "tokens": 256}
    result = {
        "status": status, "name": name, "seed": seed, "params": 1000, "tokens": 4096, "val": scores,
        "val_by_length": {"none": {"16": scores}}, "val_by_position": {"none": {}}, "backends": [{"backend": "sdpa"}],
        "memory": {"train_peak_bytes": 2**20, "infer_peak_bytes": 2**19, "kv_bytes_per_token": 64.0},
        "tokens_per_second": 10.0, "train_seconds": 1.0, "precision": "fp32", "device": "cpu", "commit": "c", "dirty": False,
        "data": {"corpus": "x", "tokenizer": "bytes", "tokens_seen_digest": f"order of {seed}"},
        "versions": {"torch": "2"},
    }  # fmt: skip
    if status != "completed":
        result = {"status": status, "error": "signal 9", "name": name, "seed": seed}
    if status != "unfinished":
        record.write_json(run_dir / "result.json", result | changes)


def rows_of(tmp_path: Path, **options):
    return gather(find_runs(tmp_path), **({"baseline": "dense", "param_tolerance": 0.02} | options))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": 9}, "tokens 9"),
        ({"params": 1100}, "parameters +10.0%"),
        ({"data": {"tokenizer": "bpe", "tokens_seen_digest": "order of 0"}}, "tokeniser bpe, baseline bytes"),
        ({"data": {"tokenizer": "bytes", "tokens_seen_digest": "other"}}, "seed 0 saw other tokens or another order"),
        ({"precision": "bf16"}, "precision bf16"),
        ({"config": {"optim": OptimConfig(lr=0.5)}}, "optim.lr 0.5"),
        ({"config": {"eval": EvalConfig(tokens=32)}}, "eval.tokens 32"),
        ({"seed": 3}, "no seed in common"),
    ],
)
def test_what_may_not_be_compared_is_marked_with_the_reason(tmp_path: Path, changes: dict, reason: str) -> None:
    made(tmp_path, "dense")
    made(tmp_path, "other", **changes)
    made(tmp_path, "fair", flags={"sliding_window": 4}, params=1010)
    cells = {line[0]: line[-1] for line in main_table(rows_of(tmp_path)).cells}
    assert reason in cells["other"] and cells["other"].startswith("not comparable")
    assert (cells["dense"], cells["fair"]) == ("baseline", "yes")


@pytest.mark.parametrize("status", ["oom", "killed", "failed", "invalid", "interrupted", "unfinished"])
def test_a_run_without_a_result_stays_in_the_table_with_its_reason(tmp_path: Path, status: str) -> None:
    made(tmp_path, "dense")
    made(tmp_path, "broken", status=status)
    line = next(line for line in main_table(rows_of(tmp_path)).cells if line[0] == "broken")
    assert status in line[-1] and (status == "unfinished" or "signal 9" in line[-1])


def test_seeds_give_mean_spread_and_a_difference_paired_by_seed(tmp_path: Path) -> None:
    for seed, bpb in enumerate((2.0, 2.2, 2.4)):
        made(tmp_path, "dense", seed=seed, bpb=bpb)
        made(tmp_path, "window", seed=seed, bpb=bpb + 0.1, flags={"sliding_window": 4})
    dense, window = rows_of(tmp_path)
    mean = estimate(dense.values("val", "bpb").values())
    assert (mean.mean, mean.spread, mean.seeds) == (pytest.approx(2.2), pytest.approx(0.2), 3)
    assert mean.half_95 == pytest.approx(4.303 * 0.2 / 3**0.5)
    # The seeds differ by far more than the variants: only the pairing shows a difference, and shows it exactly.
    difference = delta(window, dense, "val", "bpb")
    assert (difference.mean, difference.spread) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))
    line = next(line for line in main_table([dense, window]).cells if line[0] == "window")
    assert line[1:3] == ["2.3000 ± 0.2000", "+0.1000 ± 0.0000"]
    assert main_table([dense, window]).header[1:4] == ["val bpb ± sd", "delta bpb ± 95 %", "val ppl ± sd"]


def test_where_a_row_has_no_bits_per_byte_differences_are_of_nats(tmp_path: Path) -> None:
    made(tmp_path, "dense")
    score = {"loss_nats": 2.5, "ppl": 4.0, "bpb": None, "tokens": 256}
    made(tmp_path, "other", val=score, val_by_length={"none": {"16": score, "32": score}})
    table = main_table(rows_of(tmp_path))
    assert table.header[2] == "delta nats" and table.cells[1][1:3] == ["-", "+0.5000"]
    lengths = length_table(rows_of(tmp_path))
    assert "perplexity on" in lengths.title and "bits" not in lengths.title and lengths.cells[1][2] == "4.00"


def test_a_seed_that_failed_is_named_and_the_others_still_count(tmp_path: Path) -> None:
    made(tmp_path, "dense", seed=0)
    made(tmp_path, "dense", seed=1, status="oom")
    (line,) = main_table(rows_of(tmp_path)).cells
    assert line[1] == "2.0000" and "seed 1: oom: signal 9" in line[-1]
    made(tmp_path, "dense", seed=2, status="oom")
    made(tmp_path, "dense", seed=3, status="killed")
    (line,) = main_table(rows_of(tmp_path)).cells
    assert line[-1].endswith("seeds 1, 2: oom: signal 9; seed 3: killed: signal 9")


def test_runs_that_share_a_name_are_told_apart_by_their_flags(tmp_path: Path) -> None:
    for seed, window in enumerate((4, 8)):
        made(tmp_path, "run", seed=seed, flags={"sliding_window": window})
    assert [row.name for row in rows_of(tmp_path, baseline=None)] == ["run sliding_window=4", "run sliding_window=8"]


def test_a_table_with_one_length_is_left_out(tmp_path: Path) -> None:
    made(tmp_path, "dense")
    assert length_table(rows_of(tmp_path)) is None


def test_a_study_is_judged_later_with_its_own_tolerance(tmp_path: Path, monkeypatch) -> None:
    made(tmp_path, "dense")
    made(tmp_path, "lean", params=950)
    config = CompareConfig(model=dict(FLAGS), variants={"dense": {}, "lean": {}}, param_tolerance=0.1, plots=False)
    record.write_json(tmp_path / compare.STUDY, compare._kept(config))

    def verdict(**changes) -> str:
        assert compare.report(replace(config, **changes), tmp_path) == 0
        return next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| lean |"))

    assert verdict(param_tolerance=None).endswith("| yes |")
    assert "within 10% of the baseline" in (tmp_path / "report.md").read_text()
    assert "parameters -5.0%" in verdict(param_tolerance=0.04), "what is given counts more"
    record.write_json(tmp_path / compare.STUDY, {"order": 5, "param_tolerance": "all"})
    assert "parameters -5.0%" in verdict(param_tolerance=None), "what is no tolerance is none"


def test_planted_keys_have_a_table_with_the_mean_and_the_worst_depth(tmp_path: Path) -> None:
    made(tmp_path, "plain")
    assert passkey_table(rows_of(tmp_path, baseline="plain")) is None
    for seed, worst in enumerate((0.25, 0.75)):
        score = {"loss_nats": 2.0, "ppl": 4.0, "bpb": 2.0, "tokens": 256}
        depths = {"0": {"accuracy": worst, "answer_nats": 1.0}, "1": {"accuracy": 1.0, "answer_nats": 0.0}}
        found = {"none": {"16": depths, "32": depths}, "yarn": {"16": depths, "32": {"error": "no room"}}}
        lengths = {name: {"16": score, "32": score} for name in found}
        made(tmp_path, "dense", seed=seed, passkey=found, val_by_length=lengths)
    rows = rows_of(tmp_path)
    table = passkey_table(rows)
    assert table.header == ["variant", "evaluated with", "16 (1x)", "32 (2x)"]
    assert table.cells[0] == ["dense", "as trained", "0.75 (0.50)", "0.75 (0.50)"]
    assert table.cells[1] == ["dense", "yarn", "0.75 (0.50)", "not possible"] and len(table.cells) == 2
    assert table in tables(rows)
    assert "dense, yarn: no key could be asked for: no room" in notes(rows, param_tolerance=0.02)


def test_an_unknown_baseline_names_the_rows(tmp_path: Path) -> None:
    made(tmp_path, "dense")
    with pytest.raises(ConfigError, match="dense"):
        rows_of(tmp_path, baseline="dnese")


@pytest.mark.parametrize("name", ["../out", "/etc", "..", "", "a b/c"])
def test_a_variant_cannot_name_its_way_out_of_the_study(name: str) -> None:
    config = CompareConfig(model=dict(FLAGS), variants={name: {}})
    with pytest.raises(ConfigError, match="directory"):
        compare.plan(config, Path("study"))


def test_seeds_are_outermost_and_extensions_only_where_asked() -> None:
    extensions = {"yarn": {"rope_scaling": "yarn", "rope_scaling_factor": 2.0}}
    config = CompareConfig(model=dict(FLAGS), variants={"a": {}, "b": {"sliding_window": 4}}, seeds=[0, 1])
    config = replace(config, extended=["a"], eval=EvalConfig(extensions=extensions))
    jobs = compare.plan(config, Path("study"))
    assert [job.run_dir.name for job in jobs] == ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]
    assert [bool(job.config.eval.extensions) for job in jobs] == [True, False, True, False]


def test_estimates_of_nothing_and_of_one_claim_no_spread() -> None:
    assert estimate([]) is None
    one = estimate([3.0])
    assert (one.mean, one.spread, one.half_95) == (3.0, None, None)


def test_runs_of_different_code_are_pointed_out(tmp_path: Path) -> None:
    made(tmp_path, "dense")
    made(tmp_path, "window", flags={"sliding_window": 4}, commit="d")
    assert "commits c, d" in " ".join(notes(rows_of(tmp_path), param_tolerance=0.02))


def test_without_a_commit_the_version_is_named(tmp_path: Path) -> None:
    made(tmp_path, "dense", commit=None, versions={"torch": "2", "xattn": "1.2.3"})
    assert "torch 2, xattn 1.2.3." in notes(rows_of(tmp_path), param_tolerance=0.02)[0]


def test_an_unfinished_run_counts_as_no_result(tmp_path: Path) -> None:
    made(tmp_path, "dense", status="unfinished")
    (run,) = find_runs(tmp_path)
    assert isinstance(run, Run) and not run.done
