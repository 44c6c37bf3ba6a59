"""Weights from and to other projects, in safetensors files only; and dense models made into GQE."""
