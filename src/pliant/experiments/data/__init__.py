"""Image data sets and the loader that feeds them to a network."""

from pliant.experiments.data.images import ImageData as ImageData
from pliant.experiments.data.images import Loader as Loader
from pliant.experiments.data.images import load_data as load_data
