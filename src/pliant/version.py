"""The version of the package: here, so that every file can name it without importing the package's face."""

__version__ = "0.1.0.dev0"
