"""What the tiles of the overlapped int8 product ask of an H100's memories on a layer, beside the product that is
chosen: `ditq inspect --execute --counters` counts that one alone.

    python benchmarks/overlapped_counts.py --match "2048 x 1152 x 1152"
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

from ditq_kernels.inspect import counted, counting
from ditq_kernels.kernels import dispatch
from ditq_kernels.kernels.config import CONFIGS, OVERLAPPED_CAPABILITY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="2048 x 1152 x 1152", help="of an int8 layer's name (default: %(default)s)")
    args = parser.parse_args()
    layers = [one for one in counted.chosen(args.match) if one.by == counted.TRITON and one.activations == "int8"]
    counting.prepare_process()
    print(counting.HEADER)
    for layer in (one for one in layers if one.fmt == "w8"):
        for tile in (None, *CONFIGS["overlapped"]):
            print(tile or "as chosen")
            with patch.object(dispatch, "chosen", (lambda *_, tile=tile: tile) if tile else dispatch.chosen):
                print("\n".join(counting.lines(counting.count_subject(OVERLAPPED_CAPABILITY, layer))), flush=True)


if __name__ == "__main__":
    main()
