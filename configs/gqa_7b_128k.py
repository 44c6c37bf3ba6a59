"""The dense baseline of `gqe_7b_128k`."""

import dataclasses

from configs.gqa_7b import GQA_7B
from configs.gqe_7b_128k import GQE_7B_128K

GQA_7B_128K = dataclasses.replace(GQE_7B_128K, model=GQA_7B.model, run_dir="runs/gqa_7b_128k")
