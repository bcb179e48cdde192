"""Compiled kernels, executed on a CPU from their PTX: instruction by instruction, vectorised in numpy over threads."""
