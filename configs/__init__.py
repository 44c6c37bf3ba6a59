"""Named configurations, a file for each size; the command lines read this registry."""

from configs import size_1b, size_7b, size_40m, size_250m, tiny

CONFIGS = tiny.CONFIGS | size_40m.CONFIGS | size_250m.CONFIGS | size_1b.CONFIGS | size_7b.CONFIGS

__all__ = ["CONFIGS"]
