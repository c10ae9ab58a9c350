"""Train once, deploy at any size: compression-aware training with Stochastic Frank-Wolfe.

The public names are listed only in ``__init__.pyi``, where type checkers look for them. They are loaded when first
used, so that ``import pliant`` is quick and ``pliant.report`` works without torch.
"""

import lazy_loader

from pliant.version import __version__ as __version__

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def __dir__() -> list[str]:
    return __all__
