"""The pictures of a comparison, from the same rows as its tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn.experiments.gather import Row, estimate
from xattn.experiments.judge import AS_TRAINED
from xattn.experiments.record import read_metrics, say
from xattn.experiments.report import MIB

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00")
DASHES = ("-", "--", ":", "-.")


def draw(rows: Sequence[Row], folder: Path) -> list[tuple[str, str]]:
    """Draw every picture that the rows have numbers for. Returns (file name, caption) of those written."""
    import matplotlib

    matplotlib.use("Agg")
    done = [row for row in rows if row.done]
    pictures = (
        ("loss.png", "Training loss (smoothed) against tokens seen", _loss),
        ("length.png", "Bits per byte against evaluation length", _length),
        ("position.png", "Loss by position in the longest evaluated context", _position),
        ("memory.png", "Bits per byte against peak training memory", _memory),
    )
    written = []
    for name, caption, paint in pictures:
        if done and _picture(folder / name, caption, paint, done):
            written.append((name, caption))
    return written


def _picture(path: Path, caption: str, paint: Any, rows: Sequence[Row]) -> bool:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=140, layout="constrained")
    try:
        if not paint(axes, rows):
            return False
        axes.set_title(caption, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        figure.savefig(path)
        return True
    except OSError as error:
        say(f"warning: {path.name} could not be drawn: {error}")
        return False
    finally:
        plt.close(figure)


def _loss(axes: Any, rows: Sequence[Row]) -> bool:
    drawn, late = False, []
    for place, row in enumerate(rows):
        for number, run in enumerate(row.done):
            points = [(m["tokens"], m["train/loss"]) for m in read_metrics(run.path) if "train/loss" in m]
            if len(points) < 2:
                continue
            losses = _smooth([loss for _, loss in points])
            late += losses[len(losses) // 6 :]
            label = row.name if number == 0 else None
            axes.plot([t / 1e6 for t, _ in points], losses, color=_colour(place), lw=1.4, alpha=0.9, label=label)
            drawn = True
    if drawn:
        # The first sixth falls from ln(vocabulary) and would flatten everything worth seeing.
        axes.set_ylim(min(late) - 0.05, max(late) + 0.1)
        axes.set(xlabel="training tokens (million)", ylabel="loss (nats a token)")
        axes.legend(frameon=False, fontsize=9)
    return drawn


def _smooth(values: list[float], weight: float = 0.6) -> list[float]:
    smoothed, mean, total = [], 0.0, 0.0
    for value in values:
        # Divided by the weights so far, so that the first points are not pulled to zero.
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed


def _length(axes: Any, rows: Sequence[Row]) -> bool:
    drawn = False
    for place, row in enumerate(rows):
        for number, (extension, by_length) in enumerate(row.first["val_by_length"].items()):
            points = []
            for length in by_length:
                found = estimate(row.values("val_by_length", extension, length, "bpb").values())
                if found is not None:
                    points.append((int(length), found.mean))
            if len(points) < 2:
                continue
            axes.plot(*zip(*points, strict=True), **_line(row, place, extension, number))
            drawn = True
    if drawn:
        lengths = sorted({int(n) for row in rows for by in row.first["val_by_length"].values() for n in by})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
        axes.set(xlabel="evaluation length (tokens)", ylabel="bits per byte")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


def _line(row: Row, place: int, extension: str, number: int) -> dict[str, Any]:
    """Label and look of one row under one extension: the row has the colour, the extension the dashes."""
    label = row.name if extension == AS_TRAINED else f"{row.name} + {extension}"
    return {"label": label, "color": _colour(place), "ls": DASHES[number % 4], "marker": "o", "ms": 4, "lw": 1.4}


def _position(axes: Any, rows: Sequence[Row]) -> bool:
    drawn = False
    for place, row in enumerate(rows):
        for number, (extension, by_length) in enumerate(row.first["val_by_position"].items()):
            if not by_length:
                continue
            buckets = by_length[max(by_length, key=int)]
            middles = [(bucket["first"] + bucket["last"]) / 2 for bucket in buckets]
            losses = [bucket["loss_nats"] for bucket in buckets]
            axes.plot(middles, losses, **_line(row, place, extension, number))
            drawn = True
    if drawn:
        axes.set(xlabel="position in the context (tokens)", ylabel="loss (nats a token)")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


def _memory(axes: Any, rows: Sequence[Row]) -> bool:
    drawn = False
    for place, row in enumerate(rows):
        bpb = estimate(row.values("val", "bpb").values())
        peak = estimate(row.values("memory", "train_peak_bytes").values())
        if bpb is None or peak is None:
            continue
        axes.errorbar(peak.mean / MIB, bpb.mean, yerr=bpb.spread, fmt="o", color=_colour(place), capsize=3)
        axes.annotate(row.name, (peak.mean / MIB, bpb.mean), xytext=(6, 4), textcoords="offset points", fontsize=9)
        drawn = True
    if drawn:
        axes.margins(0.18)
        axes.set(xlabel="peak training memory (MiB)", ylabel="validation bits per byte")
    return drawn


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
