"""The TPU kernel keeps the contract under the TPU interpreter, and compiles for the chips."""

import dataclasses

import pytest
from jax.experimental.pallas import tpu as pltpu

from gqe_kernels import pallas_tpu
from gqe_kernels.pallas_tpu import attention
from tests.gqe_kernels.contract import Case, RoutedAttentionContract


@pytest.fixture
def interpreter():
    """The interpreter, with scratch memory full of NaNs, raising on a race."""
    pltpu.reset_tpu_interpret_mode_state()
    params = pltpu.InterpretParams(
        detect_races=True, on_race="raise", uninitialized_memory="nan"
    )
    with pltpu.force_tpu_interpret_mode(params):
        yield


@pytest.mark.usefixtures("interpreter")
class TestPallasTpu(RoutedAttentionContract):
    """Blocks as by default: each of these sequences is one block."""

    implementation = "pallas_tpu"
    base = Case(head_dim=64)
    float32_cases = tuple(
        dataclasses.replace(case, head_dim=64)
        for case in (
            Case(),
            Case(expert=4, k=3, segments="packed"),
            Case(group=3, expert=1, k=1),
            Case(group=1, expert=16, k=1, batch=1),
            Case(expert=3, k=2, weighted=False, batch=1),
            Case(shared=None, batch=1),
            Case(shared=None, weighted=False, batch=1),
            Case(shared="given", segments="padded"),
            Case(causal=False, kv_len=37, shared="given", batch=1),
            Case(causal=False, segments="all_padding"),
            Case(q_len=1, kv_len=24, q_offset=11),
            Case(q_len=5, kv_len=24, q_offset=(3, 19), segments="padded"),
            Case(q_len=8, kv_len=24, q_offset=-4, batch=1),
            Case(routing="one", scale=0.5, batch=1),
        )
    )
    bfloat16_cases = (Case(head_dim=64, expert=4, k=2, segments="packed"),)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks each way, and a backward pass of several launches."""
    blocks = pallas_tpu.BlockSizes(
        q=128, kv=256, backward_q=256, backward_kv=128, d_query_bytes=1
    )
    monkeypatch.setattr(attention, "default_block_sizes", lambda *_: blocks)


@pytest.mark.usefixtures("interpreter", "small_blocks")
class TestManyBlocks(RoutedAttentionContract):
    implementation = "pallas_tpu"
    base = Case(head_dim=128, q_len=150, group=1)
    float32_cases = (
        Case(batch=1, q_len=600, group=1, head_dim=128, segments="packed"),
        Case(batch=1, q_len=384, head_dim=64),
        Case(batch=1, q_len=130, kv_len=700, q_offset=513, head_dim=64, expert=3),
    )
    bfloat16_cases = float32_cases[:1]
