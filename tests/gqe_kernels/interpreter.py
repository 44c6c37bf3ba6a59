"""The TPU interpreter as a fixture."""

import dataclasses

import pytest
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture
def interpreter():
    """The interpreter, with scratch memory full of NaNs, raising on a race."""
    pltpu.reset_tpu_interpret_mode_state()
    known = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
    raising = {"on_race": "raise"} if "on_race" in known else {}  # before jax 0.12: printed
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", **raising)
    with pltpu.force_tpu_interpret_mode(params):
        yield
