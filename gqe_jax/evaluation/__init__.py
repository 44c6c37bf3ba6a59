"""Evaluation of trained models, and the baseline they must beat."""

from gqe_jax.evaluation.perplexity import HeldOut, evaluate

__all__ = ["HeldOut", "evaluate"]
