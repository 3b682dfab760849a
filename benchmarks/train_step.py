"""One training step (forward, backward, AdamW) against x-transformers: time and peak memory, dense and windowed.

    pip install x-transformers
    python benchmarks/train_step.py [--seq-len 1024 --rounds 20 --out train_step_cpu]

Times are taken in turn within one process; each peak in a process of its own. x-transformers runs both eager and with
attn_flash=True (SDPA), with the same sizes and the same rotary width; its window of w + 1 keys is given W - 1.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import in_fresh_process, median_ms, peak_over, quartiles, write_rows
from torch import Tensor

SIZES = {"dim": 256, "depth": 4, "heads": 4}
VOCABULARY, BATCH, WINDOW = 256, 2, 128


def ours(seq_len: int, **flags: Any) -> Callable[[Tensor], Tensor]:
    """xattn's model as a loss of token ids."""
    from xattn import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(**SIZES, rotary_pos_emb=True, use_rmsnorm=True, **flags)
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=seq_len, attn_layers=layers))


def theirs(seq_len: int, **flags: Any) -> Callable[[Tensor], Tensor]:
    """x-transformers' model as a loss of token ids; its default head width is 64."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    dim_head = SIZES["dim"] // SIZES["heads"]
    layers = Decoder(
        **SIZES, attn_dim_head=dim_head, rotary_pos_emb=True, rotary_emb_dim=dim_head, use_rmsnorm=True,
        ff_no_bias=True, verbose=False, **flags,
    )  # fmt: skip
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=seq_len, attn_layers=layers))


CASES: dict[str, dict[str, Callable[[int], Callable[[Tensor], Tensor]]]] = {
    "dense": {
        "xattn": ours,
        "x-transformers flash": partial(theirs, attn_flash=True),
        "x-transformers eager": theirs,
    },
    f"window {WINDOW}": {
        "xattn": partial(ours, sliding_window=WINDOW),
        "x-transformers flash": partial(theirs, attn_flash=True, attn_max_attend_past=WINDOW - 1),
        "x-transformers eager": partial(theirs, attn_max_attend_past=WINDOW - 1),
    },
    "selective": {
        "xattn": partial(ours, attn_selective=True),
        "x-transformers eager": partial(theirs, attn_selective=True),
    },
}


def training_step(make: Callable[[int], Any], seq_len: int) -> Callable[[], None]:
    """A closure that trains the model one step on random tokens."""
    torch.manual_seed(0)
    model = make(seq_len)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, VOCABULARY, (BATCH, seq_len + 1))

    def step() -> None:
        optim.zero_grad(set_to_none=True)
        model(ids).backward()
        optim.step()

    return step


def peak_bytes(case: str, library: str, seq_len: int) -> int:
    """What one step adds to a process that has trained a short sequence before (so that no set-up is counted)."""
    step = training_step(CASES[case][library], seq_len)
    training_step(CASES[case][library], 64)()
    return peak_over(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", default=None, help="write rows to benchmarks/results/OUT.jsonl")
    parser.add_argument("--peak", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak_bytes(*args.peak, args.seq_len)))
        return
    rows = []
    for case, libraries in CASES.items():
        steps = {name: training_step(make, args.seq_len) for name, make in libraries.items()}
        times = median_ms(steps, rounds=args.rounds)
        for name in libraries:
            low, mid, high = quartiles(times[name])
            ratios = [t / own for t, own in zip(times[name], times["xattn"], strict=True)]
            peak = in_fresh_process(str(Path(__file__)), "--seq-len", str(args.seq_len), "--peak", case, name)
            rows.append({
                "case": case, "library": name, "seq_len": args.seq_len, "batch": BATCH, **SIZES, "dtype": "float32",
                "step_ms": round(mid, 1), "step_ms_quartiles": [round(low, 1), round(high, 1)],
                "times_xattn": round(statistics.median(ratios), 2), "peak_mib": round(peak / 2**20, 1),
            })  # fmt: skip
            row = rows[-1]
            print(f"{case:12} {name:22} {row['step_ms']:9.1f} ms  {row['times_xattn']:5.2f}x  {row['peak_mib']:8.1f} MiB")
    if args.out:
        print(f"rows in {write_rows(args.out, rows)}")


if __name__ == "__main__":
    main()
