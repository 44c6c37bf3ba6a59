"""A wheel of the repository works alone: the README's examples import it outside the checkout."""

import os
import pathlib
import re
import subprocess
import sys
import venv

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
# Examples with `configs` are for a checkout, which has the named configurations.
EXAMPLES = [
    example
    for example in re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL
    )
    if "import gqe_" in example or "from gqe_" in example
    if "from configs" not in example
]


def run(*command: object, cwd: pathlib.Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> pathlib.Path:
    """The Python of an environment that has the wheel, and the dependencies of this one."""
    pytest.importorskip("hatchling", reason="needs the extra: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=REPOSITORY)
    (wheel,) = folder.glob("*.whl")
    fresh = folder / "venv"
    venv.create(fresh)
    python = fresh / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    run(*pip, wheel, cwd=folder)
    # A folder named in a .pth file has its own .pth files ignored, and so the one by which an
    # editable installation adds the checkout.
    paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = pathlib.Path(run(python, "-c", code, cwd=folder).strip())
    (site / "dependencies.pth").write_text("\n".join(paths))
    return python


def test_the_packages_are_those_of_the_wheel_and_typed(installed, tmp_path):
    code = (
        "import pathlib, sys, gqe_jax, gqe_kernels\n"
        "for package in (gqe_jax, gqe_kernels):\n"
        "    folder = pathlib.Path(package.__file__).parent\n"
        "    assert folder.is_relative_to(sys.prefix), folder\n"
        "    assert (folder / 'py.typed').is_file(), folder\n"
    )
    run(installed, "-c", code, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(installed, number, tmp_path):
    run(installed, "-c", EXAMPLES[number], cwd=tmp_path)


def test_there_are_examples():
    assert EXAMPLES
