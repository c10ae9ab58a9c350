"""Images that stay in their files: for data sets that do not fit in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.readers.decoding import content, picture

AHEAD = 2  # batches that are decoded while one is in use


class ImageFiles:
    """Stands for uint8 images (N, 3, size, size) that are decoded when a batch asks for them.

    Grey images become RGB here, for no more than the names of the files is known. A file that is missing or damaged is
    found out when its turn comes: `DamagedFile`, with its name.
    """

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.files = files
        self.shape = (len(files), 3, size, size)

    def part(self, mask: Tensor) -> ImageFiles:
        """Return the images of a boolean mask (N,)."""
        return ImageFiles([self.files[row] for row in mask.nonzero().flatten().tolist()], self.shape[2])

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each tensor of row numbers, in order, while all cores decode those that come next."""
        pool = ThreadPoolExecutor(cpu_count(), "pliant-images")
        waiting: deque[list[Future[NDArray[np.uint8]]]] = deque()
        try:
            for batch in rows:
                waiting.append([pool.submit(self._pixels, row) for row in batch.tolist()])
                if len(waiting) > AHEAD:
                    yield _stacked(waiting.popleft())
            while waiting:
                yield _stacked(waiting.popleft())
        finally:  # also where nobody asks for the rest
            pool.shutdown(cancel_futures=True)

    def _pixels(self, row: int) -> NDArray[np.uint8]:
        file = self.files[row]
        image = picture(str(file), {"bytes": content(file), "path": None}, self.shape[2])
        return np.asarray(image.convert("RGB"))


def _stacked(images: list[Future[NDArray[np.uint8]]]) -> Tensor:
    return torch.from_numpy(np.stack([image.result() for image in images])).permute(0, 3, 1, 2)
