"""What can be said of group_norm's GPU kernels without a GPU: values and bounds in the simulator; registers and
spills of what the compilers make. test_group_norm.py runs them on a GPU where there is one."""

import importlib
import itertools
import re

import pytest
import torch
from cuda_sim import simulator
from helpers import DTYPES, LAYOUTS, check, relative_error
from test_group_norm import BACKENDS, ERRORS, SHAPES, C, check_against_reference, factors, fused, reference, x
from test_group_norm_factors import reference as factors_reference
from triton_ahead_of_time import compile_kernel

from imagegen.ops._layout import memory_format
from imagegen.ops.group_norm import _factor_gradients

channels_last = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


class Simulated(torch.autograd.Function):
    """The CUDA operators as the simulator runs them."""

    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, scale, shift, activation):
        operators = simulator.load("group_norm")
        y, mean, rstd = operators.group_norm(x, num_groups, weight, bias, 1e-5, scale, shift, activation)
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        ctx.options = num_groups, activation
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
        num_groups, activation = ctx.options
        backward = simulator.load("group_norm").group_norm_backward
        dx, *sums = backward(grad, x, mean, rstd, num_groups, weight, bias, scale, shift, activation)
        given = [t is not None for t in (weight, bias, scale, shift)]
        return dx, None, *_factor_gradients(given, *sums, weight, bias, scale, shift), None


def check_simulated(x, num_groups, *given, activation="silu", **options):
    y = check(
        lambda x, *f: Simulated.apply(x, num_groups, *f, activation),
        lambda x, *f: reference(x, num_groups, *f, activation),
        x,
        *given,
        **options,
    )
    assert y.stride() == torch.empty_like(x, memory_format=memory_format(x)).stride()


@pytest.mark.parametrize("shape, num_groups", [s for s in SHAPES if s[0][0] < 64], ids=str)
def test_shapes(shape, num_groups):
    x = torch.randn(shape)
    check_simulated(x, num_groups, *factors(x))


# Groups of channels that are whole loads, parts of loads, wider than a block's row; spans with a rest.
INNERMOST = [((2, 32, 6, 5), 8), ((1, 80, 9, 4), 8), ((1, 40, 3, 70), 4), ((2, 520, 3, 3), 2), ((1, 4104, 2, 2), 3)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape, num_groups", INNERMOST, ids=str)
def test_channels_last(shape, num_groups, dtype):
    x = LAYOUTS["channels_last"](torch.randn(shape).to(dtype))
    check_simulated(x, num_groups, *factors(x))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    x = LAYOUTS[layout](torch.randn(2, 12, 6, 32).to(dtype))
    check_simulated(x, 3, *(LAYOUTS[layout](t) for t in factors(x)))


@channels_last
@pytest.mark.parametrize("activation", ["linear", "relu", "lrelu", "gelu", "tanh", "sigmoid"])
def test_activations(activation, layout):
    for dtype in (torch.float32, torch.bfloat16):
        x = LAYOUTS[layout](torch.randn(1, 16, 4, 8).to(dtype))
        check_simulated(x, 2, *factors(x), activation=activation)


# Planar: a group too large for shared memory, with planes of several slices; one plane for each warp; a group that is
# kept. Channels innermost: several pieces of an image.
SPLIT = [((1, 2, 129, 128), 1), ((1, 3, 128, 134), 3), ((1, 40, 32, 32), 2), ((2, 16, 16, 32), 4)]


@channels_last
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, num_groups", SPLIT, ids=str)
def test_split_groups(shape, num_groups, dtype, layout):
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    check_simulated(x, num_groups, *factors(x))


@channels_last
@pytest.mark.parametrize("present", [0, 1, 2, 6, 9])
def test_any_factor_may_be_absent(present, layout):
    x = LAYOUTS[layout](torch.randn(2, 8, 4, 4))
    check_simulated(x, 4, *(t if present >> i & 1 else None for i, t in enumerate(factors(x))))


@channels_last
def test_float_factors_beside_half(layout):
    x = LAYOUTS[layout](torch.randn(2, 16, 4, 8).bfloat16())
    check_simulated(x, 4, *factors(x, torch.float32))


@channels_last
@pytest.mark.parametrize("side", [8, 72])
def test_mean_far_above_deviation(side, layout):
    """x holds three digits of what is left; in squares, or in a folded offset, none would be."""
    x = LAYOUTS[layout](torch.randn(1, 8, side, side) + 1e4)
    given = factors(x)
    exact = reference(x.double(), 2, *(t.double() for t in given), "silu")
    assert relative_error(Simulated.apply(x, 2, *given, "silu"), exact) < 1e-5


@channels_last
def test_an_image_unlike_its_samples(layout):
    """The pivot is the mean of eight values; here they are all far from the group's mean."""
    x = torch.randn(1, 4, 64, 72)
    x.view(1, 1, -1)[..., :: x.numel() // 8] = 1e4
    x = LAYOUTS[layout](x)
    check_simulated(x, 1, *factors(x), gradients=False)


@channels_last
def test_nan_stays_in_its_group(layout):
    for side in (6, 96):
        x = torch.randn(2, 8, side, side)
        x[0, 3, 2, 2] = float("nan")
        nan = Simulated.apply(LAYOUTS[layout](x), 4, None, None, None, None, "silu").isnan()
        assert nan[0, 2:4].all()
        assert not nan[0, :2].any() and not nan[0, 4:].any() and not nan[1].any()


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 2, 0, 4), (2, 0, 3, 3), (2, 0)], ids=str)
def test_nothing_to_normalise(shape):
    x = torch.randn(shape)
    operators = simulator.load("group_norm")
    y, mean, rstd = operators.group_norm(x, 2, None, None, 1e-4, None, None, "linear")
    assert y.shape == shape and not y.any()
    assert mean.shape == rstd.shape == (shape[0], 2)
    assert shape[1] == 0 or rstd.eq(100).all()
    dx, *sums = operators.group_norm_backward(x, x, mean, rstd, 2, None, None, None, None, "linear")
    assert not dx.any() and all(not s.any() or x.numel() for s in sums)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_factors(layout, dtype):
    for shape, num_groups in (((2, 12, 4, 8), 3), ((1, 6, 65, 67), 2)):
        x = LAYOUTS[layout]((torch.randn(shape) * 3 + 1).to(dtype))
        given = factors(x)
        weight, bias, scale, shift = given
        found = simulator.load("group_norm").group_norm_factors(x, num_groups, weight, bias, 1e-5, scale, shift)
        expected = factors_reference(x.double(), num_groups, *(t.double() for t in given))
        for ours, exact in zip(found, expected, strict=True):
            assert ours.dtype == torch.promote_types(dtype, torch.float32)
            assert relative_error(ours, exact) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("side", [8, 72])
def test_known_moments(side, layout, dtype):
    """Those of another tensor, to be seen; and kept, as the gradient wants them."""
    x = LAYOUTS[layout]((torch.randn(2, 12, side, side + 1) + 500).to(dtype))
    m = torch.tensor([[500.25, 4], [499.5, 0.25], [500, 1]]).expand(2, 3, 2).contiguous()
    m = m.to(torch.promote_types(dtype, torch.float32))
    operators = simulator.load("group_norm")
    y, mean, rstd = operators.group_norm_with_moments(x, 3, None, None, 1e-5, None, None, "silu", m)
    assert torch.equal(mean, m[..., 0]) and relative_error(rstd, (m[..., 1].double() + 1e-5).rsqrt()) < 1e-6
    normal = (x.double().unflatten(1, (3, -1)) - mean.double()[..., None, None, None]).flatten(1, 2)
    z = torch.nn.functional.silu(normal * rstd.double().repeat_interleave(4, 1)[..., None, None])
    assert relative_error(y, z) <= {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps)


@channels_last
@pytest.mark.parametrize("side", [16, 96])
def test_orders_of_warps_agree_to_the_bit(side, layout, monkeypatch):
    x = LAYOUTS[layout](torch.randn(2, 24, side, 16)).requires_grad_()
    given = [t.requires_grad_() for t in factors(x)]
    results = []
    for order in ("forward", "reverse", "random"):
        monkeypatch.setenv("SIM_ORDER", order)
        y = Simulated.apply(x, 2, *given, "silu")
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, *given))])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_parts_too_many_to_merge_in_every_block():
    """More than kPartsInFront of them: a launch of its own merges them."""
    x = torch.randn(1, 300, 33, 31)
    check_simulated(x, 1, *factors(x))


@pytest.mark.parametrize("error, message, change", ERRORS, ids=[m[:24] for _, m, _ in ERRORS])
def test_errors(error, message, change):
    a = {"x": x, "num_groups": 3, "weight": None, "bias": None, "eps": 1e-5, "scale": None, "shift": None}
    a |= {"activation": "linear"} | change
    positional = [a[n] for n in ("x", "num_groups", "weight", "bias", "eps", "scale", "shift", "activation")]
    for operator in (simulator.load("group_norm").group_norm, torch.ops.imagegen.group_norm_triton):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=re.escape(f"group_norm: {message}")):
            operator(*positional)


def test_backward_of_triton_checks_its_arguments():
    statistics = torch.ones(2, 3)
    rest = (3, C, C, None, None, "linear")
    for arguments, message in (
        ((x[:1], x, statistics, statistics), "grad must have x's shape (2, 6, 4, 4), got (1, 6, 4, 4)"),
        ((x.half(), x, statistics, statistics), "grad must have x's dtype torch.float32, got torch.float16"),
        ((x, x, statistics[:1], statistics), "mean must be contiguous of shape (2, 3) and dtype torch.float32"),
        ((x, x, statistics, statistics.double()), "rstd must be contiguous of shape (2, 3) and dtype torch.float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(f"group_norm: {message}")):
            torch.ops.imagegen.group_norm_backward_triton(*arguments, *rest)


CUDA = simulator.ROOT / "csrc/ops/cuda"


def sanitize(sanitizer, *arguments):
    sources = [simulator.HERE / "group_norm_main.cpp", *sorted(CUDA.glob("group_norm*_kernel.cu"))]
    program = simulator.build_program(sources, sanitizer)
    printed, said = simulator.run_program(program, *arguments, order="random")
    assert printed == "ran\n"
    assert simulator.found_nothing(said), said


@pytest.mark.parametrize("layout", ["planar", "innermost"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_address_sanitizer_finds_nothing(dtype, layout):
    sanitize("address", dtype, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["planar", "innermost"])
def test_thread_sanitizer_finds_nothing(layout):
    """What blocks hand to each other passes between launches: shapes of few blocks show what warps do."""
    sanitize("thread", "bf16", layout, "small")


FORWARD, BACKWARD = (f"imagegen.ops.triton.group_norm{name}_kernel" for name in ("", "_backward"))


class Recorded:
    """A Triton kernel that writes down when it is launched."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names

    def __getitem__(self, grid):
        self.launches.append(self.kernel.__name__.removeprefix("group_norm_").removesuffix("_kernel"))
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    launches = []
    for module, kernels in itertools.groupby(KERNELS, lambda kernel: importlib.import_module(kernel[0])):
        for _, name in kernels:
            monkeypatch.setattr(module, name, Recorded(getattr(module, name), launches))
    return launches


GRADIENT = ["gradient_sums", "gradient"]
PATHS = {  # small tensors cut as large ones are -> the launches of a forward and of its backward
    "whole": ({}, ["whole"], GRADIENT),
    "looped": ({"WHOLE": 0, "LOOPED": 1, "LOOPED_TILE": 64}, ["looped"], GRADIENT),
    "two": ({"WHOLE": 0, "TILE_BYTES": 512, "FILLED": 1}, ["statistics", "apply"], GRADIENT),
    "three": (
        {"WHOLE": 0, "TILE_BYTES": 512, "IN_FRONT": 1},
        ["statistics", "merge", "apply"],
        ["gradient_sums", "merge_sums", "gradient"],
    ),
}
on_triton = pytest.mark.parametrize("backend, device", [p for p in BACKENDS if p.id == "triton"])


@on_triton
@pytest.mark.parametrize(
    "path, layout", [(path, layout) for path in PATHS for layout in ("contiguous", "channels_last")]
)
def test_triton_launches(path, layout, launches, monkeypatch, backend, device):
    """Several slices, blocks of a group and groups of a tile, each with a rest."""
    constants, forward, backward = PATHS[path]
    if path == "looped" and layout == "channels_last":
        forward = ["statistics", "apply"]  # where a group is no run of memory no program loops over it
    for name, value in constants.items():
        for module in ("group_norm_kernel", "group_norm_tiles"):
            monkeypatch.setattr(f"imagegen.ops.triton.{module}.{name}", value, raising=False)
    for shape, num_groups in (((1, 20, 5, 7), 2), ((1, 70, 3, 3), 1)):
        x = LAYOUTS[layout](torch.randn(shape, device=device).bfloat16())
        launches.clear()
        check_against_reference(x, num_groups, *factors(x), backend=backend)
        assert launches == forward + backward


@on_triton
@pytest.mark.parametrize("path", ["looped", "two", "three"])
def test_triton_mean_far_above_deviation(path, monkeypatch, backend, device):
    for name, value in PATHS[path][0].items():
        for module in ("group_norm_kernel", "group_norm_tiles"):
            monkeypatch.setattr(f"imagegen.ops.triton.{module}.{name}", value, raising=False)
    x = torch.randn(1, 4, 13, 17, device=device) + 1e4
    x[0, :2, 0, 0] = float("nan")  # which stays in the first of the groups
    given = factors(x)
    exact = reference(x.double(), 2, *(t.double() for t in given), "silu")
    y = fused(x, 2, *given, "silu", backend)
    assert y[:, :2].isnan().all() and relative_error(y[:, 2:], exact[:, 2:]) < 1e-5


# The table in front of the kernels: shape, layout -> programs, parts that are merged in front of each (0: elsewhere).
CUTS = [
    ((1, 512, 128, 128), "contiguous", 2048, 64),
    ((1, 512, 128, 128), "channels_last", 1024, 512),
    ((1, 128, 512, 512), "contiguous", 4096, 128),
    ((1, 128, 512, 512), "channels_last", 4096, 0),
    ((1, 128, 5120, 256), "contiguous", 4096, 128),
    ((1, 320, 64, 64), "channels_last", 384, 0),
]


@pytest.mark.parametrize("shape, layout, programs, parts", CUTS, ids=str)
def test_triton_cuts(shape, layout, programs, parts):
    tiles = pytest.importorskip("imagegen.ops.triton.group_norm_tiles")
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    cut = tiles.cut(torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=memory), 32)
    assert (cut.programs, cut.in_front * cut.groups * cut.parts) == (programs, parts)


def triton_variant(kernel, dtype, *, planar=True, activation="silu"):
    """How the host side launches this kernel of a module for 128 channels of 256 x 256 pixels, in 32 groups."""
    from imagegen.ops.triton import group_norm_tiles

    module, name = kernel
    stride = ("x_b", "x_p") if not planar else ("x_b", "x_c")
    one = "p" if planar else "c"
    names = getattr(importlib.import_module(module), name).arg_names
    tensors = {"grad": dtype, "x": dtype, "y": dtype, "dx": dtype}
    tensors |= dict.fromkeys(("weight", "bias"), dtype)
    tensors |= dict.fromkeys(
        ("mean", "rstd", "parts", "merged", "pivots", "gain", "offset", "of_channels", "sum_dz", "sum_dz_xhat"), "fp32"
    )
    signature = {name: f"*{type}" for name, type in tensors.items() if name in names}
    constants = dict.fromkeys(("scale", "shift", "sizes", "strides", "g_sizes", "g_strides"))
    constants |= (
        {f"{t}_{one}": 1 for t in "xgy"} | {"w_c": 1, "b_c": 1} | dict.fromkeys(("s_c", "t_c", "s_b", "t_b"), 0)
    )
    x = torch.empty(1, 128, 256, 256, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], device="meta")
    x = x if planar else x.contiguous(memory_format=torch.channels_last)
    tiles = group_norm_tiles.cut(x, 32, x if module == BACKWARD else None)
    assert tiles.in_front == planar  # where channels are innermost a tile has sixteen groups
    blocks = tiles._asdict()
    for number in ("groups", "blocks", "piece", "slices"):
        del blocks[number]
    blocks |= {"group_norm_whole_kernel": {"BC": 4, "BP": 1024}, "group_norm_looped_kernel": {"BC": 1, "BP": 8192}}.get(
        name, {"PB": group_norm_tiles.MERGED} if {"PB", "BG"} & set(names) == {"PB"} else {}
    )
    constants |= {"ACT": activation} | blocks
    constants = {name: value for name, value in constants.items() if name in names}
    scalars = {"eps": "fp64"} | dict.fromkeys(set(names) - signature.keys() - constants.keys() - {"eps"}, "i32")
    signature |= {name: type for name, type in scalars.items() if name in names}
    wide = [
        n
        for n in names
        if n in tensors or n in (*stride, "g_b", "y_b", "pixels", "piece", "C") or n[2:] == stride[1][2:]
    ]
    return {
        "signature": signature,
        "constants": constants,
        "divisible": [name for name in wide if name in signature],
        "options": {"num_warps": 8 if name == "group_norm_looped_kernel" else 4},
    }


# There Triton keeps more addresses: twelve warps on a multiprocessor instead of sixteen, whose 64 bytes a thread are
# still 24 KiB under way, where 1.6 TB/s over 108 multiprocessors at 0.6 µs need 9.
MORE_ON_SM_80 = 40
KERNELS = {  # kernel -> most registers
    (FORWARD, "group_norm_whole_kernel"): 128,
    (FORWARD, "group_norm_looped_kernel"): 128,
    (FORWARD, "group_norm_statistics_kernel"): 128,
    (FORWARD, "group_norm_merge_kernel"): 64,
    (FORWARD, "group_norm_factors_kernel"): 64,
    (FORWARD, "group_norm_apply_kernel"): 128,
    (BACKWARD, "group_norm_gradient_sums_kernel"): 128,
    (BACKWARD, "group_norm_merge_sums_kernel"): 64,
    (BACKWARD, "group_norm_gradient_kernel"): 128,
}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel[1])
def test_triton_kernels_compile_ahead_of_time(kernel):
    pytest.importorskip("triton", reason="triton is not installed")
    variants = [triton_variant(kernel, "bf16"), triton_variant(kernel, "fp32", planar=False) | {"architectures": [90]}]
    if KERNELS[kernel] < 128:  # which merge parts: no architecture makes them large
        variants[0]["architectures"] = [90]
    if kernel[1] == "group_norm_looped_kernel":  # which takes planes alone
        del variants[1]
    builds = compile_kernel(*kernel, variants)
    for variant, build in [(v, b) for v, of in zip(variants, builds, strict=True) for b in of]:
        print(kernel, variant["constants"], build)
        assert build["stack"] == build["local"] == build["spills"] == 0, "spills"
        assert build["registers"] <= KERNELS[kernel] + MORE_ON_SM_80 * (build["architecture"] == 80), build
        # A group of four channels has no 16 bytes of neighbours where channels are innermost.
        if "BP" in variant["constants"] and not (kernel[1] == "group_norm_whole_kernel" and variant is variants[1]):
            assert any("v4" in load for load in build["loads"]), "16-byte loads"
