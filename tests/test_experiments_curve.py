"""Memory against length: a curve's numbers are those of processes of their own, and its end is a result with a reason."""

import csv
import io
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

import xattn
from xattn import ConfigError
from xattn.experiments import curve, launch, plots, record
from xattn.experiments.configfile import save_config
from xattn.experiments.curve_report import curve_csv, curve_notes, curve_tables, curves_of
from xattn.experiments.gather import Row, Run
from xattn.experiments.schema import CompareConfig, MemoryCurveConfig, RunConfig, TrainerConfig

MIB = 2**20
FLAGS = dict(num_tokens=256, max_seq_len=64, dim=64, depth=2, heads=4, rotary_pos_emb=True)
TRAINER = TrainerConfig(seq_len=64, threads=1, device="cpu", precision="fp32")
SELECTIVE = dict(attn_selective=True)


def study(folder: Path, flags: dict, **asked) -> tuple[CompareConfig, list[tuple[str, Path]], RunConfig]:
    """The config of a study of one variant, as `measure_curves` takes it, and the run's own."""
    run = RunConfig(name="v", model=FLAGS | flags, trainer=TRAINER)
    (folder / "v").mkdir(exist_ok=True)
    save_config(run, folder / "v" / record.CONFIG)
    config = CompareConfig(model=run.model, trainer=TRAINER, memory_curve=MemoryCurveConfig(**asked))
    return config, [("v", folder / "v")], run


def measured(folder: Path, flags: dict, **asked) -> dict[str, curve.Curve]:
    config, runs, run = study(folder, flags, **asked)
    curve.measure_curves(config, runs, folder)
    return curve.read_curves(folder, run)


def test_ascending_lengths_in_one_process_peak_as_in_processes_of_their_own(tmp_path: Path) -> None:
    together = measured(tmp_path, SELECTIVE, kinds=["train"], length_factors=[16, 1, 4])["train"]
    alone = measured(tmp_path, SELECTIVE, kinds=["train"], length_factors=[16])["train"]
    assert list(together.points) == [64, 256, 1024] and together.end is None and alone.end is None
    # an allocator gives back whole pages of what it gathered: the slack does not grow with the length
    assert together.points[1024] == pytest.approx(alone.points[1024], abs=2 * MIB)
    spec = xattn.parse(FLAGS | SELECTIVE)
    predicted = [xattn.accounting.activation_bytes(spec, batch=1, n=n) for n in (1024, 256)]
    grown = together.points[1024] - together.points[256]
    # what is kept for the backward, and on top of it at most as much again for the length of one operation
    assert 0.9 < grown / (predicted[0] - predicted[1]) < 2.0


def test_a_curve_ends_with_the_length_and_the_reason(tmp_path: Path) -> None:
    full = measured(tmp_path, SELECTIVE, kinds=["train"], length_factors=[1, 32], cpu_limit_gib=0.1)["train"]
    assert list(full.points) == [64]
    assert (full.end["length"], full.end["reason"]) == (2048, curve.OUT_OF_MEMORY)
    assert "0.1 GiB of memory_curve.cpu_limit_gib" in full.end["error"]
    refused = measured(tmp_path, SELECTIVE, kinds=["infer"], length_factors=[1, 512])["infer"]
    assert list(refused.points) == [64]
    assert (refused.end["length"], refused.end["reason"]) == (32768, curve.REFUSED) and "limit" in refused.end["error"]
    late = measured(tmp_path, {}, kinds=["infer"], length_factors=[1, 2], seconds=1e-4)["infer"]
    assert (late.points, late.end["length"], late.end["reason"]) == ({}, 64, curve.TIME_LIMIT)
    assert "memory_curve.seconds" in late.end["error"]


def fake(lines: list[dict], code: int = 0):
    """A probe that writes these lines and ends so, and the arguments of every call."""
    calls: list[list[str]] = []

    def probe(arguments: list[str]) -> tuple[int, tuple[str, str]]:
        calls.append(arguments)
        Path(arguments[2]).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return code, (record.KILLED, "killed (SIGKILL)")

    return probe, calls


HEAD = {"lengths": [64, 128], "method": "made up"}
POINTS = [{"length": 64, "peak_bytes": 3 * MIB}, {"length": 128, "peak_bytes": 5 * MIB}]


def test_what_is_measured_stands_until_something_changes(tmp_path: Path, monkeypatch) -> None:
    probe, calls = fake([HEAD, *POINTS])
    monkeypatch.setattr(curve, "probe", probe)
    for _ in range(2):
        assert measured(tmp_path, {})["train"].points == {64: 3 * MIB, 128: 5 * MIB}
    assert len(calls) == 2, "one for each kind"
    measured(tmp_path, {}, seconds=50.0)
    measured(tmp_path, {"sliding_window": 8})
    assert len(calls) == 6
    assert measured(tmp_path, {}, kinds=["infer"]).keys() == {"train", "infer"} and len(calls) == 6


def test_a_process_that_was_killed_leaves_what_it_measured_and_is_tried_again(tmp_path: Path, monkeypatch) -> None:
    probe, calls = fake([HEAD, POINTS[0]], code=-9)
    monkeypatch.setattr(curve, "probe", probe)
    found = measured(tmp_path, {}, kinds=["train"])["train"]
    assert found.points == {64: 3 * MIB}
    assert found.end == {"length": 128, "reason": curve.DIED, "error": "killed (SIGKILL)"}
    measured(tmp_path, {}, kinds=["train"])
    assert len(calls) == 2


def test_a_failure_inside_the_step_is_a_result_that_stands(tmp_path: Path, monkeypatch) -> None:
    def broken(*args, **options):
        raise RuntimeError("no kernel\nand a trace")

    monkeypatch.setattr(curve, "peak_of", broken)
    monkeypatch.setattr(curve, "_limit_memory", lambda limit_bytes: None)
    asked = dict(kind="infer", factors=None, seconds=100.0, cpu_limit_gib=1.0)
    try:
        curve.measure(RunConfig(model=FLAGS, trainer=TRAINER), tmp_path / "out", **asked)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    head, end = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert head["lengths"] == [64, 128, 256, 512, 1024]
    assert end == {"length": 64, "reason": curve.FAILED, "error": "RuntimeError: no kernel"}
    probe, calls = fake([HEAD, end])
    monkeypatch.setattr(curve, "probe", probe)
    for _ in range(2):
        measured(tmp_path, {}, kinds=["infer"])
    assert len(calls) == 1


def test_a_stop_leaves_no_curve_that_is_not_whole(tmp_path: Path, monkeypatch) -> None:
    def stopped_meanwhile(arguments: list[str]) -> tuple[int, tuple[str, str]]:
        launch._stopped.set()
        return -15, (record.KILLED, "killed by SIGTERM")

    monkeypatch.setattr(curve, "probe", stopped_meanwhile)
    try:
        assert measured(tmp_path, {}) == {}
    finally:
        launch._stopped.clear()


def rows(tmp_path: Path, **lines: list[dict]) -> list[Row]:
    """Rows without results whose curves are these."""
    made = []
    for place, (name, written) in enumerate(lines.items()):
        run = RunConfig(name=name, model=FLAGS | {"sliding_window": 8 + place}, trainer=TRAINER)
        (tmp_path / name).mkdir()
        save_config(run, tmp_path / name / record.CONFIG)
        config = CompareConfig(model=run.model, trainer=TRAINER, memory_curve=MemoryCurveConfig(kinds=["train"]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(curve, "probe", fake(written)[0])
            curve.measure_curves(config, [(name, tmp_path / name)], tmp_path)
        made.append(Row(name=name, runs=[Run(path=tmp_path / name, config=run, result={"status": "failed"})]))
    return made


def test_a_report_shows_bytes_ends_and_the_predicted_cache(tmp_path: Path) -> None:
    end = {"length": 128, "reason": curve.OUT_OF_MEMORY, "error": "too much"}
    shown = rows(tmp_path, whole=[HEAD, *POINTS], short=[HEAD, POINTS[0], end])
    curves = curves_of(shown, tmp_path)
    train, cache = curve_tables(shown, curves)
    assert train.header == ["variant", "64", "128"]
    assert train.cells == [["whole", "3.0", "5.0"], ["short", "3.0", "out of memory"]]
    assert "predicted" in cache.title and len(cache.cells) == 2
    assert "short, train at 128 tokens: out of memory: too much" in curve_notes(shown, curves)
    lines = list(csv.DictReader(io.StringIO(curve_csv(shown, curves))))
    assert [(line["variant"], line["length"], line["peak_bytes"]) for line in lines] == [
        ("whole", "64", str(3 * MIB)), ("whole", "128", str(5 * MIB)), ("short", "64", str(3 * MIB)), ("short", "128", ""),
    ]  # fmt: skip
    assert lines[3]["end"] == "out of memory: too much"
    spec = xattn.parse(shown[1].runs[0].config.model)
    assert int(lines[3]["kv_cache_bytes_predicted"]) == xattn.accounting.kv_bytes(spec, 128)
    assert [name for name, _ in plots.draw(shown, tmp_path, curves=curves)] == ["memory_curve.png"]


def test_a_study_without_curves_has_none_in_its_report(tmp_path: Path) -> None:
    shown = rows(tmp_path, whole=[HEAD, *POINTS])
    shown[0].runs[0].config.model["dim"] = 128
    curves = curves_of(shown, tmp_path)
    assert curves == {} and curve_tables(shown, curves) == [] and curve_notes(shown, curves) == []
    (tmp_path / "memory_curve.png").write_bytes(b"of an earlier report")
    assert plots.draw(shown, tmp_path, curves=curves) == [] and not (tmp_path / "memory_curve.png").exists()


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (dict(kinds=["decode"]), "train, infer"),
        (dict(length_factors=[]), r"use \[1,2,4,8\]"),
        (dict(length_factors=[0, 1]), "1 or more"),
        (dict(seconds=0), "memory_curve.seconds"),
        (dict(cpu_limit_gib=-1), "memory_curve.cpu_limit_gib"),
    ],
)
def test_curves_that_cannot_be_are_refused(asked: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        CompareConfig(model=FLAGS, memory_curve=MemoryCurveConfig(**asked)).check()


def test_curves_follow_the_runs_and_need_processes() -> None:
    config = CompareConfig(model=FLAGS)
    assert curve.kinds_of(config) == ["train", "infer"]
    assert curve.kinds_of(replace(config, isolate=False)) == []
    assert curve.kinds_of(replace(config, trainer=replace(TRAINER, memory=False))) == []
    with pytest.raises(ConfigError, match="isolate=true"):
        replace(config, isolate=False, memory_curve=MemoryCurveConfig(kinds=["train"])).check()
