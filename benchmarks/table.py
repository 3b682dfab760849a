"""What benchmarks/attention.py measures: each section's cases, who runs in them, and the bars that ours has to meet.

A bar compares what two rows of one case say (or one row with a number). Letters: b batch, h heads, n tokens, d head width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

OURS, FA2, CUDNN, FLEX = "ours", "SDPA-FA2", "SDPA-cuDNN", "Flex"
XT_EAGER, XT_COMPILED = "x-transformers eager", "x-transformers compiled"
# the same sizes through our kernels without the case's flags, and our kernels on inputs already rotated
OURS_CAUSAL, OURS_KERNEL = "ours causal", "ours, kernel alone"
# the same selection without skipping
OURS_UNSKIPPED = "ours, skipping off"
TOKENS = 32768
SHORT = {
    "sliding_window": "w", "attn_selective": "selective", "self_extend_group": "G", "self_extend_window": "near",
    "rotary_pos_emb": "", "selection_skip": "skip",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bar:
    """value = row(what) / row(over), or row(what) alone; at most must (at_least: at least). None: no such bar.

    on: the pass; metric: a row's field. times: over / what, how many times better ours is.
    """

    on: str
    over: str | None = None
    what: str = OURS
    metric: str = "median_ms"
    must: float | None = None
    reach: float | None = None
    at_least: bool = False
    times: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape with its flags: who runs, which passes, and the bars. documents: runs of tokens in each row (0: one).

    live: the share of blocks of 64 keys that no query votes against; the others gain .2 a later token (None: random logits).
    """

    section: str
    b: int
    h: int
    n: int
    d: int
    flags: dict[str, Any] = field(default_factory=dict)
    who: tuple[str, ...] = (OURS,)
    passes: tuple[str, ...] = ("f", "fb")
    hows: tuple[str, ...] = ("eager", "graph")
    documents: int = 0
    live: float | None = None
    bars: tuple[Bar, ...] = ()

    @property
    def name(self) -> str:
        """As in «B4 H8 N4096 D64 sliding_window=512»."""
        flags = (key if value is True else f"{key}={value}" for key, value in self.flags.items())
        documents = [f"documents={self.documents}"] if self.documents else []
        live = [] if self.live is None else [f"live={self.live}"]
        return " ".join([f"B{self.b} H{self.h} N{self.n} D{self.d}", *flags, *documents, *live])

    @property
    def label(self) -> str:
        """The name as a narrow column has it."""
        flags = [f"{SHORT.get(key, key)}{'' if value is True else value}" for key, value in self.flags.items()]
        parts = [flag for flag in flags if flag] if len(flags) < 5 else ["all parts"]
        return " ".join([*self.name.split()[:4], *parts, *([] if self.live is None else [f"live{self.live:g}"])])

    @property
    def pairs(self) -> int:
        """Visible pairs of a query and a key in one head of one row, counted where flags hide some (sink tokens are not)."""
        lengths = [len(run) for run in self.runs()]
        window = self.flags.get("sliding_window") or self.n
        return sum(w * (w + 1) // 2 + (n - w) * w for n in lengths for w in (min(window, n),))

    def runs(self) -> list[range]:
        """The slots of each document; of unequal lengths, and never a multiple of a tile."""
        cuts = [self.n * (i * i + i + 2) // (self.documents**2 + self.documents + 2) + 3 for i in range(1, self.documents)]
        edges = [0, *cuts, self.n]
        return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]

    def flops(self, on: str) -> float:
        """4 d a visible pair forward, 2.5 times that backward: what selection adds is not counted."""
        return 4.0 * self.b * self.h * self.d * self.pairs * (3.5 if on == "fb" else 1.0)

    def small(self, n: int, d: int | None = None, h: int | None = None) -> "Case":
        """The same features at n tokens, windows shrunk with it, so that float64 can tell whether results are right."""
        flags = {**self.flags}
        for name, size in (("sliding_window", n // 4 + 1), ("self_extend_window", n // 8)):
            if name in flags:
                flags[name] = min(flags[name], size)
        if h is not None and "kv_heads" in flags:
            flags["kv_heads"] = h // 2
        return replace(self, b=min(self.b, 2), n=min(n, self.n), d=d or self.d, h=h or self.h, flags=flags)


def _causal() -> Iterable[Case]:
    bars = (
        Bar(on="fb", over=FA2, must=0.85), Bar(on="fb", over=FLEX, must=1.0), Bar(on="fb", over=CUDNN, reach=1.0),
    )  # fmt: skip
    for d, h in ((64, 16), (128, 8)):
        for n in (2048, 8192, 32768):
            yield Case(section="causal", b=TOKENS // n, h=h, n=n, d=d, who=(FA2, CUDNN, FLEX, OURS), bars=bars)


def _window() -> Iterable[Case]:
    for d, h, fa3 in ((64, 16, 350), (128, 8, 503)):
        for n, window in ((4096, 512), (8192, 1024), (32768, 1024)):
            bars = tuple(Bar(on=on, over=FLEX, must=1.0, reach=0.85) for on in ("f", "fb"))
            if window == 1024:
                bars += (Bar(on="f", metric="tflops", reach=fa3, at_least=True),)
            flags = {"sliding_window": window}
            yield Case(section="window", b=TOKENS // n, h=h, n=n, d=d, flags=flags, who=(FLEX, OURS), bars=bars)


def _selective() -> Iterable[Case]:
    shapes = (
        (4, 8, 4096, 64, 1.25, 1.00, 1.20, 1.00), (16, 8, 1024, 64, 1.30, 1.05, 1.20, 1.00),
        (2, 8, 8192, 64, 1.30, 1.05, 1.20, 1.00), (1, 8, 32768, 64, 1.50, 1.15, 1.25, 1.10),
        (4, 8, 4096, 128, 1.15, 0.95, 1.00, 0.85),
    )  # fmt: skip
    for b, h, n, d, must, reach, must_f, reach_f in shapes:
        who = (FA2, CUDNN) + ((FLEX,) if n < 32768 else ()) + ((XT_COMPILED,) if n <= 4096 and d == 64 else ())
        bars = [Bar(on="fb", over=FA2, must=must, reach=reach), Bar(on="f", over=FA2, must=must_f, reach=reach_f)]
        if (n, d) == (4096, 64):
            who += (XT_EAGER,)
            bars += [Bar(on="fb", over=XT_COMPILED, must=6, reach=9, times=True)]
            bars += [Bar(on="fb", metric="peak_mib", must=420, reach=260)]
        yield Case(section="selective", b=b, h=h, n=n, d=d, flags={"attn_selective": True}, who=(*who, OURS), bars=tuple(bars))


def _selfextend() -> Iterable[Case]:
    bars = (
        Bar(on="f", what=OURS_KERNEL, over=OURS_CAUSAL, must=1.15, reach=1.05),
        Bar(on="f", over=FLEX), Bar(on="f", over=FA2),
    )  # fmt: skip
    for n in (8192, 32768):
        for group in (8, 16):
            flags = {"rotary_pos_emb": True, "self_extend_group": group, "self_extend_window": 1024}
            yield Case(
                section="selfextend", b=TOKENS // n, h=8, n=n, d=128, flags=flags, passes=("f",),
                who=(FA2, FLEX, OURS_CAUSAL, OURS_KERNEL, OURS), bars=bars,
            )  # fmt: skip


def _everything() -> Iterable[Case]:
    flags = {
        "attn_selective": True, "sliding_window": 1024, "sink_tokens": 4, "sink_logits": True, "logit_softcap": 5.0,
        "kv_heads": 2, "rotary_pos_emb": True, "self_extend_group": 4, "self_extend_window": 256,
    }  # fmt: skip
    for b, n in ((4, 4096), (2, 8192)):
        yield Case(
            section="everything", b=b, h=8, n=n, d=64, flags=flags, documents=2, who=(OURS_CAUSAL, OURS),
            bars=(Bar(on="fb", over=OURS_CAUSAL, reach=2.0),),
        )  # fmt: skip


def _memory() -> Iterable[Case]:
    for n, must, reach in ((8192, None, None), (32768, 1600, 700), (131072, None, None)):
        bars = (Bar(on="fb", metric="peak_mib", must=must, reach=reach),) if must else ()
        yield Case(
            section="memory", b=1, h=8, n=n, d=64, flags={"attn_selective": True}, who=(FA2, OURS), passes=("fb",),
            hows=("eager",), bars=bars,
        )  # fmt: skip


def _skip() -> Iterable[Case]:
    for b, n in ((2, 8192), (1, 32768)):
        for live in (1.0, 0.25, 0.1):
            must, reach = (0.70, 0.45) if live == 0.25 else (None, None)
            bars = (Bar(on="f", over=FA2), Bar(on="fb", over=FA2, must=must, reach=reach))
            if live == 1.0:
                bars += (Bar(on="fb", over=OURS_UNSKIPPED, must=1.15, reach=1.03),)
            yield Case(
                section="skip", b=b, h=8, n=n, d=64, flags={"attn_selective": True, "selection_skip": 20.0}, live=live,
                who=(FA2, OURS_UNSKIPPED, OURS), bars=bars,
            )  # fmt: skip


def _scaling() -> Iterable[Case]:
    # every line of the picture twice over: without selection, and with it
    for n in (2**e for e in range(9, 17)):
        yield Case(section="scaling", b=1, h=8, n=n, d=64, who=(FA2, CUDNN, OURS), passes=("fb",))
        yield Case(
            section="scaling", b=1, h=8, n=n, d=64, flags={"attn_selective": True}, who=(XT_COMPILED, OURS), passes=("fb",)
        )


SECTIONS = {
    "causal": _causal, "window": _window, "selective": _selective, "selfextend": _selfextend, "everything": _everything,
    "memory": _memory, "skip": _skip, "scaling": _scaling,
}  # fmt: skip


def cases(section: str) -> list[Case]:
    """The cases of a section, in the order in which they run."""
    return list(SECTIONS[section]())


def tiny(case: Case) -> Case:
    """A case small enough for the interpreter."""
    small = case.small(min(case.n, 128), d=16, h=4 if "kv_heads" in case.flags else 2)
    return replace(small, b=1, hows=("eager",))


# Verdicts


def find(rows: list[dict[str, Any]], *, case: str, what: str, on: str, metric: str) -> tuple[float, str] | None:
    """A row's figure, and how it was measured: by graph replay where that is known, so that launches do not count."""
    for how in ("graph", "eager"):
        for row in reversed(rows):
            if tuple(map(row.get, ("case", "what", "pass", "how"))) == (case, what, on, how) and row.get(metric) is not None:
                return row[metric], how
    return None


def judge(case: Case, bar: Bar, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What one bar measured in one case."""
    rows = [row for row in rows if row["section"] == case.section]
    label = f"{bar.what} {bar.on} {'' if bar.metric == 'median_ms' else bar.metric}".strip()
    label = f"{bar.over} / {label}" if bar.times else f"{label} / {bar.over}" if bar.over else label
    found = find(rows, case=case.name, what=bar.what, on=bar.on, metric=bar.metric)
    over = find(rows, case=case.name, what=bar.over, on=bar.on, metric=bar.metric) if bar.over else (1.0, "")
    value, how = None, ""
    if found and over:
        value, how = (over[0] / found[0] if bar.times else found[0] / over[0]), found[1]
        if bar.over and over[1] != how:
            how = f"{how}|{over[1]}"
    return verdict(case.section, case.label, label, value, bar.must, bar.reach, how=how, at_least=bar.at_least or bar.times)


def verdict(
    section: str, case: str, bar: str, value: float | None, must: float | None, reach: float | None, *, how: str = "",
    at_least: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """ok: meets must (or has none but meets reach); reached: meets reach; missed; not measured; plain: no bar, only a figure."""

    def meets(bound: float | None) -> bool:
        return bound is not None and value is not None and (value >= bound if at_least else value <= bound)

    if value is None:
        word = "not measured"
    elif must is None and reach is None:
        word = "-"
    elif meets(reach):
        word = "reached"
    elif must is None:
        word = "not reached"
    else:
        word = "ok" if meets(must) else "MISSED"
    sign = ">=" if at_least else "<="
    return {"section": section, "case": case, "bar": bar, "value": value, "sign": sign, "must": must, "reach": reach,
            "how": how, "verdict": word}  # fmt: skip


def growth(section: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether memory is linear in length: bars between cases."""
    rows = [row for row in rows if row["section"] == section]
    peaks = []
    for case in cases(section):
        found = find(rows, case=case.name, what=OURS, on="fb", metric="peak_mib")
        peaks.append((case, found[0] if found else None))
    if section == "memory":
        value = None
        if all(peak is not None for _, peak in peaks):
            (a, peak_a), (b, peak_b), (c, peak_c) = peaks
            value = (peak_c - peak_b) / (c.n - b.n) * (b.n - a.n) / max(peak_b - peak_a, 1e-9)
        return [verdict(section, "N8k, 32k, 128k", "MiB a token 32k-128k / 8k-32k", value, 1.25, None)]
    if section == "everything":
        (_, short), (_, long) = peaks
        value = long / short if short and long else None
        return [verdict(section, "as many tokens in rows twice as long", "peak / peak", value, 1.25, None)]
    return []


def train_bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars of a training step."""
    rows = [row for row in rows if row["section"] == "train"]
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        n = next(row["n"] for row in rows if row["case"] == case)

        def speed(what: str, metric: str = "tokens_s", case: str = case) -> float | None:
            found = (row for row in reversed(rows) if (row["case"], row["what"]) == (case, what) and row.get(metric))
            return next((row[metric] for row in found), None)

        def ratio(a: float | None, b: float | None) -> float | None:
            return a / b if a and b else None

        dense, selective, own = speed("xattn dense"), speed("xattn selective"), speed("xattn dense, own kernels")
        best = max((x for x in (dense, own) if x), default=None)
        bars = [("dense / x-transformers flash", ratio(best, speed("x-transformers flash")), 1.2, 1.5, True)]
        must = 5 if n >= 4096 else None
        dense_selective = ratio(selective, speed("x-transformers selective"))
        bars += [("selective / x-transformers selective", dense_selective, must, None, True)]
        bars += [("selective / our dense", ratio(selective, best), None, 0.85, True)]
        bars += [("selective peak MiB, weights too", speed("xattn selective", "total_mib"), must and 8192, None, False)]
        found += [verdict("train", case, name, value, must, reach, at_least=more) for name, value, must, reach, more in bars]
    return found
