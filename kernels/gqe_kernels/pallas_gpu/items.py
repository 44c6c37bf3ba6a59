"""A persistent grid: a thread block for each multiprocessor takes one item of work after another.

An item is a tile of one head. Each item's own data, such as its queries, is double-buffered in
shared memory: the next item's is fetched while this one's results are written.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from gqe_kernels.chips import H200_MULTIPROCESSORS
from gqe_kernels.pallas_gpu.blocks import SLOTS, WARPGROUPS


class Items(NamedTuple):
    """The items of a launch: every tile of every head, those with the most work first.

    Attributes:
      descending: the last tile is the longest; else the first.
      programs: thread blocks of the grid.
    """

    tiles: int
    batch: int
    heads: int
    descending: bool
    programs: int

    @property
    def grid(self) -> tuple[int]:
        """The grid of the kernel; its axis is "program"."""
        return (min(self.programs, math.prod(self[:3])),)


def multiprocessors() -> int:
    """The multiprocessors of the GPU here; without one, of the GPU that is compiled for."""
    if jax.default_backend() != "gpu":
        return H200_MULTIPROCESSORS
    return getattr(jax.devices()[0], "core_count", None) or H200_MULTIPROCESSORS


def launch(
    body: Callable[..., None], items: Items, *, name: str, out_type: Any, scratch_types: Any
) -> Callable[..., Any]:
    """The kernel of `body`, which calls `share_out`, in thread blocks of three warpgroups."""
    return plgpu.kernel(
        functools.partial(body, items=items),
        out_type=out_type,
        grid=items.grid,
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )


def share_out(items: Items, fetch: Callable[..., Any], compute: Callable[..., Any]) -> None:
    """Runs `fetch` in one warpgroup and `compute` in the others, for each item.

    Args:
      fetch, compute: bodies of `for_each`, which carry the number of steps done so far.
    """
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == WARPGROUPS)
    def fetching():
        plgpu.set_max_registers(24, action="decrease")
        for_each(items, fetch, jnp.int32(0))

    @pl.when(warpgroup < WARPGROUPS)
    def computing():
        plgpu.set_max_registers(240, action="increase")
        for_each(items, compute, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def for_each[Carry](items: Items, body: Callable[..., Carry], carry: Carry) -> Carry:
    """Runs `carry = body(number, tile, batch, head, carry)` for each item of this thread block.

    Items are dealt to the thread blocks from the first to the last and back, which balances the
    load: items become shorter from round to round.

    Args:
      body: `number` counts this block's items.
    """
    total, (programs,) = math.prod(items[:3]), items.grid
    program = lax.axis_index("program")
    rounds, rest = divmod(total, programs)
    place_in_last = program if rounds % 2 == 0 else programs - 1 - program
    count = rounds + (place_in_last < rest).astype(jnp.int32)

    def item(number, carry):
        back = programs - 1 - program
        place = jnp.where(lax.rem(number, jnp.int32(2)) == 0, program, back)
        rank = number * programs + place
        tile = lax.div(rank, jnp.int32(items.batch * items.heads))
        rest = lax.rem(rank, jnp.int32(items.batch * items.heads))
        if items.descending:
            tile = items.tiles - 1 - tile
        batch, head = lax.div(rest, jnp.int32(items.heads)), lax.rem(rest, jnp.int32(items.heads))
        return body(number, tile, batch, head, carry)

    return lax.fori_loop(0, count, item, carry)


def free_slot(number, consumed):
    """The slot for an item's own data, once the item before the last has released it."""
    slot = lax.rem(number, jnp.int32(SLOTS))
    pl.when(number >= SLOTS)(lambda: plgpu.barrier_wait(consumed.at[slot]))
    return slot
