"""Faults: what a stranger, the system or an empty hand does to a run or a study is recorded or refused, never obeyed."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xattn
from xattn.experiments import checkpoint, compare, record, train
from xattn.experiments.configfile import save_config
from xattn.experiments.launch import launch
from xattn.experiments.schema import EvalConfig, RunConfig, TrackingConfig, TrainerConfig

FLAGS = dict(num_tokens=256, max_seq_len=16, dim=16, depth=2, heads=2, rotary_pos_emb=True)


def tiny(**more) -> RunConfig:
    trainer = TrainerConfig(steps=3, seq_len=16, batch_size=2, save_every=1, memory=False, threads=1)
    run = dict(isolate=False, model=dict(FLAGS), trainer=trainer, tracking=TrackingConfig(mode="disabled"))
    return RunConfig(**run | dict(eval=EvalConfig(tokens=64, length_factors=[1])) | more)


def command(monkeypatch: pytest.MonkeyPatch, entry, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    with pytest.raises(SystemExit) as exit_:
        entry()
    return exit_.value.code


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a checkpoint in the middle, as it is after a stop."""
    stop_at_two = checkpoint.save_checkpoint

    def save(run_dir: Path, model, optimiser, progress, **more):
        stop_at_two(run_dir, model, optimiser, progress, **more)
        if progress.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        with pytest.raises(KeyboardInterrupt):
            launch(tiny(), tmp_path / "run")
    return tmp_path / "run"


class Payload:
    """Unpickled, it makes a file: the proof that code of the file's author ran."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("place", ["optimiser.pt", "ema.pt", "shards/.metadata"])
def test_a_strangers_checkpoint_runs_no_code(broken_off: Path, tmp_path: Path, place: str) -> None:
    path, canary = checkpoint.newest_checkpoint(broken_off) / place, tmp_path / "canary"
    path.parent.mkdir(exist_ok=True)
    if place == "shards/.metadata":
        path.write_bytes(pickle.dumps(Payload(canary)))
        pickle.loads(path.read_bytes())
    else:
        torch.save({"state": Payload(canary)}, path)
        torch.load(path, weights_only=False)
    assert canary.exists(), "the payload is a dud, so this test can say nothing"
    canary.rmdir()
    result = launch(tiny(), broken_off)
    assert result["status"] in ("failed", "invalid"), "a checkpoint that cannot be trusted was passed over"
    assert not canary.exists()


def test_the_checkpoint_those_payloads_were_put_into_is_good_without_them(broken_off: Path) -> None:
    assert checkpoint.newest_checkpoint(broken_off).name == "step-00000002"
    assert launch(tiny(), broken_off)["status"] == "completed"


@pytest.mark.parametrize(
    "line",
    [
        "name: !!python/object/apply:os.mkdir ['CANARY']",
        "model: {_target_: os.mkdir, path: CANARY}",
        "data: {_target_: os.mkdir, path: CANARY}",
        "name: ${oc.env:HOME}\nmodel: !!python/object/new:os.mkdir ['CANARY']",
    ],
)
def test_a_strangers_config_runs_no_code_on_any_road(tmp_path: Path, monkeypatch, capsys, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(line.replace("CANARY", str(tmp_path / "canary")) + "\nisolate: false\n")
    assert command(monkeypatch, train.main, "resume=run") in (1, 2)
    assert command(monkeypatch, compare.main, "runs=run") in (1, 2)
    assert "Traceback" not in "".join(capsys.readouterr())
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "text",
    ["model: {_target_: os.mkdir, path: CANARY}", "trainer: {_target_: os.mkdir}", "name: !!python/object/apply:os.mkdir [CANARY]"],  # noqa: E501
)
def test_an_experiment_file_of_a_stranger_runs_no_code(tmp_path: Path, monkeypatch, capsys, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs" / "experiment").mkdir(parents=True)
    file = tmp_path / "theirs" / "experiment" / "nice.yaml"
    file.write_text("# @package _global_\n" + text.replace("CANARY", str(tmp_path / "canary")) + "\n")
    argv = ["--config-dir", "theirs", "+debug=fast", "+experiment=nice", "isolate=false", "run_dir=run"]
    assert command(monkeypatch, train.main, *argv) == 2
    assert "Traceback" not in "".join(capsys.readouterr())
    assert not (tmp_path / "canary").exists() and not (tmp_path / "run" / "result.json").exists()


def result_of(flags: dict) -> dict:
    """As little of a completed result as a report can do with."""
    score = {"loss_nats": 1.0, "ppl": 2.7, "bpb": 1.4, "tokens": 64}
    return {
        "status": "completed", "seed": 0, "params": 9, "tokens": 96, "val": score, "val_by_length": {"none": {"16": score}},
        "val_by_position": {"none": {"16": []}}, "flags": {"given": flags, "resolved": flags}, "backends": [],
        "memory": {"kv_bytes_per_token": 1.0}, "tokens_per_second": 1.0, "device": "cpu", "precision": "fp32",
        "data": {"corpus": "c", "tokenizer": "bytes", "tokens_seen_digest": "0"}, "commit": None, "dirty": None,
        "versions": {"torch": "2"},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["../../evil", "/<script>alert(1)</script>", "a\nb"])
def test_a_report_of_a_strangers_runs_writes_nothing_outside_their_directory(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, called in (("one", name), ("two", "dense")):
        path = tmp_path / "study" / folder
        path.mkdir(parents=True)
        save_config(tiny(name=called), path / "config.yaml")
        record.write_json(path / "result.json", result_of(FLAGS))
    record.write_json(tmp_path / "study" / "study.json", {"study": name, "description": name, "order": [name], "baseline": None})
    assert command(monkeypatch, compare.main, "runs=study") == 0
    assert {path.split("/")[0] for path in tree(tmp_path)} == {"study"}
    assert {path.name for path in (tmp_path / "study").iterdir() if path.is_dir()} == {"one", "two"}
    assert "<script" not in (tmp_path / "study" / "report.html").read_text()


@pytest.mark.parametrize(
    "result",
    [
        "[]",
        "not json",
        '{"status": "completed", "val": 3}',
        '{"status": ["completed"]}',
        json.dumps(result_of({}) | {"passkey": 3}),
    ],
)
def test_a_study_pointed_at_foreign_results_says_so(tmp_path: Path, monkeypatch, capsys, result: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, text in (("ours", json.dumps(result_of(FLAGS))), ("theirs", result)):
        path = tmp_path / "runs" / folder
        path.mkdir(parents=True)
        save_config(tiny(name=folder), path / "config.yaml")
        (path / "result.json").write_text(text)
    (tmp_path / "runs" / "wandb").mkdir()
    (tmp_path / "runs" / "wandb" / "config.yaml").write_text("wandb_version: 1\n")
    assert command(monkeypatch, compare.main, "runs=runs", "baseline=ours") == 0
    report = (tmp_path / "runs" / "report.md").read_text()
    assert "ours" in report and "theirs" in report, "a run was dropped without a word"


def test_a_directory_without_runs_is_refused_and_left_as_it_was(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "config.yaml").write_text("camera: old\n")
    assert command(monkeypatch, compare.main, "runs=photos") == 2
    assert "holds no run of xattn" in capsys.readouterr().err
    assert tree(tmp_path) == {"photos", "photos/config.yaml"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["variants={}"], "the study has no variants"),
        (["+sweep=quick", "seeds=[]"], "at least one"),
        (["+sweep=quick", "seed="], "at least one"),
        (["--config-dir", "mine", "+sweep=empty"], "the study has no variants"),
    ],
)
def test_an_empty_study_is_refused_before_any_work(tmp_path: Path, monkeypatch, capsys, argv: list[str], says: str) -> None:
    (tmp_path / "mine" / "sweep").mkdir(parents=True)
    (tmp_path / "mine" / "sweep" / "empty.yaml").write_text("# @package _global_\nstudy: empty\n")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert command(monkeypatch, compare.main, *argv) == 2
    assert says in capsys.readouterr().err and tree(tmp_path) == before


def test_a_job_out_of_memory_and_a_killed_one_are_rows_and_the_study_goes_on(tmp_path: Path) -> None:
    """Three jobs: one that asks for 17 GB under a limit of 8, one whose worker is killed with -9, one that is well."""
    options = [
        "dir=study", "+variants.huge.dim=65536", "+variants.killed.sliding_window=8", "+variants.well.sliding_window=4",
        "tracking.mode=disabled", "trainer.memory=false", "trainer.threads=1", "trainer.steps=400", "trainer.seq_len=16",
        "trainer.batch_size=2", "eval.tokens=64", "eval.length_factors=[1]", "model.dim=16", "model.depth=1", "model.heads=2",
        "plots=false", "seed=0",
    ]  # fmt: skip
    code = "import sys; from xattn.experiments.compare import main; sys.argv = ['xattn-compare', *sys.argv[1:]]; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *options],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
    ) as study:  # fmt: skip
        said, killed = [], False
        for line in study.stdout:
            said.append(line)
            if "killed-seed0] step " in line and not killed:
                (worker,) = Path(f"/proc/{study.pid}/task/{study.pid}/children").read_text().split()
                os.kill(int(worker), signal.SIGKILL)
                killed = True
    assert killed and study.returncode == 1, "".join(said)
    results = {name: record.read_result(tmp_path / "study" / f"{name}-seed0") for name in ("huge", "killed", "well")}
    assert {name: result["status"] for name, result in results.items()} == {
        "huge": "oom", "killed": "killed", "well": "completed",
    }  # fmt: skip
    assert "can't allocate memory" in results["huge"]["error"] and "SIGKILL" in results["killed"]["error"]
    assert results["huge"]["flags"]["given"]["dim"] == 65536
    report = (tmp_path / "study" / "report.md").read_text()
    assert "oom" in report and "killed" in report and "| well" in report


def test_a_secret_typed_into_a_run_without_a_worker_reaches_no_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "pLaNtEd-5ecret")
    config = tiny(name="pLaNtEd-5ecret", tracking=TrackingConfig(mode="disabled", notes="pLaNtEd-5ecret"))
    assert launch(config, tmp_path / "run")["status"] == "completed"
    shutil.copy(tmp_path / "run" / "config.yaml", tmp_path / "first.yaml")
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"pLaNtEd" not in path.read_bytes(), path
    assert launch(config, tmp_path / "run")["status"] == "completed", "the same command does not know its own run again"


def test_the_weights_of_a_stranger_are_data(broken_off: Path, tmp_path: Path) -> None:
    model = checkpoint.newest_checkpoint(broken_off) / "model"
    canary = tmp_path / "canary"
    for path in model.iterdir():
        path.write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises((xattn.CheckpointError, ValueError)):
        xattn.load(model)
    assert launch(tiny(), broken_off)["status"] == "invalid" and not canary.exists()
