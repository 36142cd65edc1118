"""Images in IDX files, as MNIST and FashionMNIST come: read whole, checked, and flattened."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from headstart.errors import DataError

SIDE = 28
PIXELS = SIDE * SIDE
CLASSES = 10

Part = Literal["train", "test"]
# Of each part, how the names of its files begin.
_PREFIX = {"train": "train", "test": "t10k"}
WHERE = (
    "MNIST's and FashionMNIST's four files each are read, packed by gzip or not: of FashionMNIST, Debian's package "
    "dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist; both are at "
    "github.com/zalandoresearch/fashion-mnist and yann.lecun.com/exdb/mnist"
)


@dataclass(frozen=True)
class Images:
    """Images of one part of a data set.

    Attributes:
        pixels: (count, 784) float32, from 0 to 1.
        labels: (count,) int64, from 0 to 9.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def read_images(folder: Path, part: Part, most: int | None = None) -> Images:
    """Return the images of a part.

    Args:
        folder: holds the data set's IDX files.
        part: "train" or "test".
        most: only the first so many.

    Raises:
        DataError: a file is missing, damaged or of another kind; names it.
    """
    pixels_file, labels_file = (_file(folder, part, kind) for kind in ("images-idx3", "labels-idx1"))
    pixels, labels = read_idx(pixels_file), read_idx(labels_file)
    if pixels.shape[1:] != (SIDE, SIDE):
        raise DataError(f"{pixels_file} holds {tuple(pixels.shape)}, not images of {SIDE} by {SIDE} pixels.")
    if labels.ndim != 1 or len(labels) != len(pixels):
        raise DataError(f"{labels_file} holds {tuple(labels.shape)} labels for {len(pixels)} images.")
    if not len(labels) or int(labels.max()) >= CLASSES:
        raise DataError(f"{labels_file} holds no labels from 0 to {CLASSES - 1}.")
    pixels, labels = pixels[:most], labels[:most]
    return Images(pixels.reshape(len(pixels), PIXELS).float() / 255, labels.long())


def read_idx(path: Path) -> Tensor:
    """Return what an IDX file of bytes holds, as uint8 in the file's shape; the file may be packed by gzip.

    Raises:
        DataError: the file can't be read, or is no IDX file of bytes; names it.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read: {error}.") from None
    # Two zeros, the type (8 is unsigned bytes), the number of sides, and each side as a big-endian integer.
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is no IDX file of bytes.")
    sides = content[3]
    head = 4 + 4 * sides
    if len(content) < head:
        raise DataError(f"{path} ends within its head.")
    shape = struct.unpack(f">{sides}I", content[4:head])
    if not math.prod(shape):
        raise DataError(f"{path} holds nothing: its shape is {shape}.")
    if len(content) - head != math.prod(shape):
        raise DataError(f"{path} holds {len(content) - head:,} bytes, not the {math.prod(shape):,} of {shape}.")
    return torch.frombuffer(bytearray(content[head:]), dtype=torch.uint8).reshape(shape)


def _file(folder: Path, part: Part, kind: str) -> Path:
    name = f"{_PREFIX[part]}-{kind}-ubyte"
    names = [name, name.replace("-idx", ".idx")]
    candidates = [folder / (name + packed) for name in names for packed in ("", ".gz")]
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(f"{folder} has no {name} or {name}.gz. {WHERE}.")
