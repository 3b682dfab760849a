"""From run directories to rows: which runs belong together, what may be compared, means and spreads over seeds."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xattn import ConfigError
from xattn.experiments import record
from xattn.experiments.configfile import differences, load_config
from xattn.experiments.schema import RunConfig

# Differences of config that change no number: where a run is logged, how often, how it is split into forwards.
_HARMLESS = ("name", "seed", "isolate", "model.", "tracking.", "eval.batch_tokens", "eval.every", "eval.extensions",
             "eval.passkey", "eval.pair_factors", "eval.kv_budget", "eval.decode", "trainer.log_every", "trainer.save_every",
             "trainer.keep_checkpoints", "trainer.threads", "trainer.memory")  # fmt: skip
# What must be equal in two results, beside their configs.
_SAME = {
    "tokens": ("tokens",),
    "tokeniser": ("data", "tokenizer"),
    "judged tokens": ("val", "tokens"),
    "precision": ("precision",),
    "device": ("device",),
}
# Two-sided 95 % quantiles of Student's t for 1 ... 10 degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory as found."""

    path: Path
    config: RunConfig
    result: dict[str, Any]

    @property
    def done(self) -> bool:
        return self.result["status"] == record.COMPLETED


@dataclass(kw_only=True)
class Row:
    """One variant: its runs over seeds, and why it may not be compared with the baseline (empty: it may)."""

    name: str
    runs: list[Run]
    problems: list[str] = field(default_factory=list)

    @property
    def done(self) -> list[Run]:
        return [run for run in self.runs if run.done]

    @property
    def first(self) -> dict[str, Any]:
        """A completed result, for what does not depend on the seed."""
        return self.done[0].result

    @property
    def failures(self) -> list[str]:
        """`seed 1: oom: reason` for each run without a result; seeds that ended alike share one."""
        seeds: dict[str, list[str]] = {}
        for run in self.runs:
            if not run.done:
                reason = ": ".join(run.result[k] for k in ("status", "error") if k in run.result)
                seeds.setdefault(reason, []).append(str(run.config.seed))
        return [f"seed{'s' if len(them) > 1 else ''} {', '.join(them)}: {reason}" for reason, them in seeds.items()]

    def values(self, *path: str) -> dict[int, float]:
        """seed -> the number at this place in result.json, where there is one."""
        found = {}
        for run in self.done:
            value: Any = run.result
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, int | float) and math.isfinite(value):
                found[run.config.seed] = value
        return found


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean over seeds. `spread`: sample standard deviation; `half_95`: half the 95 % interval; None for one seed."""

    mean: float
    spread: float | None
    half_95: float | None
    seeds: int


def estimate(values: Iterable[float]) -> Estimate | None:
    """None for no values; spread and interval only from two seeds on."""
    values = list(values)
    if not values:
        return None
    if len(values) == 1:
        return Estimate(mean=values[0], spread=None, half_95=None, seeds=1)
    spread, free = statistics.stdev(values), len(values) - 1
    t = _T95[free - 1] if free <= len(_T95) else 1.96 + 2.5 / free
    return Estimate(mean=statistics.fmean(values), spread=spread, half_95=t * spread / math.sqrt(len(values)), seeds=len(values))


def delta(row: Row, baseline: Row, *path: str) -> Estimate | None:
    """The difference to the baseline, paired by seed: the data order of a seed is the same in both and cancels out."""
    ours, theirs = row.values(*path), baseline.values(*path)
    return estimate(ours[seed] - theirs[seed] for seed in ours if seed in theirs)


def measure(rows: Sequence[Row]) -> tuple[str, str]:
    """What to judge these rows by, and its name: bits per byte where every row with a result knows them."""
    if all(row.values("val", "bpb") for row in rows if row.done):
        return "bpb", "bits per byte"
    return "loss_nats", "loss (nats a token)"


def find_runs(folder: Path) -> list[Run]:
    """Every run directory under `folder`, in order of path.

    Raises:
        ConfigError: there is none.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no directory; give the directory of a comparison or of runs")
    runs = []
    for path in sorted(folder.rglob(record.CONFIG)):
        try:
            config = load_config(path)
        except ConfigError:
            continue  # a config.yaml of something else, such as W&B's
        runs.append(Run(path=path.parent, config=config, result=record.read_result(path.parent)))
    if not runs:
        raise ConfigError(
            f"{folder} holds no run of xattn: a run directory has {record.CONFIG} and {record.RESULT}, "
            "as xattn-train and xattn-compare write them"
        )
    return runs


def gather(
    runs: list[Run], *, baseline: str | None, param_tolerance: float, order: Iterable[str] = (), varied: Iterable[str] = ()
) -> list[Row]:
    """Group runs into rows, baseline first, and mark what may not be compared with it.

    Args:
        varied: fields of the config in which rows differ by design.

    Raises:
        ConfigError: no row is called `baseline`.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.config.name, run.config.model], sort_keys=True, default=str), []).append(run)
    names = _names([group[0] for group in groups.values()])
    rows = [Row(name=name, runs=group) for name, group in zip(names, groups.values(), strict=True)]
    wanted = {name: place for place, name in enumerate(order)}
    rows.sort(key=lambda row: wanted.get(row.name, len(wanted)))
    if baseline is None:
        baseline = rows[0].name
    if baseline not in [row.name for row in rows]:
        raise ConfigError(f"baseline={baseline} is none of the rows; use one of {', '.join(row.name for row in rows)}")
    rows.sort(key=lambda row: row.name != baseline)
    for row in rows[1:]:
        row.problems = problems(row, rows[0], param_tolerance=param_tolerance, varied=tuple(varied))
    return rows


def problems(row: Row, baseline: Row, *, param_tolerance: float, varied: tuple[str, ...] = ()) -> list[str]:
    """Why `row` may not be compared with `baseline`; empty where it may."""
    if not row.done or not baseline.done:
        return []
    reasons = []
    ours, theirs = row.done[0], baseline.done[0]
    changed = differences(theirs.config, ours.config)
    reasons += [f"{key} {new}, baseline {old}" for key, (old, new) in changed.items() if not key.startswith(_HARMLESS + varied)]
    for label, path in _SAME.items():
        a, b = _at(ours.result, path), _at(theirs.result, path)
        if a != b:
            reasons.append(f"{label} {a}, baseline {b}")
    digests = {run.config.seed: _at(run.result, ("data", "tokens_seen_digest")) for run in baseline.done}
    for run in row.done:
        seed = run.config.seed
        if seed in digests and digests[seed] != _at(run.result, ("data", "tokens_seen_digest")):
            reasons.append(f"seed {seed} saw other tokens or another order")
    if not any(run.config.seed in digests for run in row.done):
        reasons.append("no seed in common")
    excess = ours.result["params"] / theirs.result["params"] - 1.0
    if abs(excess) > param_tolerance:
        reasons.append(f"parameters {excess:+.1%}")
    return reasons


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _names(runs: list[Run]) -> list[str]:
    """A run's own name; where several groups share one, the flags that differ are added."""
    shared = {run.config.name for run in runs if sum(other.config.name == run.config.name for other in runs) > 1}
    names = []
    for run in runs:
        name = run.config.name
        if name in shared:
            others = [other.config.model for other in runs if other.config.name == name]
            keys = sorted({key for model in others for key in model if any(o.get(key) != model[key] for o in others)})
            name += " " + " ".join(f"{key}={run.config.model.get(key)}" for key in keys)
        names.append(name.strip())
    return names
