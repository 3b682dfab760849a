"""The picture of training: losses against tokens seen, and their differences to the baseline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn.experiments.figure import Looks, band, panels, variant_legend
from xattn.experiments.gather import Estimate, Row, estimate
from xattn.experiments.record import read_metrics


def paint_loss(figure: Any, rows: Sequence[Row], looks: Looks) -> bool:
    """Smoothed losses, and beside them their differences to the first row on the same batches, which show far more."""
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
            settled = list(means.values())[len(means) // 6 :]
            late += [found.mean + sign * (found.spread or 0.0) for found in settled for sign in (-1, 1)]
        # The first sixth falls from ln(vocabulary) and would flatten everything worth seeing.
        if len(late) > place:
            room = 0.08 * (max(late) - min(late)) + 0.01
            ax.set_ylim(min(late) - room, max(late) + room)
        ax.locator_params(axis="x", nbins=6)
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
