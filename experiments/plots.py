"""The pictures of a comparison, from the same rows as its tables. A variant has one colour and marker in all of them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xattn.experiments.curve import Curve
from xattn.experiments.curve_report import paint_curves
from xattn.experiments.figure import Looks, band, panels, variant_legend
from xattn.experiments.gather import Estimate, Row, estimate
from xattn.experiments.judge import AS_TRAINED
from xattn.experiments.record import read_metrics, say
from xattn.experiments.tables import MIB

# Of an extension, beside the variant's colour.
DASHES = ("-", "--", ":", "-.")


def draw(rows: Sequence[Row], folder: Path, *, curves: dict[str, dict[str, Curve]] | None = None) -> list[tuple[str, str]]:
    """Draw every picture that the rows have numbers for. Returns (file name, caption) of those written.

    Args:
        curves: of each row that has some, by name; kind -> memory curve.
    """
    import matplotlib

    matplotlib.use("Agg")
    looks = Looks(row.name for row in rows)
    done = [row for row in rows if row.done]
    pictures: list[tuple[str, str, Callable[[Any], bool]]] = []
    if done:
        trained = [
            ("loss.png", "Training loss against tokens seen", lambda figure: _loss(figure, done, looks)),
            ("length.png", "Quality against evaluation length", lambda figure: _length(figure, done, looks)),
            ("position.png", "Loss by position in the longest evaluated context", lambda figure: _position(figure, done, looks)),
            ("memory.png", "Quality against memory: lower left is better", lambda figure: _memory(figure, done, looks)),
        ]
        pictures = [(name, _over_seeds(caption, done), paint) for name, caption, paint in trained]
    caption = "Memory of one sequence against its length"
    pictures.append(("memory_curve.png", caption, lambda figure: paint_curves(figure, rows, curves or {}, looks)))
    written = []
    for name, caption, paint in pictures:
        if _picture(folder / name, caption, paint):
            written.append((name, caption))
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier report: it would stand beside numbers it is not of
    return written


def _over_seeds(caption: str, rows: Sequence[Row]) -> str:
    seeds = max(len(row.done) for row in rows)
    return f"{caption} (mean ± standard deviation of {seeds} seeds)" if seeds > 1 else caption


def _picture(path: Path, caption: str, paint: Callable[[Any], bool]) -> bool:
    import matplotlib.pyplot as plt

    figure = plt.figure(dpi=150, layout="constrained")
    try:
        if not paint(figure):
            return False
        figure.suptitle(caption, x=0.012, ha="left", fontsize=11.5)
        figure.savefig(path)
        return True
    except OSError as error:
        say(f"warning: {path.name} could not be drawn: {error}")
        return False
    finally:
        plt.close(figure)


def _measure(rows: Sequence[Row]) -> tuple[str, str]:
    """What to judge by, and its name: bits per byte where all rows know them."""
    if all(row.values("val", "bpb") for row in rows):
        return "bpb", "bits per byte"
    return "loss_nats", "loss (nats a token)"


def _loss(figure: Any, rows: Sequence[Row], looks: Looks) -> bool:
    losses = {row.name: _losses(row) for row in rows}
    base = losses[rows[0].name]
    differences = {name: _differences(own, base) for name, own in losses.items() if name != rows[0].name}
    if not any(len(_means(own)) > 1 for own in losses.values()):
        return False
    drawn = [losses] + ([differences] if any(map(_means, differences.values())) else [])
    axes = panels(figure, ["smoothed"] + [f"difference to {rows[0].name} on the same batches, smoothed"] * (len(drawn) - 1))
    for place, (ax, by_name) in enumerate(zip(axes, drawn, strict=True)):
        late = [0.0] if place else []
        for name, by_seed in by_name.items():
            means = _means(by_seed)
            band(ax, [tokens / 1e6 for tokens in means], list(means.values()), color=looks[name]["color"], ls=looks[name]["ls"])
            late += [found.mean for found in list(means.values())[len(means) // 6 :]]
        # The first sixth falls from ln(vocabulary) and would flatten everything worth seeing.
        if len(late) > place:
            room = 0.08 * (max(late) - min(late)) + 0.01
            ax.set_ylim(min(late) - room, max(late) + room)
        ax.set(xlabel="training tokens (million)", ylabel="loss (nats a token)" if place == 0 else "difference (nats a token)")
        if place:
            ax.axhline(0.0, **looks.line(rows[0].name, marker=False) | {"lw": 1.0})
    variant_legend(figure, looks, [row.name for row in rows], marker=False)
    return True


def _losses(row: Row) -> dict[int, dict[int, float]]:
    """seed -> tokens seen -> smoothed loss."""
    return {run.config.seed: _smooth(_points(run.path)) for run in row.done}


def _points(run_dir: Path) -> dict[int, float]:
    return {m["tokens"]: m["train/loss"] for m in read_metrics(run_dir) if isinstance(m.get("train/loss"), float)}


def _differences(own: dict[int, dict[int, float]], base: dict[int, dict[int, float]]) -> dict[int, dict[int, float]]:
    # Smoothing is linear: the difference of two smoothed lines of the same points is the smoothed difference.
    return {
        seed: {tokens: loss - base[seed][tokens] for tokens, loss in by_tokens.items() if tokens in base[seed]}
        for seed, by_tokens in own.items()
        if seed in base
    }


def _means(by_seed: dict[int, dict[int, float]]) -> dict[int, Estimate]:
    """tokens -> mean over seeds, where every seed has a loss."""
    if not by_seed:
        return {}
    shared = set.intersection(*(set(by_tokens) for by_tokens in by_seed.values()))
    found = {tokens: estimate(by_tokens[tokens] for by_tokens in by_seed.values()) for tokens in sorted(shared)}
    return {tokens: value for tokens, value in found.items() if value is not None}


def _smooth(points: dict[int, float], weight: float = 0.8) -> dict[int, float]:
    smoothed, mean, total = {}, 0.0, 0.0
    for place, value in points.items():
        # Divided by the weights so far, so that the first points are not pulled to zero.
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        smoothed[place] = mean / total
    return smoothed


def _extended(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if len(row.first["val_by_length"]) > 1]


def _families(
    figure: Any, rows: Sequence[Row], looks: Looks, points: Callable[[Row, str], dict[float, Estimate]]
) -> Iterator[tuple[Any, bool]]:
    """A panel of all rows as trained, and one for each row that was extended; every line is drawn. Yields the panels."""
    families = [("as trained", [(row, AS_TRAINED) for row in rows])]
    families += [(row.name, [(row, extension) for extension in row.first["val_by_length"]]) for row in _extended(rows)]
    found = [(title, [(row, name, points(row, name)) for row, name in lines]) for title, lines in families]
    found = [(title, kept) for title, lines in found if (kept := [line for line in lines if len(line[2]) > 1])]
    for number, ((title, lines), ax) in enumerate(zip(found, panels(figure, [title for title, _ in found]), strict=True)):
        for row, extension, by_place in lines:
            style = looks.line(row.name)
            if title != "as trained" or number:
                place = list(row.first["val_by_length"]).index(extension)
                label = "as trained" if extension == AS_TRAINED else extension
                style |= {"label": label, "ls": DASHES[place % len(DASHES)], "ms": 3.5}
            band(ax, list(by_place), list(by_place.values()), **style)
        ax.axvline(rows[0].runs[0].config.trainer.seq_len, color="#888888", lw=0.8, ls=(0, (2, 2)), zorder=0)
        if number:
            ax.legend(fontsize=8, handlelength=3.2, framealpha=0.9, edgecolor="none")
        yield ax, number == 0
    if found:
        variant_legend(figure, looks, [row.name for row in rows], rule="trained length")


def _length(figure: Any, rows: Sequence[Row], looks: Looks) -> bool:
    measure, label = _measure(rows)

    def points(row: Row, extension: str) -> dict[float, Estimate]:
        lengths = sorted(row.first["val_by_length"].get(extension, {}), key=int)
        found = {int(n): estimate(row.values("val_by_length", extension, n, measure).values()) for n in lengths}
        return {n: value for n, value in found.items() if value is not None}

    lengths = sorted({int(n) for row in rows for by in row.first["val_by_length"].values() for n in by})
    drawn = False
    for ax, _ in _families(figure, rows, looks, points):
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
        ax.minorticks_off()
        ax.set(xlabel="evaluation length (tokens)", ylabel=label)
        drawn = True
    return drawn


def _position(figure: Any, rows: Sequence[Row], looks: Looks) -> bool:
    def points(row: Row, extension: str) -> dict[float, Estimate]:
        by_seed = [_buckets(run.result["val_by_position"].get(extension, {})) for run in row.done]
        middles = [middle for middle in by_seed[0] if all(middle in buckets for buckets in by_seed)]
        found = {middle: estimate(buckets[middle] for buckets in by_seed) for middle in middles}
        return {middle: value for middle, value in found.items() if value is not None}

    drawn = False
    for ax, _ in _families(figure, rows, looks, points):
        ax.set(xlabel="position in the context (tokens)", ylabel="loss (nats a token)")
        ax.set_xlim(left=0)
        drawn = True
    return drawn


def _buckets(by_length: dict[str, Any]) -> dict[float, float]:
    """Middle of each bucket of the longest length -> its loss."""
    if not by_length:
        return {}
    buckets = by_length[max(by_length, key=int)]
    return {(bucket["first"] + bucket["last"]) / 2: bucket["loss_nats"] for bucket in buckets}


def _memory(figure: Any, rows: Sequence[Row], looks: Looks) -> bool:
    measure, label = _measure(rows)
    costs = (
        ("training: peak of one step", "train_peak_bytes", MIB, "peak training memory (MiB)"),
        ("generation: KV cache, predicted", "kv_bytes_per_token", 1, "KV cache (bytes a token)"),
    )
    costs = [cost for cost in costs if any(row.values("memory", cost[1]) for row in rows)]
    if not costs or not any(row.values("val", measure) for row in rows):
        return False
    for (_, field, unit, name), ax in zip(costs, panels(figure, [cost[0] for cost in costs]), strict=True):
        for row in rows:
            quality = estimate(row.values("val", measure).values())
            cost = estimate(row.values("memory", field).values())
            if quality is None or cost is None:
                continue
            style = looks.line(row.name) | {"ls": "none", "ms": 8, "capsize": 3}
            ax.errorbar(cost.mean / unit, quality.mean, yerr=quality.spread, **style)
        ax.margins(0.1)
        if unit == 1:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.set(xlabel=name, ylabel=f"validation {label}")
    variant_legend(figure, looks, [row.name for row in rows], line=False)
    return True
