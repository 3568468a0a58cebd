"""Ops and saved tensors of each kind of block; one module per kind of layer."""
