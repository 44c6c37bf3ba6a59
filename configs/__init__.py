"""Named configurations, one a file; the command lines read this registry."""

from configs.gqa_1b import GQA_1B
from configs.gqa_7b import GQA_7B
from configs.gqa_7b_128k import GQA_7B_128K
from configs.gqa_250m import GQA_250M
from configs.gqe_1b import GQE_1B
from configs.gqe_7b import GQE_7B
from configs.gqe_7b_128k import GQE_7B_128K
from configs.gqe_7b_top2 import GQE_7B_TOP2
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
    "gqe_1b": GQE_1B,
    "gqa_1b": GQA_1B,
    "gqe_7b": GQE_7B,
    "gqe_7b_top2": GQE_7B_TOP2,
    "gqa_7b": GQA_7B,
    "gqe_7b_128k": GQE_7B_128K,
    "gqa_7b_128k": GQA_7B_128K,
}

__all__ = ["CONFIGS"]
