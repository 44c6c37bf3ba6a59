"""All text of a run: what it trains on, and what it is scored on."""

import dataclasses

from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.data.corpus import Corpus, Split
from gqe_jax.data.mixture import Mixture, Plan, parse_named, plans
from gqe_jax.data.stdlib import open_corpus
from gqe_jax.data.tokenizers import TOKENIZER_FILE
from gqe_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Sources:
    """The open corpora of a run."""

    main: Corpus
    """`data.corpus`: the tokenizer, and the held-out text by which checkpoints are compared."""
    mixture: Mixture
    held_out: dict[str, Split]
    """Further held-out text, by name."""
    fingerprint: str
    """The main corpus's, then NAME=FINGERPRINT of each corpus of a mixture."""
    directories: dict[str, str]
    """Those of the mixture's corpora, by name."""

    def describe(self) -> str:
        """Names the training text and its size."""
        splits = self.mixture.splits.items()
        return " + ".join(f"{len(x):,} tokens of {self.directories[name]}" for name, x in splits)


def open_sources(config: RunConfig) -> Sources:
    """Opens and checks the corpora of a run.

    Raises:
      ConfigError: a mixture or a held-out set is not of its form.
      DataError: a corpus is damaged, does not fit the model, or has another tokenizer.
    """
    stages = plans(config)
    named = {part.name: part.directory for plan in stages for part in plan.parts}
    scored: dict[str, str] = {}
    for text in config.held_out:
        form = "it must be NAME=DIRECTORY, such as books=corpora/books"
        name, directory = parse_named("held_out", text, form)
        if name in scored:
            raise ConfigError(f"held_out has {name} twice; names must differ")
        scored[name] = directory
    opened: dict[str, Corpus] = {}
    for directory in dict.fromkeys([config.data.corpus, *named.values(), *scored.values()]):
        corpus = open_corpus(directory, verify=config.data.verify_checksums)
        corpus.check(vocab_size=config.model.vocab_size, sequence_length=config.sequence_length)
        opened[directory] = corpus
        if corpus.manifest.sequence_length is not None and not config.data.document_masking:
            raise ConfigError(
                f"data.document_masking is False; {directory} has conversations, several in a "
                "window: give --data.document-masking True"
            )
    main = opened[config.data.corpus]
    for directory, corpus in opened.items():
        if problem := _other_tokenizer(main, corpus):
            raise DataError(
                f"corpus {directory} and data.corpus {config.data.corpus} have different "
                f"tokenizers ({problem}); prepare them with one, and name one of them data.corpus"
            )
    mixed = named.items() if config.data.mixture or config.data.decay_mixture else ()
    fingerprints = [f"{name}={opened[directory].fingerprint}" for name, directory in mixed]
    return Sources(
        main=main,
        mixture=Mixture(
            stages, {name: opened[path].train for name, path in named.items()}, config.batch_size
        ),
        held_out={name: opened[path].validation for name, path in scored.items()},
        fingerprint=" ".join([main.fingerprint, *fingerprints]),
        directories=named,
    )


def _other_tokenizer(ours: Corpus, theirs: Corpus) -> str | None:
    """What differs between the tokenizers of two corpora; None if nothing does."""
    for field in ("tokenizer", "vocab_size", "end_of_document", "document_prefix"):
        left, right = getattr(ours.manifest, field), getattr(theirs.manifest, field)
        if left != right:
            return f"{field} {right} and {left}"
    files = [corpus.directory / TOKENIZER_FILE for corpus in (ours, theirs)]
    if all(file.is_file() for file in files) and len({file.read_bytes() for file in files}) > 1:
        return f"the contents of {TOKENIZER_FILE}"
    return None


def other_history(
    ours: tuple[RunConfig, str], theirs: tuple[RunConfig, str], step: int
) -> str | None:
    """Says where two runs, with their fingerprints, differ in the data of the first `step` steps.

    Names and directories of corpora do not count. None if nothing differs.
    """
    left, right = _history(*ours, step), _history(*theirs, step)
    if left == right:
        return None
    moved = len(left) > 1 or len(right) > 1
    why = " (data.decay_mixture begins with the schedule's decay: optimizer.schedule_steps)" * moved
    return f"{_shown(right)}, now {_shown(left)}{why}"


_History = list[tuple[int, tuple[tuple[str, str], ...]]]


def _history(config: RunConfig, fingerprint: str, step: int) -> _History:
    """The first step of each stage before `step`, with each corpus's fingerprint and share."""
    main, *mixed = fingerprint.split()
    known = dict(text.split("=", 1) for text in mixed)

    def parts(plan: Plan):
        return tuple((known.get(part.name, main), str(part.weight)) for part in plan.parts)

    return [(plan.begin, parts(plan)) for plan in plans(config) if plan.begin < max(step, 1)]


def _shown(history: _History) -> str:
    stages = [
        " + ".join(f"{share} of {name}" for name, share in parts) + (f" from {begin}" * bool(begin))
        for begin, parts in history
    ]
    return ", then ".join(stages)
