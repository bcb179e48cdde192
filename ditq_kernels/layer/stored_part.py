"""What a quantized layer stores, as parameters that are not trained."""

from __future__ import annotations

import torch
from torch import nn

from .errors import UnsupportedError

_NOT_TRAINED = (
    "stored weights of quantized layers take no gradient: train an adapter (LoRA) over them, and of the model only "
    "what is not quantized"
)


class StoredPart(nn.Parameter):
    """A part of a stored weight. A parameter and no buffer: offloading hooks move parameters and leave buffers on the
    device.
    """

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> StoredPart:
        if requires_grad:
            raise UnsupportedError(_NOT_TRAINED)
        return super().__new__(cls, data, False)

    def requires_grad_(self, requires_grad: bool = True) -> StoredPart:
        """UnsupportedError for True: integers and their scales are not trained."""
        if requires_grad:
            raise UnsupportedError(_NOT_TRAINED)
        return self
