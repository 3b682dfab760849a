"""Memory: the probe measures the step it says it measures, and not the process around it."""

import pytest
import torch

import xattn
from xattn.experiments import memory
from xattn.experiments.configfile import save_config
from xattn.experiments.launch import probe_memory
from xattn.experiments.record import CONFIG
from xattn.experiments.schema import RunConfig, TrainerConfig

FLAGS = dict(num_tokens=256, max_seq_len=128, dim=128, depth=3, heads=4, rotary_pos_emb=True)


def test_the_peak_is_the_state_plus_activations_that_grow_with_the_batch(tmp_path) -> None:
    peaks = {}
    for rows in (8, 32):
        trainer = TrainerConfig(batch_size=rows, seq_len=128, threads=1, precision="fp32", device="cpu")
        run_dir = tmp_path / str(rows)
        run_dir.mkdir()
        save_config(RunConfig(model=FLAGS, trainer=trainer), run_dir / CONFIG)
        peaks[rows] = probe_memory(run_dir)
    params = xattn.accounting.count_params(xattn.parse(FLAGS))
    for measured in peaks.values():
        # weights, gradients, and AdamW's two moments, in float32; its step counters are the few bytes more
        assert 16 * params <= measured["state_bytes"] < 16.1 * params
        assert measured["train_peak_bytes"] == measured["state_bytes"] + measured["activation_bytes"]
        assert 4 * params < measured["infer_peak_bytes"] < measured["train_peak_bytes"]
    # Four times the rows: what a step keeps grows as predicted, and the fixed part cancels out of the difference.
    grown = peaks[32]["train_peak_bytes"] - peaks[8]["train_peak_bytes"]
    spec = xattn.parse(FLAGS)
    predicted = [xattn.accounting.activation_bytes(spec, batch=rows, n=128) for rows in (32, 8)]
    assert 0.7 < grown / (predicted[0] - predicted[1]) < 1.6


def test_a_probe_that_dies_leaves_its_reason(tmp_path) -> None:
    trainer = TrainerConfig(batch_size=2**20, seq_len=128, threads=1, device="cpu")
    save_config(RunConfig(model=FLAGS | {"dim": 2**20, "heads": 1}, trainer=trainer), tmp_path / CONFIG)
    measured = probe_memory(tmp_path)
    assert measured["train_peak_bytes"] is None and "memory" in measured["train_error"]


# torch's own compiler does that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_step_is_compiled_once_and_at_the_shape_that_is_measured(monkeypatch) -> None:
    compiled, torch_compile = [], torch.compile

    def backend(graph, inputs):
        compiled.append({tuple(t.shape) for t in inputs if torch.is_tensor(t) and t.dtype == torch.int64})
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda module, **options: torch_compile(module, backend=backend, **options))
    monkeypatch.setattr(memory, "_compiles", lambda trainer, device: trainer.compile)
    torch.compiler.reset()
    trainer = TrainerConfig(batch_size=3, seq_len=37, threads=1, device="cpu", compile=True)
    config = RunConfig(model=FLAGS | {"dim": 16, "depth": 1, "max_seq_len": 37}, trainer=trainer)
    memory.measure(config, "train")
    assert len(compiled) == 1 and (3, 38) in compiled[0]
    assert not any(isinstance(size, torch.SymInt) for shape in compiled[0] for size in shape)
