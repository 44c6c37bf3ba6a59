"""Pictures of runs: PNGs of the metrics, and a page on which the routing of a text can be seen."""

from gqe_jax.report.curves import DIRECTORY, draw

__all__ = ["DIRECTORY", "draw"]
