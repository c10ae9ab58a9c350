"""Weights that are trained as products of factors, and become single tensors again afterwards."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pliant.experiments.baselines.matrices import as_matrices


class Product(nn.Module):
    """The base of parametrisations: a weight of fixed shape whose matrices are products of factors.

    Args:
        shape: shape of the weight.
        row_dim: the dimension that counts the rows.
        blocks: how many matrices the weight holds.
    """

    def __init__(self, shape: torch.Size, row_dim: int, blocks: int) -> None:
        super().__init__()
        self.rows_first = torch.Size([shape[row_dim], *shape[:row_dim], *shape[row_dim + 1 :]])
        self.row_dim = row_dim
        self.blocks = blocks

    def forward(self, *factors: Tensor) -> Tensor:
        """Return the weight."""
        with torch.autocast(factors[0].device.type, enabled=False):  # so that merged() computes the same product
            product = factors[0]
            for factor in factors[1:]:
                product = product @ factor
        return product.reshape(self.rows_first).movedim(0, self.row_dim)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the initial factors."""
        return self.factors(as_matrices(weight, self.row_dim, self.blocks))

    def factors(self, w: Tensor) -> tuple[Tensor, ...]:
        """Return factors whose product is near the matrices ``w``, (blocks, rows, columns)."""
        raise NotImplementedError


def factorise(layer: nn.Module, product: Product) -> list[tuple[str, nn.Parameter]]:
    """Parametrise the weight of a layer as a product; return its factors with their names in the layer."""
    parametrize.register_parametrization(layer, "weight", product, unsafe=True)  # unsafe: no trial call, no second draw
    return [(name, p) for name, p in layer.named_parameters() if name.startswith("parametrizations.weight.")]


def merged(model: nn.Module) -> nn.Module:
    """Return a copy of the model with every product multiplied out; the model itself if there is none."""
    if not any(isinstance(module, Product) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    layers: list[Any] = [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]
    for layer in layers:
        chain = layer.parametrizations["weight"]
        if isinstance(chain[0], Product):
            # torch's remove_parametrizations would take the weight from the class, which copies share.
            weight, plain = nn.Parameter(chain().detach()), parametrize.type_before_parametrizations(layer)
            del layer.parametrizations
            layer.__class__ = plain
            layer._parameters = {"weight": weight, **layer._parameters}
    return model
