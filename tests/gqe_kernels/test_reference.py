"""The plain float32 semantics keep the contract."""

from tests.gqe_kernels.contract import DenseAttentionContract, RoutedAttentionContract


class TestReference(RoutedAttentionContract):
    implementation = "reference"
    by_default = slice(None, None, 2)  # `xla` has the others


class TestDenseReference(DenseAttentionContract):
    implementation = "reference"
