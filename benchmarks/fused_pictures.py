"""What fusing changes of the embedded model's pictures: same-seed PSNR between fused and unfused, in fp32, scheme by
scheme, and how far both are from the original. Beside it, what last bits alone change: the unfused model, its norms
computed in fp64 and rounded. Where activations are rounded to int8, a last bit flips codes, whose error flips more in
the layers and steps behind it.

    python benchmarks/fused_pictures.py
    python benchmarks/fused_pictures.py --schemes w8a8 w4a8_g128 --steps 50
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import ditq_kernels as ditq
from ditq_kernels.demo import MODEL_DIRECTORY
from ditq_kernels.demo.run import Settings, calibrate_source
from ditq_kernels.integrations.pictures import to_unit_range
from ditq_kernels.integrations.sampling import sample
from ditq_kernels.integrations.source import load_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=list(ditq.SCHEMES), help="(default: all)")
    parser.add_argument("--steps", type=int, default=8, help="(default: %(default)s)")
    args = parser.parse_args()
    settings = Settings(classes=10, seeds=1, steps=args.steps)
    source = load_source(MODEL_DIRECTORY)
    source.transformer.float()
    calibration = calibrate_source(source, settings)

    def draw(model: nn.Module) -> torch.Tensor:
        return to_unit_range(
            sample(
                model,
                source.scheduler,
                settings.labels,
                settings.picture_seeds,
                steps=settings.steps,
                guidance=settings.guidance,
                progress=False,
            )
        )

    def psnr(one: torch.Tensor, other: torch.Tensor) -> str:
        mse = (one - other).square().mean()
        return "the same" if mse == 0 else f"{float(-10 * torch.log10(mse)):.1f}"

    def rounded_from_fp64(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        parts = (None if part is None else part.double() for part in (norm.weight, norm.bias))
        return F.layer_norm(x.double(), norm.normalized_shape, *parts, norm.eps).to(x.dtype)

    original = draw(source.transformer)
    print("| scheme | fused to unfused, dB | last bits alone | fused to the original | unfused to the original |")
    print("|---|---|---|---|---|")
    for scheme in args.schemes:
        model = ditq.quantize(copy.deepcopy(source.transformer), scheme, calibration, progress=False)
        unfused = draw(model)
        with patch.object(nn.LayerNorm, "forward", rounded_from_fp64):
            control = draw(model)
        fused = draw(ditq.fuse(model))
        found = psnr(fused, unfused), psnr(control, unfused), psnr(fused, original), psnr(unfused, original)
        print(f"| {scheme} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
