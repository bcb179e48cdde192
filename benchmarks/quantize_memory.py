"""Peak memory of `ditq quantize` on a model of DiT-XL/2's configuration with random weights.

    python benchmarks/quantize_memory.py --scheme w4a8_g128

Needs about 4 GB of disk below --directory. The model is made in a process of its own, so that only `ditq quantize`
is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAKE_MODEL = """
import sys, torch
from diffusers import DiTTransformer2DModel
torch.manual_seed(0)
model = DiTTransformer2DModel(
    num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, patch_size=2,
    sample_size=32, num_embeds_ada_norm=1000,
)
print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
model.save_pretrained(sys.argv[1])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a8_g128")
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary directory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as work:
        source, out = Path(work) / "model", Path(work) / "quantized"
        subprocess.run([sys.executable, "-c", MAKE_MODEL, str(source)], check=True)
        # ru_maxrss is the largest of all children so far: measured in a process that has only this one.
        measured = (
            "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode;"
            "print(f'peak {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB'); sys.exit(code)"
        )
        command = [
            sys.executable,
            "-m",
            "ditq_kernels",
            "quantize",
            str(source),
            "--scheme",
            args.scheme,
            "--out",
            str(out),
        ]
        started = time.perf_counter()
        code = subprocess.run([sys.executable, "-c", measured, *command]).returncode
        print(f"exit code {code}, {time.perf_counter() - started:.0f} s")
        if code == 0:
            stored = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            before = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
            print(f"{before / 1e9:.2f} GB in fp32 became {stored / 1e9:.2f} GB")
    return code


if __name__ == "__main__":
    sys.exit(main())
