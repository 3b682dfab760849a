"""Decoding side by side in one process: our kernels against the card's copy bandwidth, and whole models against x-transformers.

    pip install x-transformers                            # its rows are skipped without it
    python benchmarks/decode.py attention bytes model     # or all
    python benchmarks/decode.py all --dry                 # without a GPU: tiny sizes, the interpreter, no figures

attention: one query a row against 32k keys, dense and window, budget, selective and Self-Extend; a case's rate is the bytes
of the keys and values it must read, over its time. bytes: what a layer's cache holds. model: a byte model of 25 M parameters,
256 bytes of prompt and 512 new ones; ours by its default, which on a GPU is static steps, their capture included. Attention of
ours is compared with the float64 definition before it is timed. Rows go to benchmarks/results/decode.jsonl as they come.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

SECTIONS = ("attention", "bytes", "model")
COPY, OURS, SDPA = "copy", "ours", "SDPA"
XT = "x-transformers"
# a byte model of 25 M parameters
SIZES, DRY_SIZES = {"dim": 512, "depth": 8, "heads": 8}, {"dim": 32, "depth": 2, "heads": 2}
PROMPT, NEW = 256, 512
# a model whose generation would take this many seconds is warmed up by a few tokens, and timed once
LONG_S, FEW = 8, 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """Decoding attention: b rows, h query heads over g key heads of width d, n tokens before; kept: keys that a cache holds."""

    name: str
    b: int = 8
    h: int = 32
    g: int = 8
    n: int = 32768
    d: int = 128
    kept: int | None = None
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> int:
        """Keys in the cache."""
        return min(self.n, self.kept or self.n)

    def small(self, n: int) -> "Case":
        """The same on n tokens, for a check against float64."""
        shrink = n / self.n
        sizes = {name: max(2, int(value * shrink)) for name, value in self.flags.items() if name.endswith("_window")}
        kept = None if self.kept is None else sizes.get("sliding_window", max(2, int(self.kept * shrink)))
        return replace(self, b=2, n=n, kept=kept, flags=self.flags | sizes)

    def read_bytes(self, itemsize: int) -> int:
        """Keys, values and votes that one step must read, at least."""
        votes = 4 if "attn_selective" in self.flags else 0
        return self.b * self.keys * (2 * self.g * self.d * itemsize + votes)


CASES = (
    Case(name="dense"),
    Case(name="dense, 8 query heads", h=8),
    Case(name="dense, one row", b=1),
    Case(name="window 1024", kept=1024, flags={"sliding_window": 1024}),
    Case(name="window 4096", kept=4096, flags={"sliding_window": 4096}),
    Case(name="selective", flags={"attn_selective": True}),
    Case(name="selective, budget 4096", kept=4096, flags={"attn_selective": True}),
    Case(name="Self-Extend", flags={"rotary_pos_emb": True, "self_extend_group": 8, "self_extend_window": 1024}),
)
MODELS: dict[str, dict[str, Any]] = {"dense": {}, "selective": {"attn_selective": True}}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=[*SECTIONS, "all"])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--budget-s", type=float, default=560, help="no new case begins after this many seconds")
    parser.add_argument("--out", type=Path, default=None, help="rows are appended here (default: results/decode.jsonl)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, no figures")
    args = parser.parse_args(argv)
    args.sections = list(SECTIONS) if "all" in args.sections else list(dict.fromkeys(args.sections))
    return args


class Given:
    """One case's tensors: a query a row (b h 1 d), the cache (b g j d) and where its keys stand."""

    def __init__(self, case: Case, dtype: Any) -> None:
        import torch
        from gpu import device

        from xattn.ops.layout import Layout
        from xattn.spec.flags import parse_attention

        torch.manual_seed(0)
        self.case, keys, at = case, case.keys, device()
        self.spec = parse_attention(causal=True, heads=case.h, kv_heads=case.g, dim_head=case.d, **case.flags)

        def normal(heads: int, n: int) -> torch.Tensor:
            return torch.randn(case.b, heads, n, case.d, device=at, dtype=dtype)

        self.q, self.k, self.v = normal(case.h, 1), normal(case.g, keys), normal(case.g, keys)
        newest = torch.full((1, 1), case.n - 1, device=at)
        self.layout = Layout(newest, kind="runs")
        if keys == case.n:
            self.keys = Layout.plain(keys, at)
        else:
            # a ring, in whose order nothing is sorted
            order = (torch.arange(keys, device=at) + keys // 2) % keys
            self.keys = Layout(order[None] + case.n - keys)
        carry = torch.rand(case.b, keys, device=at)
        self.carry = {"carry_bj": carry, "carry_rows": 1} if self.spec.selection is not None else {}


def ours(x: Given) -> Callable[[], Any]:
    """Our back-end on all that the case asks."""
    from xattn.ops.triton import run

    return lambda: run(x.q, x.k, x.v, spec=x.spec, layout_i=x.layout, layout_j=x.keys, **x.carry)


def sdpa(x: Given) -> Callable[[], Any]:
    """Torch's attention over a static cache."""
    from torch.nn.functional import scaled_dot_product_attention

    return lambda: scaled_dot_product_attention(x.q, x.k, x.v, enable_gqa=x.case.h != x.case.g)


def check(case: Case, dtype: Any, n: int) -> float:
    """The share of its stick that a small twin of the case takes up. Raises where it is more than all of it."""
    import check as checks
    import torch

    from xattn.ops.reference import reference

    x = Given(case.small(n), dtype)

    def definition(to: torch.dtype) -> tuple[torch.Tensor, ...]:
        carry = {name: t.to(torch.promote_types(to, torch.float32)) if name == "carry_bj" else t for name, t in x.carry.items()}
        q, k, v = (t.to(to) for t in (x.q, x.k, x.v))
        return reference(q, k, v, spec=x.spec, layout_i=x.layout, layout_j=x.keys, **carry)

    (right, _), (eager, _) = definition(torch.float64), definition(dtype)
    got = ours(x)()
    got = got[0] if isinstance(got, tuple) else got
    share = float((got.double() - right).abs().max()) / (2 * float((eager.double() - right).abs().max()))
    if not share <= 1:
        raise checks.WrongResult(f"{case.name}: {share:.2f} sticks")
    return share


class Run:
    """One run of the command: its rows and its clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from gpu import on_gpu
        from harness import RESULTS, Rows

        if not args.dry and not on_gpu():
            raise SystemExit("no CUDA GPU here: add --dry to try the command without one")
        self.args, self.start = args, time.monotonic()
        self.dtype = torch.float32 if args.dry else torch.bfloat16
        self.rows = Rows(args.out or (None if args.dry else RESULTS / "decode.jsonl"))

    def add(self, section: str, case: str, what: str, **figures: Any) -> None:
        """One row, on disk and on the screen."""
        self.rows.add(section=section, case=case, what=what, **figures)
        shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in figures.items()}
        told = " ".join(f"{name}={value}" for name, value in shown.items())
        print(f"{section:10} {case:26} {what:16} {told}", flush=True)

    def attempt(self, section: str, case: str, what: str, work: Callable[[], dict[str, Any]]) -> None:
        """A row of what work measures, or of why it could not."""
        from gpu import forget, is_lost, reason

        if time.monotonic() - self.start > self.args.budget_s:
            self.add(section, case, what, note=f"skipped: {self.args.budget_s:.0f} s are over")
            return
        try:
            self.add(section, case, what, **work())
        except Exception as error:
            if is_lost(error):
                raise
            self.add(section, case, what, note=f"failed: {reason(error)}")
        forget()

    def attention(self) -> None:
        """Every case, after the bandwidth of a copy that none of the caches outgrows."""
        import torch
        from gpu import device, median_ms

        size = 2**14 if self.args.dry else 2**31
        source = torch.empty(size, dtype=torch.int8, device=device())
        target = torch.empty_like(source)
        # a copy reads and writes
        ms = median_ms(partial(target.copy_, source), rep_ms=100)
        self.add("attention", "", COPY, median_ms=ms, gb_s=2e-6 * size / ms)
        del source, target
        for case in CASES:
            if self.args.only in case.name:
                for what, make in ((OURS, ours), (SDPA, sdpa)):
                    if what == OURS or not case.flags:
                        self.attempt("attention", case.name, what, partial(self.timed, case, make))

    def timed(self, case: Case, make: Callable[[Given], Callable[[], Any]]) -> dict[str, Any]:
        """One peer of a case."""
        import torch
        from gpu import captured, median_ms, reason

        with torch.no_grad():
            small = 96 if self.args.dry else 2048
            figures: dict[str, Any] = {"stick_share": check(case, self.dtype, small)} if make is ours else {}
            case = replace(case.small(96), h=4, g=2, d=16) if self.args.dry else case
            work = make(Given(case, self.dtype))
            figures |= {"eager_ms": median_ms(work), "how": "eager"}
            figures["median_ms"] = figures["eager_ms"]
            if not self.args.dry:
                try:
                    figures |= {"median_ms": median_ms(captured(work)), "how": "graph"}
                except Exception as error:
                    figures["note"] = f"capture failed: {reason(error)}"
        read = case.read_bytes(self.dtype.itemsize)
        return figures | {"read_bytes": read, "gb_s": 1e-6 * read / figures["median_ms"]}

    def bytes(self) -> None:
        """What one layer's cache holds at 32k tokens, in bfloat16."""
        import xattn
        from xattn.accounting import cache_bytes

        n = 32768
        kinds = {"full": {}, "window 1024": {"sliding_window": 1024}, "selective": {"attn_selective": True},
                 "hybrid 5:1": {"depth": 6, "sliding_window": 1024, "window_pattern": "LLLLLG"}}  # fmt: skip
        for name, flags in kinds.items():
            sizes = {"num_tokens": 256, "max_seq_len": n, "dim": 512, "depth": 1, "heads": 8, "rotary_pos_emb": True} | flags
            held = cache_bytes(xattn.build(**sizes).spec, n, batch=1, itemsize=2)
            self.add("bytes", name, OURS, cache_bytes=held, layers=sizes["depth"])

    def model(self) -> None:
        """Tokens a second of whole models, prompt included."""
        from peers import unable
        from table import XT_EAGER

        for batch in (2,) if self.args.dry else (1, 64):
            for name, flags in MODELS.items():
                case = f"{name} B{batch}"
                if self.args.only in case:
                    for what, make in makers(flags).items():
                        if what == XT and (why := unable(XT_EAGER)):
                            self.add("model", case, what, note=f"skipped: {why}")
                            continue
                        self.attempt("model", case, what, partial(self.generated, make, batch))

    def generated(self, make: Callable[[bool], Callable[[Any, int], Any]], batch: int) -> dict[str, Any]:
        """Tokens a second of one maker's model: the best of three after one to warm up, or a single one where that is long."""
        import torch
        from gpu import device, on_gpu

        torch.manual_seed(0)
        prompt, new = (8, 4) if self.args.dry else (PROMPT, NEW)
        ids = torch.randint(0, 256, (batch, prompt), device=device())
        times: list[float] = []
        with torch.inference_mode():
            generate = make(self.args.dry)

            def timed(count: int) -> float:
                begun = time.perf_counter()
                out = generate(ids, count)
                if on_gpu():
                    torch.cuda.synchronize()
                if out.shape != (batch, count):
                    raise RuntimeError(f"{tuple(out.shape)} is not the ({batch}, {count}) tokens asked for")
                return time.perf_counter() - begun

            few = min(FEW, new)
            timed(few)
            if timed(few) * new / few < LONG_S:
                timed(new)
            while len(times) < 3 and sum(times) < LONG_S:
                times.append(timed(new))
        return {"seconds": min(times), "tokens_s": batch * new / min(times), "times": len(times)}


def makers(flags: dict[str, Any]) -> dict[str, Callable[[bool], Callable[[Any, int], Any]]]:
    """Who generates: a function of `dry` that builds a model, whose result makes (ids, count) into new tokens."""
    import torch
    from gpu import device
    from train_step import ours as our_model
    from train_step import theirs as their_model

    def placed(model: Any, dry: bool) -> Any:
        return model.to(device(), torch.float32 if dry else torch.bfloat16).eval()

    def own(dry: bool) -> Callable[[Any, int], Any]:
        model = placed(our_model(PROMPT + NEW, DRY_SIZES if dry else SIZES, **flags), dry)
        return lambda ids, count: model.generate(ids, count, temperature=0)

    def theirs(dry: bool) -> Callable[[Any, int], Any]:
        # its cache gives wrong logits under selective attention, and is off there
        selective = "attn_selective" in flags
        more = {"attn_selective": True} if selective else {"attn_flash": True}
        model = placed(their_model(PROMPT + NEW, DRY_SIZES if dry else SIZES, **more), dry)
        return lambda ids, count: model.generate(ids, count, temperature=0.0, cache_kv=not selective)

    def plain(dry: bool) -> Callable[[Any, int], Any]:
        sizes = DRY_SIZES if dry else SIZES
        model = placed(our_model(PROMPT + NEW, sizes), dry)
        return lambda ids, count: static_loop(model.net, sizes, ids, count)

    return {OURS: own, XT: theirs} | ({} if flags else {SDPA: plain})


def static_loop(net: Any, sizes: dict[str, int], ids: Any, count: int) -> Any:
    """Greedy decoding as a plain loop: our weights, a static cache for each layer, torch's attention over all of it."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    b, total = len(ids), ids.shape[1] + count
    attns = [block.attn.branch for block in net.attn_layers.blocks]
    shape = (b, sizes["heads"], total, sizes["dim"] // sizes["heads"])
    weight = next(net.parameters())
    stores = [[torch.zeros(shape, device=ids.device, dtype=weight.dtype) for _ in range(2)] for _ in attns]
    place = torch.arange(total, device=ids.device)
    at = {"first": 0}

    def go_on(number: int) -> Callable[..., Any]:
        def forward(x: Any, *_: Any, **__: Any) -> Any:
            attn, rope = attns[number], attns[number].spec.positions
            q, k, v = (to(x).unflatten(-1, (shape[1], -1)).transpose(1, 2) for to in (attn.to_q, attn.to_k, attn.to_v))
            here = place[at["first"] : at["first"] + x.shape[1]]
            q, k = (rope.turn(t, here[None]) for t in (q, k))
            for store, new in zip(stores[number], (k, v), strict=True):
                store[:, :, here] = new
            mask = place[None] <= here[:, None]
            out = scaled_dot_product_attention(q, *stores[number], attn_mask=mask)
            return attn.to_out(out.transpose(1, 2).flatten(2))

        return forward

    kept = [attn.forward for attn in attns]
    try:
        for number, attn in enumerate(attns):
            attn.forward = go_on(number)
        out, chunk = [], ids
        for _ in range(count):
            logits = net(chunk)
            at["first"] += chunk.shape[1]
            chunk = logits[:, -1:].argmax(dim=-1)
            out.append(chunk)
    finally:
        for attn, forward in zip(attns, kept, strict=True):
            attn.forward = forward
    return torch.cat(out, dim=1)


# Verdicts


def verdicts(rows: list[dict[str, Any]], sections: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Every bar of the sections that ran."""
    from table import verdict

    def find(section: str, case: str, what: str, metric: str) -> float | None:
        key = (section, case, what)
        found = [row[metric] for row in rows if (row["section"], row["case"], row["what"]) == key and metric in row]
        return found[-1] if found else None

    def ratio(above: float | None, below: float | None) -> float | None:
        return None if above is None or below is None else above / below

    if "attention" in sections:
        copy, dense = find("attention", "", COPY, "gb_s"), find("attention", "dense", OURS, "median_ms")
        share = ratio(find("attention", "dense", OURS, "gb_s"), copy)
        yield verdict("attention", "dense", "ours / copy bandwidth", share, 0.7, 0.85, at_least=True)
        for case in CASES:
            if case.kept:
                # twice the share of keys, for what a launch costs whatever it reads
                spent = ratio(find("attention", case.name, OURS, "median_ms"), dense)
                yield verdict("attention", case.name, "time / dense", spent, 2 * case.kept / case.n, case.kept / case.n)
    if "bytes" in sections:
        full = find("bytes", "full", OURS, "cache_bytes")
        for name, must in (("window 1024", 1.01 / 32), ("selective", 1.004), ("hybrid 5:1", 1 + 5 / 31)):
            held = ratio(find("bytes", name, OURS, "cache_bytes"), full)
            yield verdict("bytes", name, "bytes / a full layer", held, must, None)
    if "model" in sections:
        for name, must in (("dense", 5), ("selective", 20)):
            for batch in (1, 64):
                case = f"{name} B{batch}"
                times = ratio(*(find("model", case, what, "tokens_s") for what in (OURS, XT)))
                yield verdict("model", case, f"tokens/s / {XT}", times, must, None, at_least=True)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    sys.path.insert(0, str(Path(__file__).parent))
    if args.dry:
        from gpu import go_dry

        go_dry()
    from attention import show

    run = Run(args)
    print(" ".join(f"{key}={value}" for key, value in run.rows.source.items()), flush=True)
    try:
        for section in args.sections:
            getattr(run, section)()
    finally:
        show(verdicts(run.rows.rows, args.sections))


if __name__ == "__main__":
    main()
