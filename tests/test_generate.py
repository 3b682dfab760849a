"""Promises of generation: only new tokens, greedy is argmax, ragged prompts equal single ones, bad input stops at once."""

import pytest
import torch

import xattn
from xattn.generate import min_p, top_k, top_p

FLAGS = {"num_tokens": 29, "max_seq_len": 24, "dim": 24, "depth": 2, "heads": 4}


@pytest.fixture
def ar():
    torch.manual_seed(3)
    return xattn.AutoregressiveWrapper(xattn.build(FLAGS, rotary_pos_emb=True, attn_selective=True, sliding_window=6))


def test_greedy_takes_the_argmax_of_the_full_forward(ar):
    prompt = torch.randint(0, 29, (2, 7))
    new = ar.generate(prompt, 5, temperature=0)
    assert new.shape == (2, 5)
    logits = ar.net(torch.cat([prompt, new], dim=1))
    assert torch.equal(logits[:, 6:-1].argmax(dim=-1), new)


def test_one_prompt_without_a_batch_axis_gives_one_row(ar):
    prompt = torch.randint(0, 29, (7,))
    assert torch.equal(ar.generate(prompt, 4, temperature=0), ar.generate(prompt[None], 4, temperature=0)[0])


def test_prompts_of_different_lengths_equal_single_ones(ar):
    prompts = [torch.randint(0, 29, (n,)) for n in (3, 9, 6)]
    together = ar.generate(prompts, 6, temperature=0)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, ar.generate(prompt, 6, temperature=0))


def test_a_seed_makes_the_draw_repeatable_and_zero_is_a_seed(ar):
    prompt = torch.randint(0, 29, (1, 5))
    draw = [ar.generate(prompt, 12, seed=seed, filter_logits_fn=None) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_row_stops_at_its_eos_and_all_rows_end_early(ar):
    prompt = torch.randint(0, 29, (1, 5))
    greedy = ar.generate(prompt, 8, temperature=0)[0]
    stopped = ar.generate(prompt, 8, temperature=0, eos_token=int(greedy[0]))
    assert stopped.tolist() == [[int(greedy[0])]]


def test_training_mode_is_restored(ar):
    ar.train()
    ar.generate(torch.tensor([1, 2]), 2)
    assert ar.net.training


def test_too_many_tokens_stop_before_anything_is_computed(ar):
    with pytest.raises(xattn.TokenError, match="max_seq_len=24"):
        ar.generate(torch.randint(0, 29, (1, 20)), 6)
    assert ar.generate(torch.randint(0, 29, (1, 20)), 5).shape == (1, 5)
    assert ar.generate(torch.randint(0, 29, (1, 20)), 9, extrapolate=True).shape == (1, 9)


@pytest.mark.parametrize("prompts", [torch.zeros(1, 0, dtype=torch.long), [], [torch.tensor([], dtype=torch.long)]])
def test_empty_prompts_are_refused(ar, prompts):
    with pytest.raises(xattn.TokenError, match="prompts"):
        ar.generate(prompts, 3)


def test_unknown_filter_gets_a_suggestion(ar):
    with pytest.raises(xattn.ConfigError, match="did you mean top_k"):
        ar.generate(torch.tensor([1]), 1, filter_logits_fn="topk")


def test_filters_keep_what_their_papers_say():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert top_k(logits, k=2).isfinite().tolist() == [[True, True, False, False]]
    assert top_p(logits, thres=0.6).isfinite().tolist() == [[True, True, False, False]]
    assert top_p(logits, thres=0.5).isfinite().tolist() == [[True, False, False, False]]
    assert min_p(logits, min_p=0.25).isfinite().tolist() == [[True, True, True, False]]
