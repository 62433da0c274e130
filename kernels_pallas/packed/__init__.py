"""Packed weights inside jit: pytrees, stacks of layers, conversion to float."""
