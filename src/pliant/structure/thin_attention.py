"""Attention after removal of heads: ``nn.MultiheadAttention`` whose heads together are narrower than its inputs.

An attention module with layers as projections still works with smaller layers. PyTorch's own needs another forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ThinAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose heads together are narrower than its inputs.

    PyTorch's own forward assumes that the heads have as many channels as the inputs, ``embed_dim``. Here they have
    ``num_heads · head_dim``, with in_proj_weight (3·num_heads·head_dim, embed_dim) and out_proj from
    num_heads·head_dim to embed_dim channels. Calls, results and the names in the state_dict are the same, except
    that attention weights are the mean over the remaining heads.

    :func:`thin` converts a module to this class; it is never constructed.

    Unlike the dense module it calls out_proj. While ``watch`` is not None, it is called with (self, input, output) of
    the packed projection in self-attention.
    """

    watch: Callable[[nn.Module, Tensor, Tensor], None] | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, attention weights or None), as ``nn.MultiheadAttention`` does."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which has to be given as well")
        if query.is_nested:
            return self._nested(query), None
        batched = query.dim() == 3
        alone = query is key is value
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        weights = self.in_proj_weight.chunk(3)  # each (num_heads·head_dim, embed_dim)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (  # (batch, num_heads, tokens, head_dim)
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = self._mask(q, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        shares = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5  # (batch, num_heads, queries, keys)
            shares = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = shares @ v
            shares = shares.mean(1) if average_attn_weights else shares
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if self.watch is not None and alone:
            self.watch(self, query, F.linear(query, self.in_proj_weight, self.in_proj_bias))
        if not batched:
            return output.squeeze(0), None if shares is None else shares.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), shares

    def _mask(self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Return the sum of both masks, to be added to the scores; −inf where a boolean mask is True."""
        parts = []
        if attn_mask is not None:
            parts.append(attn_mask.unflatten(0, (len(q), self.num_heads)) if attn_mask.dim() == 3 else attn_mask)
        if key_padding_mask is not None:
            parts.append(key_padding_mask[:, None, None, :])
        total: Tensor | None = None
        for part in parts:
            if part.dtype == torch.bool:
                part = torch.zeros_like(part, dtype=q.dtype).masked_fill_(part, float("-inf"))
            total = part if total is None else total + part
        return total

    def _nested(self, x: Tensor) -> Tensor:
        """Attend within a nested batch, which ``nn.TransformerEncoder`` builds from padded sequences."""
        lengths = [len(sequence) for sequence in x.unbind()]
        padded = x.to_padded_tensor(0.0)
        places = torch.arange(padded.shape[1], device=padded.device)
        outside = places >= torch.tensor(lengths, device=padded.device).unsqueeze(1)
        output, _ = self.forward(padded, padded, padded, outside, need_weights=False)
        return torch.nested.as_nested_tensor([y[:n] for y, n in zip(output, lengths, strict=True)])


def thin(module: nn.MultiheadAttention) -> None:
    """Let ``module`` work with the number of heads that its in_proj_weight has, in place."""
    module.__class__ = ThinAttention
    module.num_heads = len(module.in_proj_weight) // (3 * module.head_dim)
    module._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer from its fused kernel
