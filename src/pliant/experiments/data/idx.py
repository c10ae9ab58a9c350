"""IDX files, the format of MNIST (http://yann.lecun.com/exdb/mnist/), plain or packed with gzip.

Two zero bytes, the type (8 is uint8), the number of dimensions, each dimension as a big-endian uint32, then the values.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pliant.errors import DamagedFile
from pliant.experiments.data.base import Split


def idx_split(folder: Path, stem: str) -> Split:
    """Read the images and labels of one split, whose file names begin with ``stem``: "train" or "t10k"."""
    images = _read_array(folder, f"{stem}-images-idx3-ubyte", 3)
    labels = _read_array(folder, f"{stem}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise DamagedFile(f"{folder} holds {len(images)} {stem} images but {len(labels)} labels: get both files anew")
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)))


def _read_array(folder: Path, name: str, ndim: int) -> NDArray[np.uint8]:
    """Read the uint8 array of ``ndim`` dimensions in ``folder/name`` or, packed, in ``folder/name.gz``."""
    file = next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
    if file is None:
        raise DamagedFile(f"{folder} holds neither {name} nor {name}.gz: expected the four IDX files there")
    complete = True
    try:
        data = file.read_bytes()
        if file.suffix == ".gz":
            unpacker = zlib.decompressobj(wbits=31)  # 31: with gzip header and checksum
            data = unpacker.decompress(data)
            complete = unpacker.eof
    except (OSError, zlib.error) as error:
        raise DamagedFile(f"{file} cannot be read ({error}): get it anew") from error
    header = 4 + 4 * ndim
    if data[:4] != bytes((0, 0, 8, ndim)) or len(data) < header:
        raise DamagedFile(
            f"{file} is not an IDX file of {ndim}-dimensional uint8: expected a header of {header} bytes that starts "
            f"with 0000080{ndim}, found {data[:4].hex() or 'nothing'} in {len(data)} bytes"
        )
    shape = tuple(np.frombuffer(data, ">u4", ndim, offset=4).tolist())
    if 0 in shape:
        raise DamagedFile(f"{file} is empty: its header announces an array of shape {shape}")
    expected = header + math.prod(shape)
    if len(data) != expected or not complete:
        unpacked = " after unpacking" if file.suffix == ".gz" else ""
        ends = "" if complete else ", and the packed data end early"
        raise DamagedFile(
            f"{file} is damaged: its header announces {expected} bytes{unpacked}, found {len(data)}{ends}: get it anew"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()
