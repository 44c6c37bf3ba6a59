"""Continues texts with a trained run: `python generate.py RUN_DIR --prompt TEXT`."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Literal

import jax
import tyro

from gqe_jax.commands import parse, run_command
from gqe_jax.compilation_cache import keep_programs
from gqe_jax.config import ConfigError, MeshConfig
from gqe_jax.generation import Generator, Sampling, stream_text
from gqe_jax.runs import restore_run


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue texts with a run's model."""

    run_dir: tyro.conf.Positional[str]
    """Directory of the run."""
    prompt: tuple[str, ...]
    """The texts to continue, decoded as one batch; several are printed one after the other."""
    max_tokens: int = 256
    """The most new tokens for a text."""
    stop: tuple[str, ...] = ()
    """Sequences that end a text."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    """Seed of the random numbers."""
    step: int | Literal["latest", "best"] = "latest"
    """Which checkpoint; `best` is the one with the lowest held-out loss in training."""
    tokenizer: str | None = None
    """`byte` or a tokenizer.json; None: the run's."""
    end_of_document: str | None = None
    """Token that ends a text; None: the tokens that end the run's documents, or that the imported
    model ends texts with."""
    chunk_size: int = 256
    """Tokens of each prompt that a step of the prefill computes."""
    compilation_cache: str | None = "default"
    """Directory or bucket in which compiled programs are kept for the next start; `default`:
    `gqe_jax/programs` in the user's cache directory; None or empty: none are kept."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Where no axis is named: the run's own, if it fits the devices."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("prompt is missing; give the text to continue")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it must be positive")


def generate(config: GenerateConfig) -> None:
    """Loads the run's model and prints each prompt with its continuation."""
    keep_programs(config.compilation_cache)
    run = restore_run(
        config.run_dir,
        step=config.step,
        mesh=config.mesh.named,
        tokenizer=config.tokenizer,
        end_of_document=config.end_of_document,
    )
    pieces = stream_text(
        Generator(run.model, run.mesh, chunk_size=config.chunk_size),
        run.tokenizer,
        config.prompt,
        max_tokens=config.max_tokens,
        sampling=config.sampling,
        seed=config.seed,
        stop=config.stop,
    )
    print_texts(config.prompt, pieces)


def print_texts(prompts: Sequence[str], pieces: Iterable[tuple[int, str]]) -> None:
    """Prints prompts and their continuations; a single text is printed as it is generated.

    Args:
      pieces: the row of a text and what follows in it, as they come.
    """
    texts = list(prompts)
    streamed = len(texts) == 1

    def show(text, end=""):
        if jax.process_index() == 0:
            print(text, end=end, flush=True)

    show(texts[0] if streamed else "")
    for row, piece in pieces:
        texts[row] += piece
        show(piece if streamed else "")
    show("" if streamed else "\n\n".join(texts), end="\n")


def main() -> None:
    """Runs the command line: a run's directory and the prompts."""
    config = parse(
        GenerateConfig,
        sys.argv[1:],
        prog="generate.py",
        description="Continue a text with a run's model. RUN_DIR comes first.",
    )
    try:
        run_command(lambda: generate(config))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
