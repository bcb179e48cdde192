"""Peak memory of a model that diffusers loads and that is quantized meanwhile, over what the imports take, beside what
it should be at most: the quantized model and three of its layers in fp32.

    python benchmarks/load_memory.py                      # a billion parameters
    python benchmarks/load_memory.py --layers 2 --width 768

Anonymous resident memory: pages of the checkpoint's own files, which the system may drop at any time, are not counted.
Needs two bytes of disk per parameter below --directory. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

MAKE = """
import sys, torch
from diffusers import DiTTransformer2DModel
torch.set_default_dtype(torch.bfloat16)
torch.manual_seed(0)
width = int(sys.argv[3])
model = DiTTransformer2DModel(
    num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=int(sys.argv[2]),
    patch_size=2, sample_size=32, num_embeds_ada_norm=10,
)
print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters", flush=True)
model.save_pretrained(sys.argv[1], max_shard_size="500MB")
"""

LOAD = """
import re, sys, threading, torch
from pathlib import Path
from diffusers import DiTTransformer2DModel
from ditq_kernels.integrations.diffusers import DitqConfig

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64)).sum().item()  # threads and buffers of products
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
model = DiTTransformer2DModel.from_pretrained(
    sys.argv[1], quantization_config=DitqConfig(sys.argv[2]), dtype=torch.bfloat16
)
done.set()
watcher.join()
bytes_of = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
stored = bytes_of([*model.parameters(), *model.buffers()])
layer = max(4 * m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear))
print(f"peak {(peak - before) / 1e6:.0f} MB over imports, at most {(stored + 3 * layer) / 1e6:.0f} MB wanted: "
      f"{stored / 1e6:.0f} MB of quantized model and three times {layer / 1e6:.0f} MB")
sys.exit(peak - before > stored + 3 * layer)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a8_g128")
    parser.add_argument("--layers", type=int, default=9, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--width", type=int, default=2432, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary directory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as work:
        # Each in a process of its own, so that only loading is measured.
        subprocess.run([sys.executable, "-c", MAKE, work, str(args.layers), str(args.width)], check=True)
        return subprocess.run([sys.executable, "-c", LOAD, work, args.scheme]).returncode


if __name__ == "__main__":
    sys.exit(main())
