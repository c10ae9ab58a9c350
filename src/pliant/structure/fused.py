"""PyTorch's fused transformer layers: in eval mode they read the weights of their layers, and call none of them.

A layer that is replaced, by two of low rank or by one in eight bits, has to be called. So in a network that is changed,
``nn.TransformerEncoder`` and ``nn.TransformerEncoderLayer`` call their layers one by one, and ``nn.MultiheadAttention``
calls its output layer. Their results are the same, but for positions that a padding mask hides: fused ones may be zero
there.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from pliant.structure.thin_attention import ThinAttention, thin


def call_layers(model: nn.Module, layers: Collection[nn.Module] | None = None) -> None:
    """Let PyTorch's transformer layers in ``model`` call the layers in them, in place.

    Args:
        model: a network that may be changed.
        layers: the layers that have to be called; None for all.
    """
    called = set(model.modules() if layers is None else layers)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            ours = type(module) in (nn.MultiheadAttention, ThinAttention)  # a subclass may have further methods
            if module.out_proj in called and ours and can_be_thin(module):
                thin(module)
        elif isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and called & set(module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0


def can_be_thin(module: nn.MultiheadAttention) -> bool:
    """Return whether a ``ThinAttention`` would compute the same as ``module``."""
    own = type(module).forward not in (nn.MultiheadAttention.forward, ThinAttention.forward)
    adds = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
    packed = module._parameters.get("in_proj_weight") is not None
    return packed and not own and not adds and "forward" not in vars(module)
