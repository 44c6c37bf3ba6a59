"""Named configurations, one a file; the command lines read this registry."""

from configs.gqa_250m import GQA_250M
from configs.gqe_250m import GQE_250M
from configs.hard_concat_250m import HARD_CONCAT_250M
from configs.tiny import TINY
from configs.weighted_concat_250m import WEIGHTED_CONCAT_250M

CONFIGS = {
    "tiny": TINY,
    "gqe_250m": GQE_250M,
    "gqa_250m": GQA_250M,
    "hard_concat_250m": HARD_CONCAT_250M,
    "weighted_concat_250m": WEIGHTED_CONCAT_250M,
}

__all__ = ["CONFIGS"]
