"""Eight simulated devices for every test, programs compiled fast, reasons for what is skipped."""

import atexit
import importlib.util
import os
import shutil
import tempfile

# The tests spend their time on compiling, not on running what was compiled.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_force_host_platform_device_count=8",
    ]
).strip()
# What one test compiles, another, or a run that is started again, need not: the test run has a
# cache of programs, which its processes share.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gqe-jax-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# A program from that cache runs its collectives in no fixed order, each in a thread that waits for
# the other devices': with as many threads as devices, all can wait.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# There is no metadata server to ask where no TPU is, and the workers of pytest-xdist each load
# libtpu, which compiles for chips that are not here.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Schedules take longer to write down than programs to compile; who reads them, asks for them.
os.environ.setdefault("LIBTPU_INIT_ARGS", "--xla_jf_dump_llo_text=false")

import jax
import jaxtyping
import pytest

import tests.typed  # noqa: F401  # for the hook, which has its name

# Each call of a function of the packages is checked against its annotations, shapes included.
jaxtyping.install_import_hook(["gqe_jax", "gqe_kernels"], "tests.typed.checked")


def pytest_runtest_setup(item):
    """Before the fixtures of a test are made: skips what cannot run here, and sets type checks."""
    is_wrong = item.get_closest_marker("wrong_types") is not None
    jaxtyping.config.update("jaxtyping_disable", is_wrong)
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU, and this machine has none that JAX can use")
    if item.get_closest_marker("libtpu") and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, which exists for x86-64 Linux: pip install -e '.[tpu]'")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Corpora made on first use go to a folder of this test run's own, one for each worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
