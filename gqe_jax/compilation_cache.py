"""Where the command lines keep compiled programs, so that the next start need not compile them."""

import jax

from gqe_jax.storage import cache_directory, location

DEFAULT = "default"


def keep_programs(directory: str | None) -> None:
    """Sets JAX's compilation cache for this process; call before anything is compiled.

    Args:
      directory: a directory or bucket; `default`: the one of JAX_COMPILATION_CACHE_DIR, or
        `programs` in the user's cache directory; None or empty: programs are not kept. On a CPU
        that is split into several devices `default` keeps none: a program from the cache runs
        their collectives in no fixed order, so that they can wait for each other for ever.

    Raises:
      ConfigError: no installed package implements the protocol of `directory`.
    """
    if directory == DEFAULT:
        several_on_cpu = jax.default_backend() == "cpu" and jax.local_device_count() > 1
        if jax.config.jax_compilation_cache_dir is not None or several_on_cpu:
            return
        directory = str(cache_directory() / "programs")
    found = str(location(directory)) if directory else None
    jax.config.update("jax_compilation_cache_dir", found)
