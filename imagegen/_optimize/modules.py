"""What optimize makes of torch's own modules.

Each class here derives from exactly the class it replaces and computes the same function of the same parameters, so
that giving a module the new class is all of optimize, and giving it the base class back all of restore: parameters,
buffers, hooks and everything that points to the module stay as they are.

A container runs children as one op only while nobody can tell: a hook on one of them, or a child that has been
exchanged since, makes it call them one by one.
"""

from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from .. import ops
from ..nn._plain_conv import PLAIN
from ..ops._activation import LRELU_SLOPE, MODULES
from ..ops._check import DTYPES
from .channels_last import follow


@dataclass(frozen=True)
class Fusion:
    """What `module` and, unseen by anybody, `parts` of it compute can be done by the op `by`, unless `why_not`."""

    module: torch.nn.Module
    parts: list
    was: str
    by: str
    why_not: str | None = None


def takes(x):
    """Whether the ops take x as torch's modules do: a batch of images in a floating point dtype, with values."""
    return isinstance(x, torch.Tensor) and x.dim() == 4 and x.dtype in DTYPES and not x.is_meta


class Conv2d(torch.nn.Conv2d):
    """A 3x3 convolution by imagegen.ops.conv2d."""

    @staticmethod
    def fusions(conv):
        return [Fusion(conv, [], "Conv2d", "conv2d", _first_difference(conv, PLAIN))]

    def forward(self, input):
        return conv2d(self, input) if takes(input) else super().forward(input)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """A transposed convolution that doubles the size, by imagegen.ops.conv_transpose2d."""

    @staticmethod
    def fusions(conv):
        size = 3 if conv.kernel_size == (3, 3) else 4
        doubling = {
            "kernel_size": (size, size),
            "stride": (2, 2),
            "padding": (1, 1),
            "output_padding": (4 - size, 4 - size),
            "dilation": (1, 1),
            "groups": 1,
        }
        return [Fusion(conv, [], "ConvTranspose2d", "conv_transpose2d", _first_difference(conv, doubling))]

    def forward(self, input, output_size=None):
        if output_size is not None or not takes(input):
            return super().forward(input, output_size)
        return conv_transpose2d(self, None, "linear", input)


class GroupNorm(torch.nn.GroupNorm):
    """Group normalisation by imagegen.ops.group_norm."""

    @staticmethod
    def fusions(norm):
        return [Fusion(norm, [], "GroupNorm", "group_norm")]

    def forward(self, input):
        return group_norm(self, "linear", input)


class SiLU(torch.nn.SiLU):
    """A SiLU by imagegen.ops.bias_act where no op takes it over, saving the page faults of a large fresh output."""

    @staticmethod
    def fusions(act):
        if not act.inplace:
            yield Fusion(act, [], "SiLU", "bias_act")

    def forward(self, input):
        if self.inplace or not _is_large_and_fresh(input):
            return super().forward(input)
        return ops.bias_act(input, act="silu", gain=1.0)


class Sequential(torch.nn.Sequential):
    """A sequence whose neighbours run as one op where there is one."""

    @staticmethod
    def fusions(sequence):
        children = list(sequence)
        while children:
            n, op, _ = leading(children)
            if op:
                yield Fusion(children[0], children[:n], " + ".join(type(child).__name__ for child in children[:n]), op)
            children = children[n:]

    def forward(self, input):
        return run(list(self), input)


def run(children, x):
    """x through the children, as one op wherever possible."""
    while children:
        n, op, function = leading(children)
        now, children = children[:n], children[n:]
        if op and takes(x) and unobserved(now) and not any(map(_normalises_by_batch, now)):
            x = function(x)
        else:
            for child in now:
                x = child(x)
    return x


def leading(children):
    """(n, op, function): the op computes what the first n children do one after the other; (1, None, None) if none."""
    head, rest = children[0], children[1:]
    upsampled = is_nearest_2x(head) and rest and type(rest[0]) is Conv2d
    if upsampled or type(head) is Conv2d:
        conv, n = (rest[0], 2) if upsampled else (head, 1)
        activation, m = _activation_at(children, n)
        if n + m > 1:
            op = ops.upsample_conv2d if upsampled else ops.conv2d
            return n + m, op.__name__, lambda x: op(follow(conv, x), conv.weight, conv.bias, activation=activation)
    if type(head) is GroupNorm:
        activation, m = _activation_at(children, 1)
        conv = children[1 + m] if len(children) > 1 + m else None
        if type(conv) is Conv2d:
            after, k = _activation_at(children, 2 + m)
            return 2 + m + k, "conv2d", lambda x: norm_conv2d(head, activation, conv, x, after=after)
        if m:
            return 2, "group_norm", lambda x: group_norm(head, activation, x)
    if type(head) is ConvTranspose2d:
        norm = rest[0] if rest and _has_running_statistics(rest[0]) else None
        n = 1 if norm is None else 2
        activation, m = _activation_at(children, n)
        if n + m > 1:
            return n + m, "conv_transpose2d", lambda x: conv_transpose2d(head, norm, activation, x)
    return 1, None, None


def conv2d(conv, x, after="linear", residual=None):
    return ops.conv2d(follow(conv, x), conv.weight, conv.bias, activation=after, residual=residual)


def group_norm(norm, activation, x, scale=None, shift=None):
    return ops.group_norm(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, scale=scale, shift=shift, activation=activation
    )


def norm_conv2d(norm, activation, conv, x, *, scale=None, shift=None, bias=None, residual=None, after="linear"):
    """after(conv(activation(norm(x))) + residual), in two passes over x where nothing of it is differentiated.

    The first pass takes the statistics, the second normalises while the convolution reads. In training the normalised
    x has to be kept anyway, where it stays in the caches that saves nothing, and cuDNN cannot normalise what it reads:
    then norm and convolution are two ops.
    `bias` stands in for the convolution's own.
    """
    bias = conv.bias if bias is None else bias
    options = {"activation": after, "residual": residual}
    if not x.is_cpu or x.nbytes <= _CACHED_BYTES or records(x, norm.weight, conv.weight, scale, residual):
        hidden = group_norm(norm, activation, follow(conv, x), scale, shift)
        return ops.conv2d(hidden, conv.weight, bias, **options)
    gain, offset = ops.group_norm_factors(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, scale=scale, shift=shift
    )
    return ops.conv2d(x, conv.weight, bias, scale=gain, shift=offset, input_activation=activation, **options)


def records(*tensors):
    """Whether autograd records what is done with one of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def conv_transpose2d(conv, norm, activation, x):
    scale = shift = None
    if norm is not None:
        scale, shift = scale_and_shift(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    return ops.conv_transpose2d(
        x,
        conv.weight,
        conv.bias,
        stride=conv.stride,
        padding=conv.padding,
        output_padding=conv.output_padding,
        scale=scale,
        shift=shift,
        activation=activation,
    )


def scale_and_shift(mean, var, weight, bias, eps):
    """What a batch normalisation does in eval: x * scale + shift."""
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _is_large_and_fresh(x):
    """Whether an activation of x is a large tensor of its own on CPU, which nothing records, compiles or transforms."""
    if not is_dense_on_cpu(x) or x.dtype not in DTYPES or not 0 < x.dim() <= 8:
        return False
    return x.nbytes >= _FRESH_BYTES and not (records(x) or torch.compiler.is_compiling() or transformed())


def is_dense_on_cpu(t):
    """Whether t is a plain tensor on CPU: not nested, sparse, distributed or of quantised content."""
    if type(t) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return t.is_cpu and t.layout is torch.strided and not t.is_nested


def transformed():
    """Whether torch.func or forward mode is at work, for which an operator of ours has no rule of its own."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def activation_name(module):
    """The name by which the ops know this activation, or None."""
    name = _ACTIVATIONS.get(type(module))
    if name == "lrelu" and module.negative_slope != LRELU_SLOPE:
        return None
    if name == "gelu" and module.approximate != "none":
        return None
    return name


def unobserved(modules):
    """Whether nobody sees that these modules are not called: they have no hooks, and no forward of their own."""
    return not torch.nn.modules.module._has_any_global_hook() and not any(map(observation, modules))


def observation(module):
    """What would notice that the module is not called, or None."""
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if getattr(module, hooks):
            return hooks.strip("_").replace("_", " ")  # "forward hooks" and so on
    return "a forward of its own" if "forward" in vars(module) else None


def is_nearest_2x(module):
    if type(module) not in (torch.nn.Upsample, torch.nn.UpsamplingNearest2d) or module.mode != "nearest":
        return False
    return module.size is None and module.scale_factor in (2, (2, 2))


def _activation_at(children, i):
    """(name, 1) of the activation at position i, or ("linear", 0)."""
    name = activation_name(children[i]) if i < len(children) else None
    return (name, 1) if name and name != "linear" else ("linear", 0)


def _has_running_statistics(norm):
    return type(norm) is torch.nn.BatchNorm2d and norm.running_mean is not None


def _normalises_by_batch(module):
    """Whether this is a batch norm in training: only in eval it is a scale and a shift known beforehand."""
    return type(module) is torch.nn.BatchNorm2d and module.training


def _first_difference(conv, values):
    for name, value in {**values, "padding_mode": "zeros"}.items():
        given = getattr(conv, name)
        if given not in (value, "same" if name == "padding" else value):
            library = ": torch's own is as fast" if conv.kernel_size == (1, 1) else ""
            return f"{name}={given!r}{library}"
    return None


_ACTIVATIONS = {**{getattr(torch.nn, module): name for module, name in MODULES.items()}, SiLU: "silu"}

# Of (1, 128, 256, 256), 32 MiB, norm and convolution in one take 4 % less time than as two ops, of (1, 256, 128, 128),
# 16 MiB, 1 % more (Zen 4, one thread).
_CACHED_BYTES = 16 << 20

# From here on the ops' outputs take memory that is paged in already (imagegen.output_cache).
_FRESH_BYTES = 1 << 20

LAYERS = (Conv2d, ConvTranspose2d, GroupNorm, SiLU)
CONTAINERS = (Sequential,)
