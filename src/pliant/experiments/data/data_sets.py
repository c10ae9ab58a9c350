"""All data sets, one row each: a new data set is a row and, if none of the formats fits, a reader.

A reader takes a `Request` and returns a `Raw`. It raises `DamagedFile` for a file that is missing or cannot be read,
`BadInput` for an unsuitable option, column or image. The remaining steps are the same for every data set, in
``images``: checking the labels, holding out images, mean and std.
"""

from __future__ import annotations

from pliant.experiments.data.base import DataSet
from pliant.experiments.data.folders import read_image_folder
from pliant.experiments.data.named import read_cifar, read_digits, read_fashion_mnist
from pliant.experiments.data.outside import fault, guarded
from pliant.experiments.data.tables import read_hub, read_parquet
from pliant.extensions import find

HUB = "hub:"

DATA_SETS = {
    row.name: row
    for row in (
        DataSet("digits", read_digits, 10, (1, 8, 8), flip=False),
        DataSet("fashion-mnist", read_fashion_mnist, 10, (1, 28, 28), pad=1 / 14),
        DataSet("cifar10", read_cifar, 10, (3, 32, 32)),
        DataSet("cifar100", read_cifar, 100, (3, 32, 32)),
        DataSet("image-folder", read_image_folder),
        DataSet("parquet", read_parquet),
        DataSet(f"{HUB}OWNER/NAME", read_hub),
    )
}


def data_set(name: str) -> DataSet:
    """Return the data set of this name: one of this package, ``package.module:name``, or an installed package's offer.

    Raises:
        BadInput: nothing has this name, or the object cannot be imported or is not a data set.
    """
    return find("data set", f"{HUB}OWNER/NAME" if name.startswith(HUB) else name, DATA_SETS, fault, guarded)
