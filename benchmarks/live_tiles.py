"""How much of a trained selective model is dead: keys, and blocks of 64 keys, which is what kernels can skip.

    python benchmarks/live_tiles.py --text 'corpora/*.txt' --n 4096 --steps 300
    python benchmarks/live_tiles.py                                   # Tiny Shakespeare, a toy size, on the CPU too

Trains a byte model with selective attention in every layer, then reads F off its layers on text it has not seen. A key is
dead for a query once F >= T; a tile (64 queries x 64 keys below the diagonal) once all its keys are dead for all its
queries. Scattered living keys leave every tile alive: then only compaction could gain from the dead ones.
"""

import argparse
import glob
import time
from typing import Any

import torch
from harness import (
    RESULTS,
    ROOT,
    Rows,  # noqa: F401  (puts this checkout on the path)
)
from torch import Tensor

import xattn
from xattn.ops.triton import _rotated

THRESHOLDS = (5.0, 10.0, 20.0, 30.0)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default=str(ROOT / "experiments/corpora/tinyshakespeare.txt"), help="a glob of text files")
    parser.add_argument("--n", type=int, default=512, help="length trained and judged at")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--judge", type=int, default=4, help="rows judged")
    return parser.parse_args(argv)


def train(args: argparse.Namespace, device: str) -> tuple[Any, Tensor, float]:
    """The trained model, rows of held-out ids (judge n), and the mean training loss of the last tenth of the steps."""
    raw = b"".join(open(path, "rb").read() for path in sorted(glob.glob(args.text)))
    ids = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device).long()
    cut = len(ids) * 95 // 100
    torch.manual_seed(0)
    model = xattn.build(
        num_tokens=256, max_seq_len=args.n, dim=args.dim, depth=args.depth, heads=args.heads, rotary_pos_emb=True,
        use_rmsnorm=True, ff_glu=True, ff_swish=True, attn_selective=True,
    ).to(device)  # fmt: skip
    ar = xattn.AutoregressiveWrapper(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")
    source, losses = torch.Generator().manual_seed(0), []
    for step in range(args.steps):
        starts = torch.randint(0, cut - args.n - 1, (args.batch,), generator=source)
        rows = torch.stack([ids[s : s + args.n + 1] for s in starts.tolist()])
        rise, fall = (step + 1) / (0.1 * args.steps), (args.steps - step) / (0.5 * args.steps)
        optimiser.param_groups[0]["lr"] = args.lr * min(1.0, rise, fall)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = ar(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    held = torch.stack([ids[s : s + args.n] for s in range(cut, len(ids) - args.n, max((len(ids) - cut) // args.judge, 1))])
    return model, held[: args.judge], float(torch.stack(losses[-max(args.steps // 10, 1) :]).mean())


@torch.no_grad()
def shares(model: Any, ids: Tensor) -> list[dict[str, Any]]:
    """Of each layer and threshold: the share of (query, key) pairs alive, and of tiles below the diagonal."""
    found, n = [], ids.shape[1]
    blocks = n // 64

    def look(layer: int, module: Any, args: tuple[Any, ...]) -> None:
        spec, (x, layout) = module.spec, args
        s = spec.selection.sim_head
        q, k = (to(x).unflatten(2, (-1, spec.dim_head)).transpose(1, 2) for to in (module.to_q, module.to_k))
        q, k = (_rotated(t, spec.positions, layout) for t in (module.q_norm(q), module.k_norm(k)))
        alive = {t: [0, 0] for t in THRESHOLDS}
        below = torch.ones(blocks, blocks, dtype=torch.bool, device=x.device).tril(-1)
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        for row in range(len(x)):
            sim = (q[row, s].float() @ k[row, s].float().T) * spec.scale
            votes = sim.relu() * causal.tril(-1)
            votes[:, 0] = 0
            penalty = votes.cumsum(0) - votes
            # a tile is dead once its keys are dead for its first query
            least = penalty[::64, :].unflatten(1, (blocks, 64)).amin(2)
            for t in THRESHOLDS:
                alive[t][0] += int(((penalty < t) & causal).sum())
                alive[t][1] += int(((least < t) & below).sum())
        for t in THRESHOLDS:
            pairs, tiles = len(x) * n * (n + 1) // 2, len(x) * int(below.sum())
            found.append({"layer": layer, "threshold": t, "live_pairs": alive[t][0] / pairs, "live_tiles": alive[t][1] / tiles})

    hooks = [
        block.attn.branch.register_forward_pre_hook(lambda module, args, i=i: look(i, module, args))
        for i, block in enumerate(model.attn_layers.blocks)
    ]
    model.eval()
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def main(argv: list[str] | None = None) -> None:
    """Train, look, print a table, and append rows to results/live_tiles.jsonl."""
    args = arguments(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begun = time.monotonic()
    model, held, loss = train(args, device)
    took = time.monotonic() - begun
    print(f"n {args.n}, {args.steps} steps of {args.batch * args.n:,} bytes in {took:.0f} s, loss {loss:.3f} nats a byte")
    rows = Rows(RESULTS / "live_tiles.jsonl" if device == "cuda" else None)
    found = shares(model, held)
    for row in found:
        rows.add(section="live_tiles", **vars(args) | {"text": None}, loss_nats=round(loss, 4), **row)
    print("layer  " + "  ".join(f"T={t:g}: pairs tiles" for t in THRESHOLDS))
    for layer in sorted({row["layer"] for row in found}):
        mine = {row["threshold"]: row for row in found if row["layer"] == layer}
        print(f"{layer:5}  " + "  ".join(f"{mine[t]['live_pairs']:10.3f} {mine[t]['live_tiles']:5.3f}" for t in THRESHOLDS))


if __name__ == "__main__":
    main()
