"""The dense baseline of `gqe_1b`: every query head, nothing routed."""

import dataclasses

from configs.gqe_1b import GQE_1B

_MODEL = GQE_1B.model
GQA_1B = dataclasses.replace(
    GQE_1B,
    model=dataclasses.replace(
        _MODEL, attention=dataclasses.replace(_MODEL.attention, variant="gqa")
    ),
    run_dir="runs/gqa_1b",
)
