import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, check, check_error, relative_error, tells, tolerance

from imagegen import _library, ops, weight_cache
from imagegen.ops import eager
from imagegen.ops._activation import ACTIVATIONS

pytestmark = pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
native = torch.ops.imagegen
WINOGRAD = 2e-5  # the bound of the numeric contract; 1e-6 to 4e-6 is what it takes

# (B, C, Cout, H, W): size 1, primes, powers of two and their neighbours; either side of few channels, of panels and of
# pairs; images of either algorithm's tiles, and less than one of them; of few channels, more rows and columns than are
# staged at a time, rows of one vector and of a part of one, odd rows joined; to half a vector of channels, even rows
# and odd.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 19, 35, 5, 7),
    (3, 3, 3, 8, 8),
    (1, 2, 90, 1, 13),
    (2, 33, 17, 31, 29),
    (1, 31, 4, 6, 140),
    (2, 65, 5, 3, 2),
    (1, 130, 64, 15, 17),
    (5, 40, 40, 2, 2),
    (2, 7, 37, 9, 107),
    (2, 3, 70, 19, 40),
    (1, 4, 33, 5, 150),
    (1, 6, 5, 3, 270),
    (2, 8, 18, 6, 10),
    (3, 1, 19, 7, 16),
    (2, 12, 8, 5, 37),
    (1, 8, 7, 6, 34),
    (2, 3, 34, 9, 65),
    (1, 3, 5, 11, 6),
    (1, 600, 2, 9, 7),
    (2, 21, 1, 30, 45),
]


def make(shape, dtype=torch.float32, layout="contiguous"):
    """x, weight, bias, residual, scale and shift."""
    b, cin, cout, h, w = shape
    x, residual = (LAYOUTS[layout](torch.randn(b, c, h, w).to(dtype)) for c in (cin, cout))
    weight = (torch.randn(cout, cin, 3, 3) / (3 * cin**0.5)).to(dtype)
    factors = torch.randn(2, b, cin, dtype=torch.promote_types(dtype, torch.float32))
    return x, weight, torch.randn(cout).to(dtype), residual, *factors


def plain(input_activation="linear", activation="linear"):
    return lambda x, w, b=None, r=None, s=None, t=None: eager.conv2d(x, w, b, r, s, t, input_activation, activation)


def ours(input_activation="linear", activation="linear", backend="cpu"):
    return lambda x, w, b=None, r=None, s=None, t=None: ops.conv2d(
        x,
        w,
        b,
        residual=r,
        scale=s,
        shift=t,
        input_activation=input_activation,
        activation=activation,
        backend=backend,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, dtype, capability):
    check(ours(), plain(), *make(shape, dtype)[:3], fp32=WINOGRAD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_fused(shape, layout, dtype, capability):
    check(ours("silu", "relu"), plain("silu", "relu"), *make(shape, dtype, layout), fp32=WINOGRAD, gradients=False)


@pytest.mark.parametrize("shape", [(2, 3, 7, 5, 6), (2, 5, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_few_channels_in_double(layout, shape):
    check(ours("silu", "relu"), plain("silu", "relu"), *make(shape, torch.float64, layout))


def test_gradients_of_all(capability):
    check(ours("silu", "gelu"), plain("silu", "gelu"), *make((2, 21, 36, 9, 6)), fp32=WINOGRAD)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 35, 34, 5, 9), (2, 20, 3, 7, 6), (2, 5, 34, 9, 9), (2, 3, 34, 9, 20)], ids=str)
def test_layouts(layout, shape, capability):
    x, w, b, r, s, t = make(shape, layout=layout)
    y = check(ours(), plain(), x, w, b, fp32=WINOGRAD)
    assert y.is_contiguous(memory_format=torch.channels_last if "channels_last" in layout else torch.contiguous_format)
    put = LAYOUTS[layout]
    check(ours("silu"), plain("silu"), x, put(w), put(b), r, put(s), put(t), fp32=WINOGRAD, gradients=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_of_another_layout(layout):
    x, w, b, r, _, _ = make((2, 20, 34, 5, 9))
    y = ops.conv2d(x, w, b, residual=LAYOUTS[layout](r))
    assert torch.equal(y, ops.conv2d(x, w, b, residual=r))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_layouts(layout):
    x, w, _, grad, _, _ = make((2, 35, 34, 5, 9))
    put = LAYOUTS[layout]
    assert torch.equal(native.conv2d_backward_input(put(grad), w), native.conv2d_backward_input(grad, w))
    assert torch.equal(native.conv2d_backward_weight(put(grad), x), native.conv2d_backward_weight(grad, x))


# Above 6 MB, whole lines go past the caches: all of them, or those that happen to lie on a line.
@pytest.mark.parametrize("shape", [(1, 4, 96, 132, 128), (1, 3, 101, 134, 126)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_outputs(layout, shape, capability):
    x, w, b, *_ = make(shape, layout=layout)
    y = ops.conv2d(x, w, b, activation="relu")
    assert relative_error(y, F.conv2d(x.double(), w.double(), b.double(), padding=1).relu()) < WINOGRAD


# 612 tiles in three blocks; each thread takes two or four groups of rows at a time, of six.
def test_weight_gradient_in_blocks(capability):
    x, w, _, grad, _, _ = make((2, 70, 66, 66, 70))
    gradients = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        gradients.append(native.conv2d_backward_weight(grad, x))
    double = w.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(x.double(), double, padding=1), double, grad.double())
    assert torch.equal(*gradients) and relative_error(gradients[0], expected) < WINOGRAD


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("cin, cout", [(9, 3), (3, 18), (9, 18)])
def test_activations(activation, cin, cout, capability):
    tensors = make((2, cin, cout, 5, 6))
    for pair in (activation, "linear"), ("linear", activation):
        check(ours(*pair), plain(*pair), *tensors[:3], fp32=WINOGRAD, gradients=False)


def test_factors_in_half_precision():
    x, w, b, _, s, t = make((2, 20, 18, 6, 6), torch.bfloat16)
    y = ops.conv2d(x, w, b, scale=s.bfloat16(), shift=t.bfloat16())
    assert torch.equal(y, ops.conv2d(x, w, b, scale=s.bfloat16().float(), shift=t.bfloat16().float()))


@pytest.mark.parametrize("cin", [3, 5, 17])
def test_zero_padding_is_not_mapped(cin):
    # Every activation of 0 * scale + 7 is far from 0: were the border mapped like the image, the corners would show it.
    x, w, b, _, s, t = make((1, cin, 20, 6, 6))
    for layout in "contiguous", "channels_last":
        tensors = LAYOUTS[layout](x), w, b, None, s, t * 0 + 7
        check(ours("sigmoid"), plain("sigmoid"), *tensors, fp32=WINOGRAD, gradients=False)


@pytest.mark.parametrize("needed", range(6))
@pytest.mark.parametrize("pair", [("linear", "linear"), ("silu", "relu")], ids=str)
def test_single_gradients(needed, pair):
    tensors = [t.requires_grad_(i == needed) for i, t in enumerate(make((1, 5, 6, 4, 3)))]
    ours(*pair)(*tensors).sum().backward()
    twins = [t.detach().double().requires_grad_(i == needed) for i, t in enumerate(tensors)]
    plain(*pair)(*twins).sum().backward()
    for t, twin in zip(tensors, twins, strict=True):
        assert (t.grad is None) == (twin.grad is None)
        assert t.grad is None or relative_error(t.grad, twin.grad) <= WINOGRAD


@pytest.mark.parametrize("shape", [(0, 3, 5, 4, 4), (2, 0, 5, 4, 4), (2, 3, 0, 4, 4), (2, 3, 5, 0, 4)], ids=str)
def test_empty(shape):
    b, cin, cout, h, w = shape
    x, weight = torch.randn(b, cin, h, w, requires_grad=True), torch.randn(cout, cin, 3, 3, requires_grad=True)
    bias = torch.randn(cout)
    y = ops.conv2d(x, weight, bias)
    assert y.shape == (b, cout, h, w)
    assert torch.equal(y, bias.reshape(-1, 1, 1).expand_as(y))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_at_the_size_models_use(dtype):
    check(ours(), plain(), *make((1, 192, 160, 16, 16), dtype)[:3], fp32=5e-6)


def test_more_than_two_to_the_31_elements():
    # numpy's memory is neither touched nor poisoned before we write to it: 4 GB of addresses, a few kB of memory.
    big = torch.from_numpy(np.empty(2**31 + 64, np.float16))
    x = big.as_strided((2, 3, 4, 4), (2**31 + 16, 16, 4, 1))  # the second image begins beyond 2^31
    x.copy_(torch.randn(2, 3, 4, 4))
    w, b, grad = torch.randn(5, 3, 3, 3).half(), torch.randn(5).half(), torch.randn(2, 5, 4, 4).half()
    assert torch.equal(ops.conv2d(x, w, b), ops.conv2d(x.clone(), w, b))
    assert torch.equal(ops.conv2d(x, w[:3], b[:3]), ops.conv2d(x.clone(), w[:3], b[:3]))
    assert torch.equal(native.conv2d_backward_weight(grad, x), native.conv2d_backward_weight(grad, x.clone()))


@pytest.mark.parametrize("cin, cout", [(40, 3), (3, 40), (40, 20)])
def test_bit_identical_for_any_number_of_threads(cin, cout):
    x, w, b, r, s, t = make((2, cin, cout, 33, 31))
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        y = native.conv2d(x, w, b, r, s, t, "silu", "relu")
        results.append((y, native.conv2d_backward_input(r, w), native.conv2d_backward_weight(r, x)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("cin, cout", [(20, 18), (20, 3), (3, 20)])
def test_image_of_a_batch_is_the_image_alone(cin, cout):
    x, w, b, *_ = make((3, cin, cout, 9, 7))  # a size where all tiles together would suit the other algorithm
    y = ops.conv2d(x, w, b)
    for i in range(3):
        assert torch.equal(y[i : i + 1], ops.conv2d(x[i : i + 1], w, b))


def test_shift_equivariance():
    x, w, b, *_ = make((1, 8, 9, 16, 16))
    moved = torch.roll(x, (1, 2), (2, 3))
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    y, y_moved = ops.conv2d(x, w, b), ops.conv2d(moved, w, b)
    assert relative_error(torch.roll(y, (1, 2), (2, 3))[inner], y_moved[inner]) <= 1e-5


def test_weight_is_watched():
    x, w, b, *_ = make((1, 20, 36, 9, 9))
    for _ in range(2):
        assert relative_error(ops.conv2d(x, w, b), plain()(x.double(), w.double(), b.double())) <= WINOGRAD
        w.data[0, 0, 0, 0] += 1


def test_algorithms_and_directions_share_no_weight():
    # One square weight serves both directions and, with a small image, both algorithms.
    w = torch.randn(24, 24, 3, 3) / 15
    for size in (12, 2, 12, 2):
        x = torch.randn(1, 24, size, size)
        assert relative_error(ops.conv2d(x, w), plain()(x.double(), w.double())) <= WINOGRAD
        exact = torch.nn.grad.conv2d_input(x.shape, w.double(), x.double(), padding=1)
        assert relative_error(native.conv2d_backward_input(x, w), exact) <= WINOGRAD


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 70, 70, 13, 13))),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, layout, dtype):
    hypothesis.assume(tells(dtype, shape))
    # Smooth: ReLU's gradient jumps where half precision rounds to the other side of 0, and then luck decides.
    check(ours("silu"), plain("silu"), *make(shape, dtype, layout), fp32=WINOGRAD)


def test_opcheck():
    for layout in "contiguous", "channels_last":
        x, w, b, r, s, t = (v.requires_grad_() for v in make((2, 3, 6, 4, 5), layout=layout))
        torch.library.opcheck(native.conv2d_plain, (x, w, b))
        torch.library.opcheck(native.conv2d_plain, (x, w, None))
        torch.library.opcheck(native.conv2d, (x, w, b, None, None, None, "linear", "linear"))
        torch.library.opcheck(native.conv2d, (x, w, None, r, s, t, "silu", "relu"))
        torch.library.opcheck(native.conv2d_backward_input, (r, w))
        torch.library.opcheck(native.conv2d_backward_weight, (r, x))


@pytest.mark.parametrize("pair", [("linear", "linear"), ("silu", "tanh")], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 5, 1, 2), (2, 1, 2, 3, 1)], ids=str)
def test_gradcheck_and_gradgradcheck(pair, shape):
    tensors = [t.requires_grad_() for t in make(shape, torch.float64)]
    assert torch.autograd.gradcheck(ours(*pair), tensors)
    assert torch.autograd.gradgradcheck(ours(*pair), tensors)


@pytest.mark.parametrize("pair", [("linear", "linear"), ("silu", "tanh")], ids=str)
def test_gradgradcheck_of_the_operator(pair):
    tensors = [t.requires_grad_() for t in make((1, 2, 3, 2, 1), torch.float64)]
    operator = lambda *t: native.conv2d(*t, *pair)  # noqa: E731
    assert torch.autograd.gradcheck(operator, tensors)
    assert torch.autograd.gradgradcheck(operator, tensors)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile(layout):
    torch._dynamo.reset()
    compiled = torch.compile(ours("silu", "relu", None), fullgraph=True, dynamic=True)
    for shape in ((2, 6, 7, 4, 5), (3, 6, 7, 6, 9)):
        check(compiled, plain("silu", "relu"), *make(shape, layout=layout), fp32=WINOGRAD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x, w, b, r, s, t = (v.requires_grad_() for v in make((1, 40, 33, 5, 6)))
    with torch.autocast("cpu", dtype):
        y = ops.conv2d(x, w, b, residual=r, backend="cpu")
    assert y.dtype == dtype
    x_, w_, b_, r_ = (v.detach().to(dtype) for v in (x, w, b, r))
    assert relative_error(y, ops.conv2d(x_, w_, b_, residual=r_, backend="cpu")) <= torch.finfo(dtype).eps
    y.sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == r.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert ops.conv2d(x, w, b, scale=s, shift=t).dtype == dtype
        assert torch.equal(ops.conv2d(x, w, b), ops.conv2d(x_, w_, b_))


def test_small_images_take_small_tiles():
    x, w = torch.randn(1, 64, 2, 2), torch.randn(64, 64, 3, 3) / 24
    weight_cache.clear()
    ops.conv2d(x, w)
    assert weight_cache.size() == 16 * 64 * 64 * 4
    ops.conv2d(torch.randn(1, 64, 32, 32), w)
    assert weight_cache.size() == (16 + 36) * 64 * 64 * 4


# ---- errors

X, W, B = torch.zeros(2, 3, 4, 5), torch.zeros(6, 3, 3, 3), torch.zeros(6)
R, S, T = torch.zeros(2, 6, 4, 5), torch.zeros(2, 3), torch.zeros(2, 3)
ERRORS = {
    "x dtype": (TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64", {"x": X.long()}),
    "x rank": (ValueError, "x must have shape (B, C, H, W), got (3, 4, 5)", {"x": X[0]}),
    "weight dtype": (TypeError, "weight must have x's dtype torch.float32, got torch.float64", {"weight": W.double()}),
    "weight rank": (ValueError, "weight must have shape (Cout, C, 3, 3), got (6, 27)", {"weight": W.reshape(6, 27)}),
    "weight channels": (
        ValueError,
        "weight must have shape (6, 3, 3, 3) to match x (2, 3, 4, 5), got (6, 4, 3, 3)",
        {"weight": torch.zeros(6, 4, 3, 3)},
    ),
    "bias dtype": (TypeError, "bias must have x's dtype torch.float32, got torch.float16", {"bias": B.half()}),
    "bias shape": (ValueError, "bias must have shape (6,) to match weight (6, 3, 3, 3), got (5,)", {"bias": B[1:]}),
    "residual dtype": (
        TypeError,
        "residual must have x's dtype torch.float32, got torch.float16",
        {"residual": R.half()},
    ),
    "residual shape": (
        ValueError,
        "residual must have shape (2, 6, 4, 5) to match x (2, 3, 4, 5), got (2, 3, 4, 5)",
        {"residual": X},
    ),
    "scale alone": (ValueError, "scale and shift must be given together, got only scale", {"shift": None}),
    "shift alone": (ValueError, "scale and shift must be given together, got only shift", {"scale": None}),
    "scale dtype": (
        TypeError,
        "scale must have x's dtype torch.float32 or torch.float32, got torch.float16",
        {"scale": S.half()},
    ),
    "shift shape": (
        ValueError,
        "shift must have shape (2, 3) to match x (2, 3, 4, 5), got (3,)",
        {"shift": T[0]},
    ),
    "activation": (
        ValueError,
        "activation must be one of linear, relu, lrelu, silu, gelu, tanh, sigmoid, got 'swish'",
        {"activation": "swish"},
    ),
    "input_activation": (
        ValueError,
        "input_activation must be one of linear, relu, lrelu, silu, gelu, tanh, sigmoid, got 'swish'",
        {"input_activation": "swish"},
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    error, message, changed = ERRORS[name]
    options = {
        "x": X,
        "weight": W,
        "bias": B,
        "residual": R,
        "scale": S,
        "shift": T,
        "input_activation": "silu",
        "activation": "relu",
        **changed,
    }
    x, weight, bias, *fused = options.values()
    named = dict(zip(list(options)[3:], fused, strict=True))
    check_error(
        error,
        f"conv2d: {message}",
        lambda: ops.conv2d(x, weight, bias, **named),
        lambda: native.conv2d(*options.values()),
    )
    if changed.keys() <= {"x", "weight", "bias"}:
        check_error(
            error,
            f"conv2d: {message}",
            lambda: ops.conv2d(x, weight, bias),
            lambda: native.conv2d_plain(x, weight, bias),
        )


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"weight": W.to("meta")}, "weight must be on x's device cpu, got meta"),
        ({"weight": 1}, "weight must be a tensor, got int"),
        ({"residual": R.to("meta")}, "residual must be on x's device cpu, got meta"),
    ],
    ids=str,
)
def test_device_and_type_errors(tensor, message):
    weight = tensor.pop("weight", W)
    with pytest.raises((ValueError, TypeError), match=f"conv2d: {message}"):
        ops.conv2d(X, weight, **tensor)


def test_gradient_operators_check_their_arguments():
    for function, message in (
        (lambda: native.conv2d_backward_input(X, W), "grad must have shape (B, 6, H, W), got (2, 3, 4, 5)"),
        (
            lambda: native.conv2d_backward_weight(R[:1], X),
            "grad must have shape (2, Cout, 4, 5) to match x (2, 3, 4, 5), got (1, 6, 4, 5)",
        ),
    ):
        check_error(RuntimeError, message, function)


def test_tolerance_would_catch_a_wrong_border():
    x, w, b, *_ = make((1, 20, 18, 9, 9))
    y, exact = ops.conv2d(x, w, b), plain()(x.double(), w.double(), b.double())
    wrong = y.clone()
    wrong[..., 0, 0] = b  # one corner of 81 pixels without its neighbours
    assert relative_error(y, exact) <= tolerance(torch.float32, fp32=WINOGRAD) < relative_error(wrong, exact)
