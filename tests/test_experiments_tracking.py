"""Tracking: W&B and TensorBoard mirror the record whole and without secrets, and no failure of theirs touches a run."""

import http.server
import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from xattn import ConfigError
from xattn.experiments import record, tracking, train
from xattn.experiments.schema import TrackingConfig
from xattn.experiments.tracking import Mirror, wandb_mode

# Forty characters, as long as a real key: wandb looks at the length.
PLANTED = {"WANDB_API_KEY": "5ecret" * 6 + "wandb", "HF_TOKEN": "hf_pLaNtEdHuggingFace", "DB_PASSWORD": "pLaNtEd-pa55word"}
BOUND_SECONDS = 60


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))


def mirror(run_dir: Path, mode: str = "disabled", **more: Any) -> Mirror:
    settings = TrackingConfig(mode=mode, group="study", tags=["small"], **more)
    return Mirror(run_dir, settings, name="dense", job_type="train", config={"model": {"dim": 16}, "params": 9})


def in_a_process(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code with this module at hand as `t`: wandb keeps threads and handlers that outlive a run."""
    head = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_experiments_tracking as t\n"
    command = [sys.executable, "-c", head + code, str(Path(__file__).parent), *args]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=BOUND_SECONDS)


def wandb_records(run_dir: Path) -> list:
    """Every record of an offline run's file: 7 bytes of header, then blocks of 32 KiB holding framed protobufs."""
    from wandb.proto import wandb_internal_pb2

    (path,) = run_dir.glob("wandb/*run-*/run-*.wandb")
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


def wandb_history(run_dir: Path) -> list[dict]:
    rows = [items(r.history.item) for r in wandb_records(run_dir) if r.HasField("history")]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def tensorboard_scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """tag -> step -> value, as TensorBoard's own reader sees them; a step that is there twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all(len(dict(points)) == len(points) for points in found.values()), "a step was kept twice"
    return {tag: dict(points) for tag, points in found.items()}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from its command line with every mirror on, in an environment of secrets, one of which was typed into it."""
    folder = tmp_path_factory.mktemp("tracked")
    options = [
        "+debug=fast", "run_dir=run", "name=tiny", "trainer.threads=1", "tracking.mode=offline", "tracking.group=study",
        "tracking.tags=[small,first]", "tracking.tensorboard=true", "tracking.log_model=true", "eval.every=5",
        f"tracking.notes='pass {PLANTED['DB_PASSWORD']}'",
    ]  # fmt: skip
    command = [sys.executable, "-c", "from xattn.experiments.train import main; main()", *options]
    environment = os.environ | PLANTED | {"HOME": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("WANDB_MODE", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_an_offline_wandb_run_reads_back_with_config_group_history_and_summary(tracked: Path) -> None:
    (run,) = [r.run for r in wandb_records(tracked) if r.HasField("run")]
    assert (run.run_group, run.job_type, run.display_name, list(run.tags)) == ("study", "train", "tiny", ["small", "first"])
    config = items(run.config.update)
    result = record.read_result(tracked)
    assert config["model"] == result["flags"]["given"] and config["params"] == result["params"]
    assert {"data", "optim", "schedule", "trainer", "eval", "seed", "backends"} <= config.keys()
    rows = [row for row in record.read_metrics(tracked) if "samples" not in row]
    assert len(rows) == 11 and wandb_history(tracked) == [{k: v for k, v in row.items() if v is not None} for row in rows]
    summary = {}
    for r in wandb_records(tracked):
        if r.HasField("summary"):
            summary |= items(r.summary.update)
    assert summary["final/bpb"] == result["val"]["bpb"] and summary["params"] == result["params"]
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in wandb_records(tracked) if r.HasField("metric")}
    assert metrics["train/*"].step_metric == "tokens" and metrics["val/ppl"].summary.min


def test_the_finished_model_is_a_wandb_artifact_where_asked(tracked: Path) -> None:
    artifacts = [r.request.log_artifact.artifact for r in wandb_records(tracked) if r.request.HasField("log_artifact")]
    artifacts += [r.artifact for r in wandb_records(tracked) if r.HasField("artifact")]
    (artifact,) = artifacts
    assert artifact.type == "model" and list(artifact.aliases) == ["latest"]
    assert {entry.path for entry in artifact.manifest.contents} == {path.name for path in (tracked / "model").iterdir()}


def test_tensorboard_holds_every_number_of_the_record(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars, result = tensorboard_scalars(tracked), record.read_result(tracked)
    rows = record.read_metrics(tracked)
    for tag in ("train/loss", "train/lr", "val/bpb"):
        assert scalars[tag] == pytest.approx({row["step"]: row[tag] for row in rows if tag in row}), tag
    assert len(scalars["train/loss"]) == 10 and set(scalars["val/bpb"]) == {5, 10}
    assert scalars["final/ppl"] == pytest.approx({10: result["val"]["ppl"]})
    events = EventAccumulator(str(tracked / "tensorboard"))
    events.Reload()
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text)["model"] == result["flags"]["given"]
    assert events.SummaryMetadata("_hparams_/session_start_info")


def test_no_secret_of_the_environment_is_in_any_byte_of_the_run_directory(tracked: Path) -> None:
    files = [path for path in tracked.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "result.json", "worker.log"} <= {path.name for path in files}
    assert {".wandb", ".log"} <= {path.suffix for path in files} and any("tfevents" in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        for name, secret in PLANTED.items():
            assert secret.encode() not in content, f"{name} is in {path.relative_to(tracked)}"
    # The one that was typed did travel everywhere, under its name.
    assert yaml.safe_load((tracked / "config.yaml").read_text())["tracking"]["notes"] == "pass <DB_PASSWORD>"
    (run,) = [r.run for r in wandb_records(tracked) if r.HasField("run")]
    assert run.notes == "pass <DB_PASSWORD>"


def test_tensorboard_of_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    metrics = record.MetricsFile(tmp_path)
    first = mirror(tmp_path, tensorboard=True)
    for step in range(1, 9):
        metrics.write({"step": step})
        first.log({"step": step, "train/loss": 1.0 * step})
    metrics.close()
    # Killed after step 8; the newest checkpoint is of step 5.
    record.MetricsFile(tmp_path, keep_until_step=5).close()
    second = mirror(tmp_path, tensorboard=True)
    for step in range(6, 11):
        second.log({"step": step, "train/loss": 10.0 * step})
    second.finish()
    expected = {step: 1.0 * step for step in range(1, 6)} | {step: 10.0 * step for step in range(6, 11)}
    assert tensorboard_scalars(tmp_path)["train/loss"] == expected
    first.finish()


def test_tensorboard_without_its_package_is_refused_before_any_work(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(sys, "argv", ["xattn-train", "+debug=fast", "tracking.tensorboard=true"])
    with pytest.raises(SystemExit) as exit_:
        train.main()
    assert exit_.value.code == 2 and "pip install tensorboard" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        mirror(tmp_path, tensorboard=True)


def test_flags_of_a_mirror_that_is_off_are_refused() -> None:
    with pytest.raises(ConfigError, match="log_model"):
        TrackingConfig(mode="disabled", log_model=True).check()
    with pytest.raises(ConfigError, match="tracking.timeout=0"):
        TrackingConfig(timeout=0).check()


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


def test_a_mirror_that_fails_is_given_up_and_said_once_and_the_other_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    class Dying:
        calls = 0

        def log(self, _row):
            Dying.calls += 1
            raise BrokenPipeError("gone")

    monkeypatch.setattr(tracking, "_start", lambda *_, **__: Dying())
    dying = mirror(tmp_path, "online", tensorboard=True)
    for step in range(10):
        dying.log({"step": step, "a": 1.0})
    dying.finish()
    assert Dying.calls == 3
    assert capsys.readouterr().out.count("given up") == 1
    assert len(tensorboard_scalars(tmp_path)["a"]) == 10


def test_disabled_tracking_never_imports_wandb_or_tensorboard(tmp_path: Path) -> None:
    code = (
        "m = t.mirror(Path(sys.argv[2])); m.log({'a': 1}); m.finish()\n"
        "sys.exit('wandb' in sys.modules or 'tensorboard' in sys.modules)"
    )
    assert in_a_process(code, str(tmp_path)).returncode == 0
    assert list(tmp_path.iterdir()) == []


class Server:
    """As much of a W&B server as a run needs, on the loopback: it answers until it is told to die, then never again."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.dead = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.asked.append(self.path)
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if server.dead.is_set():
                    # wandb's own telemetry alone gets an answer: at exit it would wait ten seconds for one.
                    time.sleep(0 if self.path.startswith("/sdk/otel") else 2 * BOUND_SECONDS)
                    return self.send_error(404)
                project = {"id": "1", "name": "xattn", "entity": {"id": "1", "name": "me"}}
                bucket = {"id": "1", "name": "abc", "displayName": "x", "historyLineCount": 0, "project": project}
                answer = {"data": {"model": {"bucket": None}, "upsertBucket": {"bucket": bucket, "inserted": True}}}
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads, self.http.block_on_close = True, False
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.http.server_port}", "WANDB_API_KEY": "k" * 40}


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_a_server_that_dies_in_the_middle_neither_stops_nor_hangs_a_run(tmp_path: Path, server: Server) -> None:
    code = (
        "import time\n"
        "m = t.mirror(Path(sys.argv[2]), 'online', timeout=3.0)\n"
        "m.log({'step': 1, 'train/loss': 1.0}); print('started', flush=True); sys.stdin.readline()\n"
        "for step in (2, 3): m.log({'step': step, 'train/loss': 1.0})\n"
        "began = time.perf_counter(); m.finish(); print('took', time.perf_counter() - began, flush=True)\n"
    )
    head = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_experiments_tracking as t\n"
    command = [sys.executable, "-c", head + code, str(Path(__file__).parent), str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, env=os.environ | server.environment, **pipes) as process:
        for line in iter(process.stdout.readline, "started\n"):
            assert line, "the run ended before it started"
        assert "/graphql" in server.asked, "the run never was online"
        server.dead.set()
        said, _ = process.communicate("go on\n", timeout=BOUND_SECONDS)
    assert process.returncode == 0, said
    assert float(said.split("took ")[1].split()[0]) < 10
    assert [row["step"] for row in wandb_history(tmp_path)] == [1, 2, 3], "the rows are on disk, for wandb sync"


@pytest.mark.parametrize("how", ["mute", "closed"])
def test_a_server_that_cannot_be_had_leaves_an_offline_run(tmp_path: Path, server: Server, how: str) -> None:
    if how == "mute":
        server.dead.set()
    else:
        server.http.shutdown()
        server.http.server_close()
    code = "m = t.mirror(Path(sys.argv[2]), 'auto', timeout=2.0); m.log({'step': 1, 'train/loss': 1.0}); m.finish()"
    done = in_a_process(code, str(tmp_path), **server.environment)
    assert done.returncode == 0, done.stderr
    assert "warning: W&B (online) did not start" in done.stdout
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1
