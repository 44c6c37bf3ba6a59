"""The table of the forward kernel's block sizes: by chip, head size and length, the fastest."""

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from gqe_kernels.chips import CHIPS
from gqe_kernels.pallas_tpu.blocks import TABLE
from kernels.benchmarks.schedule.compare import GQE
from kernels.benchmarks.schedule.compiler import versions
from kernels.benchmarks.schedule.cost import cycles_at

FORWARD = tuple(
    {"q": rows, "kv": rows, "strip": strip} for rows, strip in ((512, 256), (512, 128), (256, 256))
)


def tune(
    head_dims: Sequence[int],
    lengths: Sequence[int],
    *,
    jobs: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> dict:
    """Tries block sizes on every chip and writes the best to `gqe_kernels/pallas_tpu`.

    The rest of a prefill's shape is the main setting's: 16 experts in 8 groups, k = 1, bfloat16.

    Returns:
      chip → head_dim → length → fields of `BlockSizes`, keys as JSON has them.
    """
    table = {}
    with ThreadPoolExecutor(jobs) as pool:
        for chip, head_dim in itertools.product(CHIPS, head_dims):
            # A matrix unit of 256 columns has room beside a head of 128 for a column of ones.
            wide = CHIPS[chip].mxu_size == 256
            sums = (False, True) if wide and head_dim == 128 else (wide,)
            forward = [x | {"row_sum_on_mxu": on} for x in FORWARD for on in sums]
            count = functools.partial(_cycles, chip, head_dim, lengths)
            tried = [x for x in zip(forward, pool.map(count, forward), strict=True) if x[1]]
            entry = table.setdefault(chip, {})[str(head_dim)] = {}
            for length in lengths:
                blocks, cycles = min(tried, key=lambda x: x[1][length])
                entry[str(length)] = blocks
                others = sorted(x[1][length] for x in tried)[1:]
                progress(
                    f"{chip}, D = {head_dim}, {length} tokens: {blocks}, {cycles[length]:,} "
                    f"cycles; others {', '.join(f'{x:,}' for x in others)}"
                )
    document = {"versions": versions(), "blocks": table}
    partial = TABLE.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(TABLE)
    return table


def _cycles(chip, head_dim, lengths, blocks) -> dict[int, int] | None:
    found = cycles_at(GQE, chip, lengths, {"head_dim": head_dim, **blocks})
    return found and {length: sum(kernels.values()) for length, kernels in found.items()}
