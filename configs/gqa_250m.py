"""The dense baseline of `gqe_250m`: all 16 query heads, nothing routed."""

import dataclasses

from configs.gqe_250m import GQE_250M

_MODEL = GQE_250M.model
GQA_250M = dataclasses.replace(
    GQE_250M,
    model=dataclasses.replace(
        _MODEL, attention=dataclasses.replace(_MODEL.attention, variant="gqa")
    ),
    run_dir="runs/gqa_250m",
)
