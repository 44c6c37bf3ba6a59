"""Token corpora: preparing and reading them, and the order in which training visits them."""

from gqe_jax.data.batch import Batch
from gqe_jax.data.corpus import Corpus, Split
from gqe_jax.data.pipeline import evaluation_batches, training_batches, window_indices
from gqe_jax.data.stdlib import open_corpus
from gqe_jax.errors import DataError

__all__ = [
    "Batch",
    "Corpus",
    "DataError",
    "Split",
    "evaluation_batches",
    "open_corpus",
    "training_batches",
    "window_indices",
]
