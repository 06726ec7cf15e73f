import numpy as np
import pytest
import torch
from cuda_sim import simulator
from helpers import DTYPES, LAYOUTS, backends, check, check_error, relative_error, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_ahead_of_time import compile_kernel

from imagegen import _library
from imagegen.ops import bias_act
from imagegen.ops._activation import ACTIVATIONS

BACKENDS = pytest.mark.parametrize("backend, device", backends("bias_act"))
ACTS = pytest.mark.parametrize("act", ACTIVATIONS)
needs_library = pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))


def tensors(shape, dtype=torch.float32, device="cpu", dim=1):
    return torch.randn(shape, device=device).to(dtype), torch.randn(shape[dim], device=device).to(dtype)


def compare(x, b, backend, **options):
    return check(
        lambda x, b: bias_act(x, b, backend=backend, **options),
        lambda x, b: bias_act(x, b, backend="eager", **options),
        x,
        b,
    )


@BACKENDS
@ACTS
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_output_and_gradients_match_float64(backend, device, act, dtype):
    compare(*tensors((3, 5, 7, 11), dtype, device), backend, act=act)


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(backend, device, layout, dtype):
    x, b = tensors((2, 3, 5, 8), dtype, device)
    x = LAYOUTS[layout](x)
    y = compare(x, b, backend, act="lrelu")
    assert y.stride() == torch.empty_like(x).stride()


@ACTS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_instruction_set(capability, act, layout):
    for dtype in DTYPES:
        for shape in ((2, 3, 5, 19), (1, 70, 3, 3)):
            x, b = tensors(shape, dtype)
            compare(LAYOUTS[layout](x), b, "cpu", act=act, clamp=1.5)


@BACKENDS
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_bias_along_any_axis(backend, device, dim):
    compare(*tensors((3, 4, 5), device=device, dim=dim), backend, dim=dim, act="silu")


@BACKENDS
@pytest.mark.parametrize(
    "options",
    [
        {"act": "lrelu", "alpha": 0.01},
        {"act": "lrelu", "alpha": -1.5},
        {"act": "gelu", "gain": 0.0},
        {"act": "tanh", "gain": -2.5},
        {"act": "relu", "clamp": 0.3},
        {"act": "linear", "clamp": 0.0},
        {"act": "sigmoid", "gain": 3, "clamp": 2},
    ],
)
def test_options(backend, device, options):
    compare(*tensors((2, 3, 9, 9), device=device), backend, **options)


@BACKENDS
def test_bias_may_be_a_view(backend, device):
    x, b = tensors((2, 6, 5), device=device)
    compare(x, torch.stack((b, b), 1)[:, 0], backend)
    compare(x, b[:1].expand(6), backend)
    check(lambda x: bias_act(x, backend=backend), lambda x: bias_act(x, backend="eager"), x)


@BACKENDS
@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (2, 0, 5), (5,), (64, 2, 1, 1), (1, 7, 1), (2, 1, 3, 1, 2, 1, 3, 2)])
def test_shapes(backend, device, shape):
    dim = 0 if len(shape) == 1 else 1
    x, b = tensors(shape, device=device, dim=dim)
    assert compare(x, b, backend, dim=dim, act="lrelu").shape == shape


@BACKENDS
@pytest.mark.parametrize("create_graph", [False, True])
def test_one_tensor_as_both(backend, device, create_graph):
    x = torch.randn(5, device=device, requires_grad=True)
    y = bias_act(x, x, dim=0, act="tanh", backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=create_graph)
    torch.testing.assert_close(grad, 2 * (1 - torch.tanh(2 * x) ** 2))


@needs_library
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_drawn_shapes_and_memory_orders(data):
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    order = data.draw(st.permutations(range(len(shape))))
    dim = data.draw(st.integers(0, len(shape) - 1))
    x = torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    assert list(x.shape) == shape
    # Not gelu: one element far below zero is a difference of nearly equal numbers, to eager as to us.
    compare(x, torch.randn(shape[dim]), "cpu", dim=dim, act=data.draw(st.sampled_from(["linear", "lrelu"])))


@needs_library
@pytest.mark.parametrize("channels", [1, 3, 511, 512, 513, 5000])
def test_short_and_long_channels_last_rows(channels, threads):
    x, b = tensors((2, channels, 300 if channels < 10 else 3, 41))
    compare(LAYOUTS["channels_last"](x), b, "cpu", act="lrelu")


@BACKENDS
def test_gradients_of_any_strides(backend, device):
    x, b = tensors((2, 3, 4, 8), device=device)
    for layout in LAYOUTS.values():
        grads = []
        for name in (backend, "eager"):
            leaves = x.clone().requires_grad_(), b.clone().requires_grad_()
            y = bias_act(*leaves, act="silu", backend=name)
            y.backward(layout(torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape)))
            grads.append([t.grad for t in leaves])
        assert all(relative_error(ours, theirs) < 1e-6 for ours, theirs in zip(*grads, strict=True))
    x.requires_grad_()
    bias_act(x, b, act="relu", gain=1, backend=backend).sum().backward()  # a gradient of strides 0
    assert torch.equal(x.grad, (x + b[:, None, None] > 0).float())


@BACKENDS
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradient_of_one_input_alone(backend, device, wanted, create_graph):
    leaves = [t.requires_grad_(w) for t, w in zip(tensors((2, 3, 4), device=device), wanted, strict=True)]
    wrt = leaves[0] if wanted[0] else leaves[1]
    ours, theirs = (
        torch.autograd.grad(bias_act(*leaves, act="gelu", backend=name).square().sum(), wrt, create_graph=create_graph)
        for name in (backend, "eager")
    )
    assert relative_error(ours[0], theirs[0]) < 1e-6


@BACKENDS
@ACTS
def test_gradcheck_to_the_second_order(backend, device, act):
    x, b = (t.requires_grad_() for t in tensors((2, 3, 2, 2), torch.float64, device))

    def function(x, b):
        return bias_act(x, b, act=act, clamp=1.0, backend=backend)

    assert torch.autograd.gradcheck(function, (x, b))
    assert torch.autograd.gradgradcheck(function, (x, b))


@BACKENDS
def test_penalty_on_the_gradient(backend, device):
    """What GANs do: the squared gradient in x is itself part of the loss."""
    grads = []
    for name in (backend, "eager"):
        x, b = (t.requires_grad_() for t in tensors((2, 3, 4), torch.float64, device))
        with torch.no_grad():
            x.copy_(torch.linspace(-2, 2, x.numel(), device=device).reshape(x.shape))
            b.fill_(0.3)
        (dx,) = torch.autograd.grad(bias_act(x, b, act="silu", backend=name).square().sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(dx.square().sum(), (x, b)))
    assert all(relative_error(ours, theirs) < 1e-12 for ours, theirs in zip(*grads, strict=True))


@BACKENDS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_opcheck(backend, device, layout):
    twin = "_triton" if backend == "triton" else ""
    for dtype in (torch.float32, torch.bfloat16):
        x, b = tensors((2, 3, 4, 5), dtype, device)
        x = LAYOUTS[layout](x)
        options = (1, "lrelu", 0.2, 1.5, 1.0)
        torch.library.opcheck(_library.op(f"bias_act{twin}"), (x.requires_grad_(), b.requires_grad_(), *options))
        torch.library.opcheck(_library.op(f"bias_act{twin}"), (x, None, *options))
        with torch.no_grad():
            x, b = x.detach(), b.detach()
            torch.library.opcheck(_library.op(f"bias_act_backward{twin}"), (torch.randn_like(x), x, b, *options))


@needs_library
def test_compiles_as_one_graph_with_dynamic_shapes():
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x, b):
        return bias_act(x * 2, b, act="lrelu", clamp=2.0) + 1

    for shape in ((2, 3, 4, 5), (3, 5, 2, 7)):
        grads = []
        leaves = [t.requires_grad_() for t in tensors(shape)]
        for y in (compiled(*leaves), bias_act(leaves[0] * 2, leaves[1], act="lrelu", clamp=2.0, backend="eager") + 1):
            grads.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        assert all(relative_error(ours, theirs) < 1e-6 for ours, theirs in zip(*grads, strict=True))


@BACKENDS
def test_autocast_casts_the_bias(backend, device):
    x, b = tensors((2, 3, 4), device=device)
    with torch.autocast(device, torch.bfloat16):
        y = bias_act(x.bfloat16(), b, backend=backend)
        assert bias_act(x, b, backend=backend).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert relative_error(y, x + b[:, None]) < tolerance(torch.bfloat16, size=1)


@BACKENDS
@ACTS
def test_nan_propagates(backend, device, act):
    x = torch.zeros(40, device=device)
    x[[3, 33]] = float("nan")
    y = bias_act(x, dim=0, act=act, clamp=1.0, backend=backend)
    assert torch.equal(y.isnan(), x.isnan())


@needs_library
@ACTS
def test_same_bits_on_any_number_of_threads(act):
    x, b = tensors((3, 8, 65, 127))
    results, before = [], torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(bias_act(x, b, act=act, backend="cpu"))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@BACKENDS
def test_strides_beyond_32_bits(backend, device, monkeypatch):
    """Rows 2^31 elements apart, in memory the system hands out only where it is touched."""
    step = 2**31 + 7
    if device == "cuda":
        memory = torch.empty(step + 8, dtype=torch.bfloat16, device=device)
    else:
        memory = torch.from_numpy(np.empty(step + 8, np.uint16)).view(torch.bfloat16)
    x = memory.as_strided((2, 4), (step, 2)).copy_(torch.arange(8.0).reshape(2, 4))
    assert bias_act(x, torch.ones(4, dtype=x.dtype, device=device), backend=backend).tolist() == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
    ]


X, B = torch.zeros(2, 3, 4), torch.zeros(3)
BAD_CALLS = [
    (TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64", X.long(), None, {}),
    (TypeError, "x must be float32, bfloat16, float16 or float64, got torch.bool", X.bool(), None, {}),
    (TypeError, "b must have x's dtype torch.float32, got torch.bfloat16", X, B.bfloat16(), {}),
    (ValueError, "b must have shape (3,) to match x (2, 3, 4), got (4,)", X, torch.zeros(4), {}),
    (ValueError, "b must have shape (3,) to match x (2, 3, 4), got (3, 1)", X, B[:, None], {}),
    (ValueError, "dim must be an axis of x (2, 3, 4), got 3", X, B, {"dim": 3}),
    (ValueError, "dim must be an axis of x (2, 3, 4), got -4", X, B, {"dim": -4}),
    (ValueError, "dim must be an axis of x (), got 0", X.sum(), None, {"dim": 0}),
    (ValueError, "x must have at most 8 dimensions, got 9", torch.zeros([1] * 9), None, {}),
    (ValueError, f"act must be one of {', '.join(ACTIVATIONS)}, got 'swish'", X, B, {"act": "swish"}),
    (ValueError, "clamp must be at least 0, got -1", X, B, {"clamp": -1}),
    (ValueError, "clamp must be at least 0, got nan", X, B, {"clamp": float("nan")}),
]
bad_call = pytest.mark.parametrize("error, message, x, b, options", BAD_CALLS, ids=[call[1] for call in BAD_CALLS])


def positional(dim=1, act="linear", clamp=None):
    """The options as the operators take them."""
    return dim, act, 0.2, 1.0, clamp


@bad_call
def test_errors(error, message, x, b, options):
    check_error(
        error,
        f"bias_act: {message}",
        lambda: bias_act(x, b, **options),
        lambda: _library.op("bias_act")(x, b, *positional(**options)),
    )
    check_error(error, f"bias_act: {message}", lambda: _library.op("bias_act_triton")(x, b, *positional(**options)))


def test_gradient_of_another_shape_is_refused():
    x = torch.zeros(2, 3)
    for name in ("bias_act_backward", "bias_act_backward_triton"):
        if operator := _library.op(name):
            for grad, message in (
                (torch.zeros(3, 2), "grad must have shape (2, 3) to match x (2, 3), got (3, 2)"),
                (torch.zeros(2, 3, dtype=torch.float16), "grad must have x's dtype torch.float32, got torch.float16"),
            ):
                with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
                    operator(grad, x, None, 1, "relu", 0.2, 1.0, None)
                assert f"bias_act: {message}" in str(caught.value)


def test_argument_that_is_no_tensor():
    with pytest.raises(TypeError, match="bias_act: x must be a tensor, got list"):
        bias_act([1.0])
    with pytest.raises(TypeError, match="bias_act: b must be a tensor, got float"):
        bias_act(torch.zeros(2, 3), 1.0)


class Simulated(torch.autograd.Function):
    """The CUDA operators as the simulator runs them."""

    @staticmethod
    def forward(ctx, x, b, *options):
        ctx.save_for_backward(x, b)
        ctx.options = options
        return simulator.load("bias_act").bias_act(x, b, *options)

    @staticmethod
    def backward(ctx, grad):
        x, b = ctx.saved_tensors
        dx = simulator.load("bias_act").bias_act_backward(grad, x, b, *ctx.options)
        others = [d for d in range(x.dim()) if d != ctx.options[0]]
        return dx, dx.sum(others), *(None for _ in ctx.options)


@ACTS
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_cuda_kernel_in_the_simulator(act, dtype):
    for layout in LAYOUTS.values():
        for shape in ((2, 3, 5, 7), (1, 16, 2, 8)):
            x, b = tensors(shape, dtype)
            options = (1, act, 0.2, 1.5, 1.0)
            check(
                lambda x, b: Simulated.apply(x, b, *options),  # noqa: B023
                lambda x, b: bias_act(x, b, act=act, gain=1.5, clamp=1.0, backend="eager"),
                layout(x),
                b,
            )


def test_cuda_kernel_in_the_simulator_at_odd_places():
    operator = simulator.load("bias_act").bias_act
    memory = torch.randn(4000)
    for shape in ((3, 5, 67), (1,), (0, 3), (2, 1, 1)):
        n = int(np.prod(shape))
        for first in (0, 1, 4):  # 16-byte loads need a first element at a multiple of 16 bytes
            x = memory[first : first + n].reshape(shape)
            dim = len(shape) - 1
            b = torch.randn(shape[dim])
            assert relative_error(operator(x, b, dim, "linear", 0.2, 1.0, None), x.double() + b) < 1e-7
            assert torch.equal(operator(x, None, dim, "linear", 0.2, 1.0, None), x)
    x = LAYOUTS["channels_last"](torch.randn(2, 3, 9, 9))
    assert operator(x, None, 1, "linear", 0.2, 1.0, None).stride() == x.stride()


@bad_call
def test_cuda_operator_in_the_simulator_refuses_the_same(error, message, x, b, options):
    with pytest.raises(RuntimeError) as caught:
        simulator.load("bias_act").bias_act(x, b, *positional(**options))
    assert f"bias_act: {message}" in str(caught.value)


def triton_variant(act, dtype, *, backward=False, dense=True):
    tensors = ["x", "b", "y", *(["grad"] if backward else [])]
    variant = {
        "signature": dict.fromkeys(tensors, f"*{dtype}")
        | dict.fromkeys(("size", "channels", "inner", "b_stride"), "i32")
        | dict.fromkeys(("alpha", "gain", "clamp"), "fp64"),
        "constants": {"ACT": act, "BLOCK": 1024 if dense else 256},
        "divisible": ["x", "y", "size", *(["grad"] if backward else [])],
    }
    strided = ["sizes", "x_strides", *(["grad_strides"] if backward else [])]
    if not dense:
        variant["signature"] |= {name: ["i32"] * 4 for name in strided}
    absent = {"grad", "sizes", "x_strides", "grad_strides"} - variant["signature"].keys()
    variant["constants"] |= dict.fromkeys(absent)
    return variant


def test_triton_kernel_compiles_ahead_of_time():
    pytest.importorskip("triton", reason="triton is not installed")
    variants = [
        triton_variant("lrelu", "fp32"),
        triton_variant("gelu", "bf16", backward=True),
        triton_variant("tanh", "fp16", backward=True),
        triton_variant("silu", "bf16", dense=False),
        triton_variant("sigmoid", "fp32", backward=True, dense=False),
    ]
    for variant, builds in zip(
        variants, compile_kernel("imagegen.ops.triton.bias_act_kernel", "bias_act_kernel", variants), strict=True
    ):
        for build in builds:
            print(variant["constants"]["ACT"], build)
            assert build["stack"] == build["local"] == 0, "spills"
            assert build["registers"] <= 64
            if variant["constants"]["BLOCK"] == 1024:
                assert any(load.startswith("v4") for load in build["loads"]), "16-byte loads"
