"""The batch of each step, a pure function of seed and step; Grain's threads read ahead.

Window i of a split is tokens i · sequence_length to (i + 1) · sequence_length, plus the following
token as the last target. Row r of step s is element s · batch_size + r of an endless sequence of
epochs, each a permutation of the windows. A process reads its own rows only, and no state is saved.
"""

from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from grain.experimental import index_shuffle

from gqe_jax.config import DataConfig
from gqe_jax.data.batch import Batch
from gqe_jax.data.corpus import Split
from gqe_jax.data.mixture import Mixture
from gqe_jax.data.shards import ANSWER, FIRST


def num_windows(split: Split, sequence_length: int) -> int:
    """The number of whole windows; a window needs sequence_length + 1 tokens."""
    return (len(split) - 1) // sequence_length


def window_indices(
    step: int, rows: slice | Sequence[int] | np.ndarray, *, batch_size: int, windows: int, seed: int
) -> np.ndarray:
    """Indices of the windows in rows `rows` of step `step`, int64.

    Args:
      step: the step, counted from 0.
      rows: rows of the global batch.
      batch_size: size of the global batch.
      windows: number of windows in the split.
      seed: seed of the permutations.
    """
    chosen = range(batch_size)[rows] if isinstance(rows, slice) else rows
    numbers = [step * batch_size + int(row) for row in chosen]
    return np.array([_window(number, windows, seed) for number in numbers], np.int64)


def _window(number: int, windows: int, seed: int) -> int:
    epoch, position = divmod(number, windows)
    epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return index_shuffle(index=position, max_index=windows - 1, seed=epoch_seed, rounds=4)


def read_windows(
    split: Split, windows: np.ndarray, sequence_length: int, document_masking: bool
) -> Batch:
    """The batch of these windows; positions past the end of the split are padding.

    With document masking, the documents of a window are segments 1, 2, …; padding is segment 0.
    Conversations always are, and only their answers have a weight.
    """
    tokens = np.zeros((len(windows), sequence_length + 1), np.int32)
    weights = np.zeros((len(windows), sequence_length), np.float32)
    rows = split.read_many(windows * sequence_length, sequence_length + 1)
    for row, read in enumerate(rows):
        tokens[row, : len(read)] = read
        weights[row, : max(len(read) - 1, 0)] = 1.0
    if split.is_marked:
        marks = np.zeros(tokens.shape, np.uint8)
        for row, read in enumerate(split.read_marks(windows * sequence_length, tokens.shape[1])):
            marks[row, : len(read)] = read
        begun = np.cumsum(marks[:, :-1] & FIRST > 0, axis=1, dtype=np.int32)
        segments = np.where(weights > 0, begun, 0).astype(np.int32)
        weights = np.where(marks[:, 1:] & ANSWER, weights, 0.0).astype(np.float32)
        return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments)
    segments = None
    if document_masking:
        ends = np.cumsum(tokens[:, :-1] == split.end_of_document, axis=1, dtype=np.int32)
        begun = np.pad(ends, ((0, 0), (1, 0)))[:, :-1]
        segments = np.where(weights > 0, begun + 1, 0).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments)


def mixed_windows(
    mixture: Mixture,
    step: int,
    rows: Sequence[int] | np.ndarray,
    *,
    sequence_length: int,
    seed: int,
) -> list[tuple[str, int]]:
    """The corpus and the window of each row of a step."""
    windows = {name: num_windows(split, sequence_length) for name, split in mixture.splits.items()}
    placed = mixture.place(step, rows)
    return [(name, _window(number, windows[name], seed)) for name, number in placed]


def describe_rows(
    mixture: Mixture, step: int, *, batch_size: int, sequence_length: int, seed: int
) -> str:
    """Names the windows of the batch of a step, for messages."""
    placed = mixed_windows(
        mixture, step, range(batch_size), sequence_length=sequence_length, seed=seed
    )
    parts = []
    for name in dict.fromkeys(name for name, _ in placed):
        windows = [window for corpus, window in placed if corpus == name]
        shown = ", ".join(map(str, windows[:8])) + (", ..." if len(windows) > 8 else "")
        parts.append(f"windows {shown} of " + (f"{name}'s" if len(mixture.splits) > 1 else "the"))
    return f"batch {step}: {'; '.join(parts)} train split"


def progress(mixture: Mixture, step: int, *, sequence_length: int) -> dict[str, float]:
    """Metrics of a mixture after `step` steps: each corpus's epochs, and share of all rows."""
    if len(mixture.splits) == 1:
        return {}
    counts = mixture.counts(step)
    total = max(sum(counts.values()), 1)
    epochs = {
        f"epoch/{name}": counts[name] / num_windows(split, sequence_length)
        for name, split in mixture.splits.items()
    }
    return epochs | {f"share/{name}": count / total for name, count in counts.items()}


def _read_mixed(
    mixture: Mixture, placed: list[tuple[str, int]], sequence_length: int, document_masking: bool
) -> Batch:
    """The batch of these windows of corpora, whose rows keep their order."""
    parts, order = [], []
    for name, split in mixture.splits.items():
        rows = [row for row, (corpus, _) in enumerate(placed) if corpus == name]
        if rows:
            windows = np.array([placed[row][1] for row in rows], np.int64)
            parts.append(read_windows(split, windows, sequence_length, document_masking))
            order += rows
    back = np.argsort(order)
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[back], *parts)


def training_batches(
    source: Split | Mixture,
    config: DataConfig,
    *,
    start: int,
    stop: int,
    rows: Sequence[int] | np.ndarray,
    batch_size: int,
    sequence_length: int,
    seed: int,
) -> Iterator[Batch]:
    """Yields rows `rows` of the batches of steps `start` to `stop`, as NumPy arrays."""
    mixture = source if isinstance(source, Mixture) else Mixture.of(source, batch_size)

    def batch(step: int) -> Batch:
        placed = mixed_windows(mixture, step, rows, sequence_length=sequence_length, seed=seed)
        return _read_mixed(mixture, placed, sequence_length, config.document_masking)

    return _ahead(grain.MapDataset.range(start, stop).map(batch), config)


def held_out_tokens(
    split: Split, batch_size: int, sequence_length: int, limit: int | None = None
) -> int:
    """The number of tokens that `evaluation_batches` predicts."""
    tokens = max(len(split) - 1, 0)
    tokens = tokens if limit is None else min(tokens, limit * batch_size * sequence_length)
    if not split.is_marked:
        return tokens
    return int(np.count_nonzero(split.read_marks([1], tokens)[0] & ANSWER))


def evaluation_batches(
    split: Split,
    config: DataConfig,
    *,
    rows: Sequence[int] | np.ndarray,
    batch_size: int,
    sequence_length: int,
    limit: int | None = None,
) -> tuple[int, Iterator[Batch]]:
    """The number of batches, and an iterator over rows `rows` of each.

    Windows come in order; every token but the first is predicted once. The last batch is padded.

    Args:
      limit: maximum number of batches; None: no limit.
    """
    windows = -(-(len(split) - 1) // sequence_length)
    count = -(-windows // batch_size)
    count = count if limit is None else min(count, limit)

    def batch(index: int) -> Batch:
        chosen = index * batch_size + np.array(rows)
        return read_windows(split, chosen, sequence_length, config.document_masking)

    return count, _ahead(grain.MapDataset.range(count).map(batch), config)


def _ahead(dataset: grain.MapDataset, config: DataConfig) -> Iterator[Batch]:
    options = grain.ReadOptions(
        num_threads=config.read_threads, prefetch_buffer_size=config.prefetch
    )
    return iter(dataset.to_iter_dataset(options))
