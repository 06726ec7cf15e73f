import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, check, check_error

from imagegen import ops
from imagegen.ops import eager
from imagegen.ops._activation import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings("ignore:conv_transpose2d runs in eager PyTorch")

# (B, C, Cout, H, W): size 1, primes, powers of two and their neighbours, either side of few channels, panels and pairs.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 19, 35, 5, 7),
    (3, 3, 3, 8, 8),
    (1, 2, 90, 1, 13),
    (2, 33, 17, 31, 29),
    (1, 31, 4, 6, 140),
    (2, 65, 5, 3, 2),
    (1, 130, 64, 15, 17),
]
# Kernel, stride, padding, output padding.
K4, K3 = ((4, 4), (2, 2), (1, 1), (0, 0)), ((3, 3), (2, 2), (1, 1), (1, 1))
OTHERS = {
    "generator's first": ((4, 4), (1, 1), (0, 0), (0, 0)),
    "stride 3": ((5, 5), (3, 3), (2, 2), (2, 2)),
    "no padding": ((2, 2), (2, 2), (0, 0), (0, 0)),
    "uneven": ((3, 4), (2, 1), (1, 0), (1, 0)),
    "rows of k4": ((4, 4), (2, 2), (1, 0), (0, 0)),
}
GEOMETRIES = {"k4": K4, "k3": K3, **OTHERS}


def make(shape, geometry=K4, dtype=torch.float32, layout="contiguous"):
    """x, weight, bias, scale and shift."""
    b, cin, cout, h, w = shape
    x = LAYOUTS[layout](torch.randn(b, cin, h, w).to(dtype))
    weight = torch.randn(cin, cout, *geometry[0]) / (2 * cin**0.5)
    return x, weight.to(dtype), *(t.to(dtype) for t in (torch.randn(cout), torch.rand(cout) + 0.5, torch.randn(cout)))


def plain(geometry=K4, activation="linear"):
    return lambda x, w, b=None, scale=None, shift=None: eager.conv_transpose2d(
        x, w, b, *geometry[1:], scale, shift, activation
    )


def ours(geometry=K4, activation="linear", backend=None):
    _, stride, padding, output_padding = geometry
    return lambda x, w, b=None, scale=None, shift=None: ops.conv_transpose2d(
        x,
        w,
        b,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        scale=scale,
        shift=shift,
        activation=activation,
        backend=backend,
    )


@pytest.mark.parametrize("name", GEOMETRIES)
def test_eager_is_what_torch_computes(name):
    geometry = GEOMETRIES[name]
    x, w, b, scale, shift = make((2, 3, 5, 4, 6), geometry, torch.float64)
    expected = F.conv_transpose2d(x, w, b, *geometry[1:]) * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(plain(geometry, "relu")(x, w, b, scale, shift), expected.relu())


def test_eager_is_the_definition():
    """Every pixel of x adds the weight, times its value, to the output around it."""
    x, w, *_ = make((1, 2, 3, 3, 4), dtype=torch.float64)
    full = torch.zeros(1, 3, 2 * 3 + 2, 2 * 4 + 2, dtype=torch.float64)
    for i in range(3):
        for j in range(4):
            full[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += torch.einsum("bc,cokl->bokl", x[:, :, i, j], w)
    torch.testing.assert_close(plain()(x, w), full[:, :, 1:-1, 1:-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_output_and_gradients(name, dtype):
    geometry = GEOMETRIES[name]
    check(ours(geometry), plain(geometry), *make((2, 19, 35, 5, 7), geometry, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 35, 34, 5, 9), (2, 20, 3, 7, 6)], ids=str)
def test_layouts(layout, shape):
    x, w, *channels = make(shape, layout=layout)
    y = check(ours(), plain(), x, w, *channels)
    assert y.is_contiguous(memory_format=torch.channels_last if "channels_last" in layout else torch.contiguous_format)
    check(ours(), plain(), x, LAYOUTS[layout](w), *(LAYOUTS[layout](t) for t in channels))


@pytest.mark.parametrize("given", range(8))
def test_every_choice_of_bias_scale_and_shift(given):
    x, w, *channels = make((2, 7, 6, 5, 5))
    channels = [t if given >> i & 1 else None for i, t in enumerate(channels)]
    check(ours(activation="silu"), plain(activation="silu"), x, w, *channels)


def test_scale_and_shift_in_float32_beside_half_precision():
    x, w, b, _, _ = make((2, 32, 20, 5, 5), dtype=torch.bfloat16)
    scale, shift = torch.rand(20) + 0.5, torch.randn(20)
    assert check(ours(), plain(), x, w, b, scale, shift).dtype == torch.bfloat16


def test_integers_and_pairs():
    x, w, *_ = make((1, 3, 4, 5, 5))
    y = ops.conv_transpose2d(x, w)
    assert torch.equal(y, ops.conv_transpose2d(x, w, stride=(2, 2), padding=[1, 1], output_padding=0))
    assert y.shape == (1, 4, 10, 10)


EMPTY = [(0, 3, 5, 4, 4), (2, 0, 5, 4, 4), (2, 3, 0, 4, 4), (2, 3, 5, 0, 4)]


@pytest.mark.parametrize("name", ["k4", "k3", "stride 3"])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, name):
    kernel, *geometry = GEOMETRIES[name]
    b, cin, cout, h, w = shape
    x = torch.randn(b, cin, h, w, requires_grad=True)
    weight, bias = torch.randn(cin, cout, *kernel, requires_grad=True), torch.randn(cout)
    y = ours((kernel, *geometry))(x, weight, bias)
    sizes = [(n - 1) * s - 2 * p + k + e for n, k, s, p, e in zip((h, w), kernel, *geometry, strict=True)]
    assert y.shape == (b, cout, *sizes)
    assert torch.equal(y, bias.reshape(-1, 1, 1).expand_as(y))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile(layout):
    torch._dynamo.reset()
    compiled = torch.compile(ours(activation="silu"), fullgraph=True, dynamic=True)
    for shape in ((2, 6, 7, 4, 5), (3, 6, 7, 6, 9)):
        check(compiled, plain(activation="silu"), *make(shape, layout=layout))


# ---- errors

X, W, B = torch.zeros(2, 3, 4, 5), torch.zeros(3, 6, 4, 4), torch.zeros(6)
TENSOR_ERRORS = {
    "x dtype": (TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64", (X.long(), W, B)),
    "x rank": (ValueError, "x must have shape (B, C, H, W), got (3, 4, 5)", (X[0], W, B)),
    "weight dtype": (TypeError, "weight must have x's dtype torch.float32, got torch.float64", (X, W.double(), B)),
    "weight rank": (ValueError, "weight must have shape (C, Cout, kH, kW), got (3, 96)", (X, W.reshape(3, 96), B)),
    "weight kernel": (
        ValueError,
        "weight must have shape (C, Cout, kH, kW), got (3, 6, 4, 0)",
        (X, torch.zeros(3, 6, 4, 0), B),
    ),
    "weight channels": (
        ValueError,
        "weight must have shape (3, 6, 4, 4) to match x (2, 3, 4, 5), got (4, 6, 4, 4)",
        (X, torch.zeros(4, 6, 4, 4), B),
    ),
    "weight device": (ValueError, "weight must be on x's device cpu, got meta", (X, W.to("meta"), B)),
    "weight type": (TypeError, "weight must be a tensor, got int", (X, 1, B)),
    "bias dtype": (TypeError, "bias must have x's dtype torch.float32, got torch.float16", (X, W, B.half())),
    "bias shape": (ValueError, "bias must have shape (6,) to match weight (3, 6, 4, 4), got (5,)", (X, W, B[1:])),
    "scale dtype": (
        TypeError,
        "scale must have x's dtype torch.float64 or torch.float32, got torch.float16",
        (X.double(), W.double(), None, B.half()),
    ),
    "scale shape": (
        ValueError,
        "scale must have shape (6,) to match weight (3, 6, 4, 4), got (2, 6)",
        (X, W, None, torch.zeros(2, 6)),
    ),
    "shift shape": (
        ValueError,
        "shift must have shape (6,) to match weight (3, 6, 4, 4), got (5,)",
        (X, W, None, None, B[1:]),
    ),
}


@pytest.mark.parametrize("name", TENSOR_ERRORS)
def test_tensor_errors(name):
    error, message, args = TENSOR_ERRORS[name]
    check_error(error, f"conv_transpose2d: {message}", lambda: ours()(*args))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "stride must be an integer or a pair of integers, got 2.0", {"stride": 2.0}),
        (TypeError, "padding must be an integer or a pair of integers, got (1, 1, 1)", {"padding": (1, 1, 1)}),
        (ValueError, "stride must be at least 1, got (0, 2)", {"stride": (0, 2)}),
        (ValueError, "padding must be at least 0, got -1", {"padding": -1}),
        (ValueError, "output_padding must be smaller than stride (2, 2), got (2, 2)", {"output_padding": 2}),
        (
            ValueError,
            "padding must leave something of x (2, 3, 4, 5) under weight (3, 6, 4, 4), got (6, 6)",
            {"padding": 6},
        ),
        (
            ValueError,
            "activation must be one of linear, relu, lrelu, silu, gelu, tanh, sigmoid, got 'swish'",
            {"activation": "swish"},
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_option_errors(error, message, options):
    check_error(error, f"conv_transpose2d: {message}", lambda: ops.conv_transpose2d(X, W, **options))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check(ours(activation=activation), plain(activation=activation), *make((2, 9, 18, 5, 6)))
