"""How long a quantized checkpoint takes to load beside reading its file, and what importing this package adds to
importing PyTorch. On a CPU; medians of processes that take turns, with the file in the system's cache.

    python benchmarks/load_speed.py                       # a billion parameters, 0.6 GB
    python benchmarks/load_speed.py --layers 2 --width 768 --rounds 3

"Loaded" is the model in its place, its weights mapped from the file; "touched" is every byte of them read once besides,
which is what reading the file does. Needs half a byte of disk per parameter below --directory.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SAVE = """
import sys, torch
from diffusers import DiTTransformer2DModel
import ditq_kernels as ditq
torch.set_default_dtype(torch.bfloat16)
width = int(sys.argv[3])
model = DiTTransformer2DModel(
    num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=int(sys.argv[2]),
    patch_size=2, sample_size=32, num_embeds_ada_norm=10,
)
ditq.quantize(model, "w4a8_g128", progress=False)
ditq.save(model, sys.argv[1])
"""
LOAD = """
import sys, time, torch
from diffusers import DiTTransformer2DModel
import ditq_kernels as ditq
started = time.perf_counter()
model = ditq.load(sys.argv[1])
print(time.perf_counter() - started)
for tensor in [*model.parameters(), *model.buffers()]:
    tensor.detach().view(-1).view(torch.uint8).max() if tensor.numel() else None
print(time.perf_counter() - started)
"""
READ = """
import sys, time
from pathlib import Path
import torch
started = time.perf_counter()
for path in Path(sys.argv[1]).rglob("*.safetensors"):
    buffer = torch.empty(path.stat().st_size, dtype=torch.uint8)
    with path.open("rb") as file:
        file.readinto(memoryview(buffer.numpy()))
    buffer.max()
print(time.perf_counter() - started)
"""
IMPORT = """
import time
started = time.perf_counter()
import torch
plain = time.perf_counter() - started
import ditq_kernels
print(plain)
print(time.perf_counter() - started - plain)
"""


def said(program: str, *arguments: str) -> list[float]:
    """The numbers that ``program`` prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--width", type=int, default=2432, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary directory)")
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=args.directory) as work:
        target, size = f"{work}/quantized", (str(args.layers), str(args.width))
        said(SAVE, target, *size)
        stored = sum(path.stat().st_size for path in Path(target).rglob("*.safetensors"))
        for _ in range(args.rounds):
            loaded, touched = said(LOAD, target, *size)
            torch_alone, added = said(IMPORT)
            parts = dict(loaded=loaded, touched=touched, read=said(READ, target)[0], torch=torch_alone, added=added)
            for name, seconds in parts.items():
                found.setdefault(name, []).append(seconds)
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(
        f"{stored / 1e6:.0f} MB: loaded in {medians['loaded']:.3f} s, touched after {medians['touched']:.3f} s; "
        f"read into memory and touched in {medians['read']:.3f} s\n"
        f"import torch {1e3 * medians['torch']:.0f} ms, import ditq_kernels {1e3 * medians['added']:.0f} ms more"
    )


if __name__ == "__main__":
    main()
