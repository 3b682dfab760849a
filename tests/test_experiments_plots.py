"""Pictures: means and spreads over seeds, one look a variant, and no panel of spaghetti."""

import json
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from xattn.experiments import plot_length, plot_loss, plot_passkey, plots
from xattn.experiments.figure import Looks
from xattn.experiments.gather import Row, Run
from xattn.experiments.schema import RunConfig, TrainerConfig

matplotlib.use("Agg")
LENGTHS = (16, 32)


def row(folder: Path, name: str, *losses: float, extensions: tuple[str, ...] = (), peak: int = 2**20) -> Row:
    """A variant with one seed for each loss; every number of a seed is its loss, or follows from it."""
    runs = []
    for seed, loss in enumerate(losses):
        path = folder / f"{name}-{seed}"
        path.mkdir(parents=True)
        points = [{"step": n, "tokens": 100 * n, "train/loss": loss + 1 / n} for n in (1, 2, 3)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
        score = {"loss_nats": loss, "ppl": loss, "bpb": loss}
        buckets = [{"first": 0, "last": 15, "loss_nats": loss}, {"first": 16, "last": 31, "loss_nats": loss + 1}]
        names = ("none", *extensions)
        result = {
            "status": "completed",
            "val": score,
            "val_by_length": {extension: {str(n): score for n in LENGTHS} for extension in names},
            "val_by_position": {extension: {str(n): buckets for n in LENGTHS} for extension in names},
            "memory": {"train_peak_bytes": peak, "kv_bytes_per_token": 64.0},
        }
        config = RunConfig(name=name, seed=seed, trainer=TrainerConfig(seq_len=LENGTHS[0]))
        runs.append(Run(path=path, config=config, result=result))
    return Row(name=name, runs=runs)


def painted(paint, rows: list[Row]) -> Figure:
    figure = Figure(layout="constrained")
    assert paint(figure, rows, Looks(row.name for row in rows))
    return figure


def line(ax, label: str):
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return found


@pytest.mark.parametrize(
    ("paint", "places", "values"),
    [(plot_length.paint_length, [16, 32], [2.5, 2.5]), (plot_length.paint_position, [7.5, 23.5], [2.5, 3.5])],
)
def test_lines_are_means_over_seeds_with_a_band_of_one_deviation(tmp_path: Path, paint, places: list, values: list) -> None:
    ax = painted(paint, [row(tmp_path, "dense", 2.0, 3.0)]).axes[0]
    shown = line(ax, "dense")
    assert list(shown.get_xdata()) == places and list(shown.get_ydata()) == values
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    half = 0.5**0.5
    assert min(heights) == pytest.approx(min(values) - half) and max(heights) == pytest.approx(max(values) + half)


def test_one_seed_claims_no_spread(tmp_path: Path) -> None:
    for paint in (plot_loss.paint_loss, plot_length.paint_length, plot_length.paint_position):
        assert not painted(paint, [row(tmp_path / paint.__name__, "dense", 2.0)]).axes[0].collections


@pytest.mark.parametrize("paint", [plot_length.paint_length, plot_length.paint_position])
def test_extensions_have_panels_of_their_own(tmp_path: Path, paint) -> None:
    rows = [row(tmp_path, "dense", 2.0, extensions=("yarn", "self_extend")), row(tmp_path, "window", 2.5)]
    trained, extended = painted(paint, rows).axes
    labels = {shown.get_label() for shown in trained.lines}
    assert {"dense", "window"} <= labels and not {"yarn", "self_extend"} & labels
    assert extended.get_title(loc="left") == "dense, extended"
    assert len({line(extended, label).get_linestyle() for label in ("as trained", "yarn", "self_extend")}) == 3


@pytest.mark.parametrize("paint", [plot_length.paint_length, plot_length.paint_position])
def test_the_band_of_an_extension_is_of_its_change_and_not_of_the_seeds(tmp_path: Path, paint) -> None:
    # Seeds far apart; an extension that changes nothing has no spread, though its mean stays where it is.
    trained, extended = painted(paint, [row(tmp_path, "dense", 2.0, 3.0, extensions=("yarn",))]).axes
    shown = [(ax, ax.collections[0].get_paths()[0].vertices[:, 1]) for ax in (trained, extended)]
    assert list(line(extended, "yarn").get_ydata()) == list(line(trained, "dense").get_ydata())
    heights = {ax.get_title(loc="left"): max(h) - min(h) - (max(line_) - min(line_))
               for (ax, h), line_ in ((pair, pair[0].lines[0].get_ydata()) for pair in shown)}  # fmt: skip
    assert heights["as trained"] == pytest.approx(2 * 0.5**0.5)
    assert heights["dense, extended (band: of the change)"] == pytest.approx(0.0, abs=1e-9)


def test_a_legend_stands_where_a_panel_is_missing(tmp_path: Path) -> None:
    rows = [row(tmp_path, name, 2.0, extensions=("yarn",)) for name in ("dense", "window")]
    figure = painted(plot_length.paint_length, rows)
    assert not figure.legends and not figure.axes[-1].axison, "three panels, and the legend is the fourth"
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["dense", "window", "trained length"]


def test_losses_are_also_shown_as_differences_on_the_same_batches(tmp_path: Path) -> None:
    _, differences = painted(plot_loss.paint_loss, [row(tmp_path, "dense", 2.0, 3.0), row(tmp_path, "window", 2.25, 3.25)]).axes
    shown = differences.lines[0]
    assert list(shown.get_ydata()) == pytest.approx([0.25] * 3), "paired by seed, seeds apart cancel"
    low, high = differences.get_ylim()
    assert low < 0.0 < high, "the baseline itself is in sight"


def test_quality_against_memory_has_a_point_a_variant_and_two_costs(tmp_path: Path) -> None:
    figure = painted(plots.paint_memory, [row(tmp_path, "dense", 2.0, 3.0, peak=3 * 2**20), row(tmp_path, "window", 2.5)])
    training, cache = figure.axes
    assert [list(shown.get_xdata()) for shown in training.lines if shown.get_marker() not in "_|"] == [[3.0], [1.0]]
    assert "MiB" in training.get_xlabel() and "token" in cache.get_xlabel() and "bits per byte" in training.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "window"]


def test_twelve_variants_look_different_and_the_same_everywhere() -> None:
    looks = Looks(f"v{number}" for number in range(12))
    assert len({str(looks[f"v{number}"]) for number in range(12)}) == 12
    assert len({(looks[f"v{number}"]["color"], looks[f"v{number}"]["ls"]) for number in range(12)}) == 12, "told apart as lines"


def test_planted_keys_are_a_panel_a_row_and_extension_of_means_over_seeds(tmp_path: Path) -> None:
    made = [row(tmp_path, "dense", 0.2, 0.4, extensions=("yarn",)), row(tmp_path, "window", 0.0)]
    for of_row in made:
        for run in of_row.runs:
            share = run.result["val"]["ppl"]
            by_depth = {"0": {"accuracy": share}, "1": {"accuracy": 1.0}}
            names = run.result["val_by_length"]
            run.result["passkey"] = {name: {"16": by_depth, "32": {"error": "no room"}} for name in names}
    figure = painted(plot_passkey.paint_passkey, made)
    assert [ax.get_title(loc="left") for ax in figure.axes[:3]] == ["dense", "dense, yarn", "window"]
    shown = figure.axes[0].images[0].get_array()
    assert shown[0, 0] == pytest.approx(0.3) and shown[1, 0] == 1.0 and shown.mask[:, 1].all()
    assert [text.get_text() for text in figure.axes[2].texts] == ["0.00", "-", "1.00", "-"]
    assert not plot_passkey.paint_passkey(Figure(), [row(tmp_path / "other", "dense", 1.0)], Looks(["dense"]))
