"""Generation over caches says what reading everything anew says; and what its options mean."""

import itertools
from typing import Any

import pytest
import torch
from cases import Case
from test_cache import CAUSAL, HYBRID, VOCAB, feed, ids_of, model, of

import xattn
from xattn import AutoregressiveWrapper
from xattn.generate.logits import contrast, discourage, forbid_ngrams

RAGGED = [ids_of(n, 1)[0] for n in (3, 19, 8)]


def wrapped(flags: dict[str, Any] | None = None, **sizes: Any) -> AutoregressiveWrapper:
    """A model with everything that cuts a cache short."""
    return AutoregressiveWrapper(model(HYBRID if flags is None else flags, **sizes))


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_cached_greedy_equals_uncached_token_for_token(case: Case) -> None:
    ar = AutoregressiveWrapper(of(case))
    slow = ar.generate(RAGGED, 12, temperature=0, cache_kv=False)
    assert torch.equal(ar.generate(RAGGED, 12, temperature=0), slow)
    assert torch.equal(ar.generate(RAGGED, 12, temperature=0, prefill_chunk=4), slow)
    assert len(set(slow.flatten().tolist())) > 3, "a model that says one thing shows nothing"


def test_the_cached_path_reads_each_token_once() -> None:
    ar, seen = wrapped(), []
    hook = ar.net.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    ar.generate(ids_of(20), 6, temperature=0)
    assert sum(seen) == 25 and max(seen[1:]) == 1
    seen.clear()
    ar.generate(ids_of(20), 6, temperature=0, cache_kv=False)
    assert seen == [20, 21, 22, 23, 24, 25]
    hook.remove()


def test_cached_and_uncached_draw_the_same_from_one_seed() -> None:
    ar = wrapped()
    cooler = {"filter_logits_fn": "min_p", "temperature": 0.7}
    for options in ({"filter_logits_fn": "top_p"}, cooler, {"repetition_penalty": 1.3}):
        draws = [ar.generate(RAGGED, 15, seed=3, cache_kv=kv, **options) for kv in (True, False)]
        assert torch.equal(*draws)
        generator = torch.Generator().manual_seed(3)
        assert torch.equal(ar.generate(RAGGED, 15, generator=generator, **options), draws[0])


def test_prompt_lens_say_which_tokens_of_a_right_padded_batch_are_the_prompt() -> None:
    ar, prompts = wrapped(), torch.full((3, 19), 7)
    for row, prompt in zip(prompts, RAGGED, strict=True):
        row[: len(prompt)] = prompt
    got = ar.generate(prompts, 9, temperature=0, prompt_lens=torch.tensor([3, 19, 8]))
    assert torch.equal(got, ar.generate(RAGGED, 9, temperature=0))


def test_eos_within_a_prompt_ends_nothing_and_blanks_nothing() -> None:
    ar = wrapped()
    free = ar.generate(RAGGED, 8, temperature=0)
    eos = next(token for token in range(VOCAB) if token not in free and any(token in prompt for prompt in RAGGED))
    assert torch.equal(ar.generate(RAGGED, 8, temperature=0, eos_token=eos), free)
    ending = [torch.cat([prompt, torch.tensor([eos])]) for prompt in RAGGED]
    assert torch.equal(
        ar.generate(ending, 8, temperature=0, eos_token=int(eos)), ar.generate(ending, 8, temperature=0, cache_kv=False)
    )


def test_a_row_that_ends_is_padded_and_leaves_the_others_alone() -> None:
    ar = AutoregressiveWrapper(model(HYBRID), pad_value=0)
    free = ar.generate(RAGGED, 10, temperature=0)
    row, at = next((r, t) for r in range(3) for t in range(8) if not any(free[r, t] in free[o] for o in range(3) if o != r))
    at = free[row].tolist().index(int(free[row, at]))
    stopped = ar.generate(RAGGED, 10, temperature=0, eos_token=int(free[row, at]))
    want = free.clone()
    want[row, at + 1 :] = 0
    assert torch.equal(stopped, want)


def test_stop_sequences_end_rows_and_the_batch() -> None:
    ar = wrapped()
    free = ar.generate(RAGGED[1], 10, temperature=0)
    pair = free[2:4].tolist()
    end = next(t for t in range(1, 10) if free[t - 1 : t + 1].tolist() == pair)
    assert torch.equal(ar.generate(RAGGED[1], 10, temperature=0, stop=[pair]), free[: end + 1])
    # what the prompt and the first token make together is no stop
    border = [int(RAGGED[1][-1]), int(free[0])]
    if border not in [free[t : t + 2].tolist() for t in range(9)]:
        assert torch.equal(ar.generate(RAGGED[1], 10, temperature=0, stop=[border]), free)


def test_tokens_are_told_as_they_come_and_the_listener_may_end_it() -> None:
    ar, heard = wrapped(), []
    whole = ar.generate(RAGGED, 6, temperature=0, on_token=lambda token_b: heard.append(token_b) or None)
    assert torch.equal(torch.stack(heard, dim=1), whole)
    assert ar.generate(RAGGED, 6, temperature=0, on_token=lambda _: True).shape == (3, 1)


def test_one_prefix_serves_many_prompts_and_is_left_as_it_was() -> None:
    ar, prefix = wrapped(), ids_of(15, 1)
    cache = ar.net.cache()
    feed(ar.net, cache, prefix, 6)
    whole = [torch.cat([prefix[0], prompt]) for prompt in RAGGED]
    for _ in range(2):
        assert torch.equal(ar.generate(RAGGED, 7, temperature=0, cache=cache), ar.generate(whole, 7, temperature=0))
    assert cache.lengths == [15]
    assert torch.equal(
        ar.beam_search(RAGGED, 5, beams=3, cache=cache), ar.beam_search(whole, 5, beams=3)
    )


def test_a_budget_of_all_keys_changes_nothing_and_a_small_one_does() -> None:
    ar = wrapped({"attn_selective": True, "rotary_pos_emb": True})
    free = ar.generate(RAGGED, 30, temperature=0)
    assert torch.equal(ar.generate(RAGGED, 30, temperature=0, kv_budget=60), free)
    assert not torch.equal(ar.generate(RAGGED, 30, temperature=0, kv_budget=2), free)


# Logits


def test_repetition_is_discouraged_by_the_papers_rule() -> None:
    logits = torch.tensor([[2.0, -1.0, 3.0, 0.5], [2.0, -1.0, 3.0, 0.5]])
    seen, mask = torch.tensor([[0, 1, 0], [3, 2, 2]]), torch.tensor([[True, True, True], [False, True, True]])
    assert discourage(logits, seen, mask, penalty=2.0).tolist() == [[1.0, -2.0, 3.0, 0.5], [2.0, -1.0, 1.5, 0.5]]


def test_ngrams_that_are_there_already_are_forbidden() -> None:
    seen = torch.tensor([[1, 2, 3, 1, 2], [9, 1, 3, 0, 1]])
    mask = torch.tensor([[True] * 5, [False] * 1 + [True] * 4])
    assert forbid_ngrams(torch.zeros(2, 10), seen, mask, size=3).isinf().nonzero().tolist() == [[0, 3]]
    assert forbid_ngrams(torch.zeros(2, 10), seen, mask, size=2).isinf().nonzero().tolist() == [[0, 3], [1, 3]]
    assert forbid_ngrams(torch.zeros(2, 10), seen, mask, size=1).isinf().sum(dim=1).tolist() == [3, 3]
    assert forbid_ngrams(torch.zeros(2, 4), torch.tensor([[0, 1, 2, 3]] * 2), None, size=1).isfinite().all()
    ar = wrapped()
    made = ar.generate(RAGGED, 40, temperature=0, no_repeat_ngram=2)
    for prompt, row in zip(RAGGED, made, strict=True):
        text = [*prompt.tolist(), *row.tolist()]
        late = [tuple(text[t - 1 : t + 1]) for t in range(len(prompt), len(text))]
        early = [tuple(text[t - 1 : t + 1]) for t in range(1, len(prompt))]
        assert len(set(late)) == len(late) and not set(late) & set(early)


def test_contrast_prefers_what_the_amateur_does_not_say() -> None:
    expert, amateur = torch.tensor([[0.5, 0.4, 0.09, 0.01]]).log(), torch.tensor([[0.8, 0.1, 0.05, 0.05]]).log()
    got = contrast(expert, amateur, alpha=0.1, beta=1.0)
    assert torch.allclose(got[0, :3], (2 * expert - amateur)[0, :3]) and got[0, 3] == -torch.inf
    net, weak = model(HYBRID), model({"rotary_pos_emb": True}, depth=1)
    ar, text = AutoregressiveWrapper(net), RAGGED[1].tolist()
    for _ in range(6):
        ids = torch.tensor([text])
        text.append(int(contrast(net(ids)[:, -1], weak(ids)[:, -1], alpha=0.2, beta=0.7).argmax()))
    options = {"amateur": weak, "contrast_alpha": 0.2, "contrast_beta": 0.7, "temperature": 0}
    for kv in (True, False):
        assert ar.generate(RAGGED, 6, cache_kv=kv, **options)[1].tolist() == text[-6:]


# Beams


def test_wide_beams_find_the_likeliest_continuation_of_all() -> None:
    ar = wrapped({"rotary_pos_emb": True, "attn_selective": True}, num_tokens=5)
    prompts, eos = [torch.tensor([1, 2, 3, 4]), torch.tensor([4, 4])], 2
    got, scores = ar.beam_search(prompts, 4, beams=5**3, eos_token=eos, return_scores=True)
    for row, prompt in enumerate(prompts):
        best: tuple[float, list[int]] = (-float("inf"), [])
        for text in itertools.product(range(5), repeat=4):
            text = list(text)
            if eos in text[:-1]:
                if any(token != 0 for token in text[text.index(eos) + 1 :]):
                    continue
                text = text[: text.index(eos) + 1]
            logits = ar.net(torch.cat([prompt, torch.tensor(text)])[None])[0].log_softmax(dim=-1)
            sum_ = sum(float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(text))
            best = max(best, (sum_ / len(text), text + [0] * (4 - len(text))))
        assert got[row].tolist() == best[1] and abs(float(scores[row]) - best[0]) < 1e-9


@pytest.mark.parametrize("options", [{}, {"eos_token": 3, "length_penalty": 0.0}, {"prefill_chunk": 5}], ids=str)
def test_beams_over_a_cache_equal_beams_without(options: dict[str, Any]) -> None:
    ar = wrapped()
    plain = {name: value for name, value in options.items() if name != "prefill_chunk"}
    assert torch.equal(ar.beam_search(RAGGED, 8, beams=4, **options), ar.beam_search(RAGGED, 8, beams=4, cache_kv=False, **plain))
    for row, prompt in zip(ar.beam_search(RAGGED, 8, beams=4, **options), RAGGED, strict=True):
        alone = ar.beam_search(prompt, 8, beams=4, **options)
        assert torch.equal(row[: len(alone)], alone)


def test_one_beam_is_greedy() -> None:
    ar = wrapped()
    assert torch.equal(ar.beam_search(RAGGED, 8, beams=1), ar.generate(RAGGED, 8, temperature=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_kv": False, "kv_budget": 8}, "kv_budget has no effect.*cache_kv"),
        ({"cache_kv": False, "prefill_chunk": 8}, "prefill_chunk has no effect"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram=0"),
        ({"contrast_alpha": 0.0}, "contrast_alpha=0.0"),
        ({"stop": [[1], []]}, "empty sequence"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"kv_budget": 1}, "smaller than the 2 keys"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_options_without_effect_or_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(xattn.ConfigError, match=message):
        wrapped().generate(RAGGED, 3, **options)


def test_prompts_that_cannot_be_are_refused() -> None:
    ar = wrapped()
    cache = ar.net.cache(2)
    with pytest.raises(xattn.ConfigError, match="holds 2 rows for 3 prompts"):
        ar.generate(RAGGED, 3, cache=cache)
    for lens, error in ((torch.tensor([3, 0]), xattn.TokenError), (torch.tensor([3, 9]), xattn.TokenError),
                        (torch.tensor([3]), xattn.ShapeError)):  # fmt: skip
        with pytest.raises(error, match="prompt_lens"):
            ar.generate(ids_of(8), 3, prompt_lens=lens)
    with pytest.raises(xattn.TokenError, match="max_seq_len=128"):
        feed(ar.net, cache, ids_of(120), 120)
        ar.generate(ids_of(8), 3, cache=cache)
    with pytest.raises(xattn.ConfigError, match="beams=0"):
        ar.beam_search(RAGGED, 3, beams=0)
