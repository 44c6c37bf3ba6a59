"""The dense baseline of `gqe_7b`: every query head, nothing routed."""

import dataclasses

from configs.gqe_7b import GQE_7B

_MODEL = GQE_7B.model
GQA_7B = dataclasses.replace(
    GQE_7B,
    model=dataclasses.replace(
        _MODEL, attention=dataclasses.replace(_MODEL.attention, variant="gqa")
    ),
    run_dir="runs/gqa_7b",
)
