"""What a quantized layer stored before its weight was changed, so that taking the change back gives the bits before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import reference
from .packed_weight import PackedWeight

SLACK = 1.1  # of what rounding took: it is measured in fp32, and others compute in another order


@dataclass(frozen=True, eq=False)
class ReplacedWeight:
    """Attributes:
    packed: the weight, on the CPU.
    off_rms, off_largest: fp32 [N], how far off it a weight may be, by output, that stands for it: as far as rounding
        put the one that replaced it, and as arithmetic in the layer's dtype puts both.
    """

    packed: PackedWeight
    off_rms: torch.Tensor
    off_largest: torch.Tensor

    @classmethod
    def by(cls, before: PackedWeight, wanted: torch.Tensor, got: torch.Tensor, dtype: torch.dtype) -> ReplacedWeight:
        """``before``, replaced by ``wanted`` [N, K], of which ``got`` could be stored, in a layer of ``dtype``."""
        lost, decoded, eps = wanted - got, reference.dequantize(before), torch.finfo(dtype).eps
        rms = SLACK * _rms(lost) + eps / 2 * (_rms(decoded) + _rms(wanted))
        largest = SLACK * _largest(lost) + 2 * eps * (_largest(decoded) + _largest(wanted))
        return cls(_on(before, torch.device("cpu")), rms.cpu(), largest.cpu())

    def is_meant_by(self, weight: torch.Tensor) -> bool:
        """Whether fp32 ``weight`` [N, K] stands for this one."""
        off = weight - reference.dequantize(_on(self.packed, weight.device))
        return bool((_rms(off).cpu() <= self.off_rms).all() and (_largest(off).cpu() <= self.off_largest).all())


def _on(packed: PackedWeight, device: torch.device) -> PackedWeight:
    return PackedWeight(*(part if part is None else part.detach().to(device) for part in packed[:3]), *packed[3:])


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(1).sqrt()


def _largest(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(1)
