"""Jobs elsewhere: ranks inside a study, sweeps by submitit, and schedulers that stop a job and queue it again."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xattn import ConfigError
from xattn.experiments import compare, launch, record, train
from xattn.experiments.schema import RunConfig

TINY = [
    "tracking.mode=disabled", "model.dim=16", "model.depth=1", "model.heads=2", "trainer.steps=4", "trainer.seq_len=16",
    "trainer.batch_size=4", "trainer.threads=1", "trainer.device=cpu", "trainer.log_every=1", "trainer.memory=false",
    "trainer.samples=0", "eval.tokens=64", "eval.length_factors=[1]",
]  # fmt: skip


def command(monkeypatch: pytest.MonkeyPatch, entry, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    with pytest.raises(SystemExit) as exit_:
        entry()
    return exit_.value.code


def test_a_study_on_two_ranks_gives_the_study_of_one_process(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = [*TINY, "variants={dense: {}}", "variants.window.sliding_window=4", "plots=false"]
    assert command(monkeypatch, compare.main, *study, "isolate=false", "dir=alone") == 0
    ranks = ["trainer.strategy=ddp", "trainer.processes=2"]
    curve = ["memory_curve.kinds=[infer]", "memory_curve.length_factors=[1,2]"]
    assert command(monkeypatch, compare.main, *study, *ranks, *curve, "dir=together") == 0
    for name in ("dense-seed0", "window-seed0"):
        together, alone = (record.read_result(tmp_path / folder / name) for folder in ("together", "alone"))
        assert (together["strategy"], together["processes"], alone["processes"]) == ("ddp", 2, 1)
        assert together["val"]["loss_nats"] == pytest.approx(alone["val"]["loss_nats"], rel=2e-5)
        assert together["data"] == alone["data"]
    report = (tmp_path / "together" / "report.md").read_text()
    assert "| baseline |" in report and "| yes |" in report
    assert "Peak of one evaluation" in report and "Peak of a training step" not in report
    lines = (tmp_path / "together" / "memory_curve.csv").read_text().splitlines()[1:]
    kept = [tuple(line.split(",")[:3]) for line in lines]
    assert kept == [(name, "infer", length) for name in ("dense", "window") for length in ("16", "32")]
    assert all(int(line.split(",")[3]) > 0 for line in lines)


def test_a_stop_while_memory_is_measured_is_an_interrupted_run(tmp_path: Path, monkeypatch) -> None:
    def stopped_meanwhile(arguments: list[str], environment: dict[str, str] | None) -> tuple[int, tuple[str, str]]:
        launch._stopped.set()
        return -15, (record.KILLED, "killed by SIGTERM")

    monkeypatch.setattr(launch, "probe", stopped_meanwhile)
    try:
        result = launch.launch(RunConfig(model=dict(num_tokens=256, max_seq_len=256, dim=16, depth=1, heads=2)), tmp_path)
    finally:
        launch._stopped.clear()
    assert result["status"] == "interrupted" and not (tmp_path / record.MEMORY).exists()


def test_submitit_trains_a_sweep_whose_exit_status_tells_how_it_went(tmp_path: Path, monkeypatch, capfd) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.chdir(tmp_path)
    sweep = ["-m", "hydra/launcher=submitit_local", *TINY, "isolate=false", "run_dir=sweep"]
    assert command(monkeypatch, train.main, *sweep, "trainer.micro_batch=2,3") == 1
    results = [record.read_result(tmp_path / "sweep" / number) for number in "01"]
    assert [result["status"] for result in results] == ["completed", "invalid"]
    assert "trainer.micro_batch in (1, 2, 4)" in results[1]["error"]
    assert "1 of 2 runs completed" in capfd.readouterr().out


@pytest.mark.parametrize("run_dir", [[], ["run_dir=runs/${now:%H-%M}"]])
def test_a_job_that_may_be_queued_again_needs_a_directory_that_stays(monkeypatch, run_dir: list[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="run_dir=runs/NAME"):
        train._elsewhere(["-m", "hydra/launcher=submitit_slurm", *run_dir])
    assert train._elsewhere(["hydra/launcher=submitit_slurm"]) is None and train._elsewhere(["-m", "seed=0,1"]) is None


def test_a_launcher_that_is_not_installed_names_the_extra(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'xattn\[sweep\]'"):
        train._elsewhere(["-m", "hydra/launcher=submitit_slurm", "run_dir=runs/x"])


# A process that, as one of submitit's, puts itself back into the queue when SIGUSR2 comes.
JOB = """
import os, signal, sys
from pathlib import Path
from xattn.experiments import record
from xattn.experiments.launch import launch
from xattn.experiments.schema import EvalConfig, RunConfig, TrackingConfig, TrainerConfig

run_dir, strategy = Path(sys.argv[1]), sys.argv[2]

def queue_again(number, frame):
    print("queued again:", record.read_result(run_dir)["status"])
    sys.exit(7)

signal.signal(signal.SIGUSR2, queue_again)
os.environ["JOB_PID"] = str(os.getpid())
trainer = dict(steps=5, seq_len=16, batch_size=2, memory=False, threads=1, device="cpu", samples=0)
ranks = {} if strategy == "none" else dict(strategy=strategy, processes=2)
config = RunConfig(
    model=dict(num_tokens=256, max_seq_len=16, dim=16, depth=1, heads=2),
    trainer=TrainerConfig(**trainer, **ranks),
    tracking=TrackingConfig(mode="disabled"),
    eval=EvalConfig(tokens=64, length_factors=[1]),
)
print(launch(config, run_dir)["status"])
"""
# In step 3 the scheduler signals every process of the job: the one above, torch's launcher if there is one, every rank.
SCHEDULER = """
import os, signal, sys
if 'xattn.experiments.worker' in sys.orig_argv and not os.environ.get('SPARE'):
    from xattn.experiments import loop
    step = loop.Trainer._step
    def signalled(self, number):
        if number == 2:
            for pid in {os.getpid(), os.getppid(), int(os.environ['JOB_PID'])}: os.kill(pid, signal.SIGUSR2)
            signal.sigtimedwait([], 1)
        return step(self, number)
    loop.Trainer._step = signalled
"""


@pytest.mark.parametrize("strategy", ["none", "ddp"])
def test_a_job_is_queued_again_once_its_worker_has_saved(tmp_path: Path, monkeypatch, strategy: str) -> None:
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "sitecustomize.py").write_text(SCHEDULER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    job = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "run"), strategy]
    first = subprocess.run(job, capture_output=True, text=True)
    assert (first.returncode, first.stdout.splitlines()[-1]) == (7, "queued again: interrupted"), first.stdout + first.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    monkeypatch.setenv("SPARE", "1")
    second = subprocess.run(job, capture_output=True, text=True)
    assert second.stdout.splitlines()[-1] == "completed" and "resuming from step" in second.stdout
