import torch

from .. import ops
from ._plain_conv import check_plain


class Conv2d(torch.nn.Conv2d):
    """3x3 convolution with stride 1 and padding 1; see imagegen.ops.conv2d.

    Replaces torch.nn.Conv2d(cin, cout, 3, padding=1) and loads its state_dict unchanged.
    """

    def __init__(self, in_channels, out_channels, bias=True, activation="linear", device=None, dtype=None):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    @classmethod
    def from_torch(cls, conv, activation="linear"):
        """The same convolution, sharing the parameters of a torch.nn.Conv2d."""
        check_plain("Conv2d", conv)
        self = cls(conv.in_channels, conv.out_channels, conv.bias is not None, activation, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        return self.train(conv.training)

    def forward(self, x, residual=None, scale=None, shift=None, input_activation="linear"):
        return ops.conv2d(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            residual=residual,
            scale=scale,
            shift=shift,
            input_activation=input_activation,
        )

    def extra_repr(self):
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_channels}, {self.out_channels}{bias}, activation={self.activation!r}"
