"""The examples of the README, the documents and the docstrings run as printed."""

import doctest
import importlib
import pathlib
import re

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
EXAMPLES = [
    pytest.param(path.name, example, id=f"{path.stem}-{number}")
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
    for number, example in enumerate(
        re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    )
]
OTHER_PROJECTS = ("tunix",)  # large: an extra, not installed for the tests


@pytest.mark.parametrize(("document", "example"), EXAMPLES)
def test_examples_run(document, example):
    for module in OTHER_PROJECTS:
        if re.search(rf"^from {module}\b", example, re.MULTILINE):
            pytest.importorskip(module, reason=f"needs the extra: pip install -e '.[{module}]'")
    exec(compile(example, document, "exec"), {"__name__": "example"})


@pytest.mark.parametrize(
    "module", ["gqe_jax.model.attention", "gqe_jax.generation", "gqe_jax.linen", "gqe_kernels.api"]
)
def test_docstrings_run(module):
    failed, attempted = doctest.testmod(importlib.import_module(module))
    assert attempted > 0
    assert failed == 0


def test_the_two_commands_install_and_then_train_or_test():
    """Double quotes, because the command prompt of Windows has no single ones."""
    assert re.findall(r"^pip install .* && .*$", README, re.MULTILINE) == [
        "pip install -r requirements.txt && python train.py",
        'pip install -e ".[test]" && python -m pytest',
    ]
    assert (REPOSITORY / "requirements.txt").read_text() == "-e .\n"


def test_the_map_names_what_is_there():
    tree = README.split("## Map")[1]
    for name in re.findall(r"\b[a-z_/]+\.py\b|\b[a-z_]+/(?= )", tree):
        assert list(REPOSITORY.rglob(name.rstrip("/"))), name
