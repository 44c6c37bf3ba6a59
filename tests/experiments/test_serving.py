"""The benchmark of serving: its counts, against loops walked one by one and a kernel by hand."""

import itertools

import pytest

from experiments import serving
from gqe_kernels.cycles.bundles import Bundle, Program, Region

LONG = serving.ServingConfig("gqe_250m", "v6e:2x2")
SHORT = serving.ServingConfig("gqe_250m", "v6e:2x2", tokens=300, requests=3, page=16)


def walked(queries: int, tokens: int, query: int, fetched: int, computed: int) -> list[int]:
    """The iterations of the engine's three loops for `queries` last tokens of `tokens`."""
    blocks = outer = inner = 0
    for first in range(tokens - queries, tokens, query):
        blocks += 1
        seen = min(first + query, tokens)  # keys that the block's last query attends to
        for start in range(0, seen, fetched):
            outer += 1
            inner += len(range(start, min(start + fetched, seen), computed))
    return [1, blocks, outer, inner]


@pytest.mark.parametrize("config", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize(("query", "fetched", "computed"), [(512, 1024, 512), (64, 96, 32)])
def test_loops_of_the_general_kernel(config, query, fetched, computed):
    name = f"RPAm-p_{config.page}-bq_{query}_{query // 2}-bkv_{fetched}_{computed}"
    pages = fetched // config.page
    prefill = walked(config.tokens, config.tokens, query, fetched, computed)
    assert serving.block_loops(name, config, decode=False) == (prefill, pages)
    name = f"RPAd-p_{config.page}-bq_1_1-bkv_{fetched}_{computed}"
    one = walked(1, config.tokens, 1, fetched, computed)
    assert serving.block_loops(name, config, decode=True) == (
        [config.requests * times for times in one],
        pages,
    )


def test_loops_of_the_kernel_for_64_features():
    """It visits the blocks of keys that the mask hides, too."""
    name = "RPA-HD_64-bq_64-bkvp_4-p_16"
    blocks = range(0, SHORT.tokens, 4 * 16)
    pairs = list(itertools.product(range(0, SHORT.tokens, 64), blocks))
    assert serving.block_loops(name, SHORT, decode=False) == ([1, 5, len(pairs)], 4)
    assert serving.block_loops(name, SHORT, decode=True) == ([3, 3, 3 * len(blocks)], 4)


def kernel() -> tuple[Program, Region]:
    """A loop over requests with a body for decoding and one for prefill; products at 4, 10 and 12.

    Bundles 0 and 15 run once; 1 and 14 for each request; 2 for each page of it. The guard from 3 is
    for decoding: 3, and the loop over keys at 4. The guard from 5 copies nothing and has no
    product: it always counts. The guard from 6 is for prefill: 6 and 13, the loop over queries with
    7 and 12, a loop over pages at 8, and the loop over keys with 9 to 11.
    """
    keys = Region("loop", 9, 12)
    queries = Region("loop", 7, 13, children=[Region("loop", 8, 9), keys])
    decoding = Region("guard", 3, 5, children=[Region("loop", 4, 5)])
    plain, prefill = Region("guard", 5, 6), Region("guard", 6, 14, children=[queries])
    requests = Region("loop", 1, 15, children=[Region("loop", 2, 3), decoding, plain, prefill])
    tree = Region("root", 0, 16, children=[requests])
    bundles = tuple(
        Bundle(None, 0, True, None, None, None, None, (int(i in (4, 10, 12)), 1)) for i in range(16)
    )
    return Program("kernel", "custom-call", ("MXU", "VALU"), (1, 4), bundles), tree


def test_a_prefill_counts_its_body_alone():
    requests, queries, keys, pages = 1, 5, 15, 4
    once, request, guards = 2, 2 + pages, 1  # 0, 15; 1, 14, the pages; the guard without products
    prefill = requests * 2 + queries * (2 + pages) + keys * 3  # 6, 13; 7, 12, 8; 9, 10, 11
    expected = once + requests * (request + guards) + prefill
    assert serving.count(*kernel(), [requests, queries, keys], pages, decode=False) == expected


def test_decoding_counts_its_body_alone():
    """Its queries are one block, which is no loop."""
    requests, keys, pages = 3, 12, 4
    expected = 2 + requests * (2 + pages + 1) + requests * 1 + keys * 1  # 3; 4
    assert serving.count(*kernel(), [requests, requests, keys], pages, decode=True) == expected


def test_ratios_are_to_the_first_with_what_xla_does():
    dense = serving.Served("gqa", prefill=600, decode=80, around=400, layer=900, token_bytes=8)
    routed = serving.Served("gqe, k = 1", 300, 60, 200, 700, 10)
    assert serving.table([dense, routed], LONG).splitlines() == [
        "| v6e | prefill: kernel | XLA in the attention | ratio | XLA in the layer "
        "| decode: kernel | ratio | cache bytes a token |",
        "|---|---|---|---|---|---|---|---|",
        "| gqa | 600 | 400 | 1.00 | 900 | 80 | 1.00 | 8 |",
        "| gqe, k = 1 | 300 | 200 | 0.50 | 700 | 60 | 0.75 | 10 |",
    ]
