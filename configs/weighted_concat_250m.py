"""The ablation of `gqe_250m` whose slots are scaled by their probabilities."""

import dataclasses

from configs.gqe_250m import GQE_250M

_MODEL = GQE_250M.model
WEIGHTED_CONCAT_250M = dataclasses.replace(
    GQE_250M,
    model=dataclasses.replace(
        _MODEL, attention=dataclasses.replace(_MODEL.attention, variant="weighted_concat")
    ),
    run_dir="runs/weighted_concat_250m",
)
