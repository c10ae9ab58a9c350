"""What to do about each reason why a layer is left alone; the table in docs/own-model.md is the same."""

from __future__ import annotations

_LAYERS = "use the layers of `torch.nn` inside it"
_CALL = "call the layer, `self.layer(x)`, not `F.linear(x, self.layer.weight)`"
_RANK = "`LowRank` still works"
_NOTHING = "nothing: "

ADVICE: tuple[tuple[str, str], ...] = (
    ("its channels are outputs of the model", _NOTHING + "the channels are the classes, or features for others"),
    ("is a grouped convolution", "`LowRank` factorises it, unless it is depthwise"),
    ("whose channels are not known", _LAYERS),
    ("with a forward of its own", _LAYERS),
    (
        "which eval mode does not call, may read its channels",
        "let `forward` run in training mode on the example alone, or delete the layer that is not called",
    ),
    ("in training mode", "the named layer, a loss or a token needs these channels in training"),
    ("its channels are kept as", "return them, or keep them only while you look at them"),
    (
        "its outputs are dropped",
        "no lists and no NumPy on the way to the output; delete the layer if you do not need it",
    ),
    ("is used in a way that is not known", _LAYERS),
    ("all its channels leave together", _RANK),
    ("reads places, not channels", _RANK),
    ("shares its channels with attention heads", "`HeadPruning` removes the heads"),
    (
        "the free parameter",
        "make it the weight of a layer, `self.last = nn.Conv2d(...)` for `F.conv2d(y, self.kernel)`",
    ),
    ("is parametrised", "`torch.nn.utils.parametrize.remove_parametrizations` does so"),
    ("shares a parameter with another layer", _NOTHING + "tied weights cannot be cut on one side"),
    ("is not reached through its forward", _CALL),
    ("is not called through its forward", _CALL),
    ("is not called on the example", "give an example that reaches it"),
    ("does not treat its channels one by one", "a normalisation or a sum mixes them; `LowRank` still works"),
    ("may mix its channels", "a normalisation over channels does; `LowRank` still works"),
    ("only some of its channels", _RANK),
    ("differs from", _RANK),
    ("returns or keeps other tensors", _RANK),
    ("no floating-point output to check", "return the scores, not only the classes"),
    (
        "cannot run without some of its channels",
        "take sizes from tensors, `x.shape[1]`, or write -1; `LowRank` still works",
    ),
    ("does not run in float64", "let checks of types in `forward` pass float64"),
    ("gives NaN on the example", "give an example from your data"),
    ("cannot be traced", _RANK),
    ("cannot be made smaller", _LAYERS),
    ("belongs to attention", "`HeadPruning` removes them"),
    ("makes attention heads", "`HeadPruning` removes them"),
    ("output projection of its heads is not known", "read the heads by a linear layer of the attention module"),
    (
        "keeps its projections apart",
        "give `nn.MultiheadAttention` keys and values as wide as its queries, and no `bias_k`",
    ),
    ("has no heads that can leave", "`FilterPruning` removes its neurons"),
    ("has a single", _NOTHING + "one has to stay"),
    ("has forward hooks", "remove them, and add them to the result"),
    ("cannot be replaced", "let its parent call the layer and read none of its tensors"),
    ("is no convolution or linear layer", _NOTHING + "only these are replaced"),
    ("is a depthwise convolution", _NOTHING + "its matrices have one row"),
    ("is a transposed convolution", _NOTHING + "it is not replaced"),
    ("is too small", _NOTHING + "two layers would be larger"),
    ("does not divide", "choose another n:m, or widths that are multiples of m"),
)
"""(part of a reason, what to do): the first row whose part is in a reason holds."""


def advice(reason: str) -> str | None:
    """Return what to do about a reason, None if it is not known."""
    return next((text for part, text in ADVICE if part in reason), None)


def advised(reason: str) -> str:
    """Return a reason with what to do, if anything."""
    text = advice(reason)
    if text is None or text.startswith(_NOTHING):
        return reason
    return f"{reason} ({text.replace('`', '')})"
