"""A trained model in vLLM's JAX back end: `model.py` on its interfaces, `plugin.py` its entry."""
