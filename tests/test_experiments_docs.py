"""Promise of docs/experiments.md: its commands run as they stand, its files are what they need, its fields are all there."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from xattn.experiments import compare, compose, evaluate, record, train

PAGE = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
FILES = re.findall(r"^`(\S+)`:\n```\w+\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [shlex.split(line, comments=True) for line in LINES if line.startswith("xattn-")]
ENTRIES = {"xattn-train": train.main, "xattn-compare": compare.main, "xattn-eval": evaluate.main}

_EVAL = ["eval.tokens=64", "eval.length_factors=[1]"]
# The toy size: put behind each command, so that it is the last word.
TINY = [
    "isolate=false", "tracking.mode=disabled", "model.dim=16", "model.heads=2", "trainer.steps=2", "trainer.seq_len=32",
    "trainer.batch_size=2", "trainer.threads=1", "trainer.memory=false", "trainer.device=cpu", *_EVAL,
]  # fmt: skip


def toy(name: str, argv: list[str]) -> list[str]:
    """What the test adds to a command; resuming, showing and reporting take nothing."""
    if any(arg.startswith(("resume=", "runs=", "--cfg")) for arg in argv):
        return []
    if name == "xattn-eval":
        return _EVAL
    # The shipped windows and extensions are for longer sequences, and pictures of 24 rows take their time.
    extra = ["plots=false", "extended=[]"] if name == "xattn-compare" else []
    return [*TINY, *(["data.cache=cache"] if "data.tokenizer=bpe" in argv else []), *extra]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The page read from top to bottom in an empty directory: where it was, and each command's exit status."""
    folder, statuses = tmp_path_factory.mktemp("page"), {}
    for path, text in FILES:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, *argv in COMMANDS:
            # Without a cluster: the jobs that SLURM would get run here.
            here = [arg for arg in argv if not arg.startswith(("hydra/launcher=", "hydra.launcher."))]
            patch.setattr(sys, "argv", [name, *here, *toy(name, argv)])
            try:
                ENTRIES[name]()
            except SystemExit as exit_:
                statuses[shlex.join([name, *argv])] = exit_.code
    return folder, statuses


@pytest.mark.parametrize("command", [shlex.join(command) for command in COMMANDS])
def test_a_command_of_the_page_runs(ran: tuple[Path, dict[str, int]], command: str) -> None:
    assert ran[1][command] in (0, None)


README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SHOWN = [shlex.split(line, comments=True) for line in README.splitlines() if line.startswith("xattn-")]


@pytest.mark.parametrize("command", [shlex.join(command) for command in SHOWN])
def test_a_command_of_the_readme_composes(tmp_path: Path, monkeypatch, command: str) -> None:
    """Not run: this page's commands are, and they are the same kinds."""
    name, *argv = shlex.split(command)
    if argv[0].startswith("resume="):
        return  # Hydra never sees it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    argv = compare.arguments(argv) if name == "xattn-compare" else argv
    argv = [arg for arg in argv if arg not in ("--cfg", "job")]
    seen = []
    compose.hydra_main(lambda cfg: seen.append(compose.resolve(cfg)), name.removeprefix("xattn-"), argv)
    jobs = [compare.plan(config, tmp_path) for config in seen if name == "xattn-compare" and config.variants]
    assert len(seen) == (6 if "-m" in argv else 1) and (not jobs or len(jobs[0]) == 36)


def test_the_readme_shows_every_command() -> None:
    assert {command[0] for command in SHOWN} == set(ENTRIES)


def test_the_page_shows_each_command_and_nothing_that_is_not_run() -> None:
    assert {command[0] for command in COMMANDS} == set(ENTRIES) and len(COMMANDS) >= 12
    others = {line.split()[0] for line in LINES if line.strip() and not line.startswith("xattn-")}
    assert others <= {"tensorboard", "wandb", "sbatch"}
    assert {path.split("/")[1] for path, _ in FILES} == {"experiment", "sweep", "data", "notes.jsonl"}


def test_a_new_experiment_sweep_and_data_set_do_what_the_page_says(ran: tuple[Path, dict[str, int]]) -> None:
    (experiment,) = (ran[0] / "runs" / "short_sight").glob("*/result.json")
    flags = json.loads(experiment.read_text())["flags"]
    assert flags["given"]["sliding_window"] == [8, 8, None] and flags["given"]["depth"] == 3
    assert "How short may a window be?" in (ran[0] / "runs" / "windows" / "report.html").read_text()
    variants = {"dense", "window_16", "window_4"}
    studied = {f"{variant}-seed{seed}" for variant in variants for seed in (0, 1)}
    assert studied <= {path.name for path in (ran[0] / "runs" / "windows").iterdir()}
    data = {name: record.read_result(ran[0] / "runs" / name)["data"] for name in ("notes", "bpe")}
    assert (data["notes"]["corpus"], data["notes"]["tokenizer"]) == ("mine/notes.jsonl", "bytes")
    assert (data["bpe"]["corpus"], data["bpe"]["tokenizer"]) == ("mine/*.jsonl", "bpe 300")


def test_every_field_of_a_result_is_explained(ran: tuple[Path, dict[str, int]]) -> None:
    result = record.read_result(ran[0] / "runs" / "first")
    table = PAGE.split("| field of result.json |")[1].split("\n\n")[0]
    explained = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert explained == set(result)


def test_every_field_of_memory_is_explained() -> None:
    from xattn.experiments import memory

    section = PAGE.split("### What counts as memory")[1].split("\n## ")[0]
    written = set(re.findall(r"\"(\w+_(?:bytes|method|error|per_token))\"", Path(memory.__file__).read_text()))
    written |= {f"{kind}_{what}" for kind in memory.KINDS for what in ("peak_bytes", "method", "error")}
    assert {"state_bytes", "train_peak_bytes"} <= written
    assert {name for name in written if f"`{name}`" not in section} == set()
