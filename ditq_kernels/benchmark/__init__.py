"""Speeds, measured: real layers, cold caches, side by side in one run, and never without a check of the result.

Nothing here runs at import, and nothing here runs without a CUDA GPU.
"""
