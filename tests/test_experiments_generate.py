"""xattn-generate writes on from a checkpoint, the same for the same seed, and says what it cannot do."""

import sys

import pytest
import torch

import xattn
from xattn.experiments import generate

FLAGS = {"num_tokens": 256, "max_seq_len": 64, "dim": 16, "depth": 2, "heads": 2, "rotary_pos_emb": True, "attn_selective": True}


def run(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["xattn-generate", *map(str, argv)])
    try:
        generate.main()
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    told = capsys.readouterr()
    return code, told.out, told.err


def test_text_goes_on_from_the_prompt_as_the_library_says(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = xattn.build(FLAGS).eval()
    xattn.save(model, tmp_path / "m")
    args = (tmp_path / "m", "--prompt", "ab", "--tokens", 12, "--seed", 4, "--kv-budget", 8)
    code, out, _ = run(monkeypatch, capsys, *args)
    ids = xattn.AutoregressiveWrapper(model).generate(torch.tensor([97, 98]), 12, seed=4, kv_budget=8)
    assert code in (0, None) and out == "ab" + bytes(ids.tolist()).decode("utf-8", errors="replace") + "\n"
    assert run(monkeypatch, capsys, *args)[1] == out


@pytest.mark.parametrize(
    ("flags", "more", "told"), [({"num_tokens": 300}, [], "num_tokens=300"), ({}, ["--prompt", ""], "empty")]
)
def test_what_cannot_be_is_told_without_a_traceback(tmp_path, monkeypatch, capsys, flags, more, told):
    xattn.save(xattn.build(FLAGS | flags), tmp_path / "m")
    code, out, err = run(monkeypatch, capsys, tmp_path / "m", *more)
    assert code not in (0, None) and told in out + err and "Traceback" not in out + err
