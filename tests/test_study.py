"""Promises of the study: every question composes, its preset of CPU size runs end to end, and the rules of its runs hold."""

import json
import sys
from pathlib import Path

import pytest
import torch

import xattn
from xattn.experiments import compare, compose, record, study
from xattn.experiments.schema import TrainerConfig
from xattn.experiments.tables import _causes

ROOT = Path(__file__).parents[1]
STUDIES = sorted(path.stem for path in (ROOT / "configs" / "sweep" / "study").glob("*.yaml") if path.stem != "base")
STUDIES = [name for name in STUDIES if not name.startswith("tasks_")]
TINY = ["+size=tiny", "isolate=false", "plots=false"]


def text_of(name: str) -> list[str]:
    """The preset's text; retrieval makes its own."""
    return [] if name == "retrieval" else ["data=shakespeare"]


def composed(argv: list[str], monkeypatch):
    monkeypatch.setattr(sys, "argv", ["xattn-compare"])
    seen = []
    compose.hydra_main(lambda cfg: seen.append(compose.resolve(cfg)), "compare", compare.arguments(argv))
    return seen[0]


def run(monkeypatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["xattn-compare", *argv])
    with pytest.raises(SystemExit) as exit_:
        compare.main()
    return exit_.value.code


def texts(folder: Path) -> None:
    for corpus in ("books", "wiki"):
        (folder / corpus).mkdir()
        for part in ("train", "valid"):
            (folder / corpus / f"{part}.jsonl.xz").touch()


@pytest.mark.parametrize("name", STUDIES)
def test_a_question_composes_at_full_size(name: str, tmp_path: Path, monkeypatch) -> None:
    texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XATTN_DATA", str(tmp_path))
    config = composed([f"+experiment=study/{name}"], monkeypatch)
    jobs = compare.plan(config, tmp_path)
    assert config.study == name and config.baseline in config.variants and str(config.dir) == f"runs/study/{name}"
    assert len(config.seeds) >= 3 or config.lrs
    assert len(jobs) == len(config.seeds) * len(config.variants) * max(len(config.lrs), 1)
    with torch.device("meta"):
        models = {job.config.name: xattn.build(**job.config.model) for job in jobs if job.config.seed == 0}
    size = {row: sum(weight.numel() for weight in model.parameters()) for row, model in models.items()}
    first = size[compare._baseline(config)]
    assert all(abs(count / first - 1) <= (config.param_tolerance or compare.PARAM_TOLERANCE) for count in size.values())


@pytest.mark.parametrize("name", STUDIES)
def test_a_question_runs_at_the_size_of_a_cpu(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [f"+experiment=study/{name}", *TINY, *text_of(name)]
    config = composed(argv, monkeypatch)
    # The baseline and the last variant: the others are composed above.
    dropped = [v for v in config.variants if v not in (config.baseline, list(config.variants)[-1])]
    assert run(monkeypatch, *argv, *(f"~variants.{v}" for v in dropped)) == 0, capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in Path(f"runs/{name}_tiny").glob("*/result.json")]
    assert len(results) == 2 * max(len(config.lrs), 1) and {r["status"] for r in results} == {record.COMPLETED}


def test_rows_of_a_grid_are_compared_although_their_rates_differ(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["+experiment=study/lr", *TINY, "data=shakespeare", "lrs=[1e-3,2e-3]", "trainer.steps=1"]
    assert run(monkeypatch, *base, *(f"~variants.{v}" for v in ("dense_2x", "alibi", "selective"))) == 0
    kept = json.loads(Path("runs/lr_tiny/study.json").read_text())
    assert kept["baseline"] == "dense-lr0.002" and kept["varied"] == ["optim.lr"]
    rows = json.loads(Path("runs/lr_tiny/results.json").read_text())["rows"]
    assert len(rows) == 4 and all(row["not_comparable"] == [] for row in rows)


def test_a_finished_run_of_the_same_config_is_taken_over(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["+experiment=study/selective", *TINY, "data=shakespeare", "trainer.steps=1"]
    few += [f"~variants.{v}" for v in ("dense_2x", "alibi", "selective_head_3")]
    assert run(monkeypatch, *few, "dir=first", "~variants.window_128") == 0
    assert run(monkeypatch, *few, "dir=second", "reuse=[first]") == 0
    said = capsys.readouterr().out
    assert said.count(": as in first") == 2
    assert run(monkeypatch, *few, "dir=third", "reuse=[first]", "trainer.steps=2") == 0
    assert ": as in first" not in capsys.readouterr().out


def test_runs_side_by_side_are_dealt_out_to_the_devices(monkeypatch) -> None:
    from xattn.experiments import pool

    monkeypatch.setattr(pool.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    places = pool.environments(TrainerConfig(), 3)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["2", "5", "2"]
    assert pool.environments(TrainerConfig(device="cpu"), 2) == [{}, {}]
    seen = pool.in_turn(lambda job, _: job * 2, [1, 2, 3, 4], trainer=TrainerConfig(device="cpu"), at_once=3)
    assert seen == [2, 4, 6, 8]


def test_small_files_of_a_study_make_the_page(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    few = [f"~variants.{v}" for v in ("dense_2x", "alibi", "selective_head_3", "window_128")]
    assert run(monkeypatch, "+experiment=study/selective", *TINY, "data=shakespeare", *few, "dir=runs/study/selective") == 0
    monkeypatch.setattr(sys, "argv", ["study", "keep"])
    with pytest.raises(SystemExit) as exit_:
        study.main()
    assert exit_.value.code == 0
    kept = Path("benchmarks/results/study/selective")
    assert {path.suffix for path in kept.rglob("*") if path.is_file()} == {".json", ".jsonl", ".yaml"}
    assert sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) < 30_000
    marked = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    made = study.page(marked, kept=kept.parent, images=tmp_path / "images")
    assert "| selective |" in made and "_No results yet._" in made and "(images/study/selective/loss.png)" in made
    assert study.page(made, kept=kept.parent, images=tmp_path / "images") == made


def test_every_question_stands_on_the_page() -> None:
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert [name for name in STUDIES if f"study/{name}" not in text] == []
    made = {match[3] for match in study._BLOCK.finditer(text)}
    assert made == {*STUDIES, "tasks_parity", "tasks_mqar", "tasks_copy", "tasks_variable_assignment"}


def test_cost_is_drawn_with_a_cross_where_memory_ran_out(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cost

    rows = [{"model": "xattn dense", "n": n, "step_ms": n / 100, "peak_mib": n * 2.0} for n in (1024, 2048)]
    rows.append({"model": "xattn dense", "n": 4096, "note": cost.OOM})
    assert cost.draw(rows, tmp_path / "cost.png") and not cost.draw(rows[2:], tmp_path / "none.png")
    assert {name for name, _ in cost.cells(cost.LENGTHS)} == set(cost.MODELS)


def test_errors_that_differ_in_numbers_alone_are_told_once() -> None:
    errors = ["target=4.5 is below 4.57", "no layer", "target=4.6 is below 4.61"]
    assert _causes(errors) == "target=4.5 is below 4.57 (and 1 more like it); no layer"
    assert _causes([]) == ""
