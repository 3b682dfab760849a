"""From the command line to one checked config: Hydra composes, and nothing starts before every flag has been understood."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

import xattn
from xattn import ConfigError
from xattn.experiments.schema import CompareConfig, EvalConfig, EvaluateConfig, RunConfig, TrainConfig

_HERE = Path(__file__).resolve().parent
# Installed, configs/ lies inside this package's parent; in a checkout beside it.
CONFIGS = _HERE.parent / "configs"
GROUPS = ("model", "data", "optim", "schedule", "trainer", "tracking", "eval", "experiment", "sweep", "debug")
BYTES_VOCABULARY = 256
# Everything the library raises for what a user asked; anything else is our own mistake and keeps its traceback.
USER_ERRORS = (ConfigError, xattn.CheckpointError, xattn.ShapeError, xattn.TokenError)
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")

T = TypeVar("T")


def schemas() -> dict[str, Any]:
    """The primary schema of each command. Every model flag is a known key, with None for not given."""
    flags = xattn.flag_table()

    def shared() -> dict[str, Any]:
        at_evaluation = {name: None for name, flag in flags.items() if flag.inference}
        return {"model": dict.fromkeys(flags), "eval": EvalConfig(flags=at_evaluation)}

    return {
        "train": TrainConfig(**shared()),
        "compare": CompareConfig(**shared()),
        "eval": EvaluateConfig(eval=shared()["eval"]),
    }


def hydra_main(task: Callable[[Any], Any], command: str, argv: list[str]) -> None:
    """Compose `configs/<command>.yaml` with the overrides in `argv` and call `task(cfg)` for each job.

    Raises:
        ConfigError: an override names a key that no group has.
    """
    import hydra
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for name, node in schemas().items():
        store.store(name=f"base_{name}", node=node)
    check_overrides(argv, schemas()[command])
    sys.argv = [f"xattn-{command}", *argv]
    hydra.main(config_path=str(CONFIGS), config_name=command, version_base="1.3")(task)()


def check_overrides(argv: Iterable[str], schema: Any) -> None:
    """Raise ConfigError, with a suggestion, for an override of a key that does not exist.

    Hydra's struct mode lets `+model.typo=1` through and suggests nothing for the rest.
    """
    for arg in argv:
        if arg.startswith("-") or "=" not in arg:
            continue
        key = arg.split("=", 1)[0].lstrip("+~").split("@", 1)[0]
        if key.startswith("hydra") or "/" in key or key in GROUPS:
            continue
        _check_key(key, schema)


def _check_key(key: str, schema: Any) -> None:
    node, path = schema, []
    for part in key.split("."):
        if is_dataclass(node):
            names = [f.name for f in fields(node)]
        elif path and path[-1] in ("model", "flags"):
            names = list(xattn.flag_table())
        else:
            return  # a free mapping: variants, extensions
        if part not in names:
            _unknown_key(key, ".".join(path), part, names)
        path.append(part)
        node = getattr(node, part, None)


def _unknown_key(key: str, parent: str, part: str, names: list[str]) -> None:
    if parent == "model" or parent.endswith(".flags"):
        for name, flag in xattn.flag_table().items():
            if part in flag.aliases:
                raise ConfigError(f"{key} is an alias; on the command line use {parent}.{name}")
    place = f"{parent}." if parent else ""
    what = "flag of the model" if parent == "model" else "field of the config"
    close = difflib.get_close_matches(part, names, n=1, cutoff=0.6)
    if not close and not parent:
        close = difflib.get_close_matches(part, GROUPS, n=1, cutoff=0.6)
    cure = f"did you mean {place}{close[0]}?" if close else f"known here: {', '.join(names)}"
    raise ConfigError(f"{key} is no {what}; {cure}")


def resolve(cfg: Any) -> Any:
    """The checked dataclass behind a composed config; every interpolation resolved, flags that were not given dropped.

    Raises:
        ConfigError: naming the field, what was given and what would work.
    """
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(cfg)
    config.eval.flags = _given(config.eval.flags)
    if isinstance(config, RunConfig):
        config.model = _given(config.model)
        config.check()
        complete_model(config)
        check_flags(config)
    else:
        config.eval.check()
    return config


def complete_model(config: RunConfig) -> None:
    """Fill num_tokens from the tokeniser and max_seq_len from the training length; refuse values that do not fit."""
    vocabulary = {"bytes": BYTES_VOCABULARY, "bpe": config.data.vocab_size, "gpt2": 50_257}[config.data.tokenizer]
    num_tokens = config.model.setdefault("num_tokens", vocabulary)
    if isinstance(num_tokens, int) and num_tokens < vocabulary and config.data.source != "bin":
        raise ConfigError(
            f"model.num_tokens={num_tokens} is less than the {vocabulary} ids of data.tokenizer={config.data.tokenizer}; "
            f"drop model.num_tokens or use {vocabulary}"
        )
    longest = config.model.setdefault("max_seq_len", config.trainer.seq_len)
    if isinstance(longest, int) and config.trainer.seq_len > longest:
        raise ConfigError(
            f"trainer.seq_len={config.trainer.seq_len} is beyond model.max_seq_len={longest}; "
            f"use trainer.seq_len={longest} or raise model.max_seq_len"
        )


def check_flags(config: RunConfig) -> None:
    """Parse the model's flags, and the evaluation-time flags on top of them, so that both fail now and not hours later."""
    xattn.parse(config.model)
    if config.eval.flags:
        xattn.parse(config.model | config.eval.flags)
    for name, flags in config.eval.extensions.items():
        unknown = [flag for flag in flags if flag not in xattn.flag_table()]
        for flag in unknown:
            _unknown_key(f"eval.extensions.{name}.{flag}", f"eval.extensions.{name}.flags", flag, list(xattn.flag_table()))


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


# What a run directory keeps.


def as_run(config: RunConfig) -> RunConfig:
    """The RunConfig part of a command's config: what decides a run, without where it is written."""
    return RunConfig(**{f.name: getattr(config, f.name) for f in fields(RunConfig)})


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as plain YAML; values of secret-looking environment variables never reach it."""
    path.write_text(yaml.safe_dump(redact(asdict(as_run(config))), sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_config(path: Path) -> RunConfig:
    """Read a run's config.yaml. Nothing in it is interpolated or instantiated.

    Raises:
        ConfigError: no such file, no mapping, or a key that no run has.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a run's config.yaml: {error}") from None
    config = from_dict(RunConfig, data, where=str(path))
    config.check()
    return config


def from_dict(cls: type[T], data: Any, *, where: str) -> T:
    """Build the dataclass from plain data, refusing keys it does not have."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where} holds a {type(data).__name__}, not the mapping that a run's config is")
    known = {f.name: f for f in fields(cls)}
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: {key} is no field of a run's config; known: {', '.join(known)}")
    values = {
        key: from_dict(known[key].type, value, where=f"{where}: {key}") if is_dataclass(known[key].type) else value
        for key, value in data.items()
    }
    return cls(**values)


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """`group.field` -> (old, new) wherever two run configs differ."""
    flat_old, flat_new = _flatten(asdict(as_run(old))), _flatten(asdict(as_run(new)))
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    }


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def redact(value: Any) -> Any:
    """Replace every occurrence of a secret-looking environment variable's value by its name in angle brackets."""
    secrets = {v: f"<{k}>" for k, v in os.environ.items() if len(v) >= 8 and any(w in k.upper() for w in _SECRET_WORDS)}

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [clean(inner) for inner in item]
        if isinstance(item, str):
            for secret, name in secrets.items():
                item = item.replace(secret, name)
        return item

    return clean(value)


def command_line(body: Callable[[list[str]], int]) -> None:
    """Run a command's body; a ConfigError is one clear line and exit status 2, never a traceback."""
    try:
        status = body(sys.argv[1:])
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
