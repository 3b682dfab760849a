"""Promises of benchmarks/: every case composes, peers compute the same thing, and what is wrong is never timed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import attention  # noqa: E402
import check  # noqa: E402
import decode  # noqa: E402
import peers  # noqa: E402
import plot  # noqa: E402
import table  # noqa: E402
import train_step  # noqa: E402
import tune  # noqa: E402

from xattn.ops.layout import Layout  # noqa: E402
from xattn.ops.reference import reference  # noqa: E402

CASES = [case for section in table.SECTIONS for case in table.cases(section)]


def right(x: peers.Given) -> torch.Tensor:
    """What the definition says."""
    return reference(x.q, x.k, x.v, spec=x.spec, layout_i=x.layout, layout_j=x.layout, sink_logits_h=x.sink)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.section} {case.name}")
def test_case_composes_in_full_and_small(case):
    for form in (case, case.small(512), table.tiny(case)):
        spec = peers.spec_of(form)
        assert spec.features == peers.spec_of(case).features
        assert sum(len(run) for run in form.runs()) == form.n
    assert set(case.who) <= set(peers.PEERS)
    for bar in case.bars:
        assert {bar.what, bar.over or bar.what} <= set(case.who) and bar.on in case.passes


def test_cases_of_a_section_have_names_of_their_own():
    names = [(case.section, case.name) for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("flags, documents", [({}, 0), ({"sliding_window": 9}, 0), ({"sliding_window": 9}, 3)])
def test_visible_pairs_are_those_of_the_definition(flags, documents):
    case = table.Case(section="-", b=2, h=2, n=61, d=16, flags=flags, documents=documents)
    layout, pattern = peers.layout_of(case), peers.spec_of(case).pattern
    cpu = [None if t is None else t[:1].cpu() for t in (layout.pos_bn, layout.doc_bn)]
    assert case.pairs == int(pattern.allowed(cpu[0], cpu[0], cpu[1], cpu[1]).sum())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "section, who", [("causal", "Flex"), ("window", "Flex"), ("selective", "Flex"), ("selective", "x-transformers eager")]
)
def test_peer_computes_the_attention_of_its_case(section, who, monkeypatch):
    if why := peers.unable(who) if who != "Flex" else None:
        pytest.skip(why)
    monkeypatch.setattr(peers, "device", lambda: torch.device("cpu"))
    x = peers.draw(table.tiny(table.cases(section)[0]), torch.float32)
    x = replace(x, q=x.q.detach(), k=x.k.detach(), v=x.v.detach())
    work = peers.flex(x, compiled=False) if who == "Flex" else peers.PEERS[who](x)
    torch.testing.assert_close(work(), right(x), rtol=0, atol=2e-6)


def test_wrong_result_is_refused(monkeypatch):
    monkeypatch.setattr(peers, "device", lambda: torch.device("cpu"))
    truth = check.Truth(table.tiny(table.cases("window")[0]), torch.float32)
    assert max(truth.compare(lambda x: lambda: right(x)).values()) <= 1
    with pytest.raises(check.WrongResult, match="dv off by"):
        truth.compare(lambda x: lambda: right(replace(x, v=1.01 * x.v)))
    shifted = Layout(torch.arange(128)[None] // 2 * 2)
    with pytest.raises(check.WrongResult):
        truth.compare(lambda x: lambda: right(replace(x, layout=shifted)))


def test_bars_take_graph_replay_and_tell_missed_from_met():
    case = table.cases("causal")[0]

    def row(what: str, how: str, ms: float) -> dict:
        return {"section": "causal", "case": case.name, "what": what, "pass": "fb", "how": how, "median_ms": ms}

    rows = [
        {"section": "causal", "case": case.name, "what": "Flex", "note": "skipped"}, row("SDPA-FA2", "eager", 9.0),
        row("SDPA-FA2", "graph", 1.0), row("ours", "eager", 9.0), row("ours", "graph", 0.9), row("SDPA-cuDNN", "eager", 0.9),
    ]  # fmt: skip
    found = {bar.over: table.judge(case, bar, rows) for bar in case.bars}
    assert (found["SDPA-FA2"]["value"], found["SDPA-FA2"]["verdict"]) == (0.9, "MISSED")
    assert found["Flex"]["verdict"] == "not measured"
    assert (found["SDPA-cuDNN"]["verdict"], found["SDPA-cuDNN"]["how"]) == ("reached", "graph|eager")


def test_memory_is_called_linear_by_its_slope():
    def rows(peaks: list[float]) -> list[dict]:
        return [{"section": "memory", "case": case.name, "what": "ours", "pass": "fb", "how": "eager", "peak_mib": peak}
                for case, peak in zip(table.cases("memory"), peaks, strict=True)]  # fmt: skip

    assert table.growth("memory", rows([300.0, 600.0, 1800.0]))[0]["verdict"] == "ok"
    assert table.growth("memory", rows([300.0, 600.0, 5100.0]))[0]["verdict"] == "MISSED"
    assert table.growth("memory", [])[0]["verdict"] == "not measured"


def test_training_bars_compare_rows_of_one_length():
    rows = [{"section": "train", "case": "N4096 B8", "n": 4096, "what": what, "tokens_s": speed, "total_mib": 5000.0}
            for what, speed in (("xattn dense", 1.5e6), ("xattn selective", 1.2e6), ("x-transformers flash", 1e6),
                                ("x-transformers selective", 2e5))]  # fmt: skip
    assert {row["what"] for row in rows} < set(train_step.VARIANTS)
    assert [bar["verdict"] for bar in table.train_bars(rows)] == ["reached", "ok", "not reached", "ok"]


def test_tuning_tries_the_present_choice_of_every_kernel_first():
    args = tune.arguments([])
    found = tune.configurations(args)
    groups = {(job["kernel"], job["kind"], job["width"]) for job in found}
    assert len(groups) == 24 + 6 and len(found) >= 24 * 24 + 6 * 8
    for kernel, kind, width in groups:
        first = next(job for job in found if (job["kernel"], job["kind"], job["width"]) == (kernel, kind, width))
        assert tuple(first["tile"]) == tune.present(kernel, kind, width)


def test_picture_marks_where_memory_ran_out(tmp_path):
    def row(n: int, **more: object) -> dict:
        return {"section": "scaling", "case": f"N{n} attn_selective", "n": n, "what": "x-transformers compiled", "device": "a",
                **more}  # fmt: skip

    timed = {"pass": "fb", "peak_mib": 9.0}
    rows = [row(512, how="eager", median_ms=7.0, **timed), row(512, how="graph", median_ms=3.0, **timed),
            row(1024, how="graph", median_ms=12.0, **timed), row(2048, oom=True)]  # fmt: skip
    line = plot.points(rows)["x-transformers compiled", True]
    assert line[512]["ms"] == 3.0 and line[2048] == {"oom": True}
    assert plot.draw(rows, tmp_path / "scaling.png") and (tmp_path / "scaling.png").stat().st_size > 10_000
    assert not plot.draw([], tmp_path / "none.png")


def test_command_runs_dry_and_writes_rows_as_they_come(tmp_path):
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, attention.__file__, "window", "--dry", "--only", "B8 H16 N4096", "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["what"], row.get("pass")) for row in rows] == [("Flex", None), ("ours", "f"), ("ours", "fb")]
    assert all(row["median_ms"] > 0 and row["stick_share"] <= 1 and row["commit"] is not None for row in rows[1:])
    assert "not measured" in done.stdout


def test_decoding_reads_what_its_cache_holds():
    cases = {case.name: case for case in decode.CASES}
    assert cases["dense"].read_bytes(2) == 8 * 32768 * 2 * 8 * 128 * 2
    assert 31 < cases["dense"].read_bytes(2) / cases["window 1024"].read_bytes(2) < 33
    for case in decode.CASES:
        assert case.small(96).keys <= 96 and set(case.small(96).flags) == set(case.flags)


def test_plain_loop_over_a_static_cache_makes_the_tokens_of_our_model():
    torch.manual_seed(0)
    model = train_step.ours(64, decode.DRY_SIZES).eval()
    ids = torch.randint(0, 256, (3, 9))
    with torch.inference_mode():
        assert decode.static_loop(model.net, decode.DRY_SIZES, ids, 20).equal(model.generate(ids, 20, temperature=0))
        # and leaves the model as it was
        assert model.net(ids).shape == (3, 9, 256)


def test_decoding_runs_dry_and_holds_its_bars(tmp_path):
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, decode.__file__, "attention", "bytes", "--only", "budget", "--dry", "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["case"], row["what"]) for row in rows[:2]] == [("", "copy"), ("selective, budget 4096", "ours")]
    assert rows[1]["stick_share"] <= 1 and rows[1]["commit"] is not None
    bars = {bar["case"]: bar["verdict"] for bar in decode.verdicts(rows, ["bytes"])}
    assert bars == {"window 1024": "ok", "selective": "ok", "hybrid 5:1": "ok"}


def test_decoding_bars_tell_missed_from_met():
    def row(section: str, case: str, what: str, **figures: float) -> dict:
        return {"section": section, "case": case, "what": what, **figures}

    rows = [row("attention", "", "copy", gb_s=4000.0), row("attention", "dense", "ours", gb_s=3000.0, median_ms=0.4),
            row("attention", "window 1024", "ours", median_ms=0.03), row("model", "dense B1", "ours", tokens_s=900.0),
            row("model", "dense B1", "x-transformers", tokens_s=200.0)]  # fmt: skip
    found = {(bar["section"], bar["case"]): bar["verdict"] for bar in decode.verdicts(rows, decode.SECTIONS)}
    assert found["attention", "dense"] == "ok" and found["attention", "window 1024"] == "MISSED"
    assert found["model", "dense B1"] == "MISSED" and found["model", "dense B64"] == "not measured"
