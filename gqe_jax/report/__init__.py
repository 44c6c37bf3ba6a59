"""Reports on runs: PNG plots of the metrics, and an HTML page that shows the routing of a text."""

from gqe_jax.report.curves import DIRECTORY, draw

__all__ = ["DIRECTORY", "draw"]
