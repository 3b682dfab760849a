"""One training step (forward, backward, AdamW) against x-transformers: time and peak memory, dense and windowed.

    pip install x-transformers
    python benchmarks/train_step.py [--seq-len 1024 --rounds 20 --out train_step_cpu]
    python benchmarks/train_step.py --gpu [--dry]         # compiled, bf16, a byte model of 25 M parameters; see attention.py

Times are taken in turn within one process; each peak in a process of its own. x-transformers runs both eager and with
attn_flash=True (SDPA), with the same sizes and the same rotary width; its window of w + 1 keys is given W - 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import torch
from harness import RESULTS, Rows, in_fresh_process, median_ms, peak_over, quartiles, write_rows
from torch import Tensor

SIZES = {"dim": 256, "depth": 4, "heads": 4}
VOCABULARY, BATCH, WINDOW = 256, 2, 128
# on a GPU: a byte model of 25 M parameters, 32k tokens a step
GPU_SIZES, GPU_TOKENS, GPU_LENGTHS = {"dim": 512, "depth": 8, "heads": 8}, 32768, (4096, 1024)
DRY_SIZES, DRY_TOKENS, DRY_LENGTHS = {"dim": 32, "depth": 1, "heads": 2}, 128, (64,)


def ours(seq_len: int, sizes: dict[str, int] = SIZES, **flags: Any) -> Callable[[Tensor], Tensor]:
    """xattn's model as a loss of token ids."""
    from xattn import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(**sizes, rotary_pos_emb=True, use_rmsnorm=True, **flags)
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=seq_len, attn_layers=layers))


def theirs(seq_len: int, sizes: dict[str, int] = SIZES, **flags: Any) -> Callable[[Tensor], Tensor]:
    """x-transformers' model as a loss of token ids; its default head width is 64."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    dim_head = sizes["dim"] // sizes["heads"]
    layers = Decoder(
        **sizes, attn_dim_head=dim_head, rotary_pos_emb=True, rotary_emb_dim=dim_head, use_rmsnorm=True,
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


# On a GPU

VARIANTS: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "xattn dense": ours,
    "xattn dense, own kernels": partial(ours, attn_backend="triton"),
    "xattn selective": partial(ours, attn_selective=True, attn_backend="triton"),
    "x-transformers flash": partial(theirs, attn_flash=True),
    "x-transformers selective": partial(theirs, attn_selective=True),
}


def know_triton() -> None:
    """Our kernels among the back-ends, where this version does not list them by itself."""
    from xattn.ops import backends, triton

    if "triton" not in [backend.name for backend in backends.BACKENDS]:
        own = backends.Backend(name="triton", supports=triton.SUPPORTS, limits=triton.limits, run=triton.run)
        backends.BACKENDS = (*backends.BACKENDS, own)


def gpu_step(name: str, seq_len: int, *, dry: bool, replay: bool = False) -> tuple[Callable[[], Tensor], int]:
    """A compiled training step in bf16 on random bytes, and the model's number of parameters.

    replay: launches are recorded once and replayed (torch.compile's mode "reduce-overhead"): the host's speed does not count.
    """
    torch.manual_seed(0)
    sizes, tokens = (DRY_SIZES, DRY_TOKENS) if dry else (GPU_SIZES, GPU_TOKENS)
    model = VARIANTS[name](seq_len, sizes=sizes).to(gpu.device())
    # a graph that broke would cost us the host's time at every layer
    mode = "reduce-overhead" if replay else None
    run = model if dry else torch.compile(model, dynamic=False, fullgraph=name.startswith("xattn"), mode=mode)
    optim = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    ids = torch.randint(0, VOCABULARY, (tokens // seq_len, seq_len + 1), device=gpu.device())

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # the interpreter knows no bf16
        with nullcontext() if dry else torch.autocast("cuda", torch.bfloat16):
            loss = run(ids)
        loss.backward()
        optim.step()
        optim.zero_grad(set_to_none=True)
        return loss.detach()

    return step, sum(p.numel() for p in model.parameters())


def measure_on_gpu(
    rows: Rows, *, budget_s: float = 560, dry: bool = False, only: str = "", compile_only: bool = False, replay: bool = False,
    ahead: bool = True, scratch_mib: int = 256,
) -> None:  # fmt: skip
    """Tokens a second and peak memory of every variant at every length; a row each. ahead: other processes compile first.

    scratch_mib: what rows say of selection's cap, which the caller sets.
    """
    start = time.monotonic()
    know_triton()
    if ahead and not dry and not compile_only:
        compile_ahead()
    for seq_len in DRY_LENGTHS if dry else GPU_LENGTHS:
        for name in VARIANTS:
            if only not in f"{name} N{seq_len}":
                continue
            tokens = DRY_TOKENS if dry else GPU_TOKENS
            how = "eager" if dry else "compiled, replayed" if replay else "compiled"
            row = {"section": "train", "case": f"N{seq_len} B{tokens // seq_len}", "what": name, "n": seq_len, "pass": "step",
                   "how": how, "scratch_mib": scratch_mib}  # fmt: skip
            if time.monotonic() - start > budget_s:
                row["note"] = f"skipped: {budget_s:.0f} s are over"
            else:
                row |= _measure(name, seq_len, tokens, dry=dry, compile_only=compile_only, replay=replay)
            rows.add(**row)
            print(f"train      {row['case']:12} {name:26} " + " ".join(f"{k}={row[k]}" for k in row if k not in (
                "section", "case", "what", "n", "pass", "scratch_mib")), flush=True)  # fmt: skip
            gpu.forget()


def _measure(name: str, seq_len: int, tokens: int, *, dry: bool, compile_only: bool, replay: bool) -> dict[str, Any]:
    try:
        step, parameters = gpu_step(name, seq_len, dry=dry, replay=replay)
        begun = time.monotonic()
        loss = [float(step()) for _ in range(1 if compile_only or dry else 4)][-1]
        first_s = round(time.monotonic() - begun, 1)
        if compile_only:
            return {"first_s": first_s}
        peak = gpu.peak_mib(step)
        total = torch.cuda.max_memory_allocated() / gpu.MIB if gpu.on_gpu() else None
        ms = gpu.median_ms(step, rep_ms=600, least=8)
    except ModuleNotFoundError as error:
        return {"note": f"skipped: package {error.name} is not installed"}
    except Exception as error:
        if gpu.is_lost(error):
            raise
        memory = gpu.out_of_memory(error)
        return {"oom": memory, "note": f"{'out of memory' if memory else 'failed'}: {gpu.reason(error)}"}
    return {
        "median_ms": round(ms, 3), "tokens_s": round(tokens / ms * 1e3), "peak_mib": peak and round(peak, 1),
        "total_mib": total and round(total, 1), "loss_nats": round(loss, 4), "parameters": parameters, "first_s": first_s,
    }  # fmt: skip


def compile_ahead() -> None:
    """Fills the compilers' caches on disk, a process a variant; the dense definition of selection is too big to do so."""
    begun = time.monotonic()
    names = [f"{name} N{seq_len}" for name in VARIANTS for seq_len in GPU_LENGTHS if name != "x-transformers selective"]
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, __file__, "--gpu", "--compile-only", "--only"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    workers = [subprocess.Popen([*command, name], env=env, **quiet) for name in names]
    for worker in workers:
        try:
            worker.wait(timeout=max(1.0, 200 - (time.monotonic() - begun)))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    print(f"-- compiled ahead by {len(workers)} processes: {time.monotonic() - begun:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", default=None, help="write rows to benchmarks/results/OUT.jsonl")
    parser.add_argument("--peak", nargs=2, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--gpu", action="store_true", help="compiled steps of a byte model of 25 M parameters, in bf16")
    parser.add_argument("--dry", action="store_true", help="with --gpu: a tiny model on the CPU, by the interpreter")
    parser.add_argument("--only", default="", help="with --gpu: variants whose name holds this, as in «selective N4096»")
    parser.add_argument("--replay", action="store_true", help="with --gpu: launches are replayed (mode «reduce-overhead»)")
    parser.add_argument("--scratch-mib", type=int, default=256, help="with --gpu: what selection may hold at once")
    parser.add_argument("--no-ahead", action="store_true", help="with --gpu: no processes compile first; the caches are full")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.gpu:
        if args.dry:
            gpu.go_dry()
        file = None if args.dry or args.compile_only else RESULTS / "attention.jsonl"
        from xattn import scratch_limit

        with scratch_limit(args.scratch_mib * 2**20):
            how = {"dry": args.dry, "compile_only": args.compile_only, "replay": args.replay, "ahead": not args.no_ahead}
            measure_on_gpu(Rows(file), only=args.only, scratch_mib=args.scratch_mib, **how)
        return
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
