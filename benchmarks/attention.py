"""Attention side by side in one process: SDPA, FlexAttention, x-transformers and ours, checked, timed, and held to the bars.

    pip install x-transformers                            # its rows are skipped without it
    python benchmarks/attention.py causal window selective selfextend everything memory
    python benchmarks/attention.py scaling                # the lines of benchmarks/plot.py
    python benchmarks/attention.py train                  # one training step of a byte model
    python benchmarks/attention.py all --dry              # without a GPU: tiny sizes, the interpreter, no figures

Ours is compared with the float64 definition before it is timed, and not timed when it is wrong. Rows go to
benchmarks/results/attention.jsonl as they come. Times are medians with a cold L2; bars take CUDA-graph replay where it was
captured. Other processes compile everything first, in parallel, into the caches on disk.
"""

import argparse
import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__)
MORE = ("train",)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from table import SECTIONS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=[*SECTIONS, *MORE, "all"])
    parser.add_argument("--only", default="", help="cases whose name holds this, as in «N4096 D64»")
    parser.add_argument("--scratch-mib", type=int, default=256, help="what selection may hold at once")
    parser.add_argument("--rep-ms", type=float, default=30, help="how long each measurement repeats")
    parser.add_argument("--hows", nargs="+", choices=("eager", "graph"), default=["eager", "graph"], help="how calls are timed")
    parser.add_argument("--budget-s", type=float, default=560, help="no new case begins after this many seconds")
    parser.add_argument("--jobs", type=int, default=None, help="processes that compile before the timed pass (0: none)")
    parser.add_argument("--out", type=Path, default=None, help="rows are appended here (default: results/attention.jsonl)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, without the peers that need a GPU")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.sections = [*SECTIONS, *MORE] if "all" in args.sections else list(dict.fromkeys(args.sections))
    return args


class Run:
    """One run of the command: its rows, its clock, and the peers that ran out of memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from gpu import on_gpu
        from harness import RESULTS, Rows

        self.args, self.start = args, time.monotonic()
        self.dtype = torch.float32 if args.dry else torch.bfloat16
        file = args.out or (None if args.dry or args.worker else RESULTS / "attention.jsonl")
        self.rows = Rows(file)
        self.stopped: set[tuple[str, str, str]] = set()
        if not args.dry and not on_gpu():
            raise SystemExit("no CUDA GPU here: add --dry to try the command without one")
        # collections before each capture then have little to look at
        gc.collect()
        gc.freeze()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self.start

    def cases(self, section: str) -> list[Any]:
        """Those asked for; tiny when dry."""
        from table import cases, tiny

        found = [case for case in cases(section) if self.args.only in case.name]
        return list({case.name: case for case in map(tiny, found)}.values()) if self.args.dry else found

    def add(self, case: Any, what: str, **figures: Any) -> None:
        """One row, on disk and on the screen."""
        row = {"section": case.section, "case": case.name, "what": what, "n": case.n, "dtype": str(self.dtype)[6:],
               "scratch_mib": self.args.scratch_mib, **figures}  # fmt: skip
        self.rows.add(**row)
        ms, tflops, peak = (row.get(name) for name in ("median_ms", "tflops", "peak_mib"))
        figures = f"{ms:9.3f} ms {tflops or 0:6.0f} TFLOP/s" if ms is not None else f"{'':9}    {'':14}"
        print(f"{case.section:10} {case.label:36} {what:24} {row.get('pass', ''):2} {row.get('how', ''):5} {figures} "
              f"{'' if peak is None else f'{peak:8.0f} MiB'} {row.get('note', '')}", flush=True)  # fmt: skip

    def case(self, case: Any) -> None:
        """Every peer of a case, one after the other."""
        from gpu import forget, is_lost, out_of_memory, reason
        from peers import unable

        for what in case.who:
            key = (case.section, what, " ".join(case.flags))
            if (why := unable(what)) or (key in self.stopped and (why := "out of memory at a smaller size")):
                self.add(case, what, note=f"skipped: {why}")
                continue
            try:
                self.peer(case, what)
            except Exception as error:
                if is_lost(error):
                    raise
                memory = out_of_memory(error)
                if memory:
                    self.stopped.add(key)
                else:
                    traceback.print_exc(limit=4)
                self.add(case, what, oom=memory, note=f"{'out of memory' if memory else 'failed'}: {reason(error)}")
            forget()

    def peer(self, case: Any, what: str) -> None:
        """Check where it is ours, then each pass eager and by graph replay."""
        import torch
        from check import check
        from gpu import captured, median_ms, out_of_memory, peak_mib, reason
        from peers import OWN, PEERS, compiled_graphs, draw, ours
        from table import FLEX, OURS_CAUSAL, XT_COMPILED

        share = None
        if what in OWN:
            checked = replace(case, flags={}, documents=0) if what == OURS_CAUSAL else case
            share = round(check(checked, self.dtype, ours, n=case.n if self.args.dry else None), 3)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        x = draw(case, self.dtype)
        make = PEERS[what](x)
        learned = getattr(make, "learned", x.learned)

        def forward() -> Any:
            with torch.no_grad():
                return make()

        def both() -> Any:
            return torch.autograd.grad(make(), learned, x.dout)

        for on in case.passes:
            work = forward if on == "f" else both
            begun = time.monotonic()
            got = work()
            if what in (FLEX, XT_COMPILED) and compiled_graphs() == 0:
                raise RuntimeError("torch.compile made no graph: it fell back to eager")
            if what in OWN and not all(bool(t.isfinite().all()) for t in (got if isinstance(got, tuple) else (got,))):
                raise RuntimeError("a result is not finite at this size")
            first_s = round(time.monotonic() - begun, 2)
            del got
            if self.args.worker:
                continue
            peak = peak_mib(work)
            dense = 4 * case.b * case.h * case.n**2 / 2**20
            if what == FLEX and peak is not None and case.n >= 4096 and peak >= dense:
                raise RuntimeError(f"peak {peak:.0f} MiB is that of dense logits ({dense:.0f} MiB): it fell back to eager")
            # a case that is timed eagerly alone (it is too large to capture) always is
            for how in [how for how in case.hows if how in self.args.hows] or case.hows:
                figures = {"pass": on, "how": how, "peak_mib": peak, "first_s": first_s, "stick_share": share}
                try:
                    ms = median_ms(work if how == "eager" else captured(work), rep_ms=self.args.rep_ms)
                except Exception as error:
                    if how == "eager" or out_of_memory(error):
                        raise
                    self.add(case, what, **figures, note=f"capture failed: {reason(error)}")
                    continue
                self.add(case, what, **figures, median_ms=round(ms, 4), tflops=round(case.flops(on) / ms / 1e9, 1))

    def sections(self) -> None:
        """All that was asked for, within the budget."""
        for section in self.args.sections:
            begun = time.monotonic()
            if section == "train":
                from train_step import measure_on_gpu

                left, ahead = self.args.budget_s - self.seconds, self.args.jobs != 0
                measure_on_gpu(self.rows, budget_s=left, dry=self.args.dry, ahead=ahead, scratch_mib=self.args.scratch_mib)
            else:
                for case in self.cases(section):
                    if self.seconds > self.args.budget_s:
                        self.add(case, "", note=f"skipped: {self.args.budget_s:.0f} s are over")
                        continue
                    self.case(case)
            print(f"-- {section}: {time.monotonic() - begun:.0f} s", flush=True)

    def work(self) -> None:
        """As one of several workers: run its share of the cases once, so that the caches on disk are full."""
        from peers import OWN
        from table import XT_EAGER

        number, count = map(int, self.args.worker.split("/"))
        # what compiles alike goes to one worker: ours whatever the length, the others case by case
        groups: dict[Any, list[tuple[Any, str]]] = {}
        for section in self.args.sections:
            for case in self.cases(section) if section != "train" else ():
                for what in case.who:
                    if what != XT_EAGER and not (section in ("scaling", "memory") and case.n > 8192):
                        key = (what, case.d, *case.flags) if what in OWN else (what, case.name)
                        groups.setdefault(key, []).append((case, what))
        for group in list(groups.values())[number::count]:
            for case, what in group:
                self.case(replace(case, who=(what,)))


def compile_ahead(args: argparse.Namespace, jobs: int) -> None:
    """Fills Triton's and Inductor's caches from several processes; what fails there is tried again in the timed pass."""
    begun = time.monotonic()
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(SCRIPT), *args.sections, "--only", args.only, "--scratch-mib", str(args.scratch_mib)]
    command += ["--dry"] if args.dry else []
    workers = [
        subprocess.Popen([*command, "--worker", f"{i}/{jobs}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        for i in range(jobs)
    ]
    for worker in workers:
        try:
            worker.wait(timeout=max(1.0, 180 - (time.monotonic() - begun)))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    lost = sum(worker.returncode != 0 for worker in workers)
    print(f"-- compiled ahead by {jobs} processes, {lost} of them lost: {time.monotonic() - begun:.0f} s", flush=True)


def verdicts(run: Run) -> list[dict[str, Any]]:
    """Every bar of the sections that ran."""
    from table import growth, judge, train_bars

    found = []
    for section in run.args.sections:
        if section == "train":
            found += train_bars(run.rows.rows)
            continue
        found += [judge(case, bar, run.rows.rows) for case in run.cases(section) for bar in case.bars]
        if not run.args.dry and not run.args.only:
            found += growth(section, run.rows.rows)
    return found


def show(bars: Iterable[dict[str, Any]]) -> None:
    """The short table."""
    print(f"\n{'section':10} {'case':36} {'bar':52} {'measured':>9} {'must':>8} {'reach':>8}  verdict")
    for bar in bars:
        value, must, reach = ("-" if bar[name] is None else f"{bar[name]:.4g}" for name in ("value", "must", "reach"))
        print(f"{bar['section']:10} {bar['case'][:36]:36} {bar['bar'][:52]:52} {value:>9} {must:>8} {reach:>8}  "
              f"{bar['verdict']} {bar['how']}")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.dry:
        from gpu import go_dry

        go_dry()
    from xattn import scratch_limit

    with scratch_limit(args.scratch_mib * 2**20):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """A whole run, or a process that only compiles."""
    run = Run(args)
    if args.worker:
        run.work()
        return
    print(" ".join(f"{key}={value}" for key, value in run.rows.source.items()), flush=True)
    jobs = args.jobs if args.jobs is not None else 0 if args.dry else max(0, min(12, (os.cpu_count() or 1) - 2))
    if jobs > 1 and args.sections != ["train"]:
        compile_ahead(args, jobs)
    try:
        run.sections()
    finally:
        show(verdicts(run))
        print(f"{run.seconds:.0f} s" + (f"; rows in {run.rows.file}" if run.rows.file else ""))


if __name__ == "__main__":
    main()
