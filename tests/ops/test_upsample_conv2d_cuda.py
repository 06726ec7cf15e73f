"""What can be said of upsample_conv2d's CUDA kernels without a GPU: values, races and bounds in the simulator;
registers, spills and matrix instructions of what nvcc makes. test_upsample_conv2d.py runs them where there is a GPU."""

import copy
import itertools
import re
from collections import Counter

import pytest
import torch
from cuda_ahead_of_time import kernels
from cuda_sim import simulator
from helpers import DTYPES, LAYOUTS, check, relative_error, tolerance
from test_cuda_build import needs_nvcc

from imagegen import _library, nn, ops
from imagegen.ops import _backend, eager
from imagegen.ops._activation import ACTIVATIONS
from imagegen.ops.eager.upsample_conv2d import moments as moments_of
from imagegen.ops.upsample_conv2d import _fake_pack_weight, _fake_packed, _kernel

# (B, C, Cout, H, W): one pixel, channels and pixels that fill no tile, several tiles and chunks in each direction.
SHAPES = [(1, 1, 1, 1, 1), (2, 19, 35, 5, 7), (1, 72, 40, 17, 9)]


def operators():
    return simulator.load("upsample_conv2d")


class Simulated(torch.autograd.Function):
    """The CUDA operators as the simulator runs them, without the activation."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return operators().upsample_conv2d(x, weight, bias, "linear")

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = operators().upsample_conv2d_backward_input(grad, weight)
        return dx, operators().upsample_conv2d_backward_weight(grad, x), grad.sum((0, 2, 3))


def make(shape, dtype=torch.float32, layout="contiguous"):
    b, cin, cout, h, w = shape
    x = LAYOUTS[layout](torch.randn(b, cin, h, w).to(dtype))
    return x, (torch.randn(cout, cin, 3, 3) / (3 * cin**0.5)).to(dtype), torch.randn(cout).to(dtype)


def plain(activation="linear"):
    return lambda x, w, b: eager.upsample_conv2d(x, w, b, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_in_the_simulator(shape, dtype):
    check(Simulated.apply, plain(), *make(shape, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_the_simulator(layout):
    """Eight channels in half precision are read in place, others by way of a copy; either gives the same bits."""
    for cin, cout in ((8, 16), (5, 3)):
        x, w, b = make((2, cin, cout, 5, 6), torch.bfloat16)
        grad = torch.randn(2, cout, 10, 12).bfloat16()
        ops, of = operators(), LAYOUTS[layout]
        y = ops.upsample_conv2d(of(x), of(w), of(b), "silu")
        memory_format = torch.channels_last if "channels_last" in layout else torch.contiguous_format
        assert y.is_contiguous(memory_format=memory_format)
        assert torch.equal(y, ops.upsample_conv2d(x, w, b, "silu"))
        dx = ops.upsample_conv2d_backward_input(of(grad), of(w))
        assert dx.is_contiguous(memory_format=memory_format)
        assert torch.equal(dx, ops.upsample_conv2d_backward_input(grad, w))
        dw = ops.upsample_conv2d_backward_weight(of(grad), of(x))
        assert torch.equal(dw, ops.upsample_conv2d_backward_weight(grad, x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_in_the_simulator(activation, dtype):
    x, w, b = make((1, 9, 12, 3, 4), dtype)
    y = operators().upsample_conv2d(x, w, b, activation)
    reference = plain(activation)(x.double(), w.double(), b.double())
    bound = tolerance(dtype, relative_error(plain(activation)(x, w, b), reference))
    assert relative_error(y, reference) <= bound


def test_no_bias_in_the_simulator():
    x, w, _ = make((1, 9, 12, 3, 4))
    y = operators().upsample_conv2d(x, w, None, "relu")
    assert relative_error(y, plain("relu")(x.double(), w.double(), None)) <= tolerance(x.dtype)


@pytest.mark.parametrize("shape", [(0, 3, 5, 4, 4), (2, 0, 5, 4, 4), (2, 3, 0, 4, 4), (2, 3, 5, 0, 4)], ids=str)
def test_empty_in_the_simulator(shape):
    x, w, b = (t.requires_grad_() for t in make(shape))
    y = Simulated.apply(x, w, b)
    assert torch.equal(y, b.reshape(-1, 1, 1).expand_as(y))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_float32_is_rounded_to_tf32_where_torch_allows_it(tf32):
    """Ten bits behind the point: errors a thousand times larger, in the output and in both gradients."""
    tensors = make((2, 19, 35, 9, 7))
    grad = torch.rand(2, 35, 18, 14) + 0.5

    def results(run, tensors, grad):
        leaves = [t.requires_grad_() for t in tensors]
        y = run(*leaves)
        return y, *torch.autograd.grad(y, leaves[:2], grad)

    exact = results(plain(), [t.double() for t in tensors], grad.double())
    errors = map(relative_error, results(Simulated.apply, tensors, grad), exact)
    assert all(1e-4 < error < 1e-3 for error in errors)


def test_an_image_does_not_depend_on_its_batch():
    """Four images fill the simulator's multiprocessors with wide tiles, one takes small ones: the same bits."""
    x, w, b = make((4, 40, 24, 10, 8), torch.bfloat16)
    ops, grad = operators(), torch.randn(4, 24, 20, 16).bfloat16()
    together = ops.upsample_conv2d(x, w, b, "linear"), ops.upsample_conv2d_backward_input(grad, w)
    alone = ops.upsample_conv2d(x[2:3], w, b, "linear"), ops.upsample_conv2d_backward_input(grad[2:3], w)
    assert all(torch.equal(one, all_[2:3]) for one, all_ in zip(alone, together, strict=True))


def test_schedules_agree_to_the_bit(monkeypatch):
    """Whichever warp runs ahead and whenever a copy lands; more chunks of channels and tiles than stages."""
    tensors = [t.requires_grad_() for t in make((1, 72, 40, 9, 9), torch.bfloat16)]
    results = []
    for order, landing in itertools.product(("forward", "reverse", "random"), ("late", "early")):
        monkeypatch.setenv("SIM_ORDER", order)
        monkeypatch.setenv("SIM_ASYNC", landing)
        y = Simulated.apply(*tensors)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_warpgroups_and_warps_agree_to_the_bit(dtype, monkeypatch):
    """The kernel of sm_90a adds up in the order of the other one, in every schedule."""
    x, w, b = make((1, 168, 40, 17, 9), dtype)  # six chunks, in four stages
    expected = operators().upsample_conv2d(x, w, b, "linear")
    monkeypatch.setenv("SIM_ARCHITECTURE", "90")
    for order, landing in itertools.product(("forward", "reverse", "random"), ("late", "early")):
        monkeypatch.setenv("SIM_ORDER", order)
        monkeypatch.setenv("SIM_ASYNC", landing)
        assert torch.equal(operators().upsample_conv2d(x, w, b, "linear"), expected)


@pytest.mark.parametrize(
    "layout, cout, width, activation, passes",
    [
        ("channels_last", 128, 9, "silu", True),
        ("channels_last", 98, 9, "linear", True),
        ("channels_last", 320, 9, "linear", True),
        ("channels_last", 320, 8, "linear", False),  # of two waves of blocks the second would be half empty
        ("channels_last", 128, 9, "relu", False),
        ("channels_last", 127, 9, "linear", False),
        ("channels_last", 160, 9, "linear", False),
        ("contiguous", 128, 9, "linear", False),
    ],
)
def test_when_warpgroups_take_passes(layout, cout, width, activation, passes, monkeypatch):
    """That kernel alone adds up in an order of its own, which shows in bits where y is small beside its terms."""
    x, w, _ = make((1, 8, cout, 17, width), torch.bfloat16, layout)
    x, b = x + 64, -64 * w.sum((1, 2, 3))
    others = operators().upsample_conv2d(x, w, b, activation)
    monkeypatch.setenv("SIM_ARCHITECTURE", "90")
    assert torch.equal(operators().upsample_conv2d(x, w, b, activation), others) != passes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape, activation, biased",
    [((1, 40, 128, 17, 9), "silu", True), ((3, 19, 250, 9, 7), "linear", True), ((1, 8, 120, 17, 9), "silu", False)],
    ids=str,
)
def test_warpgroups_in_passes(shape, activation, biased, dtype, monkeypatch):
    """An odd number of tiles too, of which the last shares its weights with nobody."""
    monkeypatch.setenv("SIM_ARCHITECTURE", "90")
    x, w, b = make(shape, dtype, "channels_last")
    b = b if biased else None
    y = operators().upsample_conv2d(x, w, b, activation)
    assert y.is_contiguous(memory_format=torch.channels_last)
    reference = plain(activation)(x.double(), w.double(), b.double() if biased else None)
    assert relative_error(y, reference) <= tolerance(dtype, relative_error(plain(activation)(x, w, b), reference))


def test_schedules_of_the_passes_agree_to_the_bit(monkeypatch):
    """Seven chunks in each pass, patches in three stages and weights in five."""
    x, w, b = make((2, 104, 120, 9, 9), torch.bfloat16, "channels_last")
    monkeypatch.setenv("SIM_ARCHITECTURE", "90")
    results = []
    for order, landing in itertools.product(("forward", "reverse", "random"), ("late", "early")):
        monkeypatch.setenv("SIM_ORDER", order)
        monkeypatch.setenv("SIM_ASYNC", landing)
        results.append(operators().upsample_conv2d(x, w, b, "silu"))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_passes_over_no_channels(monkeypatch):
    monkeypatch.setenv("SIM_ARCHITECTURE", "90")
    x, w, b = make((1, 0, 128, 17, 9), torch.bfloat16, "channels_last")
    y = operators().upsample_conv2d(x, w, b, "linear")
    assert torch.equal(y, b.reshape(-1, 1, 1).expand_as(y))


@pytest.mark.parametrize(
    "architecture, shape, layout, dtype",
    [
        ("80", (2, 19, 36, 5, 7), "contiguous", torch.float32),
        ("80", (3, 8, 12, 17, 9), "channels_last", torch.bfloat16),
        ("90", (3, 24, 48, 9, 7), "contiguous", torch.float16),  # nine products at once, of an odd number of tiles too
        ("90", (3, 24, 252, 9, 7), "channels_last", torch.bfloat16),  # three passes, of a tile without a neighbour too
        ("90", (1, 8, 128, 18, 8), "channels_last", torch.float16),
    ],
    ids=str,
)
def test_moments_in_the_simulator(architecture, shape, layout, dtype, monkeypatch):
    """Of y as it is stored; far from zero too; y's bits are those without them."""
    monkeypatch.setenv("SIM_ARCHITECTURE", architecture)
    ops = operators()
    x, w, b = make(shape, dtype, layout)
    b[:9] += 100
    for activation, groups in (("linear", 3 if shape[2] % 3 == 0 else 4), ("silu", shape[2])):
        results = []
        for order in ("forward", "random"):
            monkeypatch.setenv("SIM_ORDER", order)
            results.append(ops.upsample_conv2d_moments(x, w, b, activation, groups))
        assert all(map(torch.equal, *results))
        y, moments = results[0]
        assert torch.equal(y, ops.upsample_conv2d(x, w, b, activation))
        for found, exact in zip(moments.unbind(-1), moments_of(y.double(), groups).unbind(-1), strict=True):
            assert relative_error(found, exact) <= 1e-5


def test_moments_of_nothing_in_the_simulator():
    x, w, b = make((2, 3, 6, 0, 4))
    assert torch.equal(operators().upsample_conv2d_moments(x, w, b, "linear", 3)[1], torch.zeros(2, 3, 2))
    with pytest.raises(
        RuntimeError, match="moments must be a number of groups that divides weight's 6 output channels"
    ):
        operators().upsample_conv2d_moments(x, w, b, "linear", 4)


# ---- weights packed beforehand


@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("cin, cout", [(5, 3), (40, 64), (24, 98), (33, 160)])
def test_a_weight_packed_beforehand(cin, cout, architecture, monkeypatch):
    """One order for all kernels: blocks of 32, 64 and 128 channels, whole and not."""
    monkeypatch.setenv("SIM_ARCHITECTURE", architecture)
    x, w, b = make((2, cin, cout, 17, 9), torch.bfloat16, "channels_last")
    packed = operators().upsample_conv2d_pack_weight(w.mT.contiguous().mT)
    y, moments = operators().upsample_conv2d_packed(x, packed, b, "silu", cout, 0)
    assert torch.equal(y, operators().upsample_conv2d(x, w, b, "silu")) and moments.shape == (2, 0, 2)
    expected = operators().upsample_conv2d_moments(x, w, b, "silu", cout)
    assert all(map(torch.equal, operators().upsample_conv2d_packed(x, packed, b, "silu", cout, cout), expected))


def test_opcheck_of_packed_weights():
    for name, fake in (("pack_weight", _fake_pack_weight), ("packed", _fake_packed)):
        operators()  # whose namespace it is
        torch.library.register_fake(f"imagegen_sim::upsample_conv2d_{name}", fake)
    for cin, cout, dtype in ((5, 3, torch.float32), (33, 65, torch.bfloat16), (0, 40, torch.float16)):
        x, w, b = make((1, cin, cout, 3, 4), dtype, "channels_last")
        pack = operators().upsample_conv2d_pack_weight
        torch.library.opcheck(pack, (w,))
        torch.library.opcheck(operators().upsample_conv2d_packed, (x, pack(w), b, "linear", cout, 1))


def test_errors_of_packed_weights():
    x, w, b = make((1, 5, 40, 3, 4))
    packed = operators().upsample_conv2d_pack_weight(w)
    message = (
        "upsample_conv2d: packed_weight must be what upsample_conv2d_pack_weight makes of a weight of shape "
        r"\(40, 5, 3, 3\), got a tensor of shape \(9215,?\)"
    )
    with pytest.raises(RuntimeError, match=message):
        operators().upsample_conv2d_packed(x, packed[1:], b, "linear", 40, 0)
    with pytest.raises(ValueError, match=message):
        ops.upsample_conv2d(x, w, b, packed_weight=packed[1:])
    message = "upsample_conv2d: packed_weight must have weight's dtype torch.float32, got torch.float16"
    with pytest.raises(TypeError, match=message):
        ops.upsample_conv2d(x, w, b, packed_weight=packed.half())
    for wrong in (w[0], w.double()):
        with pytest.raises(RuntimeError, match=r"_pack_weight: (weight must have shape|the cuda kernel takes)"):
            operators().upsample_conv2d_pack_weight(wrong)


@pytest.fixture
def packing(monkeypatch):
    """nn.UpsampleConv2d runs in the simulator, and a list fills with the weights that it packs."""
    packed = []

    def pack(weight):
        packed.append(weight)
        return operators().upsample_conv2d_pack_weight(weight)

    simulated = _kernel(*(getattr(operators(), f"upsample_conv2d{part}") for part in ("", "_moments", "_packed")))
    monkeypatch.setitem(_backend.implementations("upsample_conv2d"), "cpu", simulated)
    monkeypatch.setattr("imagegen.nn.upsample_conv2d._packs", lambda weight: True)
    monkeypatch.setattr(_library, "op", lambda name: {"upsample_conv2d_pack_weight": pack}[name])
    return packed


def _in_place(module):
    with torch.no_grad():
        module.weight.mul_(2)


def _optimizer_step(module):
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.SGD([module.weight], lr=0.1).step()


def _load(module):
    module.load_state_dict(nn.UpsampleConv2d(6, 8).state_dict())


def _replace(module):
    for _ in range(2):  # the second may well lie where the first one lay
        module.weight = torch.nn.Parameter(torch.randn_like(module.weight))


def _to_and_back(module):
    module.bfloat16().float()


def _data_and_pack(module):
    module.weight.data.neg_()
    module.pack_weight()


@pytest.mark.parametrize("change", [_in_place, _optimizer_step, _load, _replace, _to_and_back, _data_and_pack])
def test_a_module_packs_its_weight_once(change, packing):
    module, x = nn.UpsampleConv2d(6, 8).pack_weight(), torch.randn(1, 6, 3, 4)
    with torch.no_grad():
        for times in (1, 2):
            for _ in range(2):
                expected = plain()(x.double(), module.weight.double(), module.bias.double())
                assert relative_error(module(x), expected) <= 1e-5
            assert len(packing) == times
            with torch.enable_grad():
                change(module)


def test_a_module_with_gradients_or_autocast_takes_the_weight_itself(packing):
    module, x = nn.UpsampleConv2d(6, 8).pack_weight(), torch.randn(1, 6, 3, 4)
    assert module(x).shape == (1, 8, 6, 8) and not packing
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module(x)
    assert not packing
    with torch.no_grad():
        y, twin = module(x), copy.deepcopy(module)
        assert torch.equal(twin(x), y)
    assert [p.data_ptr() for p in packing] == [m.weight.data_ptr() for m in (module, twin)]


def test_what_the_cuda_kernels_do_not_take():
    x, w, b = make((1, 2, 3, 4, 5), torch.float64)
    message = "the cuda kernel takes float32, bfloat16 or float16, x is torch.float64"
    with pytest.raises(RuntimeError, match=f"upsample_conv2d: {message}"):
        operators().upsample_conv2d(x, w, b, "linear")


@pytest.mark.parametrize("sanitizer, dtype", [("address", "bf16"), ("address", "f32"), ("thread", "bf16")])
def test_sanitizers_find_nothing(sanitizer, dtype):
    kernels = sorted((simulator.ROOT / "csrc/ops/cuda").glob("upsample_conv2d*_kernel.cu"))
    program = simulator.build_program([*kernels, simulator.HERE / "upsample_conv2d_main.cpp"], sanitizer)
    printed, said = simulator.run_program(program, dtype, order="random")
    assert printed == "ran\n"
    assert simulator.found_nothing(said), said


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("stem, products", [("", {"64x32x16": 18}), ("_passes", {"64x128x16": 3})])
def test_warpgroup_products(stem, products):
    """They are as wide and as many as written: nothing was unrolled or taken apart."""
    for kernel in kernels(f"upsample_conv2d_wgmma{stem}", "90a"):
        assert Counter(re.findall(r" HGMMA\.(\w+)", kernel.sass)) == products, kernel.name
