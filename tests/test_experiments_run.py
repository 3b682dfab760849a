"""A run: it learns, repeats, resumes bit for bit, and leaves a result whatever happens to it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import xattn
from xattn import ConfigError
from xattn.experiments import checkpoint, loop, outcome, record, train
from xattn.experiments.launch import launch
from xattn.experiments.schema import EvalConfig, OptimConfig, RunConfig, TrackingConfig, TrainerConfig
from xattn.experiments.worker import run

FLAGS = dict(num_tokens=256, max_seq_len=16, dim=16, depth=2, heads=2, rotary_pos_emb=True)


def tiny(**trainer) -> RunConfig:
    settings = dict(steps=12, seq_len=16, batch_size=4, log_every=1, memory=False, threads=1) | trainer
    return RunConfig(
        isolate=False,
        model=dict(FLAGS),
        optim=OptimConfig(lr=1e-2),
        trainer=TrainerConfig(**settings),
        tracking=TrackingConfig(mode="disabled"),
        eval=EvalConfig(tokens=256, length_factors=[1, 2]),
    )


def losses(run_dir: Path) -> list[float]:
    return [row["train/loss"] for row in record.read_metrics(run_dir) if "train/loss" in row]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return xattn.load(run_dir / "model").state_dict()


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to compare others with."""
    run_dir = tmp_path_factory.mktemp("unbroken")
    assert launch(tiny(), run_dir)["status"] == "completed"
    return run_dir


def test_a_run_leaves_everything_the_record_promises(unbroken: Path) -> None:
    result = json.loads((unbroken / "result.json").read_text())
    model = xattn.build(FLAGS)
    assert result["status"] == "completed"
    assert result["flags"]["given"] == FLAGS
    assert xattn.parse(result["flags"]["resolved"]) == model.spec
    assert [row["backend"] for row in result["backends"]] == [row["backend"] for row in model.backends()]
    assert result["params"] == xattn.accounting.count_params(model.spec)
    assert result["tokens"] == 12 * 4 * 16
    assert set(result["val"]) == {"loss_nats", "ppl", "bpb", "tokens"}
    assert set(result["val_by_length"]["none"]) == set(result["val_by_position"]["none"]) == {"16", "32"}
    assert result["memory"]["kv_bytes_per_token"] == xattn.accounting.kv_bytes(model.spec, 16) / 16
    assert result["tokens_per_second"] > 0 and result["seed"] == 0
    assert {"commit", "dirty", "versions"} <= set(result)
    assert {path.name for path in unbroken.iterdir()} == {
        "config.yaml", "metrics.jsonl", "result.json", "explain.txt", "model", "samples.txt",
    }  # fmt: skip


def test_training_learns(tmp_path: Path) -> None:
    launch(tiny(steps=60), tmp_path)
    curve = losses(tmp_path)
    assert curve[0] == pytest.approx(5.55, abs=0.2), "the first loss is that of a uniform guess over 256 bytes"
    assert curve[-1] < curve[0] - 1.5


def test_the_same_seed_repeats_bit_for_bit_and_another_does_not(unbroken: Path, tmp_path: Path) -> None:
    launch(tiny(), tmp_path / "same")
    launch(replace(tiny(), seed=1), tmp_path / "other")
    assert losses(tmp_path / "same") == losses(unbroken) != losses(tmp_path / "other")
    assert same_weights(tmp_path / "same", unbroken)


def test_accumulation_gives_the_same_step(unbroken: Path, tmp_path: Path) -> None:
    launch(tiny(micro_batch=1), tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(unbroken), rel=1e-4)


def test_variants_of_equal_parameters_start_equal_and_see_equal_data(unbroken: Path, tmp_path: Path) -> None:
    config = tiny()
    config.model["sliding_window"] = 4
    launch(config, tmp_path)
    window, dense = record.read_result(tmp_path), record.read_result(unbroken)
    assert window["data"]["tokens_seen_digest"] == dense["data"]["tokens_seen_digest"]
    assert losses(tmp_path)[0] == pytest.approx(losses(unbroken)[0], rel=1e-3)
    assert losses(tmp_path)[-1] != losses(unbroken)[-1]


def test_a_run_stopped_while_it_is_judged_keeps_its_training(unbroken: Path, tmp_path: Path, monkeypatch) -> None:
    judge = outcome.judge_all

    def stopped(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return judge(*args, **options)

    monkeypatch.setattr(outcome, "judge_all", stopped)
    assert launch(tiny(), tmp_path)["status"] == "interrupted"
    monkeypatch.undo()
    monkeypatch.setattr(loop.Trainer, "_step", None)
    result = launch(tiny(), tmp_path)
    assert result["status"] == "completed" and result["tokens_per_second"] > 0
    assert losses(tmp_path) == losses(unbroken) and same_weights(tmp_path, unbroken)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(tmp_path: Path, monkeypatch, dropout: float) -> None:
    config = tiny()
    config.model["ff_dropout"] = dropout
    launch(config, tmp_path / "unbroken")
    step = loop.Trainer._step

    def interrupted(self, number: int):
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    monkeypatch.setattr(loop.Trainer, "_step", interrupted)
    first = launch(config, tmp_path / "broken")
    assert (first["status"], signal.getsignal(signal.SIGTERM)) == ("interrupted", signal.SIG_DFL)
    assert len(losses(tmp_path / "broken")) == 7
    monkeypatch.undo()
    assert launch(config, tmp_path / "broken")["status"] == "completed"
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    assert same_weights(tmp_path / "broken", tmp_path / "unbroken")
    results = [record.read_result(tmp_path / name) for name in ("broken", "unbroken")]
    assert results[0]["val"] == results[1]["val"] and results[0]["data"] == results[1]["data"]


def test_a_killed_worker_is_recorded_and_resumes_bit_for_bit(unbroken: Path, tmp_path: Path, monkeypatch) -> None:
    config = replace(tiny(steps=12, save_every=5), isolate=True)
    # The worker kills itself after step 8, between two checkpoints.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'xattn.experiments.worker' in sys.orig_argv and not os.environ.get('SPARE'):\n"
        "    from xattn.experiments import loop\n"
        "    step = loop.Trainer._step\n"
        "    def fatal(self, number):\n"
        "        if number == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return step(self, number)\n"
        "    loop.Trainer._step = fatal\n"
    )
    run_dir = tmp_path / "run"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert launch(config, run_dir)["status"] == "killed"
    assert "SIGKILL" in record.read_result(run_dir)["error"]
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000005"]
    monkeypatch.setenv("SPARE", "1")
    assert launch(config, run_dir)["status"] == "completed"
    assert "resuming from step 5" in (run_dir / "worker.log").read_text()
    assert losses(run_dir) == losses(unbroken)
    assert same_weights(run_dir, unbroken)


def test_a_half_written_checkpoint_is_never_taken(tmp_path: Path, monkeypatch) -> None:
    model = xattn.build(FLAGS)
    optimiser = torch.optim.AdamW(model.parameters())

    def save(step: int) -> bool:
        return checkpoint.save_checkpoint(tmp_path, model, optimiser, checkpoint.Progress(step=step), keep=2)

    assert save(1) and save(2)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert not save(3)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save(4)
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-00000002"
    assert checkpoint.load_checkpoint(checkpoint.newest_checkpoint(tmp_path), attn_backend="auto")[2].step == 2
    monkeypatch.undo()
    assert save(5)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000002", "step-00000005"]


WRITER = """
import os, resource, signal, sys
from pathlib import Path
import torch, xattn
from xattn.experiments import checkpoint
model = xattn.build(num_tokens=64, max_seq_len=16, dim=64, depth=1, heads=2)
optimiser = torch.optim.AdamW(model.parameters())
def save(step):
    progress = checkpoint.Progress(step=step)
    return checkpoint.save_checkpoint(Path(sys.argv[1]), model, optimiser, progress, keep=2)
assert save(1)
"""
KILLED = """
def half(state, path):
    Path(path).write_bytes(b"half a file")
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
save(2)
"""
FULL = """
# A file may not grow beyond this: safetensors' own writer meets the limit, half way through the weights.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
assert not save(2)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize(("fault", "code", "left"), [(KILLED, -signal.SIGKILL, 1), (FULL, 0, 0)], ids=["killed", "full"])
def test_a_fault_during_a_write_keeps_the_older_checkpoint_and_leaves_nothing(
    tmp_path: Path, fault: str, code: int, left: int
) -> None:
    done = subprocess.run([sys.executable, "-c", WRITER + fault, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    folder = tmp_path / "checkpoints"
    assert len(list(folder.glob(".step-*"))) == left
    kept = checkpoint.newest_checkpoint(tmp_path)
    loaded = checkpoint.load_checkpoint(kept, attn_backend="auto")
    assert (kept.name, loaded.progress.step) == ("step-00000001", 1)
    optimiser = torch.optim.AdamW(loaded.model.parameters())
    assert checkpoint.save_checkpoint(tmp_path, loaded.model, optimiser, checkpoint.Progress(step=3), keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("poisoned", ["loss", "gradient", "weights"])
def test_what_is_not_finite_stops_the_run_at_its_own_step(tmp_path: Path, monkeypatch, poisoned: str) -> None:
    step = loop.Trainer._step

    def poison(self, number: int):
        loss, grad_norm, lr = step(self, number)
        if number == 4 and poisoned == "weights":
            next(self.model.parameters()).data[0] = torch.inf
        elif number == 4:
            loss, grad_norm = (loss * torch.nan, grad_norm) if poisoned == "loss" else (loss, grad_norm * torch.inf)
        return loss, grad_norm, lr

    monkeypatch.setattr(loop.Trainer, "_step", poison)
    # Neither logged nor saved at step 5 but for the last case: what is not looked at must stop the run all the same.
    result = launch(tiny(log_every=10, save_every=5 if poisoned == "weights" else 2), tmp_path)
    assert result["status"] == "failed" and "step 5" in result["error"] and poisoned in result["error"]
    kept = checkpoint.newest_checkpoint(tmp_path)
    assert (kept.name if kept else None) == (None if poisoned == "weights" else "step-00000004")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    config = tiny(save_every=1)
    config.optim = OptimConfig(lr=1e38, grad_clip=None, weight_decay=0.0)
    result = launch(config, tmp_path)
    assert result["status"] == "failed" and "at step" in result["error"]
    kept = checkpoint.newest_checkpoint(tmp_path)
    model = checkpoint.load_checkpoint(kept, attn_backend="auto")[0]
    assert all(p.isfinite().all() for p in model.parameters()), "a diverged model pushed out the last good one"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "oom"),
        (RuntimeError("anything else"), "failed"),
        (ConfigError("flag"), "invalid"),
    ],
)
def test_every_end_is_a_recorded_status(tmp_path: Path, monkeypatch, error: Exception, status: str) -> None:
    def fail(self, number: int):
        raise error

    monkeypatch.setattr(loop.Trainer, "_step", fail)
    assert run(tiny(), tmp_path)["status"] == status
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == status and str(error) in result["error"] and result["flags"]["given"] == FLAGS
    assert (tmp_path / "error.txt").exists() == (status == "failed")


def test_a_directory_of_another_run_is_refused_with_the_difference(unbroken: Path) -> None:
    before = (unbroken / "result.json").read_bytes()
    config = tiny()
    config.model["dim"] = 32
    with pytest.raises(ConfigError, match="model.dim: 16 there, 32 now"):
        launch(config, unbroken)
    assert (unbroken / "result.json").read_bytes() == before


def test_a_finished_run_stands_and_what_changes_no_number_may_change(unbroken: Path) -> None:
    began = time.perf_counter()
    assert launch(tiny(log_every=5), unbroken)["status"] == "completed"
    assert time.perf_counter() - began < 0.5


def test_a_stop_reaches_the_worker_and_no_further_run_is_started(tmp_path: Path) -> None:
    code = "import sys; from xattn.experiments.train import main; sys.argv = ['t', *sys.argv[1:]]; main()"
    options = ["-m", "+debug=fast", "seed=0,1", "run_dir=sweep", "trainer.steps=100000", "trainer.threads=1"]
    sweep = subprocess.Popen(
        [sys.executable, "-c", code, *options], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with sweep:
        said = [line for line in iter(sweep.stdout.readline, "") if not line.startswith("step ") or sweep.terminate()]
    assert sweep.returncode == 75, said
    assert record.read_result(tmp_path / "sweep" / "0")["status"] == "interrupted"
    assert not (tmp_path / "sweep" / "1").exists()


def main(monkeypatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["xattn-train", *argv])
    with pytest.raises(SystemExit) as exit_:
        train.main()
    return exit_.value.code


def test_a_sweep_records_a_job_that_cannot_be_and_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_API_KEY", "tr0ub4dor")
    fast = ["+debug=fast", "isolate=false", "trainer.steps=2", "trainer.threads=1", "run_dir=sweep", "name=tr0ub4dor"]
    assert main(monkeypatch, "-m", *fast, "model.attn_selective=true", "model.sim_head=0,9,1") == 1
    statuses = [record.read_result(tmp_path / "sweep" / str(i))["status"] for i in range(3)]
    assert statuses == ["completed", "invalid", "completed"]
    given = [record.read_result(tmp_path / "sweep" / str(i))["flags"]["given"]["sim_head"] for i in range(3)]
    assert given == [0, 9, 1]
    said = capsys.readouterr().out
    jobs = [line for line in said.splitlines() if line.startswith("[job ")]
    assert len(jobs) == 3 and "[job 1]" in jobs[1] and "model.sim_head=9" in jobs[1]
    assert not any("tr0ub4dor" in line for line in jobs)
    assert said.splitlines()[-1] == "2 of 3 runs completed; compare them: xattn-compare runs=sweep"


def test_resume_takes_a_run_directory_and_nothing_else(unbroken: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert main(monkeypatch, f"resume={tmp_path}") == 2
    assert main(monkeypatch, f"resume={unbroken}", "model.dim=64") == 2
    assert "drop model.dim=64" in capsys.readouterr().err
    assert main(monkeypatch, f"resume={unbroken}") == 0


def test_metrics_survive_a_line_cut_short(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/lo')
    assert record.read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.0}]


def test_a_result_with_a_number_that_is_not_finite_is_still_json(tmp_path: Path) -> None:
    record.write_json(tmp_path / "x.json", {"loss": float("inf"), "rows": [float("nan")]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"loss": "inf", "rows": ["nan"]}
