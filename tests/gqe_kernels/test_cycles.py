"""Cycles of kernels whose regions are found by their order, on schedules made by hand."""

import dataclasses
import itertools

import numpy as np
import pytest

from gqe_kernels.cycles.bundles import Bundle, Program, Region, ScheduleError
from gqe_kernels.cycles.counting import call_cycles, label_by_order
from gqe_kernels.cycles.runs import backward_runs, forward_runs, scheduled_runs

OUTSIDE, LOOP, COPIES, STEP = 3, 5, 2, 7


def schedule(trips: int, *guards: tuple[int, bool], pipelined: bool = True):
    """A kernel whose guards have these lengths, and products or not."""
    around = OUTSIDE + LOOP + (COPIES + STEP if pipelined else 0)
    at, multiplies, regions = around, [False] * around, []
    for length, has_products in guards:
        regions.append(Region("guard", at, at + length))
        multiplies += [has_products] * length
        at += length
    inner = regions
    if pipelined:  # a guard around the copies that start, and one around the step
        begin = OUTSIDE + LOOP + COPIES
        copies = Region(
            "guard", OUTSIDE + LOOP, begin, children=[Region("guard", begin - 1, begin)]
        )
        inner = [copies, Region("guard", begin, at, children=regions)]
    loop = Region("loop", OUTSIDE, at, trips=trips, children=inner)
    bundles = (Bundle(None, 0, True, None, None, None, None, (int(m),)) for m in multiplies)
    program = Program("gqe_forward.1", "custom-call", ("MXU",), (1,), tuple(bundles))
    return program, Region("root", 0, at, children=[loop])


def test_guards_take_their_counts_in_order():
    runs = forward_runs(2048, 512, 512, batch=3)
    assert runs == {"grid": 30, "diagonal": 12, "interior": 18, "finish": 12}
    program, tree = schedule(32, (100, True), (1000, True), (10, False))
    expected = OUTSIDE + 32 * (LOOP + COPIES + STEP) + 12 * 100 + 18 * 1000 + 12 * 10
    assert call_cycles(program, tree, runs, cores=1) == expected


def test_a_guard_around_the_pipelines_copies_is_not_the_authors():
    """It has no name, and is counted in every step."""
    lengths = (100, True), (1, False), (1000, True), (10, False)
    program, tree = schedule(30, *lengths, pipelined=False)
    runs = forward_runs(2048, 512, 512, batch=3)
    expected = OUTSIDE + 30 * (LOOP + 1) + 12 * 100 + 18 * 1000 + 12 * 10
    assert call_cycles(program, tree, runs, cores=1) == expected


def test_launches_share_the_work():
    runs = backward_runs(4096, 256, 512, launches=3, blocks=6)
    lengths = [(n, n in (30, 40)) for n in (10, 20, 30, 40, 50, 60)]
    program, tree = schedule(50, *lengths)
    interior, masked = runs["interior"], runs["masked"]
    expected = 3 * (OUTSIDE + 50 * (LOOP + COPIES + STEP)) + 24 * (10 + 50) + 18 * (20 + 60)
    expected += interior * 30 + masked * 40
    assert call_cycles(program, tree, runs, cores=1) == pytest.approx(expected / 3)


def test_a_body_of_every_step_has_no_guard():
    """One block of keys: each step starts and ends a sum, and its only tile is crossed."""
    program, tree = schedule(4, (1000, True), pipelined=False)
    runs = {"grid": 4, "start": 4, "interior": 0, "masked": 2, "finish": 4}
    assert call_cycles(program, tree, runs, cores=1) == OUTSIDE + 4 * LOOP + 2 * 1000


@pytest.mark.parametrize(
    "guards",
    [
        [(100, True), (1000, True)],  # too few
        [(100, True), (1000, True), (10, True)],  # the last has no products
        [(100, True), (1000, True), (10, False), (10, False)],  # too many
    ],
)
def test_guards_that_do_not_fit_are_an_error(guards):
    program, tree = schedule(32, *guards)
    with pytest.raises(ScheduleError, match="conditional regions, which fit diagonal, interior"):
        label_by_order(program, tree, forward_runs(2048, 512, 512, batch=3))


def test_unknown_kernels_are_counted_if_little_is_conditional():
    once = OUTSIDE + 4 * (LOOP + COPIES + STEP)
    assert call_cycles(*schedule(4), None, cores=1) == once
    program, tree = schedule(4, (1, False))
    with pytest.raises(ScheduleError, match="how often its 1 conditional regions run"):
        call_cycles(program, tree, None, cores=1)
    tree.children[0].stop = tree.stop = tree.stop + 100  # a longer loop around it
    longer = dataclasses.replace(program, bundles=program.bundles + program.bundles[-1:] * 100)
    assert call_cycles(longer, tree, None, cores=1) == once + 4 * (1 + 100)


@pytest.mark.parametrize(("q", "kv"), [(4, 4), (4, 8), (8, 4)])
def test_runs_are_those_of_the_mask(q, kv):
    seen = np.tril(np.ones((16, 16), bool))
    tiles = seen.reshape(16 // q, q, 16 // kv, kv).swapaxes(1, 2)
    full, some = int(tiles.all((2, 3)).sum()), int(tiles.any((2, 3)).sum())
    runs = forward_runs(16, q, kv, batch=2, diagonal_first=False)
    assert (runs["interior"], runs["masked"]) == (2 * full, 2 * (some - full))
    assert (runs["start"], runs["grid"]) == (2 * 16 // q, 2 * 16 // q * (16 // kv))
    if q == kv:
        assert forward_runs(16, q, kv)["interior"] == some - 16 // q


def windows(scalars: int, queries: int, keys: int, *, q: int = 256, kv: int = 512) -> Program:
    shapes = ((q, queries), (kv, keys))
    inputs = {
        scalars + n: ((1, block, 64), (2, length, 64)) for n, (block, length) in enumerate(shapes)
    }
    return Program("gqe_forward.1", "custom-call", (), (), (), inputs)


def test_geometry_comes_from_the_windows():
    assert scheduled_runs("gqe_forward", windows(1, 2048, 2048, q=512)) == forward_runs(
        2048, 512, 512, batch=2, diagonal_first=True
    )
    assert scheduled_runs("gqe_forward", windows(3, 2048, 2048)) == forward_runs(
        2048, 256, 512, batch=2, diagonal_first=False
    )
    assert scheduled_runs("mlp", windows(1, 2048, 2048)) is None


def projection(parts: int, shared: bool, routes: bool) -> Program:
    """Two sequences of 1,024 tokens in blocks of 512; 512 lanes of queries, in parts."""
    wide = 6 if shared else 3
    tokens = ((1, 512, 64), (2, 1024, 64))
    outputs = dict.fromkeys(range(wide), tokens)
    outputs |= dict.fromkeys(range(wide, wide + 2 * routes), ((1, 1, 4, 512), (2, 1, 4, 1024)))
    weights = {1: ((64, 512 // parts), (64, 512))}
    return Program("gqe_project.1", "custom-call", (), (), (), {0: tokens} | weights, outputs)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_projection_in_parts_has_the_regions_of_its_grid(parts):
    steps = list(itertools.product(range(2), range(2), range(parts)))
    first = sum(part == 0 for _, _, part in steps)
    added = sum(part > 0 for _, _, part in steps)
    last = sum(part == parts - 1 for _, _, part in steps)
    runs = {"grid": len(steps), "narrow": first}
    assert scheduled_runs("gqe_project", projection(parts, False, True)) == runs
    runs |= {"start_sums": first, "add_sums": added, "finish_sums": last}
    assert scheduled_runs("gqe_project", projection(parts, True, True)) == runs
    dense = scheduled_runs("gqe_project", projection(parts, False, False))
    assert dense == {"grid": len(steps)}
    trips = len(steps) + 2  # the pipeline's first and last copies
    program, tree = schedule(trips, (1000, True), (10, False), (20, False), (30, False))
    expected = OUTSIDE + trips * (LOOP + COPIES + STEP)
    expected += first * (1000 + 10) + added * 20 + last * 30
    assert call_cycles(program, tree, runs, cores=1) == expected


def test_a_projection_in_one_part_has_no_regions():
    whole = projection(1, True, True)
    assert scheduled_runs("gqe_project", whole) is None
    del whole.inputs[1]
    assert scheduled_runs("gqe_project", whole) is None


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (windows(8, 2048, 2048), "depends on segment ids"),
        (windows(3, 1024, 2048), "1024 queries see 2048 keys"),
        (windows(3, 2050, 2050), "do not divide 2050"),
        (Program("gqe_forward.1", "custom-call", (), (), ()), "has windows of operands"),
    ],
)
def test_runs_that_shapes_do_not_tell_are_an_error(program, reason):
    with pytest.raises(ScheduleError, match=reason):
        scheduled_runs("gqe_forward", program)
