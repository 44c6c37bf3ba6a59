"""The table of libtpu's options: each set is the compiler's while its row is compiled."""

import types

import jax
import pytest

from experiments import flags
from gqe_jax.config import ConfigError
from gqe_jax.training import steps
from gqe_kernels.chips import GIB


def test_each_row_is_compiled_with_its_set(monkeypatch):
    seen = []

    def compile_step(config, topology):
        seen.append(steps.compiler_options(None, None))
        if len(seen) == 2:
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such option\nand more")
        scheduled = types.SimpleNamespace(xla=1.5, exposed=0.02, overlapped=0.003)
        return types.SimpleNamespace(
            scheduled=scheduled, memory=types.SimpleNamespace(temporaries=3 * GIB)
        )

    monkeypatch.setattr(flags, "compile_step", compile_step)
    monkeypatch.setattr(flags, "get_topology", lambda *_: None)
    own = steps.compiler_options
    sets = ("none", "fused asynchronous gathers and sums", "all collectives on the SparseCore")
    rows = list(flags.rows(flags.FlagsConfig("gqe_1b", "v5p:2x2x1", sets=sets)))
    assert seen == [flags.SETS[name] for name in sets]
    assert steps.compiler_options is own
    assert rows[2] == "| none | 1,500.0 | 20.0 | 3.0 | 3.0 GiB |"
    assert rows[3].endswith("| refused: INVALID_ARGUMENT: No such option | | | |")
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": "gqe"}, "config has 'gqe'; it must be among 'tiny', 'gqe_40m'"),
        ({"sets": ("some",)}, "sets has 'some'; it must be among 'none'"),
    ],
)
def test_unknown_names_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        flags.FlagsConfig(**{"config": "gqe_1b", "slice": "v5p:2x2x1"} | fields)
