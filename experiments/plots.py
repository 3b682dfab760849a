"""The pictures of a comparison, from the same rows as its tables. A variant has one colour and marker in all of them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from xattn.experiments.curve import Curve
from xattn.experiments.curve_report import paint_curves
from xattn.experiments.figure import Looks, panels, variant_legend
from xattn.experiments.gather import Row, estimate, measure
from xattn.experiments.plot_length import paint_length, paint_position
from xattn.experiments.plot_loss import paint_loss
from xattn.experiments.plot_passkey import paint_passkey
from xattn.experiments.plot_task import paint_task
from xattn.experiments.record import say
from xattn.experiments.tables import MIB, pruned, pruned_measure, pruned_places

# inches of a picture that a caption does not fit into on one line, beside the legend
_NARROW = 8.0


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
        over = partial(_over_seeds, rows=done)
        trained: list[tuple[str, str, Callable[[Any, Sequence[Row], Looks], bool]]] = [
            ("loss.png", over("Training loss against tokens seen"), paint_loss),
            ("task.png", over("Answers right of all that were asked for"), paint_task),
            ("length.png", over("Quality against evaluation length"), paint_length),
            ("passkey.png", over("Planted keys found", shown="mean"), paint_passkey),
            ("position.png", over("Loss by position in the longest evaluated context"), paint_position),
            ("memory.png", over("Quality against memory: lower left is better"), paint_memory),
            ("kv_bytes.png", over(_kv_bytes_caption(done)), paint_kv_bytes),
        ]
        about = {"rows": done, "looks": looks}
        pictures = [(name, caption, partial(paint, **about)) for name, caption, paint in trained]
    caption = "Memory of one sequence against its length"
    pictures.append(("memory_curve.png", caption, lambda figure: paint_curves(figure, rows, curves or {}, looks)))
    written = []
    for name, caption, paint in pictures:
        if _picture(folder / name, caption, paint):
            written.append((name, caption))
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier report: it would stand beside numbers it is not of
    return written


def _kv_bytes_caption(rows: Sequence[Row]) -> str:
    judged, label = pruned_measure(rows)
    return f"{label.capitalize()} against KV bytes: {'lower' if judged == 'ppl' else 'upper'} left is better"


def _over_seeds(caption: str, rows: Sequence[Row], *, shown: str = "mean ± standard deviation") -> str:
    seeds = max(len(row.done) for row in rows)
    return f"{caption} ({shown} of {seeds} seeds)" if seeds > 1 else caption


def _picture(path: Path, caption: str, paint: Callable[[Any], bool]) -> bool:
    import matplotlib.pyplot as plt

    figure = plt.figure(dpi=150, layout="constrained")
    try:
        if not paint(figure):
            return False
        if figure.get_size_inches()[0] < _NARROW:
            caption = caption.replace(" (", "\n(")
        figure.suptitle(caption, x=0.012, ha="left", fontsize=11.5)
        figure.savefig(path)
        return True
    except OSError as error:
        say(f"warning: {path.name} could not be drawn: {error}")
        return False
    finally:
        plt.close(figure)


def paint_memory(figure: Any, rows: Sequence[Row], looks: Looks) -> bool:
    """A point a variant: quality against what training and what generation hold."""
    name, label = measure(rows)
    costs = (
        ("training: peak of one step", "train_peak_bytes", MIB, "peak training memory (MiB)"),
        ("generation: KV cache, predicted", "kv_bytes_per_token", 1, "KV cache (bytes a token)"),
    )
    costs = [cost for cost in costs if any(row.values("memory", cost[1]) for row in rows)]
    if not costs or not any(row.values("val", name) for row in rows):
        return False
    for (_, field, unit, cost_label), ax in zip(costs, panels(figure, [cost[0] for cost in costs]), strict=True):
        for row in rows:
            quality = estimate(row.values("val", name).values())
            cost = estimate(row.values("memory", field).values())
            if quality is None or cost is None:
                continue
            style = looks.line(row.name) | {"ls": "none", "ms": 8, "capsize": 3}
            ax.errorbar(cost.mean / unit, quality.mean, yerr=quality.spread, **style)
        ax.margins(0.1)
        if unit == 1:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.set(xlabel=cost_label, ylabel=f"validation {label}")
    variant_legend(figure, looks, [row.name for row in rows], line=False)
    return True


def paint_kv_bytes(figure: Any, rows: Sequence[Row], looks: Looks) -> bool:
    """A point a variant, and for one that was pruned a line from all its keys down its budgets; False where none was pruned."""
    if not any("error" not in entry for row in rows for entry in pruned(row).values()):
        return False
    (ax,) = panels(figure, ["predicted, one sequence of the trained length"])
    judged, label = pruned_measure(rows)
    for row in rows:
        places = [pruned_places(budget, judged) for budget in (None, *pruned(row))]
        found = [tuple(estimate(row.values(*place).values()) for place in pair) for pair in places]
        points = sorted(((kv.mean, quality) for quality, kv in found if kv and quality), key=lambda point: point[0])
        if points:
            spread = [quality.spread or 0.0 for _, quality in points] if points[0][1].spread is not None else None
            style = looks.line(row.name) | {"ms": 6, "capsize": 3}
            ax.errorbar([kv for kv, _ in points], [quality.mean for _, quality in points], yerr=spread, **style)
    ax.margins(0.1)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set(xlabel="KV cache (bytes a token)", ylabel=f"validation {label}" if judged == "ppl" else label)
    variant_legend(figure, looks, [row.name for row in rows])
    return True
