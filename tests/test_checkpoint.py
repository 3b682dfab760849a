"""Promises of checkpoints: what is saved comes back, foreign files are named, nothing half-written is left."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import xattn

FLAGS = {
    "num_tokens": 29, "max_seq_len": 37, "dim": 24, "depth": 3, "heads": 4, "rotary_pos_emb": True, "sliding_window": 9,
    "window_pattern": "LG", "sink_logits": True, "tie_embedding": True, "use_rmsnorm": True,
}  # fmt: skip
IDS = torch.arange(20)[None]


@pytest.fixture
def model():
    return xattn.build(FLAGS).eval()


def test_what_is_saved_comes_back(model, tmp_path):
    xattn.save(model, tmp_path / "run")
    again = xattn.load(tmp_path / "run")
    assert again.spec == model.spec and not again.training
    assert torch.equal(again(IDS), model(IDS))


def test_file_holds_safetensors_and_flags_in_json(model, tmp_path):
    file = xattn.save(model, tmp_path / "deep" / "model.safetensors")
    assert sorted(p.name for p in file.parent.iterdir()) == ["model.safetensors"]
    with safe_open(file, framework="pt") as opened:
        assert xattn.parse(json.loads(opened.metadata()["flags"])) == model.spec
        assert set(opened.keys()) == set(model.state_dict())


def test_saving_over_a_checkpoint_replaces_it(model, tmp_path):
    xattn.save(model, tmp_path)
    with torch.no_grad():
        model.token_emb.weight.add_(1.0)
    xattn.save(model, tmp_path)
    assert torch.equal(xattn.load(tmp_path)(IDS), model(IDS))


def test_inference_flag_is_overridden_without_a_word(model, tmp_path):
    xattn.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extended = xattn.load(tmp_path, self_extend_group=4, self_extend_window=6, attn_backend="reference")
    assert extended.spec.layers.blocks[0].attention.positions.self_extend_group == 4
    assert {row["backend"] for row in extended.backends()} == {"reference"}
    assert not torch.allclose(extended(IDS), model(IDS))


def test_training_flag_is_overridden_with_a_warning_that_names_it(model, tmp_path):
    xattn.save(model, tmp_path)
    with pytest.warns(xattn.FlagWarning, match=r"sliding_window=5 \(trained with \[9, None, 9\]\)"):
        xattn.load(tmp_path, sliding_window=5)
    with pytest.warns(xattn.FlagWarning, match="sliding_window=None"):
        assert xattn.load(tmp_path, sliding_window=None).spec.layers.blocks[0].attention.pattern.sliding_window is None


def test_yarn_on_load_knows_the_trained_length(model, tmp_path):
    xattn.save(model, tmp_path)
    loaded = xattn.load(tmp_path, rope_scaling="yarn", rope_scaling_factor=4.0, max_seq_len=148)
    assert loaded.spec.layers.blocks[0].attention.positions.rope_original_len == 37


@pytest.mark.parametrize("override, lack", [({"dim": 32}, "token_emb.weight"), ({"qk_rmsnorm": True}, "q_norm")])
def test_override_that_needs_other_weights_names_flag_and_weight(model, tmp_path, override, lack):
    xattn.save(model, tmp_path)
    with pytest.warns(xattn.FlagWarning), pytest.raises(xattn.ConfigError, match=f"{next(iter(override))}=.*{lack}"):
        xattn.load(tmp_path, **override)


def test_unknown_override_gets_a_suggestion(model, tmp_path):
    xattn.save(model, tmp_path)
    with pytest.raises(xattn.ConfigError, match="did you mean self_extend_group"):
        xattn.load(tmp_path, self_extend_gruop=4)


def test_missing_corrupt_and_foreign_files_are_told_apart(model, tmp_path):
    with pytest.raises(xattn.CheckpointError, match="no checkpoint at"):
        xattn.load(tmp_path / "nowhere")
    file = xattn.save(model, tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(xattn.CheckpointError, match="cut short"):
        xattn.load(tmp_path)
    file.write_bytes(b"not a checkpoint at all")
    with pytest.raises(xattn.CheckpointError, match="not a readable safetensors"):
        xattn.load(tmp_path)
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(xattn.CheckpointError, match="holds no xattn flags"):
        xattn.load(tmp_path)
    save_file({"weight": torch.zeros(3)}, file, metadata={"xattn": "1", "flags": '{"dim": 3, "futuristic": 1}'})
    with pytest.raises(xattn.CheckpointError, match="not readable by this version.*futuristic"):
        xattn.load(tmp_path)
    save_file({"weight": torch.zeros(3)}, file, metadata={"xattn": "1", "flags": json.dumps(FLAGS)})
    with pytest.raises(xattn.ConfigError, match="lacks token_emb.weight"):
        xattn.load(tmp_path)
