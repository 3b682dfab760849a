"""Time and memory against length, from the rows of `python benchmarks/attention.py scaling`.

    python benchmarks/plot.py [--rows benchmarks/results/attention.jsonl --out docs/images/scaling.png]

The latest row of each point counts; rows of other devices than the newest row's are left out. Time is by CUDA-graph replay.
"""

import argparse
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, read_rows
from picture import against_length, save
from table import CUDNN, FA2, OURS, XT_COMPILED

# Okabe and Ito's colours, told apart by colour-blind readers too: (peer, selective) -> label, colour, dashes, marker, width
LINES = {
    (XT_COMPILED, True): ("selective, x-transformers (compiled)", "#D55E00", "-", "s", 1.6),
    (OURS, True): ("selective, xattn", "#0072B2", "-", "o", 2.4),
    (FA2, False): ("dense, FlashAttention-2 (SDPA)", "#8C8C00", "--", "^", 1.4),
    (CUDNN, False): ("dense, cuDNN (SDPA)", "#000000", ":", "v", 1.4),
    (OURS, False): ("dense, xattn", "#56B4E9", "--", "D", 1.4),
}


def points(rows: list[dict[str, Any]]) -> dict[tuple[str, bool], dict[int, dict[str, Any]]]:
    """What each line shows: length -> {ms, mib}, or {oom} where memory ran out. {} without rows."""
    rows = [row for row in rows if row.get("section") == "scaling"]
    rows = [row for row in rows if row["device"] == rows[-1]["device"]]
    lines: dict[tuple[str, bool], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = (row["what"], "attn_selective" in row["case"])
        at = lines.setdefault(key, {}).setdefault(row["n"], {})
        if row.get("oom"):
            at["oom"] = True
        if row.get("median_ms") is None or row.get("pass") != "fb":
            continue
        if row["how"] == "graph" or not at.get("graph"):
            at.update(ms=row["median_ms"], graph=row["how"] == "graph")
        at["mib"] = row.get("peak_mib")
        at.pop("oom", None)
    return lines


def draw(rows: list[dict[str, Any]], file: Path) -> bool:
    """The picture; False without rows to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {key: line for key, line in points(rows).items() if key in LINES}
    lengths = sorted({n for line in lines.values() for n in line})
    if not lengths:
        return False
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.4), dpi=160, layout="constrained")
    looks = (("ms", "Time, forward + backward (ms)"), ("mib", "Peak memory over the inputs (MiB)"))
    for axes, (name, title) in zip(panels, looks, strict=True):
        for key, (label, colour, dashes, marker, width) in LINES.items():
            line = lines.get(key, {})
            seen = sorted((n, at[name]) for n, at in line.items() if at.get(name))
            if not seen:
                continue
            axes.plot(*zip(*seen, strict=True), ls=dashes, color=colour, marker=marker, ms=4, lw=width, label=label)
            if lost := sorted(n for n, at in line.items() if at.get("oom")):
                # where the line would go on: memory of a square grows fourfold
                (n, value), step = seen[-1], lost[0] / seen[-1][0]
                axes.plot([n, lost[0]], [value, value * step**2], ls=":", color=colour, lw=1.0, alpha=0.7)
                axes.plot(lost[0], value * step**2, marker="x", color=colour, ms=8, mew=2)
                axes.annotate("out of memory", (lost[0], value * step**2), xytext=(-8, 0), textcoords="offset points",
                              ha="right", va="center", fontsize=8, color=colour)  # fmt: skip
        against_length(axes, lengths, title=title, label="sequence length N (batch 1, 8 heads of 64, bf16)")
    handles, labels = panels[0].get_legend_handles_labels()
    panels[0].legend(handles, labels, frameon=False, fontsize=9, loc="upper left")
    newest = next(row for row in reversed(rows) if row.get("section") == "scaling")
    versions = newest.get("versions", {})
    source = f"{newest['device']}, torch {versions.get('torch')}, Triton {versions.get('triton')}"
    figure.supxlabel(source, fontsize=8, color="#666666")
    save(figure, file)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=RESULTS / "attention.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "scaling.png")
    args = parser.parse_args()
    if not draw(read_rows(args.rows), args.out):
        raise SystemExit(f"no rows of section scaling in {args.rows}: run python benchmarks/attention.py scaling on a GPU first")
    print(args.out)


if __name__ == "__main__":
    main()
