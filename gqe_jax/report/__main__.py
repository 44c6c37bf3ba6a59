"""Writes the report of runs: `python -m gqe_jax.report RUN_DIR [RUN_DIR ...]`."""

import dataclasses
import pathlib
import sys
from typing import Literal

import tyro

from gqe_jax.commands import parse, run_command
from gqe_jax.config import ConfigError, MeshConfig
from gqe_jax.errors import DataError
from gqe_jax.report import page
from gqe_jax.report.curves import DIRECTORY, Curves, NoMetricsError
from gqe_jax.report.routing import route_text
from gqe_jax.storage import Location, is_remote, location, write_whole
from gqe_jax.training.checkpoint import CheckpointError


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Report how runs learn and route: one HTML page, and its plots as PNG files."""

    run_dirs: tyro.conf.Positional[tuple[str, ...]]
    """Directories of the runs."""
    text: str | None = None
    """The text to route; None: the beginning of the held-out split of each run's corpus."""
    text_file: pathlib.Path | None = None
    """A file of text to route instead."""
    max_tokens: int = 4096
    """Maximum number of tokens of the text."""
    step: int | Literal["latest", "best"] = "latest"
    """The checkpoint; `best` has the lowest held-out loss."""
    corpus: str | None = None
    """Source of the tokenizer and of the held-out text; None: each run's own."""
    end_of_document: str | None = None
    """Token that ends a document; None: the tokenizer's."""
    output: pathlib.Path | None = None
    """Directory of index.html; None: report/ in the first run's directory."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Where no axis is named: each run's own, if it fits the devices."""

    def __post_init__(self) -> None:
        if not self.run_dirs:
            raise ConfigError("run_dirs is empty; name at least one run directory")
        if self.text is not None and self.text_file is not None:
            raise ConfigError(f"text and text_file ({self.text_file}) are both given; give one")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it must be positive")


def write_report(config: ReportConfig) -> Location:
    """Writes the page and its PNG files, and returns the path of the page.

    A run without a checkpoint is shown by its metrics alone.

    Raises:
      ConfigError: a run directory has no metrics, or the text cannot be read.
      DataError: the text or its corpus does not fit a run's model.
    """
    text = config.text
    if config.text_file is not None:
        try:
            text = config.text_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"text_file {config.text_file} cannot be read as UTF-8 text ({error})"
            ) from None
    runs = []
    for run_dir, label in zip(config.run_dirs, _labels(config.run_dirs), strict=True):
        try:
            curves = Curves.read(run_dir, label)
        except (NoMetricsError, DataError) as error:
            raise ConfigError(f"run_dirs: {error}") from None
        routed, missing = None, ""
        try:
            routed = route_text(
                run_dir,
                text,
                step=config.step,
                max_tokens=config.max_tokens,
                corpus=config.corpus,
                end_of_document=config.end_of_document,
                mesh=config.mesh.named,
            )
        except CheckpointError as error:
            missing = str(error)
        runs.append(page.Run(curves, routed, missing))
    content, images = page.build(runs)
    output = config.output or location(config.run_dirs[0]) / DIRECTORY
    for name, image in images.items():
        write_whole(output / name, image)
    path = output / "index.html"
    write_whole(path, content)
    return path


def _labels(run_dirs: tuple[str, ...]) -> list[str]:
    """Returns the names of the directories, or their paths where two names are equal."""
    paths = map(location, run_dirs)
    names = [path.name if is_remote(path) else path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else list(run_dirs)


def main() -> None:
    """The command line."""
    config = parse(
        ReportConfig,
        sys.argv[1:],
        prog="python -m gqe_jax.report",
        description="Report how runs learn and route: writes one self-contained HTML page, and its "
        "plots as PNG files.",
    )
    print(run_command(lambda: write_report(config)))


if __name__ == "__main__":
    main()
