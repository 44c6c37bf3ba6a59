"""`gqe_7b` with two of the four experts of each group active."""

import dataclasses

from configs.gqe_7b import GQE_7B

_MODEL = GQE_7B.model
GQE_7B_TOP2 = dataclasses.replace(
    GQE_7B,
    model=dataclasses.replace(_MODEL, attention=dataclasses.replace(_MODEL.attention, top_k=2)),
    run_dir="runs/gqe_7b_top2",
)
