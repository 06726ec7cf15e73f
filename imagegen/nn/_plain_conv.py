"""The one kind of torch.nn.Conv2d the 3x3 modules stand in for."""

PLAIN = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


def why_not_plain(conv):
    """None where conv is a 3x3 convolution with stride 1 and zero padding 1, else the first thing it should have."""
    for name, value in PLAIN.items():
        if getattr(conv, name) not in (value, "same" if name == "padding" else value):
            return f"{name}={value}, got {getattr(conv, name)}"
    if conv.padding_mode != "zeros":
        return f"padding_mode='zeros', got {conv.padding_mode!r}"
    return None


def check_plain(module, conv):
    reason = why_not_plain(conv)
    if reason is not None:
        raise ValueError(f"{module}: conv must have {reason}")
