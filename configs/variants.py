"""Configurations that differ from another one in the attention."""

import dataclasses
from typing import Any

from gqe_jax.config import RunConfig


def variant_of(config: RunConfig, name: str, **attention: Any) -> RunConfig:
    """Returns `config` with these fields of its attention, and the run directory of `name`."""
    changed = dataclasses.replace(config.model.attention, **attention)
    model = dataclasses.replace(config.model, attention=changed)
    return dataclasses.replace(config, model=model, run_dir=f"runs/{name}")
