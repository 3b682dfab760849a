"""beam_search: the likeliest of many continuations that are kept side by side.

Letters: w beams of one prompt.
"""

import torch
from torch import Tensor, nn

from xattn.cache.cache import Cache
from xattn.errors import ConfigError
from xattn.generate.reader import align, reader_for
from xattn.generate.sample import evaluating


@torch.no_grad()
def beam_search(
    net: nn.Module,
    prompts: Tensor | list[Tensor],
    seq_len: int,
    *,
    beams: int = 4,
    eos_token: int | None = None,
    length_penalty: float = 1.0,
    prompt_lens: Tensor | None = None,
    return_scores: bool = False,
    cache_kv: bool = True,
    cache: Cache | None = None,
    prefill_chunk: int | None = None,
    static: bool | None = None,
    pad_value: int = 0,
    extrapolate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The best continuation of each prompt among those that a beam of `beams` keeps, step after step.

    A beam that has reached eos_token stays as it is and competes on. The best is the one with the largest
    log-probability / tokens ** length_penalty, the eos_token counted.

    Args:
        as `generate`; beams: continuations kept of each prompt; length_penalty: 0 ranks by log-probability alone.
    Returns:
        only the new tokens, (b, at most seq_len), after eos_token pad_value; with return_scores also each row's rank (b,).
    """
    if beams < 1 or seq_len < 1:
        raise ConfigError(f"beams={beams} and seq_len={seq_len} must be at least 1")
    ids, mask, single = align(prompts, prompt_lens=prompt_lens, pad_value=pad_value)
    b, device = len(ids), ids.device
    reader = reader_for(
        net, b, ids.shape[1] + seq_len - 1, cache_kv=cache_kv, cache=cache, prefill_chunk=prefill_chunk, extrapolate=extrapolate,
        static=static, steps=seq_len - 1,
    )  # fmt: skip
    rows_b1 = torch.arange(b, device=device)[:, None] * beams
    with evaluating(net):
        logits_v = reader.read(ids, mask)
        reader.reorder(torch.arange(b, device=device).repeat_interleave(beams))
        logits_v = logits_v.repeat_interleave(beams, dim=0)
        # of equal beams one counts, until they differ
        score_bw = torch.full((b, beams), -torch.inf, dtype=logits_v.dtype, device=device)
        score_bw[:, 0] = 0.0
        done_bw = torch.zeros(b, beams, dtype=torch.bool, device=device)
        length_bw = torch.zeros(b, beams, dtype=torch.long, device=device)
        made_bwt = torch.zeros(b, beams, 0, dtype=ids.dtype, device=device)
        while True:
            gain_bwv = logits_v.log_softmax(dim=-1).unflatten(0, (b, beams))
            # an ended beam has one way on, at no cost
            stay_v = torch.full_like(gain_bwv[0, 0], -torch.inf)
            stay_v[pad_value] = 0.0
            gain_bwv = torch.where(done_bw[..., None], stay_v, gain_bwv)
            score_bw, flat_bw = (score_bw[..., None] + gain_bwv).flatten(1).topk(beams, dim=1)
            parent_bw, token_bw = flat_bw // gain_bwv.shape[-1], flat_bw % gain_bwv.shape[-1]
            done_bw, length_bw = done_bw.gather(1, parent_bw), length_bw.gather(1, parent_bw)
            length_bw = length_bw + ~done_bw
            made_bwt = made_bwt.gather(1, parent_bw[..., None].expand(-1, -1, made_bwt.shape[2]))
            made_bwt = torch.cat([made_bwt, token_bw[..., None]], dim=2)
            if eos_token is not None:
                done_bw = done_bw | (token_bw == eos_token)
            if made_bwt.shape[2] == seq_len or (eos_token is not None and bool(done_bw.all())):
                break
            reader.reorder((rows_b1 + parent_bw).flatten())
            logits_v = reader.read(token_bw.flatten()[:, None])
    rank_bw = score_bw / length_bw.to(score_bw.dtype) ** length_penalty
    best_b1 = rank_bw.argmax(dim=1, keepdim=True)
    best_bt = made_bwt.gather(1, best_b1[..., None].expand(-1, -1, made_bwt.shape[2]))[:, 0]
    new = best_bt[0] if single else best_bt
    return (new, rank_bw.gather(1, best_b1)[:, 0]) if return_scores else new
