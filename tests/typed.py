"""The type checker that the tests put around every function of the packages."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def checked(function: Callable) -> Callable:
    """Checks calls against annotations; leaves constructors alone.

    JAX builds dataclasses of shapes, shardings and None from those of arrays, and configurations
    name a wrong value themselves.
    """
    return function if function.__name__ == "__init__" else _check(function)
