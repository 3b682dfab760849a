"""Promise of the architecture: the five lines of docs/architecture.md add an attention variant, and nothing else does."""

import json

import pytest
import torch

import xattn
from xattn.ops import backends
from xattn.spec.part import PARTS, flag, part, require
from xattn.spec.score import Score

SIZES = {"num_tokens": 29, "max_seq_len": 37, "dim": 24, "depth": 2, "heads": 4, "rotary_pos_emb": True}


@pytest.fixture
def distance_decay():
    """Steps 1 to 3: the part with its meaning, its flag, and its law."""

    @part(switch="distance_decay")
    class DistanceDecay(Score):
        distance_decay: float | None = flag(float, None, "toy: each step of distance divides the logit once more")

        def __post_init__(self):
            require(self.distance_decay > 0, f"distance_decay={self.distance_decay} must be above 0")

        def modify(self, sim_bhij, distance_bij):
            return sim_bhij / (1 + self.distance_decay * distance_bij[:, None].abs())

    yield DistanceDecay
    PARTS["score"].remove(DistanceDecay)


def test_a_part_is_all_a_variant_needs(distance_decay, tmp_path):
    model = xattn.build(SIZES, distance_decay=0.5).eval()
    ids = torch.randint(0, 29, (2, 11))
    assert "distance_decay=0.5" in model.explain()
    assert {row["backend"] for row in model.backends()} == {"reference"}
    plain = xattn.build(SIZES).eval()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(model(ids), plain(ids))
    xattn.save(model, tmp_path)
    assert torch.equal(xattn.load(tmp_path)(ids), model(ids))
    assert json.loads(json.dumps(xattn.to_flags(model.spec)))["distance_decay"] == 0.5
    with pytest.raises(xattn.ConfigError, match="distance_decay=-1.0 must be above 0"):
        xattn.build(SIZES, distance_decay=-1.0)
    with pytest.raises(xattn.ConfigError, match="did you mean distance_decay"):
        xattn.build(SIZES, distance_decya=1.0)


def test_a_backend_refuses_it_until_it_names_it(distance_decay, monkeypatch):
    with pytest.raises(xattn.UnsupportedFeature, match="does not implement distance_decay"):
        xattn.build(SIZES, distance_decay=0.5, attn_backend="sdpa")
    # step 4: the back-end implements it (here sdpa happens to be able not to) and says so
    able = backends.Backend(
        name="able", supports=backends.SDPA.supports | {"distance_decay"}, limits=lambda call: [],
        run=backends.REFERENCE.run,
    )  # fmt: skip
    monkeypatch.setattr(backends, "BACKENDS", (able, *backends.BACKENDS))
    assert {row["backend"] for row in xattn.build(SIZES, distance_decay=0.5).backends()} == {"able"}


def test_the_flag_is_gone_with_the_part():
    with pytest.raises(xattn.ConfigError, match="unknown flag 'distance_decay'"):
        xattn.build(SIZES, distance_decay=0.5)
