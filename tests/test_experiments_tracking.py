"""Tracking: W&B mirrors the record offline and whole, and no failure of it touches a run."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from xattn.experiments import tracking
from xattn.experiments.schema import TrackingConfig
from xattn.experiments.tracking import WandbMirror, wandb_mode


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))


def mirror(run_dir: Path, mode: str = "offline") -> WandbMirror:
    settings = TrackingConfig(mode=mode, group="study", tags=["small"])
    return WandbMirror(run_dir, settings, name="dense", job_type="train", config={"model": {"dim": 16}, "params": 9})


def records(path: Path) -> list:
    """Every record of an offline run's file: 7 bytes of header, then blocks of 32 KiB holding framed protobufs."""
    from wandb.proto import wandb_internal_pb2

    data, at, found, part = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = 32_768 - at % 32_768
        _, size, kind = struct.unpack("<IHB", data[at : at + 7]) if left >= 7 else (0, 0, 0)
        if kind == 0:
            at += left
            continue
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return found


def items(update) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}


def test_an_offline_run_reads_back_with_config_group_history_and_summary(tmp_path: Path) -> None:
    # In its own process: wandb keeps threads and handlers that outlive a run.
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_experiments_tracking as t\n"
        "m = t.mirror(Path(sys.argv[1]))\n"
        "for i in range(5): m.log({'step': i, 'tokens': 10 * i, 'train/loss': 2.0 - i})\n"
        "m.summary({'final/ppl': 7.5}); m.finish()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)], check=True, timeout=120)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found = records(file)
    (run,) = [r.run for r in found if r.HasField("run")]
    assert (run.run_group, run.job_type, run.display_name, list(run.tags)) == ("study", "train", "dense", ["small"])
    assert items(run.config.update)["model"] == {"dim": 16} and items(run.config.update)["params"] == 9
    history = [items(r.history.item) for r in found if r.HasField("history")]
    assert [(row["tokens"], row["train/loss"]) for row in history] == [(10 * i, 2.0 - i) for i in range(5)]
    summary = {}
    for r in found:
        if r.HasField("summary"):
            summary |= items(r.summary.update)
    assert summary["final/ppl"] == 7.5
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in found if r.HasField("metric")}
    assert metrics["train/*"].step_metric == "tokens" and metrics["val/ppl"].summary.min


def test_auto_is_online_only_with_a_key(monkeypatch, tmp_path: Path) -> None:
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "disabled"
    assert wandb_mode("offline") == "offline"


def test_a_start_that_fails_falls_back_to_offline_and_then_to_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    tried = []

    def refuse(_dir, _tracking, mode, **_):
        tried.append(mode)
        raise ConnectionError("unreachable")

    monkeypatch.setattr(tracking, "_start", refuse)
    nothing = mirror(tmp_path, "online")
    nothing.log({"a": 1})
    nothing.summary({"a": 1})
    nothing.finish()
    assert tried == ["online", "offline"]
    assert "unreachable" in capsys.readouterr().out


def test_a_server_that_dies_in_the_middle_is_given_up_and_said_once(tmp_path: Path, monkeypatch, capsys) -> None:
    class Dying:
        calls = 0

        def log(self, _row):
            Dying.calls += 1
            raise BrokenPipeError("gone")

    monkeypatch.setattr(tracking, "_start", lambda *_, **__: Dying())
    dying = mirror(tmp_path, "online")
    for _ in range(10):
        dying.log({"a": 1})
    dying.finish()
    assert Dying.calls == 3
    assert capsys.readouterr().out.count("given up") == 1


def test_disabled_tracking_never_imports_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_experiments_tracking as t\n"
        "m = t.mirror(Path(sys.argv[1]), 'disabled'); m.log({'a': 1}); m.finish(); sys.exit('wandb' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)], check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []
