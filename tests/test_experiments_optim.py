"""What the trainer's options do: Muon, compilation, activation checkpointing, averaged weights, spikes, MFU, samples."""

import io
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_experiments_run import FLAGS, losses, same_weights, tiny

import xattn
from xattn import ConfigError
from xattn.experiments import device, loop, pace, progress, record
from xattn.experiments.device import loss_module, peak_flops
from xattn.experiments.launch import launch
from xattn.experiments.optim import Together, build_optimiser
from xattn.experiments.schema import OptimConfig, RunConfig, ScheduleConfig, TrainerConfig
from xattn.experiments.watch import Watch


def interrupted_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.Trainer._step

    def asked(self, current: int):
        if current == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, current)

    monkeypatch.setattr(loop.Trainer, "_step", asked)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_everything_else() -> None:
    model = xattn.build(FLAGS | {"use_abs_pos_emb": True, "ff_bias": True, "rotary_pos_emb": False})
    optimiser = build_optimiser(model, OptimConfig(name="muon", momentum=0.9))
    assert isinstance(optimiser, Together)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = ({names[id(p)] for group in part.param_groups for p in group["params"]} for part in optimiser.parts)
    assert muon | adamw == set(names.values()) and not muon & adamw
    assert muon == {name for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2}
    assert {"token_emb.weight", "pos_emb.weight", "to_logits.weight"} <= adamw
    assert optimiser.parts[0].defaults["adjust_lr_fn"] == "match_rms_adamw"
    assert optimiser.parts[0].defaults["momentum"] == 0.9


def test_muon_trains_otherwise_than_adamw(tmp_path: Path) -> None:
    config = tiny(steps=40, samples=0)
    launch(config, tmp_path / "adamw")
    launch(replace(config, optim=OptimConfig(name="muon", lr=1e-2)), tmp_path / "muon")
    assert losses(tmp_path / "muon")[0] == losses(tmp_path / "adamw")[0]
    assert losses(tmp_path / "muon")[-1] != losses(tmp_path / "adamw")[-1]
    assert losses(tmp_path / "muon")[-1] < losses(tmp_path / "muon")[0] - 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: OptimConfig(momentum=0.9),
        lambda: ScheduleConfig(decay_fraction=0.3),
        lambda: ScheduleConfig(name="constant", final_factor=0.3),
        lambda: TrainerConfig(samples=0, sample_tokens=5),
        lambda: TrainerConfig(ema_decay=1.0),
        lambda: TrainerConfig(activation_checkpointing="some"),
        lambda: TrainerConfig(spike_deviations=0.0),
    ],
)
def test_a_setting_without_effect_or_sense_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make().check()


def test_muon_average_and_accumulation_resume_bit_for_bit(tmp_path: Path, monkeypatch) -> None:
    config = tiny(micro_batch=2, ema_decay=0.8, activation_checkpointing="full", samples=1)
    config.optim, config.model["ff_dropout"] = OptimConfig(name="muon", lr=1e-2), 0.2
    launch(config, tmp_path / "unbroken")
    interrupted_at(6, monkeypatch)
    assert launch(config, tmp_path / "broken")["status"] == "interrupted"
    monkeypatch.undo()
    launch(config, tmp_path / "broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    assert same_weights(tmp_path / "broken", tmp_path / "unbroken")
    ours, theirs = (record.read_result(tmp_path / name) for name in ("broken", "unbroken"))
    for key in ("val", "ema", "loss_spikes", "grad_norm", "data"):
        assert ours[key] == theirs[key], key
    texts = [(tmp_path / name / "samples.txt").read_text() for name in ("broken", "unbroken")]
    assert texts[0] == texts[1] and "=== step 12, sample 1" in texts[0]


def test_the_average_is_what_is_judged_and_saved_and_the_raw_weights_stand_beside_it(tmp_path: Path) -> None:
    config = tiny(ema_decay=0.9, samples=0)
    config.eval.every = 6
    result = launch(config, tmp_path / "ema")
    plain = launch(tiny(samples=0), tmp_path / "raw")
    assert (result["weights"], plain["weights"], plain["ema"]) == ("ema", "raw", None)
    assert losses(tmp_path / "ema") == losses(tmp_path / "raw"), "averaging changed the training"
    assert result["ema"]["raw_val"] == plain["val"] != result["val"] == result["ema"]["val"]
    assert not same_weights(tmp_path / "ema", tmp_path / "raw")
    rows = [row for row in record.read_metrics(tmp_path / "ema") if "val/loss_nats" in row]
    assert [row["step"] for row in rows] == [6, 12] and all("val/raw_loss_nats" in row for row in rows)


def test_resuming_with_another_model_or_optimiser_is_refused_with_the_difference(tmp_path: Path, monkeypatch) -> None:
    interrupted_at(3, monkeypatch)
    launch(tiny(), tmp_path)
    monkeypatch.undo()
    # As if config.yaml had been edited by hand: the checkpoint itself must object.
    for change, said in (
        (lambda c: c.model.update(sliding_window=4), "model.sliding_window: None there, 4 now"),
        (lambda c: setattr(c.optim, "name", "muon"), "Muon needs momentum_buffer"),
        (lambda c: setattr(c.trainer, "ema_decay", 0.9), "no average"),
    ):
        (tmp_path / "config.yaml").unlink()
        config = tiny()
        change(config)
        result = launch(config, tmp_path)
        assert result["status"] == "invalid" and said in result["error"]


@pytest.mark.parametrize("more", [{}, {"attn_selective": True, "ff_dropout": 0.2, "sliding_window": 5}])
def test_checkpointed_blocks_have_the_same_gradients_and_keep_less(more: dict) -> None:
    ids, gradients, kept = torch.randint(0, 256, (4, 17)), {}, {}
    for mode in ("none", "full"):
        torch.manual_seed(0)
        model = xattn.build(FLAGS | {"depth": 4} | more)
        loss_of = loss_module(model, TrainerConfig(activation_checkpointing=mode))
        storages: dict[int, int] = {}

        def pack(t: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = loss_of(ids)
        kept[mode] = sum(storages.values())
        loss.backward()
        gradients[mode] = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradients["none"], gradients["full"], strict=True))
    assert kept["full"] < 0.6 * kept["none"]


# torch's own compiler does that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiling_changes_no_loss_and_no_name(tmp_path: Path, monkeypatch) -> None:
    compiled = []

    def compile_(module, **options):
        compiled.append(options)
        return torch_compile(module, backend="aot_eager", **options)

    torch_compile = torch.compile
    monkeypatch.setattr(device.torch, "compile", compile_)
    launch(tiny(samples=0), tmp_path / "eager")
    assert not compiled
    result = launch(tiny(samples=0, compile=True), tmp_path / "compiled")
    assert result["status"] == "completed" and result["compile"] and compiled == [{"fullgraph": True}]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    names = [list(xattn.load(tmp_path / kind / "model").state_dict()) for kind in ("compiled", "eager")]
    assert names[0] == names[1]


def test_a_spike_is_counted_and_said_once() -> None:
    watch, said = Watch(), []
    see = partial(watch.see, deviations=6.0, grad_clip=1.0)
    for step in range(1, 60):
        loss = 9.0 if step in (30, 40) else 3.0 - step / 100
        said.append(see(loss, 2.0 if step == 7 else 0.5, step=step))
    assert [i + 1 for i, line in enumerate(said) if line] == [30] and "spiked to 9.000 at step 30" in said[29]
    found = watch.result()
    assert found["loss_spikes"] == {"count": 2, "first_steps": [30, 40]}
    assert found["grad_norm"] == {"max": 2.0, "max_step": 7, "clipped_steps": 1}
    assert Watch(**json.loads(json.dumps(watch.state()))) == watch


def test_utilisation_is_known_on_known_devices_only(monkeypatch) -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12),
                       ("NVIDIA A100-SXM4-80GB", 312e12), ("Abacus 3000", None)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda"), "bf16") == peak, name


def test_utilisation_is_model_flops_over_the_peak(monkeypatch) -> None:
    monkeypatch.setattr(pace, "peak_flops", lambda *_: 1e9)
    spec = xattn.build(FLAGS).spec
    run = pace.Pace(trainer=tiny().trainer, spec=spec, device=torch.device("cpu"), precision="fp32", before=100.0)
    assert run.mfu() == pytest.approx(xattn.accounting.train_flops(spec, 16) / 16 * 100 / 1e9)
    run.seconds = [9.0, 9.0, 9.0, 2.0, 4.0, 3.0]
    assert run.tokens_per_second() == pytest.approx(run.trainer.tokens_per_step / 3.0), "the warm-up is left out"


def test_samples_go_on_from_validation_text_and_are_kept_twice(tmp_path: Path) -> None:
    config = tiny(samples=2, sample_tokens=5)
    config.eval.every = 6
    launch(config, tmp_path)
    rows = [row for row in record.read_metrics(tmp_path) if "samples" in row]
    assert [row["step"] for row in rows] == [6, 12] and all(len(row["samples"]) == 2 for row in rows)
    sample = rows[-1]["samples"][0]
    assert len(sample["prompt"]) == 4
    assert f"{sample['prompt']}⟶{sample['text']}" in (tmp_path / "samples.txt").read_text()


def test_the_runs_own_peak_is_recorded(tmp_path: Path) -> None:
    memory = launch(tiny(steps=2, samples=0), tmp_path)["memory"]
    assert memory["run_peak_bytes"] > 2**20 and "training process" in memory["run_method"]


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("isolate", [True, False])
def test_a_terminal_gets_a_bar_and_a_file_gets_lines(tmp_path: Path, monkeypatch, isolate: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal, config = Terminal(), tiny(steps=4, samples=0)
    config = replace(config, isolate=isolate)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal)
        assert launch(config, tmp_path / "bar")["status"] == "completed"
    shown = terminal.getvalue()
    assert "━" in shown and "4/4" in shown
    assert "step 4/4" not in shown and progress.MARK not in shown and "judging" in shown
    plain = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", plain)
        launch(config, tmp_path / "lines")
    assert "step 4/4  loss" in plain.getvalue() and "━" not in plain.getvalue()


def test_every_trainer_field_is_read_by_the_code() -> None:
    code = "".join(p.read_text() for p in Path(loop.__file__).parent.glob("*.py") if p.name != "schema.py")
    schema = Path(loop.__file__).with_name("schema.py").read_text()
    for group, cls in (("trainer", TrainerConfig), ("optim", OptimConfig), ("schedule", ScheduleConfig)):
        for name in cls.__dataclass_fields__:
            # Rows are worked out in the schema itself, and read as trainer.rows and forward_rows.
            assert f".{name}" in code or name in ("micro_batch",) and f"self.{name}" in schema, f"{group}.{name} is ignored"
    assert RunConfig(trainer=TrainerConfig(batch_size=8, micro_batch=2)).trainer.forward_rows == 2
