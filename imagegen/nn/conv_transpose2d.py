import torch

from .. import ops


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """A transposed convolution, with the batch normalisation and the activation behind it in the same pass.

        y = act((conv_transpose2d(x) + bias) * scale + shift)

    Replaces torch.nn.ConvTranspose2d, alone or followed by a BatchNorm2d in evaluation and an activation, and loads the
    state_dict of that ConvTranspose2d unchanged. scale and shift are buffers, or None without a normalisation.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        output_padding=0,
        bias=True,
        activation="linear",
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.register_buffer("scale", None)
        self.register_buffer("shift", None)
        self.activation = activation

    @classmethod
    def from_torch(cls, conv, norm=None, activation="linear"):
        """The same convolution, sharing the parameters of a torch.nn.ConvTranspose2d.

        norm, a torch.nn.BatchNorm2d in evaluation, is folded into scale and shift as it is now: it is not followed when
        it learns on.
        """
        plain = {"dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        for name, value in plain.items():
            if getattr(conv, name) != value:
                raise ValueError(f"ConvTranspose2d: conv must have {name}={value!r}, got {getattr(conv, name)!r}")
        self = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.output_padding,
            conv.bias is not None,
            activation,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        if norm is not None:
            self.scale, self.shift = _fold(norm, conv)
        return self.train(conv.training)

    def forward(self, x, output_size=None):
        kernel, dilation = self.kernel_size, self.dilation
        output_padding = self._output_padding(x, output_size, self.stride, self.padding, kernel, 2, dilation)
        return ops.conv_transpose2d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            output_padding=output_padding,
            scale=self.scale,
            shift=self.shift,
            activation=self.activation,
        )

    def extra_repr(self):
        return f"{super().extra_repr()}, activation={self.activation!r}"


def _fold(norm, conv):
    """What norm does to each channel in evaluation, y = x * scale + shift, in float32 at least."""
    if norm.num_features != conv.out_channels:
        raise ValueError(
            f"ConvTranspose2d: norm must have conv's {conv.out_channels} channels, got {norm.num_features}"
        )
    if norm.training or norm.running_var is None:
        raise ValueError("ConvTranspose2d: norm must be in evaluation, with running statistics")
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias
        return scale.to(dtype), shift.to(dtype)
