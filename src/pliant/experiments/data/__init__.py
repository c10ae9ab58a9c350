"""Image data sets and the loader that feeds them to a network.

images     :func:`load_data`, from a name to an ``ImageData``
loader     the batches of one split
data_sets  a row for each data set
named      readers of digits, Fashion-MNIST and CIFAR
outside    the data sets of other packages
idx        the file format of Fashion-MNIST
tables     parquet files and the hub
folders    images in folders
decoding   encoded images as tensors
streaming  the same batch by batch, for images that stay in their files
base       the description of a data set, the request to its reader and the reader's result
"""

from pliant.experiments.data.base import DataSet as DataSet
from pliant.experiments.data.base import Raw as Raw
from pliant.experiments.data.base import Request as Request
from pliant.experiments.data.base import Split as Split
from pliant.experiments.data.images import ImageData as ImageData
from pliant.experiments.data.images import load_data as load_data
from pliant.experiments.data.loader import Loader as Loader
