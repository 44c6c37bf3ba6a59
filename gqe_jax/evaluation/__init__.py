"""Evaluation of trained models, and a trigram baseline."""

from gqe_jax.evaluation.perplexity import HeldOut, evaluate

__all__ = ["HeldOut", "evaluate"]
