"""Whole models with seeded random weights, as every provider runs them."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import imagegen
from benchmarks.contestant import compile_mode
from benchmarks.suite import Provider
from imagegen._optional import require

# The share of its multiplications that a 3x3 convolution of stride 1 keeps, and one after nearest-2x upsampling: on CPU
# in Winograd's form, on CUDA where cuDNN has the first and nine products the second.
SHARES = {"imagegen": (2.25 / 9, 25 / 144), "imagegen-cuda": (1, 9 / 36)}


class Model:
    """A model under test: build() makes it, call(module, **tensors) -> tensor is what is timed.

    Every provider has a module of its own in every memory format. Those of one format share their weights, unless the
    call `trains` or optimize changes them. Only the model that ran last is kept: some are large.
    """

    kept = None

    def __init__(self, build, call, make_inputs, *, trains=False):
        self.build, self.call, self.make_inputs, self.trains = build, call, make_inputs, trains
        self.made = {}
        self.count = functools.cache(self._count)

    def providers(self, openvino=("f32",)):
        """The table of a benchmark file, with a provider for each of OpenVINO's precisions."""
        return {
            "imagegen": Provider(self._run("imagegen")),
            "eager": Provider(self._run("eager")),
            "compile": Provider(self._run("compile"), warm_up=True),
            **{
                f"openvino-{precision}": Provider(
                    self._run_openvino(precision), warm_up=True, layouts=("nchw",), devices=("cpu",)
                )
                for precision in openvino
            },
        }

    def reference(self, **tensors):
        with _QueriesInPieces():
            return self.call(self._seeded().to(_first(tensors).device, torch.float64), **tensors)

    def flops(self, shape):
        return self.count(shape)["eager"]

    def flops_made(self, shape, provider):
        return self.count(shape).get(provider, self.flops(shape))

    def bytes_moved(self, shape, itemsize, direction):
        """The weights and the inputs once; what layers hand on could stay in caches that are large enough."""
        inputs = sum(t.numel() for t in self.make_inputs(shape).values())
        with torch.device("meta"):
            return itemsize * (inputs + sum(p.numel() for p in self.build().parameters()))

    def _run(self, provider):
        def run(**tensors):
            x = _first(tensors)
            module = self._once(self._module, provider, _is_channels_last(tensors), x.device, x.dtype)
            return self.call(module, **tensors)

        return run

    def _run_openvino(self, precision):
        def run(**tensors):
            shapes = tuple((name, tuple(t.shape)) for name, t in tensors.items())
            compiled = self._once(self._openvino, precision, shapes, torch.get_num_threads())
            return torch.from_numpy(compiled([t.numpy() for t in tensors.values()])[0])

        return run

    def _once(self, make, *key):
        """What make(*key) makes, made once."""
        if Model.kept is not self:
            if Model.kept:
                Model.kept.made.clear()
            Model.kept = self
        # With other threads comes another check, of the first step of all: for it a trained model is made anew.
        name = (make.__name__, *key, torch.get_num_threads() if self.trains else None)
        if name not in self.made:
            self.made[name] = make(*key)
        return self.made[name]

    def _seeded(self):
        torch.manual_seed(0)
        return self.build().train(self.trains).requires_grad_(self.trains)

    def _weights(self, channels_last, device, dtype):
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return self._seeded().to(device, dtype, memory_format=memory_format)

    def _module(self, provider, channels_last, device, dtype):
        kind = channels_last, device, dtype
        alone = self.trains or (
            provider == "imagegen" and device.type == "cuda"
        )  # where optimize lays weights out anew
        own = self._weights(*kind) if alone else _share(self._once(self._weights, *kind))
        if provider == "imagegen":
            imagegen.optimize(own)
        if provider == "compile":
            own.compile(dynamic=False, mode=compile_mode())
        return own

    def _openvino(self, precision, shapes, threads):
        openvino = require("openvino", "comparing with OpenVINO")
        names, shapes = zip(*shapes, strict=True)
        eager = self._once(self._module, "eager", False, torch.device("cpu"), torch.float32)
        traced = _Positional(eager, self.call, names)
        examples = tuple(torch.randn(shape) for shape in shapes)
        converted = openvino.convert_model(traced, example_input=examples, input=list(shapes))
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        return openvino.Core().compile_model(converted, "CPU", options)

    def _count(self, shape):
        """FLOP of one forward: the plain count, and what is left of it where 3x3 convolutions are done by SHARES."""
        convolved = []

        def note(upsampled, conv, inputs, output):
            convolved.append((upsampled, 2 * 9 * conv.in_channels * output.numel()))

        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            module = self.build().eval()
            for parent in module.modules():
                upsampled = type(parent).__name__ == "Upsample2D"
                for conv in parent.children():
                    if isinstance(conv, torch.nn.Conv2d) and (conv.kernel_size, conv.stride) == ((3, 3), (1, 1)):
                        conv.register_forward_hook(functools.partial(note, upsampled))
            self.call(module, **{name: t.to("meta") for name, t in self.make_inputs(shape).items()})
        plain = counter.get_total_flops()
        return {"eager": plain} | {
            provider: plain - sum((1 - shares[upsampled]) * flop for upsampled, flop in convolved)
            for provider, shares in SHARES.items()
        }


class _QueriesInPieces(TorchFunctionMode):
    """Attention over 1024 queries at a time: all scores of a 2048x2048 image in double are 34 GB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention or kwargs.get("attn_mask") is not None:
            return function(*args, **kwargs)
        q, *rest = args
        return torch.cat([function(piece, *rest, **kwargs) for piece in q.split(1024, dim=2)], dim=2)


class _Positional(torch.nn.Module):
    """What OpenVINO traces: the call with its tensors by position."""

    def __init__(self, module, call, names):
        super().__init__()
        self.module, self.call, self.names = module, call, names

    def forward(self, *tensors):
        return self.call(self.module, **dict(zip(self.names, tensors, strict=True)))


def _share(module):
    """A copy of the module with the same parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in tensors})


def _first(tensors):
    return next(iter(tensors.values()))


def _is_channels_last(tensors):
    return any(t.dim() == 4 and not t.is_contiguous() for t in tensors.values())
