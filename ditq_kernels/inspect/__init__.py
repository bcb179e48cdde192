"""The instruments that judge the kernels, with no GPU: every compiled form, its machine code, and what that must be."""
