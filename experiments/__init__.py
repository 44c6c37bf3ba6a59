"""Commands that make the figures of the README and the docs."""
