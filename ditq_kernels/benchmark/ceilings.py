"""What this GPU reaches at most, measured in the same run: the roofs that other figures are seen against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .timing import Stopwatch, interleave, record

COPY_BYTES = 2 << 30
LARGEST_PRODUCT = (8192, 8192, 8192)  # M, N, K


@dataclass(frozen=True)
class Ceilings:
    """Attributes:
    copy_gbs: GB/s of a large device-to-device copy, bytes read and bytes written both counted.
    tflops: kind of operands ("bf16", "int8", "fp8") to (TFLOP/s, the contender that reached them) of the largest
        product; absent where nothing could be measured.
    """

    copy_gbs: float | None
    tflops: dict[str, tuple[float, str]]


def copy_bandwidth(device: torch.device, stopwatch: Stopwatch, most_bytes: int = COPY_BYTES) -> float:
    """GB/s of a device-to-device copy that no cache holds."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        most_bytes = min(most_bytes, free // 4)
    source = torch.empty(most_bytes // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    copied: Callable[..., torch.Tensor] = target.copy_
    timing = interleave({"copy": record(copied, [(source,)], stopwatch)}, stopwatch)["copy"]
    if isinstance(timing, Exception):
        raise timing
    return 2 * source.numel() * source.element_size() / timing.microseconds * 1e-3


# The kind of operands that a contender multiplies; the roofs come from these.
OPERANDS = {
    "cublas_bf16": "bf16",
    "w8a8 product": "int8",
    "w8a8 product cuda": "int8",
    "int_mm": "int8",
    "scaled_mm fp8 rowwise": "fp8",
}


def best(tflops: dict[str, float]) -> dict[str, tuple[float, str]]:
    """The fastest contender for each kind of operands, from TFLOP/s by contender."""
    found: dict[str, tuple[float, str]] = {}
    for name, rate in tflops.items():
        kind = OPERANDS.get(name)
        if kind and (kind not in found or rate > found[kind][0]):
            found[kind] = (rate, name)
    return found
