"""How often the regions of this project's TPU kernels run, which follows from grid and mask.

A region goes by the name of the function under its `pl.when`. Counts are those of prefill: causal
self-attention without segments. "grid" is the number of grid steps; "calls" that of launches, where
a loop around the kernel launches it more than once. All other names stand in program order.
"""

from collections.abc import Mapping

from gqe_kernels.cycles.bundles import Program, ScheduleError
from gqe_kernels.pallas_tpu.schedule import Tiles


def causal_tiles(length: int, block_q: int, block_kv: int) -> tuple[int, int]:
    """Tiles below the diagonal, and tiles that it crosses."""
    starts = range(0, length, block_q)
    interior = sum((first + 1) // block_kv for first in starts)
    seen = sum(-(-(first + block_q) // block_kv) for first in starts)
    return interior, seen - interior


def forward_runs(
    length: int, block_q: int, block_kv: int, *, batch: int = 1, diagonal_first: bool | None = None
) -> dict[str, int]:
    """Executions in `gqe_forward`.

    Args:
      diagonal_first: whether the grid itself says what is visited; None: as the kernel chooses.
    """
    tiles = Tiles(block_q, block_kv, length, length, True, False, static_offset=0, is_prefill=True)
    interior, crossed = causal_tiles(length, block_q, block_kv)
    if tiles.diagonal_first if diagonal_first is None else diagonal_first:
        pairs, steps = tiles.pairs
        first = {"diagonal": tiles.num_q, "interior": interior}
    else:
        pairs, steps = tiles.num_q, tiles.num_kv
        first = {"start": tiles.num_q, "interior": interior, "masked": crossed}
    runs = {"grid": pairs * steps, **first, "finish": tiles.num_q}
    return {name: batch * times for name, times in runs.items()}


def backward_runs(
    length: int, block_q: int, block_kv: int, *, batch: int = 1, launches: int, blocks: int
) -> dict[str, int]:
    """Executions in all launches of `gqe_backward`.

    Args:
      launches, blocks: calls of the kernel, and blocks of queries in each.
    """
    num_kv = length // block_kv
    interior, masked = causal_tiles(length, block_q, block_kv)
    runs = {
        "grid": launches * num_kv * blocks,
        "start_keys": launches * num_kv,
        "start_queries": launches * blocks,
        "interior": interior,
        "masked": masked,
        "finish_keys": launches * num_kv,
        "finish_queries": launches * blocks,
    }
    return {"calls": launches, **{name: batch * times for name, times in runs.items()}}


def scheduled_runs(kernel: str, program: Program) -> Mapping[str, int] | None:
    """Executions in a scheduled kernel of this project, from the windows that it reads.

    Returns:
      Executions by region, or None for a kernel of which nothing is known.

    Raises:
      ScheduleError: they depend on more than shapes, such as segment ids.
    """
    if kernel == "gqe_forward":
        return _scheduled_forward(program)
    if kernel == "gqe_backward":
        return _scheduled_backward(program)
    if kernel == "gqe_backward_prepare":
        window = _windows(program, 1)[0]
        (_, block_q, _), (batch, length, _) = window
        return {"grid": batch * -(-length // block_q)}
    if kernel == "gqe_project" and 1 in program.inputs:
        return _scheduled_projection(program)
    return None


def _scheduled_projection(program: Program) -> dict[str, int] | None:
    """Of the kernel that reads its weights in several parts; in one, it has no regions."""
    ((_, block, _), (batch, length, _)), ((_, part), (_, lanes)) = _windows(program, 2)
    blocks, parts = batch * -(-length // block), lanes // part
    if parts == 1:
        return None
    runs = {"grid": blocks * parts}
    if len(program.outputs) > 3:  # more than queries, keys and values
        runs["narrow"] = blocks
    wide = [whole for _, whole in program.outputs.values() if len(whole) == 3]
    if len(wide) == 6:  # the shared query, and the means of keys and values
        runs |= {"start_sums": blocks, "add_sums": blocks * (parts - 1), "finish_sums": blocks}
    return runs


def _scheduled_forward(program: Program) -> dict[str, int]:
    scalars = min(program.inputs, default=0)
    ((_, q, _), (batch, q_len, _)), ((_, kv, _), (_, kv_len, _)) = _windows(program, 2)
    # Visits: the positions alone, or with the first and last block that each block visits.
    _check(program, scalars in (1, 3), "what it visits depends on segment ids")
    _check(program, q_len == kv_len, f"{q_len} queries see {kv_len} keys from an offset")
    _check(program, q_len % q == 0 == kv_len % kv, f"tiles {q} × {kv} do not divide {q_len}")
    return forward_runs(q_len, q, kv, batch=batch, diagonal_first=scalars == 1)


def _scheduled_backward(program: Program) -> dict[str, int]:
    scalars = min(program.inputs, default=0)
    windows = _windows(program, 5)  # selected, d_out, logsumexp, delta, key
    (_, q, _), (batch, q_len, _) = windows[0]
    (_, kv, _), (_, kv_len, _) = windows[4]
    _check(program, scalars == 4, "what it visits depends on segment ids")
    _check(program, q_len == kv_len, f"{q_len} queries see {kv_len} keys from an offset")
    _check(program, q_len % q == 0 == kv_len % kv, f"tiles {q} × {kv} do not divide {q_len}")
    _check(program, 0 in program.outputs, "the dump does not say what it writes")
    _, own_length, _ = program.outputs[0][1]
    launches = -(-q_len // own_length)
    return backward_runs(q_len, q, kv, batch=batch, launches=launches, blocks=own_length // q)


def _windows(program: Program, least: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The windows of the first arrays that are read, in the order of the operands."""
    windows = [program.inputs[index] for index in sorted(program.inputs)[:least]]
    first = min(program.inputs, default=0)
    whole = list(range(first, first + least)) == sorted(program.inputs)[:least]
    _check(program, whole, f"the dump has windows of operands {sorted(program.inputs)} alone")
    return windows


def _check(program: Program, is_known: bool, reason: str) -> None:
    if not is_known:
        raise ScheduleError(f"{program.name}: how often its regions run is not known: {reason}")
