"""Several processes train as one: the same losses, one record, checkpoints that any number of processes can go on from."""

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import xattn
from xattn import ConfigError
from xattn.experiments import checkpoint, loop, record, train
from xattn.experiments.launch import launch
from xattn.experiments.schema import EvalConfig, OptimConfig, RunConfig, TrackingConfig, TrainerConfig

FLAGS = dict(num_tokens=256, max_seq_len=16, dim=16, depth=2, heads=2, rotary_pos_emb=True, tie_embedding=True, use_rmsnorm=True)
# Float additions in another order; Muon rounds its updates to bf16, where the last bit is 2**-8 of them.
TOLERANCE = {"adamw": 2e-5, "muon": 1e-3}


def config(*, optim: str = "adamw", **trainer) -> RunConfig:
    settings = dict(steps=6, seq_len=16, batch_size=8, micro_batch=2, log_every=1, memory=False, threads=1) | trainer
    return RunConfig(
        model=dict(FLAGS),
        optim=OptimConfig(name=optim, lr=1e-2),
        trainer=TrainerConfig(**{"device": "cpu"} | settings),
        tracking=TrackingConfig(mode="disabled"),
        eval=EvalConfig(tokens=256, length_factors=[1], every=4),
    )


def rows(run_dir: Path, key: str) -> list[float]:
    return [row[key] for row in record.read_metrics(run_dir) if key in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With each optimiser, the single process that several must equal."""
    found = {}
    for optim in TOLERANCE:
        found[optim] = tmp_path_factory.mktemp(optim)
        assert launch(replace(config(optim=optim, ema_decay=0.5), isolate=False), found[optim])["status"] == "completed"
    return found


def stop_after(step: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have one rank of every worker be asked to stop in this step, until SPARE is set."""
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'xattn.experiments.worker' in sys.orig_argv and os.environ.get('RANK') == '1' and not os.environ.get('SPARE'):\n"
        "    from xattn.experiments import loop\n"
        "    step = loop.Trainer._step\n"
        "    def asked(self, number):\n"
        f"        if number == {step - 1}: os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return step(self, number)\n"
        "    loop.Trainer._step = asked\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")


@pytest.mark.parametrize(("strategy", "optim"), [("ddp", "muon"), ("fsdp", "adamw")])
def test_two_ranks_stop_and_one_resumes_with_the_losses_of_one_process(
    alone: dict[str, Path], tmp_path: Path, monkeypatch, strategy: str, optim: str
) -> None:
    run_dir, near = tmp_path / "run", TOLERANCE[optim]
    stop_after(4, tmp_path, monkeypatch)
    two = config(optim=optim, ema_decay=0.5, strategy=strategy, processes=2)
    assert launch(two, run_dir)["status"] == "interrupted", (run_dir / "worker.log").read_text()
    assert rows(run_dir, "train/loss") == pytest.approx(rows(alone[optim], "train/loss")[:4], rel=near)
    assert f"2 processes {strategy}" in (run_dir / "worker.log").read_text()
    kept = checkpoint.newest_checkpoint(run_dir)
    assert (kept.name, (kept / "shards" / ".metadata").exists()) == ("step-00000004", True)
    assert len(list((kept / "shards").glob("*.distcp"))) == 2, "one rank wrote everything"
    result = launch(replace(config(optim=optim, ema_decay=0.5), isolate=False), run_dir)
    assert result["status"] == "completed"
    whole = record.read_result(alone[optim])
    for key in ("train/loss", "train/grad_norm", "val/loss_nats", "val/raw_loss_nats"):
        assert rows(run_dir, key) == pytest.approx(rows(alone[optim], key), rel=near), key
    assert result["val"]["loss_nats"] == pytest.approx(whole["val"]["loss_nats"], rel=near)
    assert result["data"] == whole["data"]


def test_shards_finish_a_run_that_one_process_began(alone: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    step = loop.Trainer._step

    def fatal(self, number: int):
        if number == 4:
            raise RuntimeError("lost")
        return step(self, number)

    monkeypatch.setattr(loop.Trainer, "_step", fatal)
    one = replace(config(optim="muon", ema_decay=0.5, save_every=3), isolate=False)
    assert launch(one, tmp_path)["status"] == "failed"
    monkeypatch.undo()
    result = launch(config(optim="muon", ema_decay=0.5, strategy="fsdp", processes=2), tmp_path)
    assert result["status"] == "completed", (tmp_path / "worker.log").read_text()
    assert (result["strategy"], result["processes"]) == ("fsdp", 2)
    assert rows(tmp_path, "train/loss") == pytest.approx(rows(alone["muon"], "train/loss"), rel=TOLERANCE["muon"])
    assert xattn.load(tmp_path / "model").state_dict().keys() == xattn.load(alone["muon"] / "model").state_dict().keys()


def test_ranks_work_inside_a_sweep(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = ["trainer.steps=2", "trainer.threads=1", "trainer.device=cpu", "trainer.processes=2"]
    options = ["+debug=fast", *trainer, "run_dir=sweep"]
    monkeypatch.setattr(sys, "argv", ["xattn-train", "-m", *options, "trainer.strategy=none,fsdp"])
    with pytest.raises(SystemExit) as exit_:
        train.main()
    results = [record.read_result(tmp_path / "sweep" / str(i)) for i in range(2)]
    assert exit_.value.code == 1 and [r["status"] for r in results] == ["invalid", "completed"]
    assert "trainer.strategy is none" in results[0]["error"] and results[1]["strategy"] == "fsdp"


def test_a_strangers_shards_run_no_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "attacked",))

    shards = tmp_path / "checkpoints" / "step-00000001" / "shards"
    shards.mkdir(parents=True)
    record.write_json(shards.parent / "state.json", {"step": 1})
    (shards / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(xattn.CheckpointError, match="not a readable checkpoint"):
        checkpoint.load_checkpoint(shards.parent, attn_backend="auto")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("trainer", "named"),
    [
        (dict(processes=2), "trainer.strategy is none"),
        (dict(processes=3, strategy="ddp"), r"use trainer.processes in \(1, 2, 4, 8\)"),
        (dict(processes=2, strategy="ddp", micro_batch=3), r"use trainer.micro_batch in \(1, 2, 4\)"),
        (dict(processes=2, strategy="fsdp", compile=True), "trainer.compile"),
        (dict(strategy="deepspeed"), "none, ddp, fsdp"),
    ],
)
def test_processes_that_cannot_be_are_refused(trainer: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config(**trainer).check()


def test_several_processes_need_isolation() -> None:
    with pytest.raises(ConfigError, match="isolate=true"):
        replace(config(strategy="ddp", processes=2), isolate=False).check()


def test_a_device_that_is_not_there_is_an_invalid_run_and_not_a_hang(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    result = launch(config(strategy="ddp", processes=2, device="cuda"), tmp_path)
    assert result["status"] == "invalid" and "trainer.device=cuda" in result["error"]
