"""ops.group_norm against its specification in float64, on every backend that can run here."""

import copy

import pytest
import torch
from helpers import DTYPES, LAYOUTS, backends, check, check_error, relative_error, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from imagegen import _library, ops
from imagegen.ops import eager
from imagegen.ops._activation import ACTIVATIONS
from imagegen.ops._layout import memory_format
from imagegen.ops.eager.upsample_conv2d import moments as upsample_moments

BACKENDS = backends("group_norm")
# Without Triton's interpreter, which takes minutes over large tensors and thousands of calls.
QUICK_BACKENDS = [p for p in BACKENDS if p.values != ("triton", "cpu")]
needs_library = pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))

# (x's shape, num_groups): vectors of 4, 8 and 16 lanes with and without a rest, one channel a group, one group,
# no pixels to speak of, pieces of several channels, several pieces a channel, the ranks beside 4.
SHAPES = [
    ((2, 32, 8, 8), 8),
    ((2, 6, 5, 7), 3),
    ((1, 16, 17, 15), 16),
    ((3, 5, 3, 31), 1),
    ((2, 96, 1, 1), 32),
    ((2, 127, 1, 3), 1),
    ((1, 129, 33, 2), 3),
    ((1, 4, 65, 127), 2),
    ((64, 4, 2, 2), 2),
    ((2, 48), 6),
    ((2, 12, 67), 4),
    ((1, 6, 3, 4, 5), 2),
    ((0, 8, 4, 4), 2),
]


def moments_of(x, num_groups):
    return upsample_moments(x.reshape(*x.shape[:2], 1, -1), num_groups)


def reference(x, num_groups, weight, bias, scale, shift, activation):
    return eager.group_norm(x, num_groups, weight, bias, 1e-5, scale, shift, activation)


def fused(x, num_groups, weight, bias, scale, shift, activation, backend="cpu"):
    return ops.group_norm(x, num_groups, weight, bias, scale=scale, shift=shift, activation=activation, backend=backend)


def factors(x, dtype=None):
    """weight, bias, scale and shift that fit x, drawn at random."""
    B, C = x.shape[:2]
    return [torch.randn(*s, dtype=dtype or x.dtype, device=x.device) for s in ((C,), (C,), (B, C), (B, C))]


def check_against_reference(x, num_groups, *factors, activation="silu", backend="cpu", **options):
    y = check(
        lambda x, *f: fused(x, num_groups, *f, activation, backend),
        lambda x, *f: reference(x, num_groups, *f, activation),
        x,
        *factors,
        **options,
    )
    assert y.stride() == torch.empty_like(x, memory_format=memory_format(x)).stride()
    return y


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("shape, num_groups", SHAPES, ids=str)
def test_shapes(shape, num_groups, backend, device):
    x = torch.randn(shape, device=device)
    check_against_reference(x, num_groups, *factors(x), backend=backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, backend, device):
    x = torch.randn(2, 20, 9, 9, device=device)
    check_against_reference(x, 5, *factors(x), activation=activation, backend=backend)


@needs_library
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_instruction_sets(capability, dtype, channels_last):
    x = torch.randn(2, 40, 13, 11).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    check_against_reference(x, 8, *factors(x))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, backend, device):
    """x, the factors and the incoming gradient each in this layout."""
    x = LAYOUTS[layout](torch.randn(2, 12, 6, 34, device=device, dtype=dtype))
    f = [LAYOUTS[layout](t) for t in factors(x)]
    check_against_reference(x, 3, *f, backend=backend)
    gradients = []
    grad = torch.randn(x.shape, device=device, dtype=dtype)
    for g in (grad, LAYOUTS[layout](grad)):
        leaf = x.detach().requires_grad_()
        gradients += torch.autograd.grad(fused(leaf, 3, *f, "silu", backend), leaf, g)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend, device", QUICK_BACKENDS)
@pytest.mark.parametrize("shape, num_groups", [((1, 4, 1024, 808), 4), ((1, 312, 104, 104), 26)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_large(shape, num_groups, channels_last, backend, device):
    """Above the size from which outputs go past the caches: whole vectors and rests, groups above and below a MB."""
    x = torch.randn(shape, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    check_against_reference(x, num_groups, *factors(x), backend=backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float_factors_beside_half(dtype, backend, device):
    x = torch.randn(2, 12, 7, 7, device=device, dtype=dtype)
    check_against_reference(x, 3, *factors(x, torch.float32), backend=backend)
    half, _, scale, shift = factors(x)
    check_against_reference(x, 3, half, None, scale.float(), shift, backend=backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("present", range(16))
def test_any_factor_may_be_absent(present, backend, device):
    x = torch.randn(2, 8, 5, 5, device=device)
    f = [t if present >> i & 1 else None for i, t in enumerate(factors(x))]
    check_against_reference(x, 4, *f, backend=backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_mean_far_above_deviation(channels_last, backend, device):
    """mean 1e4, deviation 1: x holds three digits of what is left. The saved mean is float32, so the gradient is not
    to 1e-5, but nearer than eager's."""
    x = torch.randn(2, 8, 70, 70, device=device) + 1e4
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    f = factors(x)
    y = fused(x, 2, *f, "silu", backend)
    exact = reference(x.double(), 2, *[t.double() for t in f], "silu")
    assert relative_error(y, exact) <= tolerance(torch.float32)
    grad = torch.randn_like(x)

    def gradient(function, dtype):
        leaf = x.to(dtype).requires_grad_()
        return torch.autograd.grad(function(leaf, 2, *[t.to(dtype) for t in f], "silu"), leaf, grad.to(dtype))[0]

    exact = gradient(reference, torch.float64)
    ours = relative_error(gradient(lambda *a: fused(*a, backend), torch.float32), exact)
    assert ours <= relative_error(gradient(reference, torch.float32), exact)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_border_unlike_the_rest(backend, device):
    """The sums are taken about the mean of each piece's beginning, which here is far from the mean of the piece."""
    x = 5 + 0.1 * torch.randn(1, 4, 64, 64, device=device)
    x[:, :, :8] = 0
    for layout in (torch.contiguous_format, torch.channels_last):
        check_against_reference(x.contiguous(memory_format=layout), 4, *factors(x), backend=backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 2, 0, 4), (2, 0, 3, 3), (2, 0)], ids=str)
def test_nothing_to_normalise(shape, backend, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    f = [t.requires_grad_() for t in factors(x)]
    y = fused(x, 2, *f, "silu", backend)
    _, bias, scale, shift = f
    expected = ACTIVATIONS["silu"](bias * (1 + scale) + shift).reshape(shape[:2] + (1,) * (len(shape) - 2))
    expected = expected.expand(shape)
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y.sum(), [x, *f])
    assert gradients[0].abs().max() < 1e-3 if x.numel() else gradients[0].shape == x.shape
    expected = torch.autograd.grad(expected.sum(), (bias, scale, shift))
    for ours, theirs in zip(gradients[2:], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not gradients[1].any()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_constant_groups(backend, device):
    x = torch.full((2, 4, 9, 9), 3.7, device=device)
    assert fused(x, 2, None, None, None, None, "linear", backend).abs().max() < 1e-3


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_nan_stays_in_its_group(backend, device):
    x = torch.randn(2, 8, 6, 6, device=device)
    x[0, 3, 2, 2] = float("nan")
    for layout in (torch.contiguous_format, torch.channels_last):
        nan = fused(x.contiguous(memory_format=layout), 4, None, None, None, None, "silu", backend).isnan()
        assert nan[0, 2:4].all()
        assert not nan[0, :2].any() and not nan[0, 4:].any() and not nan[1].any()


@needs_library
@pytest.mark.parametrize(
    "shape, num_groups",
    [((1, 32, 64, 66), 4), ((3, 24, 48, 48), 1), ((2, 64, 40, 40), 32), ((1, 64, 136, 128), 32)],  # the last: streamed
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_same_bits_for_any_number_of_threads(shape, num_groups, channels_last):
    x = torch.randn(shape)
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    f = [t.requires_grad_() for t in factors(x)]
    grad = torch.randn_like(x)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3, 5):
            torch.set_num_threads(threads)
            y = fused(x, num_groups, *f, "silu")
            results.append([y, *torch.autograd.grad(y, [x, *f], grad)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@needs_library
def test_strides_beyond_32_bits():
    """Images more than 2^31 elements apart, in virtual memory of which only their pixels are touched."""
    B_stride, C_stride = 2**31 + 64, 2**20
    try:
        storage = torch.UntypedStorage(2 * (B_stride + 4 * C_stride))
    except RuntimeError as error:
        pytest.skip(f"no 4 GB of address space: {error}")
    x = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (2, 4, 8, 8), (B_stride, C_stride, 8, 1))
    values = torch.randn(2, 4, 8, 8).bfloat16()
    for b in range(2):
        for c in range(4):
            x[b, c] = values[b, c]
    f = factors(x)
    results = []
    for t in (x, values):
        leaf = t.detach().requires_grad_()
        y = fused(leaf, 2, *f, "silu")
        results.append((y, *torch.autograd.grad(y, leaf, values)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_expanded_tensors(backend, device):
    x = torch.randn(1, 6, 1, 5, device=device).expand(3, 6, 4, 5)
    scale = torch.randn(1, 6, device=device).expand(3, 6)
    y = fused(x, 3, None, None, scale, scale, "relu", backend)
    torch.testing.assert_close(y, fused(x.contiguous(), 3, None, None, scale, scale, "relu", backend))
    leaf = torch.randn(2, 6, 4, 4, device=device, requires_grad=True)
    fused(leaf, 3, None, None, None, None, "silu", backend).sum().backward()  # the gradient has no strides
    expected = leaf.detach().requires_grad_()
    reference(expected, 3, None, None, None, None, "silu").sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 20),
    st.lists(st.integers(1, 40), max_size=3),
    st.booleans(),
    st.sampled_from(list(ACTIVATIONS)),
)
def test_random_shapes(B, num_groups, per_group, pixels, channels_innermost, activation):
    x = torch.randn(B, num_groups * per_group, *pixels, dtype=torch.float64)
    if channels_innermost:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    f = factors(x)
    results = []
    for function in (ops.group_norm, None):
        leaves = [t.detach().requires_grad_() for t in (x, *f)]
        run = reference if function is None else lambda *a: fused(*a, backend=None)
        y = run(leaves[0], num_groups, *leaves[1:], activation)
        results.append([y, *torch.autograd.grad((y * x).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


GRADIENT_LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("backend, device", QUICK_BACKENDS)
@pytest.mark.parametrize("activation", ["linear", "silu", "gelu"])
@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
def test_gradcheck(layout, activation, backend, device):
    x = torch.randn(2, 4, 2, 3, device=device, dtype=torch.float64).contiguous(memory_format=GRADIENT_LAYOUTS[layout])
    inputs = [t.requires_grad_() for t in (x, *factors(x))]
    function = lambda x, *f: fused(x, 2, *f, activation, backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("backend, device", QUICK_BACKENDS)
def test_second_order_where_one_tensor_is_every_factor(backend, device):
    x = torch.randn(1, 4, 3, 3, device=device, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, device=device, dtype=torch.float64, requires_grad=True)
    function = lambda x, w: fused(x, 2, w, w, w[None], w[None], "silu", backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, w))
    assert torch.autograd.gradgradcheck(function, (x, w))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "second"])
def test_one_gradient_at_a_time(create_graph, wanted, backend, device):
    x = torch.randn(2, 4, 3, 3, device=device, dtype=torch.float64)
    inputs = [x, *factors(x)]
    inputs[wanted].requires_grad_()
    gradients = [
        torch.autograd.grad(
            function(inputs[0], 2, *inputs[1:], "silu").square().sum(), inputs[wanted], create_graph=create_graph
        )[0]
        for function in (lambda *a: fused(*a, backend), reference)
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].requires_grad == create_graph


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_gradient_penalty(backend, device):
    """The gradient of the gradient's norm in float32, as WGAN-GP takes it."""
    x, w = torch.randn(2, 8, 5, 5, device=device), torch.randn(8, device=device)
    results = []
    for function, dtype in ((lambda *a: fused(*a, backend), torch.float32), (reference, torch.float64)):
        leaf, weight = (t.to(dtype).requires_grad_() for t in (x, w))
        y = function(leaf, 4, weight, None, None, None, "lrelu")
        (g,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad((g.flatten(1).norm(dim=1) - 1).square().sum(), (leaf, weight)))
    for ours, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) < 1e-5


@needs_library
@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
def test_opcheck(layout):
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=GRADIENT_LAYOUTS[layout])
    f = factors(x)
    arguments = (2, f[0], None, 1e-5, *f[2:], "silu")
    for inputs in ((x, *arguments), (x.detach().requires_grad_(), *arguments)):
        torch.library.opcheck(torch.ops.imagegen.group_norm.default, inputs)
    _, mean, rstd = torch.ops.imagegen.group_norm(x, *arguments)
    assert mean.shape == rstd.shape == (2, 2)
    inputs = (torch.randn_like(x), x, mean, rstd, 2, f[0], None, *f[2:], "silu")
    torch.library.opcheck(torch.ops.imagegen.group_norm_backward.default, inputs)


@needs_library
def test_saved_statistics():
    x = 3 + 2 * torch.randn(2, 6, 9, 9)
    _, mean, rstd = torch.ops.imagegen.group_norm(x, 3, None, None, 1e-5, None, None, "linear")
    groups = x.double().reshape(2, 3, -1)
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (groups.var(2, correction=0) + 1e-5).rsqrt(), rtol=1e-6, atol=0)


@needs_library
def test_compile():
    function = lambda x, w, s: ops.group_norm(x, 4, w, scale=s, activation="silu")  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for shape in ((2, 8, 6, 6), (3, 16, 5, 9)):
        for layout in GRADIENT_LAYOUTS.values():
            x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
            w, _, s, _ = (t.requires_grad_() for t in factors(x))
            grad = torch.randn(shape)
            y, expected = compiled(x, w, s), function(x, w, s)
            assert torch.equal(y, expected) and y.stride() == expected.stride()
            for ours, theirs in zip(*(torch.autograd.grad(t, (x, w, s), grad) for t in (y, expected)), strict=True):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_autocast(backend, device):
    """A half x beside float parameters, as a convolution under autocast leaves it: x's dtype comes back."""
    x = torch.randn(2, 8, 4, 4, device=device, dtype=torch.bfloat16)
    w, b, *_ = factors(x, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = fused(x, 4, w, b, None, None, "silu", backend)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, fused(x, 4, w, b, None, None, "silu", backend))


# ---- moments that are known


def with_moments(x, num_groups, m, given, activation="silu", backend="cpu"):
    weight, bias, scale, shift = given
    return ops.group_norm(
        x, num_groups, weight, bias, scale=scale, shift=shift, activation=activation, moments=m, backend=backend
    )


@pytest.mark.parametrize("backend, device", [pytest.param("eager", "cpu", id="eager"), *BACKENDS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, num_groups", [((2, 12, 6, 34), 3), ((3, 40, 5, 7), 20), ((1, 16, 65, 67), 1)], ids=str)
def test_known_moments(shape, num_groups, layout, backend, device):
    x = LAYOUTS[layout](torch.randn(shape, device=device))
    y = check(
        lambda x, *f: with_moments(x, num_groups, moments_of(x, num_groups), f, backend=backend),
        lambda x, *f: reference(x, num_groups, *f, "silu"),
        x,
        *factors(x),
    )
    assert y.stride() == torch.empty_like(x, memory_format=memory_format(x)).stride()


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 4, 6), (1, 6, 130, 129)], ids=str)
def test_known_moments_are_not_worked_out_again(shape, dtype, channels_last, backend, device):
    """Those of another tensor, to be seen, with a mean far above the deviation."""
    x = (torch.randn(shape, device=device) + 500).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    m = torch.tensor([[500.25, 4], [499.5, 0.25], [500, 1]], device=device).expand(shape[0], 3, 2)
    m = m.to(torch.promote_types(dtype, torch.float32))
    given = factors(x)
    y = with_moments(x, 3, m, given, "linear", backend)
    weight, bias, scale, shift = (t.double() for t in given)
    mean, var = (t[..., None, None, None] for t in m.double().unbind(-1))
    normal = ((x.double().unflatten(1, (3, -1)) - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
    z = (normal * weight[:, None, None] + bias[:, None, None]) * (1 + scale[..., None, None]) + shift[..., None, None]
    assert relative_error(y, z) <= {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps)


@needs_library
def test_operator_with_known_moments():
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    given = [f.requires_grad_() for f in factors(x)]
    operator = torch.ops.imagegen.group_norm_with_moments.default
    torch.library.opcheck(operator, (x, 3, *given[:2], 1e-5, *given[2:], "silu", moments_of(x, 3).detach()))

    def function(x, *given):
        return with_moments(x, 3, moments_of(x, 3), given)

    assert torch.autograd.gradcheck(function, (x, *given))
    assert torch.autograd.gradgradcheck(function, (x, *given))
    check_error(
        RuntimeError,
        "group_norm: moments must be contiguous of shape (2, 3, 2) and dtype torch.float64, got (2, 3)",
        lambda: operator(x, 3, None, None, 1e-5, None, None, "silu", moments_of(x, 3)[..., 0].contiguous()),
    )


@needs_library
def test_moments_of_an_upsampling_convolution():
    x, w = torch.randn(2, 5, 7, 6, requires_grad=True), torch.randn(12, 5, 3, 3, requires_grad=True)
    y, m = ops.upsample_conv2d(x, w, moments=4)
    found, expected = ops.group_norm(y, 4, moments=m), ops.group_norm(y, 4)
    assert relative_error(found, expected) <= 1e-6
    loss = torch.randn_like(y)
    for a, b in zip(
        *(torch.autograd.grad((t * loss).sum(), (x, w), retain_graph=True) for t in (found, expected)), strict=True
    ):
        assert relative_error(a, b) <= 1e-5


def test_known_moments_compile():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, m: ops.group_norm(x, 4, moments=m), fullgraph=True, dynamic=True)
    for size in (5, 9):
        x = torch.randn(2, 12, size, 6)
        assert relative_error(compiled(x, moments_of(x, 4)), ops.group_norm(x.double(), 4)) <= 1e-5


def test_backends_agree_on_memory_format():
    for layout in LAYOUTS.values():
        x = layout(torch.randn(2, 6, 4, 4))
        assert ops.group_norm(x, 2).stride() == ops.group_norm(x, 2, backend="eager").stride()


x = torch.randn(2, 6, 4, 4)
C = torch.ones(6)
ERRORS = [
    (TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64", {"x": x.long()}),
    (ValueError, "x must have shape (B, C, ...) of at most 10 axes, got (6,)", {"x": C}),
    (ValueError, "num_groups must divide x's 6 channels, got 4", {"num_groups": 4}),
    (ValueError, "num_groups must divide x's 6 channels, got 0", {"num_groups": 0}),
    (ValueError, "weight must have shape (6,) to match x (2, 6, 4, 4), got (5,)", {"weight": torch.ones(5)}),
    (ValueError, "bias must have shape (6,) to match x (2, 6, 4, 4), got (6, 1)", {"bias": torch.ones(6, 1)}),
    (ValueError, "scale must have shape (2, 6) to match x (2, 6, 4, 4), got (6,)", {"scale": C}),
    (ValueError, "shift must have shape (2, 6) to match x (2, 6, 4, 4), got (2, 3)", {"shift": torch.ones(2, 3)}),
    (
        TypeError,
        "weight must have x's dtype torch.float32 or torch.float32, got torch.bfloat16",
        {"weight": C.bfloat16()},
    ),
    (ValueError, "eps must be at least 0, got -1", {"eps": -1.0}),
    (
        ValueError,
        "activation must be one of linear, relu, lrelu, silu, gelu, tanh, sigmoid, got 'swish'",
        {"activation": "swish"},
    ),
]
MOMENTS_ERRORS = [
    (ValueError, "moments must have shape (2, 3, 2) to match x (2, 6, 4, 4), got (2, 3)", torch.ones(2, 3)),
    (TypeError, "moments must be torch.float32, got torch.float64", torch.ones(2, 3, 2).double()),
]


@pytest.mark.parametrize("error, message, moments", MOMENTS_ERRORS, ids=["shape", "dtype"])
def test_moments_errors(error, message, moments):
    check_error(error, f"group_norm: {message}", lambda: ops.group_norm(x, 3, moments=moments))


@pytest.mark.parametrize("error, message, change", ERRORS, ids=[m[:24] for _, m, _ in ERRORS])
def test_errors(error, message, change):
    a = {"x": x, "num_groups": 3, "weight": None, "bias": None, "eps": 1e-5, "scale": None, "shift": None}
    a = copy.copy(a) | {"activation": "linear"} | change
    positional = [a[n] for n in ("x", "num_groups", "weight", "bias", "eps", "scale", "shift", "activation")]
    check_error(
        error,
        f"group_norm: {message}",
        lambda: ops.group_norm(**a),
        lambda: torch.ops.imagegen.group_norm(*positional),
    )


@needs_library
def test_backward_checks_its_arguments():
    y, mean, rstd = torch.ops.imagegen.group_norm(x, 3, None, None, 1e-5, None, None, "linear")
    rest = (3, None, None, None, None, "linear")
    for arguments, message in (
        ((y[:1], x, mean, rstd), "group_norm: grad must have x's shape (2, 6, 4, 4), got (1, 6, 4, 4)"),
        ((y.half(), x, mean, rstd), "group_norm: grad must have x's dtype torch.float32, got torch.float16"),
        (
            (y, x, mean[:1], rstd),
            "group_norm: mean must be contiguous of shape (2, 3) and dtype torch.float32, got (1, 3)",
        ),
        (
            (y, x, mean, rstd.double()),
            "group_norm: rstd must be contiguous of shape (2, 3) and dtype torch.float32, got",
        ),
    ):
        check_error(RuntimeError, message, lambda a=arguments: torch.ops.imagegen.group_norm_backward(*a, *rest))


@pytest.mark.parametrize("needing", range(5))
def test_a_gradient_in_any_one_tensor(needing):
    """Without one, torch's autograd wrapper is skipped: whichever of the tensors needs it has to be noticed."""
    tensors = [torch.randn(shape) for shape in ((2, 6, 4, 4), (6,), (6,), (2, 6), (2, 6))]
    tensors[needing].requires_grad_()

    def gradient(group_norm, tensors):
        x, weight, bias, scale, shift = tensors
        y = group_norm(x, 3, weight, bias, scale=scale, shift=shift)
        return torch.autograd.grad(y.square().sum(), tensors[needing])[0]

    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    assert relative_error(gradient(ops.group_norm, tensors), gradient(ops.group_norm, doubles)) < 1e-5
