"""The ablation of `gqe_250m` with hard slots only."""

import dataclasses

from configs.gqe_250m import GQE_250M

_MODEL = GQE_250M.model
HARD_CONCAT_250M = dataclasses.replace(
    GQE_250M,
    model=dataclasses.replace(
        _MODEL, attention=dataclasses.replace(_MODEL.attention, variant="hard_concat")
    ),
    run_dir="runs/hard_concat_250m",
)
