"""The examples of the README, the documents and the docstrings run as printed."""

import doctest
import importlib
import pathlib
import re

import pytest

from gqe_jax.sharding import RULES

REPOSITORY = pathlib.Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
DOCUMENTS = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
PAGES = (*DOCUMENTS, REPOSITORY / "kernels" / "README.md")
EXAMPLES = [
    pytest.param(
        *(path.name, example),
        id=f"{path.stem}-{number}",
        marks=[] if path.name == "README.md" else [pytest.mark.slow],
    )
    for path in DOCUMENTS
    for number, example in enumerate(
        re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    )
]
OTHER_PROJECTS = ("tunix",)  # large: an extra, not installed for the tests


@pytest.fixture
def own_rules():
    """The table of mesh axes, which an example edits, is as it was afterwards."""
    saved = dict(RULES)
    yield
    RULES.clear()
    RULES.update(saved)


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize(("document", "example"), EXAMPLES)
def test_examples_run(document, example):
    for module in OTHER_PROJECTS:
        if re.search(rf"^from {module}\b", example, re.MULTILINE):
            pytest.importorskip(module, reason=f"needs the extra: pip install -e '.[{module}]'")
    exec(compile(example, document, "exec"), {"__name__": "example"})


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_pages_and_headings_that_exist(page):
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


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
