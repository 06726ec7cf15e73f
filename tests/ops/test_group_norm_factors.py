"""ops.group_norm_factors against its specification, and against the op whose factors they are."""

import pytest
import torch
from helpers import DTYPES, LAYOUTS, backends, check, relative_error

from imagegen import _library, ops
from imagegen.ops import eager
from imagegen.ops.eager.upsample_conv2d import moments as upsample_moments

BACKENDS = backends("group_norm_factors")
needs_library = pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
SHAPES = [
    ((2, 32, 8, 8), 8),
    ((1, 6, 65, 67), 3),
    ((3, 5, 3, 31), 1),
    ((2, 96, 1, 1), 32),
    ((64, 4, 2, 2), 2),
    ((2, 12, 67), 4),
]


def parameters(x, dtype=None):
    B, C = x.shape[:2]
    return [torch.randn(*s, dtype=dtype or x.dtype, device=x.device) for s in ((C,), (C,), (B, C), (B, C))]


def reference(x, num_groups, weight, bias, scale, shift):
    return eager.group_norm_factors(x, num_groups, weight, bias, 1e-5, scale, shift)


def native(x, num_groups, weight, bias, scale, shift, backend="cpu"):
    return ops.group_norm_factors(x, num_groups, weight, bias, scale=scale, shift=shift, backend=backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, num_groups", SHAPES, ids=str)
def test_values_and_gradients(shape, num_groups, layout, backend, device):
    x = LAYOUTS[layout](torch.randn(shape, device=device) + 2)
    check(
        lambda x, *p: native(x, num_groups, *p, backend),
        lambda x, *p: reference(x, num_groups, *p),
        x,
        *parameters(x),
    )


@needs_library
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_dtypes_instruction_sets_and_threads(dtype, channels_last, capability, threads):
    x = (torch.randn(2, 24, 33, 35) * 3 + 1).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    given = parameters(x)
    expected = reference(x.double(), 6, *(p.double() for p in given))
    for factor, exact in zip(native(x, 6, *given), expected, strict=True):
        assert factor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative_error(factor, exact) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("absent", range(5))
def test_any_parameter_may_be_absent(absent, backend, device):
    x = torch.randn(2, 8, 5, 5, device=device)
    given = [None if i >= absent else p for i, p in enumerate(parameters(x))]
    check(lambda x, *p: native(x, 4, *p, backend), lambda x, *p: reference(x, 4, *p), x, *given)


@pytest.mark.parametrize("backend", ["eager", *(p.values[0] for p in BACKENDS if not p.marks)])
def test_they_are_the_factors_of_group_norm(backend):
    x = torch.randn(2, 12, 7, 9)
    given = parameters(x)
    gain, offset = native(x, 3, *given, backend)
    y = ops.group_norm(x, 3, *given[:2], scale=given[2], shift=given[3], backend="eager")
    torch.testing.assert_close(x * gain[..., None, None] + offset[..., None, None], y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", *(p.values[0] for p in BACKENDS if not p.marks)])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_known_moments_give_the_same(needs_grad, backend):
    """Where no gradient is asked for x is not read."""
    x = torch.randn(2, 12, 7, 9, requires_grad=needs_grad)
    given, m = parameters(x), upsample_moments(x, 3)

    def found(x):
        weight, bias, scale, shift = given
        return ops.group_norm_factors(x, 3, weight, bias, scale=scale, shift=shift, moments=m.detach(), backend=backend)

    for known, exact in zip(found(x if needs_grad else x * 0), reference(x, 3, *given), strict=True):
        assert relative_error(known, exact) < 1e-5
    if needs_grad:
        wanted = torch.autograd.grad(sum(f.sum() for f in reference(x, 3, *given)), x)[0]
        assert relative_error(torch.autograd.grad(sum(f.sum() for f in found(x)), x)[0], wanted) < 1e-5


@needs_library
def test_operator():
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    given = [p.requires_grad_() for p in parameters(x)]
    args = (x, 3, *given[:2], 1e-5, *given[2:])
    torch.library.opcheck(torch.ops.imagegen.group_norm_factors.default, args)

    def function(x, *p):
        return native(x, 3, *p)

    torch.autograd.gradcheck(function, (x, *given))
    torch.autograd.gradgradcheck(function, (x, *given))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_groups must divide x's 6 channels, got 4"):
        ops.group_norm_factors(torch.randn(1, 6, 2, 2), 4)
    with pytest.raises(ValueError, match=r"moments must have shape \(1, 3, 2\) to match x"):
        ops.group_norm_factors(torch.randn(1, 6, 2, 2), 3, moments=torch.zeros(1, 6, 2))
    with pytest.raises(TypeError, match=r"moments must be torch\.float32, got torch.float64"):
        ops.group_norm_factors(torch.randn(1, 6, 2, 2), 3, moments=torch.zeros(1, 3, 2).double())
