"""Chooses the tile sizes of xattn/kernels/tiles.py: every configuration is checked against float64, then timed.

    python benchmarks/tune.py                                  # all kernels, kinds and widths
    python benchmarks/tune.py --kernels dq --kinds select --widths 64 --n 8192
    python benchmarks/tune.py --dry                            # one configuration a kernel by the interpreter

Compilation is what costs: worker processes compile and check every n-th configuration (which fills Triton's cache on disk),
then one process times those that were right, alone on the GPU: a whole forward, or forward and backward, by graph replay with
only that kernel's tile replaced. A worker that a configuration kills is replaced, and the configuration is out.
"""

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KERNELS = ("forward", "dkdv", "dq")
# selection's own kernels: their tiles are always 64 x 64
SMALL = ("fill", "spread", "add")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 512},
    "select": {"attn_selective": True},
    "extend": {"rotary_pos_emb": True, "self_extend_group": 8, "self_extend_window": 1024},
}
TOKENS, HEADS = 16384, 8
LIMIT_S = 90


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS + SMALL, default=list(KERNELS + SMALL))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--block-i", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--block-j", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--warps", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--n", type=int, default=4096, help="tokens a row in the timed pass, 16k in all")
    parser.add_argument("--jobs", type=int, default=None, help="processes that compile and check (default: 14, or fewer)")
    parser.add_argument("--budget-s", type=float, default=560, help="nothing new begins after this many seconds")
    parser.add_argument("--top", type=int, default=4, help="how many to print of each")
    parser.add_argument("--out", type=Path, default=None, help="rows are appended here (default: results/tune.jsonl)")
    parser.add_argument("--dry", action="store_true", help="one configuration a kernel, tiny, by the interpreter")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def configurations(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All that is asked for; the table's own choice is always among them, first in its group."""
    found = []
    for kind, width, kernel in itertools.product(args.kinds, args.widths, args.kernels):
        if kernel in SMALL and kind != "select":
            continue
        blocks = ([64], [64]) if kernel in SMALL else (args.block_i, args.block_j)
        sizes = (*blocks, args.warps, [1, *args.stages] if kernel in SMALL else args.stages)
        sweep = [tuple(s) for s in itertools.product(*sizes)]
        own = present(kernel, kind, width)
        tiles = [own, *(t for t in sweep if t != own)]
        found += [{"kernel": kernel, "kind": kind, "width": width, "tile": list(t)} for t in (tiles[:1] if args.dry else tiles)]
    return found


def present(kernel: str, kind: str, width: int) -> tuple[int, ...]:
    """What the table says today."""
    from xattn.kernels.tiles import small, tile

    if kernel in SMALL:
        launch = small(kernel, block_d=width, itemsize=2, extend=False)
        return 64, 64, launch["num_warps"], launch["num_stages"]
    kinds = {"select": kind == "select", "extend": kind == "extend", "window": kind == "window"}
    return tuple(tile(kernel, block_d=width, itemsize=2, **kinds))


# In a worker


class Bench:
    """Checks and times configurations; keeps the truth and the inputs of each kind and width."""

    def __init__(self, *, n: int, dry: bool) -> None:
        import torch

        self.n, self.dry = n, dry
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.truths: dict[tuple[str, int], Any] = {}
        self.inputs: dict[tuple[str, int], Any] = {}

    def check(self, kernel: str, kind: str, width: int, tile: list[int]) -> dict[str, Any]:
        """Whether all results are right at a small size."""
        from check import Truth, WrongResult
        from peers import ours
        from table import Case

        from xattn.kernels.tiles import Tile, override

        if (kind, width) not in self.truths:
            case = Case(section="tune", b=1, h=2 if self.dry else HEADS, n=512, d=width, flags=KINDS[kind])
            small = case.small(64, d=16) if self.dry else case.small(1024 if kind == "select" else 512)
            self.truths[kind, width] = Truth(small, self.dtype)
        try:
            with override(**{kernel: Tile(*tile)}):
                shares = self.truths[kind, width].compare(ours)
        except WrongResult as error:
            return {"ok": False, "note": f"wrong: {error}"}
        return {"ok": True, "stick_share": round(max(shares.values()), 3)}

    def time(self, kernel: str, kind: str, width: int, tile: list[int]) -> dict[str, Any]:
        """Median milliseconds of the forward, or of forward and backward, with this tile."""
        import torch
        from gpu import captured, median_ms
        from peers import draw, recorded
        from table import Case

        from xattn.kernels.autograd import attention
        from xattn.kernels.tiles import Tile, override

        if (kind, width) not in self.inputs:
            self.inputs.clear()
            n = 64 if self.dry else self.n
            case = Case(section="tune", b=1 if self.dry else max(1, TOKENS // n), h=2 if self.dry else HEADS, n=n,
                        d=16 if self.dry else width, flags=KINDS[kind])  # fmt: skip
            x = draw(case, self.dtype)
            inputs, options = recorded(x)
            for name in ("q", "k", "v", "far_q", "far_k"):
                t = getattr(inputs, name)
                setattr(inputs, name, t if t is None else t.detach().requires_grad_())
            self.inputs[kind, width] = (x, inputs, options, case)
        x, inputs, options, case = self.inputs[kind, width]
        leaves = [t for t in (inputs.q, inputs.k, inputs.v, inputs.far_q, inputs.far_k) if t is not None]

        def forward() -> Any:
            with torch.no_grad():
                return attention(inputs, options)

        def both() -> Any:
            return torch.autograd.grad(attention(inputs, options)[0], leaves, x.dout)

        on, work = ("f", forward) if kernel == "forward" else ("fb", both)
        with override(**{kernel: Tile(*tile)}):
            ms = median_ms(work if self.dry else captured(work), rep_ms=20)
        return {"pass": on, "median_ms": round(ms, 4), "tflops": round(case.flops(on) / ms / 1e9, 1), "case": case.name}


def serve(args: argparse.Namespace) -> None:
    """Reads one job a line, answers one line each; an error that leaves the GPU unusable ends the process."""
    import gc

    from gpu import is_lost, reason

    # what libraries print must not land among the answers
    answers, sys.stdout = sys.stdout, sys.stderr
    bench = Bench(n=args.n, dry=args.dry)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        lost = False
        try:
            answer = getattr(bench, job["do"])(job["kernel"], job["kind"], job["width"], job["tile"])
        except Exception as error:
            lost = is_lost(error)
            answer = {"ok": False, "note": f"failed: {reason(error)}"}
        print(json.dumps(answer), file=answers, flush=True)
        if lost:
            # tear-down would hang on the broken context
            os._exit(1)


# In the parent


class Worker:
    """A process that answers jobs, replaced when it dies or hangs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.process = args, None

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to a job, or that it never came."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            watch = threading.Timer(LIMIT_S, self.process.kill)
            watch.start()
            line = self.process.stdout.readline()
            watch.cancel()
            if line:
                return json.loads(line)
        except OSError:
            pass
        self.stop()
        return {"ok": False, "note": f"failed: the process died or took more than {LIMIT_S} s"}

    def _start(self) -> None:
        command = [sys.executable, __file__, "--worker", "--n", str(self.args.n), *(["--dry"] if self.args.dry else [])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def check_all(args: argparse.Namespace, jobs: list[dict[str, Any]], workers: int, until: float) -> list[dict[str, Any]]:
    """Each configuration with its verdict, by several workers."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(len(jobs)):
        waiting.put(i)
    answers: list[dict[str, Any]] = [{"ok": False, "note": "not tried: out of time"} for _ in jobs]

    def drain() -> None:
        worker = Worker(args)
        while time.monotonic() < until:
            try:
                i = waiting.get_nowait()
            except queue.Empty:
                break
            answers[i] = worker.ask({"do": "check", **jobs[i]})
        worker.stop()

    threads = [threading.Thread(target=drain) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [{**job, **answer} for job, answer in zip(jobs, answers, strict=True)]


def groups(rows: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, str, int], list[dict[str, Any]]]]:
    """Rows by kernel, kind and width, the fastest first."""
    keys = dict.fromkeys((row["kernel"], row["kind"], row["width"]) for row in rows)
    for key in keys:
        mine = [row for row in rows if (row["kernel"], row["kind"], row["width"]) == key]
        yield key, sorted(mine, key=lambda row: row.get("median_ms") or float("inf"))


def show(rows: list[dict[str, Any]], top: int) -> None:
    """The best of each group beside the table's choice, as lines that xattn/kernels/tiles.py can take."""
    for (kernel, kind, width), mine in groups(rows):
        own = list(present(kernel, kind, width))
        now = next((row.get("median_ms") for row in mine if row["tile"] == own), None)
        timed = [row for row in mine if row.get("median_ms")]
        wrong = sum("wrong" in row.get("note", "") for row in mine)
        print(f"\n{kernel} {kind} d{width}: table {tuple(own)} {'-' if now is None else f'{now:.4f} ms'}; {len(timed)} timed, "
              f"{wrong} wrong, {len(mine) - len(timed) - wrong} failed or not tried")  # fmt: skip
        for row in timed[:top]:
            gain = "" if now is None else f"  {row['median_ms'] / now:.3f} of the table's"
            print(f"    Tile({', '.join(map(str, row['tile']))})  {row['median_ms']:.4f} ms {row['tflops']:.0f} TFLOP/s{gain}")
        for row in mine:
            if "wrong" in row.get("note", ""):
                print(f"    Tile({', '.join(map(str, row['tile']))})  {row['note'][:100]}")


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.dry:
        from gpu import go_dry

        go_dry()
    from harness import RESULTS, Rows

    if args.worker:
        serve(args)
        return
    import torch

    if not args.dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here: add --dry to try the command without one")
    start = time.monotonic()
    jobs = configurations(args)
    count = args.jobs or max(1, min(14, (os.cpu_count() or 2) - 1, len(jobs)))
    file = args.out or (None if args.dry else RESULTS / "tune.jsonl")
    rows = Rows(file)
    print(f"{len(jobs)} configurations, {count} processes", flush=True)
    # a good half of the time for compiling
    checked = check_all(args, jobs, count, start + 0.6 * args.budget_s)
    print(f"checked: {sum(row['ok'] for row in checked)} right, {time.monotonic() - start:.0f} s", flush=True)
    alone = Worker(args)
    try:
        for row in checked:
            if row["ok"] and time.monotonic() - start < args.budget_s:
                job = {name: row[name] for name in ("kernel", "kind", "width", "tile")}
                row |= alone.ask({"do": "time", **job})
            rows.add(section="tune", present=row["tile"] == list(present(row["kernel"], row["kind"], row["width"])), **row)
    finally:
        alone.stop()
        show(rows.rows, args.top)
        print(f"\n{time.monotonic() - start:.0f} s" + (f"; rows in {file}" if file else ""))


if __name__ == "__main__":
    main()
