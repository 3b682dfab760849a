"""A run's config.yaml: written once, resolved and without secrets; read back as data, with nothing run or looked up."""

import os
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from xattn import ConfigError
from xattn.experiments.schema import RunConfig

_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")

T = TypeVar("T")


def as_run(config: RunConfig) -> RunConfig:
    """The RunConfig part of a command's config: what decides a run, without where it is written."""
    return RunConfig(**{f.name: getattr(config, f.name) for f in fields(RunConfig)})


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as plain YAML; values of secret-looking environment variables never reach it."""
    text = yaml.safe_dump(redact(asdict(as_run(config))), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


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
    # Redacted as saved: a run is told from another one by what its config.yaml can show.
    flat_old, flat_new = (_flatten(redact(asdict(as_run(config)))) for config in (old, new))
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    }


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


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
