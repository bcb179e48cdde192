"""What compiled kernels are asked to compute when they are executed, and what is right."""
