"""Fashion-MNIST (Xiao et al., arXiv 1708.07747; MIT licence) as tensors: the pictures that the embedded model is
trained on.

The files are the four gzipped IDX archives of the original release, as Debian's package ``dataset-fashion-mnist``
installs them.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch

DEFAULT_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_PREFIX = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX archive of unsigned bytes.

    Raises:
        FileNotFoundError: with the way to get the data set.
        ValueError: if the file is not an IDX archive of unsigned bytes.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; install Debian's package dataset-fashion-mnist, or pass the directory that holds "
            "the four *-ubyte.gz files"
        )
    data = gzip.decompress(path.read_bytes())
    zero, kind, ndim = struct.unpack_from(">HBB", data)
    if zero != 0 or kind != _UNSIGNED_BYTE:
        raise ValueError(f"{path} is not an IDX archive of unsigned bytes")
    shape = struct.unpack_from(f">{ndim}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def load(split: str = "train", directory: str | Path = DEFAULT_DIRECTORY) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures float32 [count, 1, 28, 28] in [-1, 1] and labels int64 [count] of ``split`` ("train" or "test")."""
    prefix = Path(directory) / _PREFIX[split]
    pictures = read_idx(prefix.with_name(prefix.name + "-images-idx3-ubyte.gz"))
    labels = read_idx(prefix.with_name(prefix.name + "-labels-idx1-ubyte.gz"))
    return torch.from_numpy(pictures / np.float32(127.5) - 1).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))
