"""Imports go down the floors of the repository and never up."""

import ast
import pathlib

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
# From the top. A room may import the rooms of lower floors, and nothing of another room on its own.
LIBRARY = [
    ["train", "eval", "generate"],
    ["experiments"],
    ["configs"],
    ["gqe_jax.serving"],
    ["gqe_jax.training.loop"],
    ["gqe_jax.evaluation", "gqe_jax.report", "gqe_jax.interop", "gqe_jax.compile_for"],
    ["gqe_jax.generation"],
    ["gqe_jax.runs"],
    ["gqe_jax.training"],
    ["gqe_jax.data"],
    ["gqe_jax"],  # what users import, and whatever has no floor of its own
    ["gqe_jax.linen", "gqe_jax.model.transformer"],
    ["gqe_jax.model.attention"],
    ["gqe_jax.model"],
    ["gqe_jax.commands"],
    ["gqe_jax.processes", "gqe_jax.sharding", "gqe_jax.storage", "gqe_jax.config_json"],
    ["gqe_jax.config"],
    ["gqe_jax.errors"],
    ["gqe_kernels"],
]
BENCHMARKS = [["experiments"], ["kernels.benchmarks"], ["gqe_kernels"]]
FOLDERS = ("experiments", "configs", "gqe_jax", "kernels")


def module_name(path: pathlib.Path) -> str:
    """The name under which a file of the repository is imported."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    parts = parts[1:] if parts[:2] == ("kernels", "gqe_kernels") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path.read_text()
    for path in [
        *REPOSITORY.glob("*.py"),
        *(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")),
    ]
}


def imports(source: str) -> set[str]:
    """The modules that a source imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # What is no module is an attribute of `node.module`.
            found |= {name if name in SOURCES else node.module for name in names}
    return found


def place(module: str, floors: list[list[str]]) -> tuple[int, str] | None:
    """The floor and the room of a module: of those that contain it, the innermost."""
    rooms = [(floor, room) for floor, rooms in enumerate(floors) for room in rooms]
    return max(
        (found for found in rooms if f"{module}.".startswith(f"{found[1]}.")),
        key=lambda found: len(found[1]),
        default=None,
    )


def goes_down(importer: str, imported: str, floors: list[list[str]]) -> bool:
    above, below = place(importer, floors), place(imported, floors)
    return bool(above and below) and (above == below or above[0] < below[0])


def upward(module: str, source: str) -> list[str]:
    """The imports of a module that go neither down a list nor out of the repository."""
    ours = {name.partition(".")[0] for name in SOURCES} | {"tests"}
    return [
        name
        for name in sorted(imports(source))
        if name.partition(".")[0] in ours
        if not any(goes_down(module, name, floors) for floors in (LIBRARY, BENCHMARKS))
    ]


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module):
    assert upward(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "source", "name"),
    [
        ("gqe_kernels.api", "from gqe_jax.sharding import make_mesh", "gqe_jax.sharding"),
        ("gqe_kernels.api", "import kernels.benchmarks.prefill", "kernels.benchmarks.prefill"),
        ("kernels.benchmarks.prefill", "import gqe_jax", "gqe_jax"),
        ("gqe_jax.model.routing", "import gqe_jax.model.attention", "gqe_jax.model.attention"),
        ("gqe_jax.config", "def f():\n    from gqe_jax import model", "gqe_jax.model"),
        ("gqe_jax.data.pipeline", "from gqe_jax.training import steps", "gqe_jax.training.steps"),
        ("gqe_jax.training.steps", "from gqe_jax import runs", "gqe_jax.runs"),
        ("gqe_jax.report.page", "from gqe_jax.evaluation import Scores", "gqe_jax.evaluation"),
        ("gqe_jax.commands", "from configs import CONFIGS", "configs"),
        ("gqe_jax.runs", "import kernels.benchmarks.prefill", "kernels.benchmarks.prefill"),
        ("configs.tiny", "import experiments.ablation", "experiments.ablation"),
        ("experiments.ablation", "import train", "train"),
        ("gqe_jax.commands", "import tests.oracle", "tests.oracle"),
    ],
)
def test_an_import_upward_is_found(module, source, name):
    assert upward(module, f"import jax\nfrom gqe_kernels import api\n{source}\n") == [name]
