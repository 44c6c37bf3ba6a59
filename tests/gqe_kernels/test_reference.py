"""The plain float32 semantics keep the contract."""

from tests.gqe_kernels.contract import DenseAttentionContract, RoutedAttentionContract


class TestReference(RoutedAttentionContract):
    implementation = "reference"


class TestDenseReference(DenseAttentionContract):
    implementation = "reference"
