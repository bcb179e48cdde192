"""One linear layer: its number formats, its stored bytes, its quantizer, what its ops mean, and who computes them."""
