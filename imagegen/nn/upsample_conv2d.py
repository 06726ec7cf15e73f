import torch

from .. import _library, ops
from ..ops._check import autocasts
from ._plain_conv import check_plain


class UpsampleConv2d(torch.nn.Conv2d):
    """Nearest-2x upsampling followed by a 3x3 convolution with padding 1.

    Replaces torch.nn.Sequential(torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(cin, cout, 3, padding=1)) and
    loads the state_dict of that Conv2d unchanged.
    """

    _packed = None  # or a tuple: empty, or the weight, as it was when packed, its version then, and it packed

    def __init__(self, in_channels, out_channels, bias=True, activation="linear", device=None, dtype=None):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    @classmethod
    def from_torch(cls, conv, activation="linear"):
        """The same convolution behind the upsampling, sharing the parameters of a torch.nn.Conv2d."""
        check_plain("UpsampleConv2d", conv)
        self = cls(conv.in_channels, conv.out_channels, conv.bias is not None, activation, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        return self.train(conv.training)

    def pack_weight(self):
        """Keep the weight as the CUDA kernels multiply by it, for calls without gradients. Returns self.

        It is packed anew once torch has counted a write to the weight: in place, by an optimizer or load_state_dict, or
        by to(). Where something else writes, through .data, in another library or in a replayed CUDA graph, call this
        again; a graph captured with a packed weight keeps that. Elsewhere than on CUDA it changes nothing.
        """
        self._packed = ()
        return self

    def _apply(self, fn, recurse=True):
        if self._packed:
            self._packed = ()  # what was packed has no use on another device or in another dtype
        return super()._apply(fn, recurse)

    def forward(self, x):
        packed = None if self._packed is None else self._packed_weight(x)
        return ops.upsample_conv2d(x, self.weight, self.bias, activation=self.activation, packed_weight=packed)

    def _packed_weight(self, x):
        weight, kept = self.weight, self._packed
        if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor) or autocasts(x):
            return None
        if weight.is_inference() or not _packs(weight):  # the first counts no writes
            return None
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, self.bias)):
            return None
        if not kept or kept[0] is not weight or not _is_view_of(weight, kept[1]) or weight._version != kept[2]:
            if weight.is_cuda and torch.cuda.is_current_stream_capturing():
                return None  # what a graph makes is there only when it is replayed
            # The old memory is kept alive beside what was made of it: no other weight can come to lie where it lay.
            old = weight.detach()
            self._packed = kept = (weight, old, weight._version, _library.op("upsample_conv2d_pack_weight")(old))
        return kept[3]

    def __getstate__(self):
        state = self.__dict__.copy()
        if self._packed:
            state["_packed"] = ()  # a copy packs its own weight
        return state

    def extra_repr(self):
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_channels}, {self.out_channels}{bias}, activation={self.activation!r}"


def _packs(weight):
    operator = "upsample_conv2d_pack_weight"
    return weight.is_cuda and weight.dtype != torch.float64 and _library.why_missing(operator, "cuda") is None


def _is_view_of(a, b):
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
