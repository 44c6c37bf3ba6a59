"""The layers and the language model: pure functions of their arguments and parameters."""
