"""The Triton kernel of conv_transpose2d and of upsample_conv2d, which folds into it, and the CUDA kernel of the former:
values and gradients in Triton's interpreter, where there is no GPU, and in the CUDA simulator, races and bounds too;
registers, spills and matrix instructions of what the compilers make."""

import itertools

import pytest
import torch
from cuda_sim import simulator
from helpers import DTYPES, LAYOUTS, backends, check, check_error, relative_error, tolerance
from torch._subclasses import FakeTensorMode
from triton_ahead_of_time import MATRIX, compile_kernel

from imagegen import _library, ops
from imagegen.ops import eager
from imagegen.ops._activation import ACTIVATIONS
from imagegen.ops.conv_transpose2d import backward_input_cudnn, backward_weight_cudnn

TRITON = [p for p in backends("conv_transpose2d") if p.id == "triton"]
on_triton = pytest.mark.parametrize("backend, device", TRITON)
# (B, C, Cout, H, W): size 1, primes, either side of a tile of channels and of pixels.
SHAPES = [(1, 1, 1, 1, 1), (2, 19, 35, 5, 7), (1, 40, 3, 3, 2), (3, 8, 65, 1, 9)]


class Transposed:
    """conv_transpose2d of one kernel size and output padding: its tensors are x, weight, bias, scale and shift."""

    def __init__(self, kernel, extra):
        self.kernel, self.extra = kernel, extra
        self.geometry = {"stride": 2, "padding": 1, "output_padding": extra}

    def tensors(self, C, Cout):
        weight = torch.randn(C, Cout, self.kernel, self.kernel) / (2 * C**0.5)
        return weight, torch.randn(Cout), torch.rand(Cout) + 0.5, torch.randn(Cout)

    def ours(self, backend, activation="linear"):
        return lambda x, w, b=None, scale=None, shift=None: ops.conv_transpose2d(
            x, w, b, **self.geometry, scale=scale, shift=shift, activation=activation, backend=backend
        )

    def plain(self, activation="linear"):
        return lambda x, w, b=None, scale=None, shift=None: eager.conv_transpose2d(
            x, w, b, (2, 2), (1, 1), self.extra, scale, shift, activation
        )


class Upsampled:
    def tensors(self, C, Cout):
        return torch.randn(Cout, C, 3, 3) / (3 * C**0.5), torch.randn(Cout)

    def ours(self, backend, activation="linear"):
        return lambda x, w, b=None: ops.upsample_conv2d(x, w, b, activation=activation, backend=backend)

    def plain(self, activation="linear"):
        return lambda x, w, b=None: eager.upsample_conv2d(x, w, b, activation)


OPS = {
    "k4": Transposed(4, (0, 0)),
    "k3": Transposed(3, (1, 1)),
    "k4, odd rows": Transposed(4, (1, 0)),
    "k3, odd columns": Transposed(3, (1, 0)),
    "upsample": Upsampled(),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
MODELS = [OPS["k4"], OPS["k3"], OPS["upsample"]]


def make(op, shape, device, dtype=torch.float32, layout="contiguous"):
    B, C, Cout, H, W = shape
    tensors = (torch.randn(B, C, H, W), *op.tensors(C, Cout))
    x, *parameters = (t.to(device, dtype) for t in tensors)
    return LAYOUTS[layout](x), *parameters


@on_triton
@every_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, op, backend, device):
    check(op.ours(backend), op.plain(), *make(op, shape, device))


@on_triton
@pytest.mark.parametrize("op", MODELS, ids=["k4", "k3", "upsample"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(dtype, op, backend, device):
    check(op.ours(backend), op.plain(), *make(op, (2, 40, 24, 5, 6), device, dtype))


@on_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, device):
    op = OPS["upsample"]
    x, *parameters = make(op, (2, 5, 6, 3, 4), device, layout=layout)
    y = check(op.ours(backend), op.plain(), x, *(LAYOUTS[layout](t) for t in parameters))
    assert y.is_contiguous(memory_format=torch.channels_last if "channels_last" in layout else torch.contiguous_format)


@on_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_epilogue(activation, backend, device):
    """Where a gradient is wanted it is taken apart; bias, scale and shift come in any choice."""
    op = OPS["k4"]
    x, w, *channels = make(op, (1, 9, 6, 3, 4), device)
    for given in (7, list(ACTIVATIONS).index(activation)):
        chosen = [t if given >> i & 1 else None for i, t in enumerate(channels)]
        with torch.no_grad():
            y = op.ours(backend, activation)(x, w, *chosen)
        exact = op.plain(activation)(*(t if t is None else t.double() for t in (x, w, *chosen)))
        assert relative_error(y, exact) <= tolerance(torch.float32)


@on_triton
@pytest.mark.parametrize("op", MODELS, ids=["k4", "k3", "upsample"])
def test_second_order_gradients(op, backend, device):
    tensors = [t.requires_grad_() for t in make(op, (1, 2, 3, 2, 1), device, torch.float64)]

    def second_order(function):
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    for ours, plain in zip(second_order(op.ours(backend, "silu")), second_order(op.plain("silu")), strict=True):
        assert relative_error(ours, plain) <= 1e-12


@on_triton
@pytest.mark.parametrize("name", ["conv_transpose2d", "upsample_conv2d"])
def test_opcheck(name, backend, device):
    op = OPS["k3"] if name == "conv_transpose2d" else OPS["upsample"]
    x, w, b, *channels = (t.requires_grad_() for t in make(op, (1, 2, 3, 2, 3), device, layout="channels_last"))
    extra = ([1, 1],) if channels else ()
    grad = torch.randn(1, 3, 4, 6, device=device).requires_grad_()
    forward, backward_input, backward_weight = (
        _library.op(f"{name}{part}_triton") for part in ("", "_backward_input", "_backward_weight")
    )
    torch.library.opcheck(forward, (x, w, b, *extra, *channels, "silu"))
    torch.library.opcheck(backward_input, (grad, w, *extra))
    torch.library.opcheck(backward_weight, (grad, x, *((3,) if extra else ()), *extra))


@on_triton
@pytest.mark.parametrize("op", MODELS, ids=["k4", "k3", "upsample"])
@pytest.mark.parametrize("shape", [(0, 3, 5, 4, 4), (2, 0, 5, 4, 4), (2, 3, 0, 4, 4)], ids=str)
def test_empty(shape, op, backend, device):
    x, w, b, *_ = (t.requires_grad_() for t in make(op, shape, device))
    y = op.ours(backend)(x, w, b)
    assert torch.equal(y, b.reshape(-1, 1, 1).expand_as(y))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(w.grad, torch.zeros_like(w))


@on_triton
def test_folded_weight_follows_the_weight(backend, device):
    """Whoever writes to it, in whichever way."""
    op = OPS["upsample"]
    x, w, b = make(op, (1, 3, 4, 2, 3), device)
    for change in (lambda: w.mul_(2), lambda: w.data.add_(1), lambda: w.detach().zero_()):
        change()
        assert relative_error(op.ours(backend)(x, w, b), op.plain()(*(t.double() for t in (x, w, b)))) <= 1e-6


@on_triton
def test_autocast(backend, device):
    for op in (OPS["k4"], OPS["upsample"]):
        tensors = make(op, (1, 4, 5, 3, 3), device)[:3]
        with torch.autocast(device, torch.bfloat16):
            y = op.ours(backend)(*tensors)
        assert torch.equal(y, op.ours(backend)(*(t.bfloat16() for t in tensors)))


X, W4, W3 = torch.zeros(2, 3, 4, 5), torch.zeros(3, 6, 4, 4), torch.zeros(6, 3, 3, 3)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("conv_transpose2d", (X, W4[..., 1:], None, [0, 0], None, None, "linear"), "the kernel must be 3x3 or 4x4"),
        ("conv_transpose2d", (X, W4, None, [0, 2], None, None, "linear"), "output_padding must be smaller than stride"),
        ("conv_transpose2d", (X, W4, None, [-1, 0], None, None, "linear"), "output_padding must be at least 0"),
        ("conv_transpose2d_backward_input", (torch.zeros(2, 5, 8, 10), W4, [0, 0]), "grad must have shape (B, 6, OH"),
        (
            "conv_transpose2d_backward_input",
            (torch.zeros(2, 6, 7, 10), W4, [0, 0]),
            "grad of shape (2, 6, 7, 10) is no",
        ),
        ("conv_transpose2d_backward_weight", (torch.zeros(2, 6, 7, 10), X, 4, [0, 0]), "grad must have shape (2, Cout"),
        ("upsample_conv2d", (X, W4, None, "linear"), "weight must have shape (3, 3, 3, 3) to match x"),
        ("upsample_conv2d_backward_input", (torch.zeros(2, 6, 7, 10), W3), "grad must have shape (B, 6, 2H, 2W)"),
        ("upsample_conv2d_backward_weight", (torch.zeros(2, 6, 7, 10), X), "grad must have shape (2, Cout, 8, 10)"),
    ],
)
def test_operator_errors(name, arguments, message):
    """In the words of the compiled operator."""
    check_error(ValueError, f"{name}: {message}", lambda: _library.op(f"{name}_triton")(*arguments))
    if _library.load_error is None:
        check_error(RuntimeError, f"{name}: {message}", lambda: _library.op(name)(*arguments))


def triton_variant(
    tile, dtype="bf16", *, channels_innermost=True, gradient=False, kernel=4, activation="silu", lots=False
):
    """How the host side launches the kernel; it is upsample_conv2d that asks for lots, without scale and shift."""
    element, strides = f"*{dtype}", ["i32"] * 4
    tensors = ("x", "weight", "y", "bias", *(() if lots else ("scale", "shift")))
    signature = dict.fromkeys(tensors, element) | dict.fromkeys(("B", "C", "N", "H", "W", "out_h", "out_w"), "i32")
    signature["alpha"] = "fp32"
    if lots:
        signature["lots"] = "*fp64" if dtype == "fp64" else "*fp32"
    constants = {"GRADIENT": gradient, "KERNEL": kernel, "ACT": activation, "FAR": False}
    constants |= {"PRECISION": "tf32x3" if dtype == "fp32" else "ieee"}
    constants |= {"scale": None, "shift": None} if lots else {"lots": None}
    constants |= {"BM": tile.pixels, "BN": tile.channels, "BK": tile.depth}
    divisible = [*tensors, "C", "N"]
    innermost = 1 if channels_innermost else 3
    for tensor, axis in {"x": innermost, "y": innermost, "weight": 0 if gradient else 1}.items():
        signature[f"{tensor}_strides"] = [*strides[:axis], "constexpr", *strides[axis + 1 :]]
        constants[f"{tensor}_strides.{axis}"] = 1
        divisible += [f"{tensor}_strides.{other}" for other in range(4) if other != axis]
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return {"signature": signature, "constants": constants, "divisible": divisible, "options": options}


def check_ahead_of_time(variants):
    """None spills, each multiplies by its architecture's own instruction, doubles by none, and fits: sm_80 for sm_86,
    sm_89 and sm_120, which have less."""
    shared = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
    name = "conv_transpose2d_kernel"
    all_builds = compile_kernel(f"imagegen.ops.triton.{name}", name, variants)
    for variant, builds in zip(variants, all_builds, strict=True):
        for build in builds:
            told = {k: v for k, v in build.items() if k != "loads"} | variant["constants"]
            print(told)
            assert build["spills"] == build["local"] == 0, f"spills: {told}"
            double = "*fp64" in variant["signature"].values()
            assert [*build["matrix"]] == ([] if double else [MATRIX[build["architecture"]]]), told
            assert build["shared"] <= shared[build["architecture"]] and build["tensor_memory"] <= 512, told


def test_triton_kernel_compiles_ahead_of_time():
    pytest.importorskip("triton", reason="triton is not installed")
    from imagegen.ops.triton.conv_transpose2d_kernel import tiles

    check_ahead_of_time([triton_variant(tiles(2, True)[0]), triton_variant(tiles(2, True)[0], lots=True)])


def test_a_spill_is_seen():
    """The sums alone would take 256 registers."""
    pytest.importorskip("triton", reason="triton is not installed")
    from imagegen.ops.triton.conv_transpose2d_kernel import Tile

    faulty = triton_variant(Tile(128, 64, 16, warps=1, stages=1), gradient=True, activation="linear")
    with pytest.raises(AssertionError, match="spills: "):
        check_ahead_of_time([faulty | {"architectures": [80]}])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("channels_innermost", [True, False], ids=["channels_last", "contiguous"])
def test_every_triton_tile(channels_innermost, dtype):
    pytest.importorskip("triton", reason="triton is not installed")
    from imagegen.ops.triton.conv_transpose2d_kernel import tiles

    size = {"bf16": 2, "fp32": 4, "fp64": 8}[dtype]
    for tile in tiles(size, channels_innermost):
        layout = {"channels_innermost": channels_innermost}
        check_ahead_of_time(
            [
                triton_variant(tile, dtype, **layout),
                triton_variant(tile, dtype, **layout, kernel=3, activation="gelu"),
                triton_variant(tile, dtype, **layout, lots=True),
                triton_variant(tile, dtype, **layout, gradient=True, activation="linear"),
            ]
        )


def simulated(op, x, w, b=None, scale=None, shift=None, activation="linear"):
    operator = simulator.load("conv_transpose2d").conv_transpose2d
    return operator(x, w, b, list(op.extra), scale, shift, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, layout",
    [
        ((1, 1, 1, 1, 1), "contiguous"),
        ((2, 24, 40, 9, 8), "contiguous"),
        ((2, 24, 40, 9, 8), "channels_last"),
        ((2, 37, 131, 3, 5), "channels_last_slice"),
    ],
)
@pytest.mark.parametrize("op", [op for op in OPS.values() if isinstance(op, Transposed)], ids=list(OPS)[:-1])
def test_cuda_kernel_in_the_simulator(op, shape, layout, dtype):
    tensors = make(op, shape, "cpu", dtype, layout)
    y = check(lambda *t: simulated(op, *t), op.plain(), *tensors, gradients=False)
    assert y.is_contiguous(memory_format=torch.channels_last if "channels_last" in layout else torch.contiguous_format)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cuda_epilogue_in_the_simulator(activation):
    op = OPS["k4"]
    x, w, *channels = make(op, (1, 8, 16, 3, 4), "cpu", torch.bfloat16, "channels_last")
    for given in (7, list(ACTIVATIONS).index(activation)):
        chosen = [t if given >> i & 1 else None for i, t in enumerate(channels)]
        chosen[1:] = [t if t is None else t.float() for t in chosen[1:]]
        exact = op.plain(activation)(*(t if t is None else t.double() for t in (x, w, *chosen)))
        assert relative_error(simulated(op, x, w, *chosen, activation), exact) <= 4e-3


def test_float32_is_rounded_to_tf32_where_torch_allows_it(tf32):
    op = OPS["k3"]
    x, w = make(op, (2, 24, 40, 5, 6), "cpu")[:2]
    assert 1e-4 < relative_error(simulated(op, x, w), op.plain()(x.double(), w.double())) < 1e-3


@pytest.mark.parametrize("allowed", [False, True])
def test_triton_asks_the_same_switch(allowed, request):
    """Triton's interpreter multiplies in full either way."""
    pytest.importorskip("triton", reason="triton is not installed")
    from imagegen.ops.triton.conv_transpose2d_kernel import _precision

    if allowed:
        request.getfixturevalue("tf32")
    x = torch.ones(1)
    assert [_precision(t) for t in (x, x.double(), x.half())] == ["tf32" if allowed else "tf32x3", "ieee", "ieee"]


def test_cuda_schedules_agree_to_the_bit(monkeypatch):
    """Whichever warp runs ahead and whenever a copy lands."""
    op, results = OPS["k3"], []
    tensors = make(op, (1, 136, 48, 7, 9), "cpu", torch.bfloat16, "channels_last")
    for order, landing in itertools.product(("forward", "reverse", "random"), ("late", "early")):
        monkeypatch.setenv("SIM_ORDER", order)
        monkeypatch.setenv("SIM_ASYNC", landing)
        results.append(simulated(op, *tensors, "silu"))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("extra", [(0, 0), (1, 0)], ids=str)
@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_that_cudnn_computes(layout, kernel, extra):
    """torch's convolutions in place of kernels on CUDA: on CPU tensors against eager, and on CUDA's tensors without
    values in the layouts that the fake kernels promise."""
    op = Transposed(kernel, extra)
    x, w = make(op, (2, 5, 6, 4, 3), "cpu", torch.float64, layout)[:2]
    grad = LAYOUTS[layout](torch.randn_like(op.plain()(x, w)))
    x, w = x.requires_grad_(), w.requires_grad_()
    expected = torch.autograd.grad(op.plain()(x, w), (x, w), grad)
    found = backward_input_cudnn(grad, w, list(extra)), backward_weight_cudnn(grad, x, kernel, list(extra))
    for ours, plain in zip(found, expected, strict=True):
        assert relative_error(ours, plain) <= 1e-12
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_grad, fake_w, fake_x = (torch.empty_strided(t.shape, t.stride(), device="cuda") for t in (grad, w, x))
        fakes = (
            torch.ops.imagegen.conv_transpose2d_backward_input(fake_grad, fake_w, list(extra)),
            torch.ops.imagegen.conv_transpose2d_backward_weight(fake_grad, fake_x, kernel, list(extra)),
        )
    for ours, fake in zip(found, fakes, strict=True):
        assert (ours.shape, ours.stride(), fake.device.type) == (fake.shape, fake.stride(), "cuda")


def test_what_the_cuda_kernel_does_not_take():
    message = "conv_transpose2d: the cuda kernel takes float32, bfloat16 or float16, x is torch.float64"
    with pytest.raises(RuntimeError, match=message):
        simulated(OPS["k4"], X.double(), W4.double())


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_sanitizers_find_nothing(sanitizer, dtype):
    kernel = simulator.ROOT / "csrc/ops/cuda/conv_transpose2d_kernel.cu"
    program = simulator.build_program([simulator.HERE / "conv_transpose2d_main.cpp", kernel], sanitizer)
    for channels in (40, 37):
        printed, said = simulator.run_program(program, dtype, channels, order="random")
        assert printed == "ran\n"
        assert simulator.found_nothing(said), said
