"""Images that stay in their files, for data sets that do not fit in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.experiments.data.decoding import decoder, encoded

IN_MEMORY = 2 * 2**30  # bytes of decoded images; more of them stay in their files
AHEAD = 2  # number of batches that are decoded while one is in use


class ImageFiles:
    """Images (N, 3, size, size), uint8, that are decoded when a batch needs them.

    Grey images become RGB, because only the names of the files are known. A file that is missing, damaged or not an
    8-bit image raises `DamagedFile` or `BadInput`, with its name, when it is decoded.

    Args:
        files: paths of the image files.
        size: side of the square that every image is resized to, in pixels.
    """

    def __init__(self, files: Sequence[str], size: int) -> None:
        self.files = files
        self.shape = (len(files), 3, size, size)

    def part(self, mask: Tensor) -> ImageFiles:
        """Return the images of a boolean mask (N,)."""
        return ImageFiles([self.files[row] for row in mask.nonzero().flatten().tolist()], self.shape[2])

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images (B, 3, size, size) of each tensor of row numbers (B,); threads decode the next ones."""
        threads = _threads()
        pool = ThreadPoolExecutor(threads, "pliant-images")
        picture = decoder(self.shape[2])
        waiting: deque[list[Future[NDArray[np.uint8]]]] = deque()
        try:
            for batch in rows:
                shares = [share.tolist() for share in batch.tensor_split(threads) if len(share)]
                waiting.append([pool.submit(self._pixels, picture, share) for share in shares])
                if len(waiting) > AHEAD:
                    yield _joined(waiting.popleft())
            while waiting:
                yield _joined(waiting.popleft())
        finally:  # also if the caller stops early
            pool.shutdown(cancel_futures=True)

    def _pixels(self, picture: Callable[[str, dict[str, Any]], Any], rows: list[int]) -> NDArray[np.uint8]:
        images = [picture(self.files[row], encoded(self.files[row])) for row in rows]
        return np.stack([np.asarray(image.convert("RGB")) for image in images])


def _joined(shares: list[Future[NDArray[np.uint8]]]) -> Tensor:
    return torch.from_numpy(np.concatenate([share.result() for share in shares])).permute(0, 3, 1, 2)


def _threads() -> int:
    """Return the number of cores for this process: its share if torchrun started several on the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
