"""From the command line to one checked config: Hydra composes, and nothing starts before every flag is understood."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

import xattn
from xattn import ConfigError
from xattn.experiments.device import check_device
from xattn.experiments.schema import CompareConfig, EvalConfig, EvaluateConfig, RunConfig, TrainConfig, check_packages
from xattn.experiments.sources import check_files, vocabulary_of

_HERE = Path(__file__).resolve().parent
# Installed, configs/ lies inside this package's parent; in a checkout beside it.
CONFIGS = _HERE.parent / "configs"
GROUPS = ("model", "data", "optim", "schedule", "trainer", "tracking", "eval", "experiment", "sweep", "size", "debug")
# Everything the library raises for what a user asked; anything else is our own mistake and keeps its traceback.
USER_ERRORS = (ConfigError, xattn.CheckpointError, xattn.ShapeError, xattn.TokenError)


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
        ConfigError: an override names a key that no group has or gives what no such key can be, or the task raised it.
    """
    import hydra
    import yaml
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import CompactHydraException
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    for name, node in schemas().items():
        store.store(name=f"base_{name}", node=node)
    check_overrides(argv, schemas()[command])
    sys.argv = [f"xattn-{command}", *argv]
    refusals: list[Exception] = []

    def guarded(cfg: Any) -> Any:
        # Hydra would print a traceback and exit: our own errors are carried past it.
        try:
            return task(cfg)
        except USER_ERRORS as error:
            refusals.append(error)
        finally:
            # Of a refused job, or of a report that is written elsewhere.
            _remove_if_empty(Path(HydraConfig.get().runtime.output_dir))

    with _errors_raised():
        try:
            hydra.main(config_path=str(CONFIGS), config_name=command, version_base="1.3")(guarded)()
        except (CompactHydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(_in_our_words(error, command)) from None
    if refusals:
        raise refusals[0]


@contextmanager
def _errors_raised() -> Iterator[None]:
    """Hydra raises its errors, where it would print them in its own words and exit."""
    name = "HYDRA_FULL_ERROR"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _in_our_words(error: Exception, command: str) -> str:
    """What Hydra, OmegaConf or YAML says, on one line."""
    from hydra.errors import OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    said = " ".join(str(error).split()).removeprefix("Error merging override ")
    if found := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'$", str(error).strip().splitlines()[0]):
        runs = "for a run of each add -m, " if command == "train" else ""
        return f"{found[1]}={found[2]} gives several values; {runs}for a list write {found[1]}=[{found[2]}]"
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: {said}"
    if found := re.search(r"Key '(experiment|sweep|size|debug)' not in", said):
        return f"{said.split(':')[0]}: {found[1]} is no field of the config; begin the file with the line # @package _global_"
    if isinstance(error.__cause__, OmegaConfBaseException):
        return f"{said}: {str(error.__cause__).splitlines()[0]}"
    return said


def _remove_if_empty(folder: Path) -> None:
    """Take back the directories that Hydra made for a job that then left nothing there."""
    for path in (folder, *folder.parents):
        if path == Path.cwd() or path in Path.cwd().parents:
            return
        try:
            path.rmdir()
        except OSError:
            return  # something lies in it


def check_overrides(argv: Iterable[str], schema: Any) -> None:
    """Raise ConfigError, with a suggestion, for an override of a key, or a choice of a group, that does not exist.

    Hydra's struct mode lets `+model.typo=1` through and suggests nothing for the rest.
    """
    argv = list(argv)
    for arg in argv:
        if arg.startswith("--"):
            _check_option(arg, schema)
        if arg.startswith("-") or "=" not in arg:
            continue
        key, value = arg.split("=", 1)
        key = key.lstrip("+~").split("@", 1)[0]
        if key.startswith("hydra") or "/" in key:
            continue
        if key in GROUPS:
            _check_choice(key, value, argv)
        else:
            _check_key(key, schema)


def _check_option(arg: str, schema: Any) -> None:
    """Options are Hydra's own, such as --cfg; what is a field of ours stands without dashes."""
    key, _, value = arg.removeprefix("--").replace("-", "_").partition("=")
    ours = {*GROUPS, *(f.name for f in fields(schema)), "resume"} - {"run"}  # Hydra has a --run
    if key.split(".")[0] in ours:
        raise ConfigError(f"{arg} is no option; fields stand without dashes: use {key}={value or 'VALUE'}")


def _check_choice(group: str, value: str, argv: list[str]) -> None:
    folders = [folder / group for folder in (CONFIGS, *_config_dirs(argv))]
    names = {path.relative_to(folder).with_suffix("").as_posix() for folder in folders for path in folder.rglob("*.yaml")}
    for name in value.split(","):
        if name not in names and re.fullmatch(r"[\w/]*", name) and name != "null":
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            cure = f"did you mean {group}={close[0]}?" if close else f"use one of {', '.join(sorted(names))}"
            raise ConfigError(f"{group}={name}: there is no such file in the group {group}; {cure}")


def _config_dirs(argv: list[str]) -> list[Path]:
    """The folders of the user's own groups, in Hydra's spellings."""
    options = ("--config-dir", "-cd")
    apart = [value for option, value in zip(argv, argv[1:], strict=False) if option in options]
    joined = [arg.split("=", 1)[1] for arg in argv if arg.startswith(tuple(f"{option}=" for option in options))]
    return [Path(folder) for folder in apart + joined]


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
            if not path:
                _suggest_group(key, part, schema)
            _unknown_key(key, ".".join(path), part, names)
        path.append(part)
        node = getattr(node, part, None)


def _suggest_group(key: str, name: str, schema: Any) -> None:
    """A flag or a field that was given without its group: `sliding_window=4`, `lr=1e-3`."""
    groups = {f.name: getattr(schema, f.name) for f in fields(schema) if f.name in GROUPS}
    places = [group for group, node in groups.items() if is_dataclass(node) and name in [f.name for f in fields(node)]]
    if "model" in groups and name in xattn.flag_table():
        places.insert(0, "model")
    if places:
        raise ConfigError(f"{key} is no field of the config; did you mean {places[0]}.{key}?")


def _unknown_key(key: str, parent: str, part: str, names: list[str]) -> None:
    if parent == "model" or parent.startswith(("eval.flags", "eval.extensions")):
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
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the config cannot be resolved: {' '.join(str(error).split())}") from None
    config.eval.flags = _given(config.eval.flags)
    if isinstance(config, RunConfig):
        config.model = _given(config.model)
        config.check()
        check_packages(config)
        check_device(config.trainer)
        check_files(config.data)
        complete_model(config)
        check_flags(config)
    else:
        config.eval.check()
    return config


def complete_model(config: RunConfig) -> None:
    """Fill num_tokens from the tokeniser, max_seq_len and a task's sizes from the training length; refuse what does not fit."""
    if config.data.source == "task":
        config.data.task = config.data.task.settled(config.trainer.seq_len)
    vocabulary = vocabulary_of(config.data)
    if vocabulary is None and "num_tokens" not in config.model:
        raise ConfigError(
            f"data.path={config.data.path} has no meta.json with vocab_size; say how many ids there are with "
            "model.num_tokens=50304 or the like"
        )
    num_tokens = config.model.setdefault("num_tokens", vocabulary)
    if vocabulary is not None and isinstance(num_tokens, int) and num_tokens < vocabulary:
        raise ConfigError(
            f"model.num_tokens={num_tokens} is less than the {vocabulary} ids of "
            f"data.tokenizer={config.data.tokenizer}; drop model.num_tokens or use {vocabulary}"
        )
    longest = config.model.setdefault("max_seq_len", config.trainer.seq_len)
    if isinstance(longest, int) and config.trainer.seq_len > longest:
        raise ConfigError(
            f"trainer.seq_len={config.trainer.seq_len} is beyond model.max_seq_len={longest}; "
            f"use trainer.seq_len={longest} or raise model.max_seq_len"
        )


def check_flags(config: RunConfig) -> None:
    """Check the model's flags, and the evaluation-time flags on top of them: both fail now, not hours later."""
    for flags in (config.model, config.model | config.eval.flags):
        xattn.parse(flags)
        if flags.get("attn_backend") is not None:
            with torch.device("meta"):
                xattn.build(**flags)  # raises where that back-end cannot serve a layer
    known = list(xattn.flag_table())
    for name, flags in config.eval.extensions.items():
        for flag in flags:
            if flag not in known:
                _unknown_key(f"eval.extensions.{name}.{flag}", f"eval.extensions.{name}", flag, known)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


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
