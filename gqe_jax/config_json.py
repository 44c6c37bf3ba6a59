"""Reading of JSON; conversion of configurations to and from dictionaries, and their comparison."""

import dataclasses
import json
import os
import pathlib
import types
import typing
from typing import Any, Literal, get_args

from upath import UPath

from gqe_jax.config import ConfigError, RunConfig

# Fields that may change when a run resumes: those on which the past steps do not depend. After a
# change of `steps` the run continues on the schedule of the new length. The fingerprint of the
# corpus is compared, not where it lies; so are the mixtures of past steps (`data.sources`).
RESUMABLE = ("steps", "mesh", "run_dir", "log_every", "eval_every", "eval_batches", "resume_step")
RESUMABLE += ("model.remat", "accumulation_steps", "data.corpus", "optimizer.schedule_steps")
RESUMABLE += ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "attention_kernel")
RESUMABLE += ("optimizer.shard_state_over_data",)
RESUMABLE += ("profile", "watchdog_seconds", "watchdog_exit", "compilation_cache", "compiled")
RESUMABLE += ("libtpu_flags", "wandb")
RESUMABLE += ("data.mixture", "data.decay_mixture", "held_out")
RESUMABLE += ("data.read_threads", "data.prefetch", "data.verify_checksums")


def parse_json(content: str | bytes) -> Any:
    """Parses JSON, which is UTF-8 if it is bytes.

    Raises:
      ValueError: it is no JSON, no UTF-8, or nested too deeply.
    """
    text = content if isinstance(content, str) else content.decode()
    try:
        return json.loads(text)
    except RecursionError:  # where `json` gives up, which no file of ours comes near
        raise ValueError("it is nested too deeply") from None


def read_object(path: pathlib.Path | UPath) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no JSON object; names the file.
    """
    try:
        values = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be an object of fields; copy it again")
    return values


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries that JSON can hold."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: Any, path: str = "") -> Any:
    """Builds the dataclass `kind` from the nested dictionaries of `to_dict`; executes no code.

    Raises:
      ConfigError: a field is unknown, missing, or has a value of the wrong type or range.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{path or kind.__name__} is {values!r}; it must be an object of fields")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        known = ", ".join(field.name for field in dataclasses.fields(kind))
        raise ConfigError(f"{path}{unknown[0]} is no field of {kind.__name__}; it has {known}")
    arguments = {name: _typed(hints[name], value, path + name) for name, value in values.items()}
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in values and field.default is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{path}{missing[0]} is missing from {kind.__name__}")
    return kind(**arguments)


def _typed(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{path}.")
    if origin is Literal:
        return value  # the dataclass checks the choice
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_typed(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    allowed = arguments if origin in (types.UnionType, typing.Union) else (origin or hint,)
    allowed = tuple(str if typing.get_origin(kind) is Literal else kind for kind in allowed)
    if float in allowed and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{path} is {value!r}; it must be a finite number") from None
    if type(value) not in allowed:
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
        raise ConfigError(f"{path} is {value!r}; it must be of type {names}")
    return value


def differences(ours: RunConfig, theirs: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The fields, with both values, whose difference prevents resuming `theirs` as `ours`."""
    prefixes = tuple(f"{name}." for name in RESUMABLE)
    return {
        name: values
        for name, values in changes(ours, theirs).items()
        if name not in RESUMABLE and not name.startswith(prefixes)
    }


def changes(ours: RunConfig, theirs: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The fields, with both values, that differ; two ways to write one value do not."""
    left, right = _flat(ours), _flat(theirs)
    return {name: (left[name], right[name]) for name in left if left[name] != right[name]}


def _flat(config: RunConfig) -> dict[str, Any]:
    def flatten(values, path=""):
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{path}{name}.")
            else:
                yield f"{path}{name}", value

    flat = dict(flatten(to_dict(config)))
    flat["model.attention.head_dim"] = config.model.attention.resolved_head_dim
    if config.teacher is not None and "://" not in config.teacher:
        flat["teacher"] = os.path.realpath(config.teacher)
    return flat
