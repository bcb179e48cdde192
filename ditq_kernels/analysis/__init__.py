"""What makes a diffusion transformer hard to quantize, measured on one sampling run: the analysis that arXiv 2406.11100
is named after, as a tool for any model.
"""
