import copy
import io
import pickle
import types
import warnings

import pytest
import torch
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import imagegen
from imagegen import _library
from imagegen._optimize import modules, walk
from imagegen.ops import _backend


class Net(nn.Module):
    """One of everything that is replaced, and some of what is not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding="same"), nn.ReLU())
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1, bias=False))
        self.transposed = nn.Sequential(
            nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.last = nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1, output_padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
            self.transposed[1].running_var.uniform_(0.5, 2)
            self.transposed[1].running_mean.normal_()

    def forward(self, x):
        return self.last(self.transposed(self.up(self.down(self.block(self.stem(x))))))


@pytest.fixture
def net():
    return Net().eval()


def images(dtype=torch.float32):
    return torch.randn(2, 3, 6, 10).to(dtype)


def rows(report):
    return {(r.name, r.was): r.by for r in report.replaced}, {(r.name, r.was): r.why for r in report.left}


def test_every_layer_is_replaced_or_named(net):
    replaced, left = rows(imagegen.optimize(net))
    assert replaced == {
        ("stem", "Conv2d"): "conv2d",
        ("block.0", "GroupNorm"): "group_norm",
        ("block.0", "GroupNorm + SiLU + Conv2d + ReLU"): "conv2d",
        ("block.1", "SiLU"): "bias_act",
        ("block.2", "Conv2d"): "conv2d",
        ("up.0", "Upsample + Conv2d"): "upsample_conv2d",
        ("up.1", "Conv2d"): "conv2d",
        ("transposed.0", "ConvTranspose2d"): "conv_transpose2d",
        ("transposed.0", "ConvTranspose2d + BatchNorm2d + ReLU"): "conv_transpose2d",
        ("last", "ConvTranspose2d"): "conv_transpose2d",
    }
    assert left == {("down", "Conv2d"): "stride=(2, 2)"}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs(net, layout):
    x = images().to(memory_format=layout)
    exact = copy.deepcopy(net).double()(x.double())
    imagegen.optimize(net)
    assert relative_error(net(x), exact) < 1e-5
    assert relative_error(net.double()(x.double()), exact) < 1e-12


def test_what_runs_as_one(net, calls):
    imagegen.optimize(net)
    net(images())
    ops = ["conv2d", "group_norm", "conv2d", "upsample_conv2d", "conv_transpose2d", "conv_transpose2d"]
    assert calls == ops
    calls.clear()
    net.train()(images())  # the batch norm needs the statistics of the transposed convolution
    assert calls == ops


def test_a_large_norm_is_applied_by_the_convolution_that_reads_it(net, calls, monkeypatch):
    x = images()
    y = net(x)
    imagegen.optimize(net)
    monkeypatch.setattr(modules, "_CACHED_BYTES", 0)
    with torch.no_grad():
        torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)
    assert calls[:4] == ["conv2d", "group_norm_factors", "conv2d", "upsample_conv2d"]
    calls.clear()
    net(x)  # its gradient will need the normalised x
    assert calls[:4] == ["conv2d", "group_norm", "conv2d", "upsample_conv2d"]


@pytest.mark.parametrize("training", [False, True])
def test_gradients_and_running_statistics(net, training):
    net.double().train(training)
    twin = copy.deepcopy(net)
    imagegen.optimize(net)
    x = images(torch.float64)
    for module in (net, twin):
        module(x).square().mean().backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < 1e-12, name
    for (name, b), c in zip(net.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=name)


def test_names_parameters_and_modules_stay(net):
    before = dict(net.named_modules()), dict(net.named_parameters()), dict(net.named_buffers()), list(net.state_dict())
    imagegen.optimize(net)
    assert (
        dict(net.named_modules()),
        dict(net.named_parameters()),
        dict(net.named_buffers()),
        list(net.state_dict()),
    ) == before
    assert all(isinstance(net.stem, kind) for kind in (nn.Conv2d, nn.Module))
    fresh = Net()
    fresh.load_state_dict(net.state_dict())
    net.load_state_dict(fresh.state_dict())


def test_restore_undoes_it_exactly(net):
    x = images()
    y, state = net(x), {name: dict(vars(module)) for name, module in net.named_modules()}
    kinds = {name: type(module) for name, module in net.named_modules()}
    imagegen.optimize(net)
    assert {name: type(module) for name, module in net.named_modules()} != kinds
    imagegen.restore(net)
    assert {name: type(module) for name, module in net.named_modules()} == kinds
    assert {name: dict(vars(module)) for name, module in net.named_modules()} == state
    assert torch.equal(net(x), y)
    imagegen.restore(net)
    assert {name: type(module) for name, module in net.named_modules()} == kinds


def test_a_second_call_finds_nothing_more_to_do(net):
    first = imagegen.optimize(net)
    kinds = [type(module) for module in net.modules()]
    second = imagegen.optimize(net)
    assert [type(module) for module in net.modules()] == kinds
    assert second.replaced == [] and second.left == first.left and second.kept == 10
    assert str(second).startswith("0 replaced, 10 were before, 1 left\n")


def test_copies_and_pickles(net):
    imagegen.optimize(net)
    x = images()
    y = net(x)
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(twin(x), y) and type(twin.stem) is type(net.stem)
        imagegen.restore(twin)
        assert type(twin.stem) is nn.Conv2d and type(twin.block) is nn.Sequential


def test_moves_and_modes(net):
    imagegen.optimize(net)
    x = images()
    y = net.double()(x.double())
    assert y.dtype == torch.float64
    half = net.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative_error(half, y) < 0.05
    assert net.to("meta")(x.bfloat16().to("meta")).shape == y.shape


def test_autocast(net):
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        imagegen.optimize(net)
        z = net(x)
    assert z.dtype == y.dtype and relative_error(z, y) < 0.05


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile(net):
    imagegen.optimize(net)
    torch._dynamo.reset()
    x = images()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))


def test_images_without_a_batch(net):
    x = images()[0]
    net = nn.Sequential(net.stem, net.block[2], net.block[3], net.last.__class__(8, 3, 4, 2, 1))
    y = net(x)
    imagegen.optimize(net)
    torch.testing.assert_close(net(x), y)


def test_output_size_of_a_transposed_convolution():
    conv = nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1)
    x = torch.randn(1, 3, 5, 5)
    y = conv(x, output_size=(11, 10))
    imagegen.optimize(conv)
    assert torch.equal(conv(x, output_size=(11, 10)), y)


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (nn.Conv2d(4, 4, 1), "kernel_size=(1, 1): torch's own is as fast"),
        (nn.Conv2d(4, 4, 3), "padding=(0, 0)"),
        (nn.Conv2d(4, 4, 3, padding="valid"), "padding='valid'"),
        (nn.Conv2d(4, 4, 5, padding="same"), "kernel_size=(5, 5)"),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2), "padding=(2, 2)"),
        (nn.Conv2d(4, 4, 3, padding="same", dilation=2), "dilation=(2, 2)"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), "groups=2"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.ConvTranspose2d(4, 4, 2, stride=2), "kernel_size=(2, 2)"),
        (nn.ConvTranspose2d(4, 4, 4), "stride=(1, 1)"),
        (nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1), "output_padding=(0, 0)"),
        (nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, groups=2), "groups=2"),
    ],
    ids=str,
)
def test_other_geometries_are_left_and_named(conv, why):
    report = imagegen.optimize(nn.Sequential(conv, nn.ReLU()))
    assert report.replaced == [] and [(left.name, left.why) for left in report.left] == [("0", why)]
    assert type(conv) in (nn.Conv2d, nn.ConvTranspose2d)


class OtherConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("kind", [OtherConv, type("Renamed", (nn.Conv2d,), {})])
def test_subclasses_are_left_and_named(kind):
    model = nn.ModuleDict({"conv": kind(3, 3, 3, padding=1)})
    report = imagegen.optimize(model)
    assert report.replaced == [] and type(model["conv"]) is kind
    assert str(report.left) == f"[Left(name='conv', was='Conv2d', why='it is a subclass, {kind.__name__}')]"


def test_a_parametrised_convolution_is_left():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    report = imagegen.optimize(conv)
    assert report.left[0].why == "it is a subclass, ParametrizedConv2d"


def test_the_old_weight_norm_goes_on_working():
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    x = images()
    imagegen.optimize(conv)
    with torch.no_grad():
        conv.weight_g.mul_(2)
        expected = nn.functional.conv2d(x, 2 * conv.weight_v * 1, conv.bias, padding=1)
        torch.testing.assert_close(conv(x), expected)


def test_a_forward_of_its_own_is_left_and_named(net):
    forward = net.stem.forward
    net.stem.forward = lambda x: forward(x) * 2
    y = net(images() * 0 + 1)
    report = imagegen.optimize(net)
    assert ("stem", "it has a forward of its own") in [(left.name, left.why) for left in report.left]
    torch.testing.assert_close(net(images() * 0 + 1), y)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_what_they_always_saw(net, kind, when):
    """Of layers one by one, and of those that would otherwise run as one."""
    places = ("stem", "block.1", "block.3", "up.0", "transposed.1")
    x = images().requires_grad_()
    seen = {}

    def hook(place, twin):
        def note(module, *values):
            value = values[-1][0] if isinstance(values[-1], tuple) else values[-1]
            seen.setdefault((place, twin), []).append(value.detach().clone())

        return note

    plain = copy.deepcopy(net)
    report = imagegen.optimize(net) if when == "after" else None
    for place in places:
        for twin, model in enumerate((net, plain)):
            getattr(model.get_submodule(place), f"register_{kind}_hook")(hook(place, twin))
    report = report or imagegen.optimize(net)
    for model in (net, plain):
        model(x).square().mean().backward()
    for place in places:
        (ours,), (theirs,) = seen[place, 0], seen[place, 1]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    if when == "before":
        why = {"full_backward": "backward hooks", "full_backward_pre": "backward pre hooks"}.get(
            kind, f"{kind.replace('_', ' ')} hooks"
        )
        named = {(left.name, left.was): left.why for left in report.left}
        assert named["block.0", "GroupNorm + SiLU + Conv2d + ReLU"] == f"SiLU has {why}, which would be bypassed"
        assert named["up.0", "Upsample + Conv2d"] == f"Upsample has {why}, which would be bypassed"


def test_global_hooks_see_every_module(net):
    imagegen.optimize(net)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        net(images())
    finally:
        handle.remove()
    assert set(map(id, seen)) == set(map(id, net.modules()))


def test_a_child_may_be_exchanged_afterwards(net, calls):
    imagegen.optimize(net)
    net.block[3] = nn.Tanh()
    net.up[1] = OtherConv(8, 8, 3, padding=1)
    x = images()
    y = net(x)
    assert calls == ["conv2d", "group_norm", "conv2d", "conv_transpose2d", "conv_transpose2d"]
    imagegen.restore(net)
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)


LARGE = torch.randn(1, 4, 256, 256)  # 1 MB


def silu_of_vmap(act):
    return torch.func.vmap(act)(LARGE)


def silu_of_jvp(act):
    return torch.func.jvp(act, (LARGE,), (LARGE.flip(-1),))[1]


@pytest.mark.parametrize(
    ("run", "op"),
    [
        (lambda act: act(LARGE), ["bias_act"]),
        (lambda act: act(LARGE.bfloat16().repeat(2, 1, 1, 1).mT), ["bias_act"]),
        (lambda act: act(LARGE[..., 1:]), []),
        (lambda act: act(LARGE.double()[..., :64]), []),
        (lambda act: act(LARGE.clone().requires_grad_()), []),
        (lambda act: torch.compile(act, backend="eager")(LARGE), []),
        (silu_of_vmap, []),
        (silu_of_jvp, []),
    ],
    ids=["large", "bfloat16", "small", "half", "recorded", "compiled", "vmap", "jvp"],
)
def test_a_large_silu_takes_memory_that_is_paged_in(run, op, calls):
    y, act = run(nn.SiLU()), nn.SiLU()
    imagegen.optimize(act)
    calls.clear()
    ours = run(act)
    assert calls == op
    torch.testing.assert_close(ours, y, rtol=2**-8 if y.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_a_silu_of_nested_tensors_is_torch_s(layout, calls):
    x = torch.nested.nested_tensor([LARGE[0, 0], LARGE[0].flatten(0, 1)], layout=layout)
    act = nn.SiLU()
    y = act(x)
    imagegen.optimize(act)
    for ours, theirs in zip(act(x).unbind(), y.unbind(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert calls == []


def test_a_silu_in_place_is_left():
    act = nn.SiLU(inplace=True)
    assert not imagegen.optimize(act).replaced and type(act) is nn.SiLU


def test_shared_modules():
    """One convolution in two places, its activation in one of them and used alone as well."""
    conv, act = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Sequential(conv, act), nn.Sequential(act, conv), conv

        def forward(self, x):
            return self.a(x) + self.b(x) + self.c(x)

    model, x = Shared(), torch.randn(1, 4, 6, 6)
    y = model(x)
    replaced, left = rows(imagegen.optimize(model))
    assert replaced == {("a.0", "Conv2d"): "conv2d", ("a.0", "Conv2d + ReLU"): "conv2d"} and not left
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


def test_children_used_one_by_one_and_in_slices(net):
    x = torch.randn(1, 8, 6, 6)
    expected = [net.block[:n](x) for n in range(1, 5)]
    one_by_one = [net.block[0](x), net.block[1](x), net.block[2](x)]
    imagegen.optimize(net)
    for n in range(1, 5):
        torch.testing.assert_close(net.block[:n](x), expected[n - 1], rtol=1e-4, atol=1e-5)
    for child, y in zip(net.block, one_by_one, strict=False):
        torch.testing.assert_close(child(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("act", "fuses"),
    [
        (nn.ReLU(), True),
        (nn.LeakyReLU(0.2), True),
        (nn.LeakyReLU(0.01), False),
        (nn.GELU(), True),
        (nn.GELU("tanh"), False),
        (nn.Tanh(), True),
        (nn.Sigmoid(), True),
        (nn.Mish(), False),
        (nn.Identity(), False),
        (nn.ReLU6(), False),
    ],
    ids=str,
)
def test_activations(act, fuses, calls):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), act)
    x = images()
    y = model(x)
    report = imagegen.optimize(model)
    assert len(report.replaced) == 1 + fuses
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("upsample", "fuses"),
    [
        (nn.Upsample(scale_factor=2), True),
        (nn.Upsample(scale_factor=(2.0, 2.0)), True),
        (nn.UpsamplingNearest2d(scale_factor=2), True),
        (nn.Upsample(scale_factor=3), False),
        (nn.Upsample(scale_factor=(2.0, 1.0)), False),
        (nn.Upsample(size=(12, 20)), False),
        (nn.Upsample(scale_factor=2, mode="bilinear"), False),
        (nn.Upsample(scale_factor=2, mode="nearest-exact"), False),
        (nn.UpsamplingBilinear2d(scale_factor=2), False),
    ],
    ids=str,
)
def test_upsamplings(upsample, fuses, calls):
    model = nn.Sequential(upsample, nn.Conv2d(3, 4, 3, padding=1))
    x = images()
    y = model(x)
    imagegen.optimize(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert calls == ["upsample_conv2d" if fuses else "conv2d"]


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norms(options, bias):
    conv, norm = nn.ConvTranspose2d(3, 4, 4, 2, 1, bias=bias), nn.BatchNorm2d(4, eps=0.1, **options)
    if norm.running_mean is not None:
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    model = nn.Sequential(conv, norm).eval().double()
    x = images(torch.float64)
    y = model(x)
    imagegen.optimize(model)
    torch.testing.assert_close(model(x), y)


LAYERS = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "pointwise": lambda: nn.Conv2d(4, 4, 1),
    "norm": lambda: nn.GroupNorm(2, 4),
    "silu": nn.SiLU,
    "relu": lambda: nn.ReLU(inplace=True),
    "upsample": lambda: nn.Upsample(scale_factor=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 4, 2, 1),
    "batch_norm": lambda: nn.BatchNorm2d(4),
    "pool": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "nested": lambda: nn.Sequential(nn.GroupNorm(4, 4), nn.Tanh()),
}


@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), max_size=6),
    hooked=st.sets(st.integers(0, 5)),
    training=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_sequence(names, hooked, training):
    torch.manual_seed(0)
    model = nn.Sequential(*(LAYERS[name]() for name in names)).double().train(training)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    seen = []
    for i in hooked & set(range(len(names))):
        model[i].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    y, count = copy.deepcopy(model)(x), len(seen)
    imagegen.optimize(model)
    torch.testing.assert_close(model(x), y)
    assert len(seen) == 2 * count
    for theirs, ours in zip(seen[:count], seen[count:], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_pipeline(net):
    components = {"net": net, "scheduler": object(), "nothing": None, "norm": nn.GroupNorm(1, 3)}
    pipeline = types.SimpleNamespace(components=components)
    replaced, left = rows(imagegen.optimize(pipeline))
    assert ("net.stem", "Conv2d") in replaced and ("norm", "GroupNorm") in replaced
    assert left == {("net.down", "Conv2d"): "stride=(2, 2)"}
    imagegen.restore(pipeline)
    assert type(net.stem) is nn.Conv2d and type(components["norm"]) is nn.GroupNorm


@pytest.mark.parametrize("function", [imagegen.optimize, imagegen.restore])
def test_other_objects_are_refused(function):
    message = f"{function.__name__}: model must be a torch.nn.Module or a pipeline, got list"
    with pytest.raises(TypeError, match=message):
        function([])


def test_no_kernel_no_replacement(net, kernels, monkeypatch):
    monkeypatch.setattr(walk, "_missing_kernel", kernels)
    report = imagegen.optimize(net.to("meta"))
    assert {r.was for r in report.replaced} == {"SiLU"}  # without parameters, so on no device
    assert type(net.stem) is nn.Conv2d
    assert ("stem", "imagegen has no kernels for meta") in [(left.name, left.why) for left in report.left]


def test_without_the_library_every_layer_is_left_with_the_reason(net, kernels, monkeypatch):
    monkeypatch.setattr(walk, "_missing_kernel", kernels)
    monkeypatch.setattr(_library, "load_error", "the compiled kernels are not there: a test hid them")
    report = imagegen.optimize(net)
    assert report.replaced == []
    assert {left.why for left in report.left} >= {f"cpu: {_library.load_error}", "stride=(2, 2)"}


def test_the_report_prints_as_a_table(capsys):
    block = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
    report = imagegen.optimize(nn.ModuleList([block, copy.deepcopy(block)]), verbose=True)
    assert str(report) == (
        "8 replaced, 2 left\n"
        "\n"
        "replaced                   by          count  where\n"
        "-------------------------  ----------  -----  -----\n"
        "GroupNorm                  group_norm  2      *.0\n"
        "SiLU                       bias_act    2      *.1\n"
        "Conv2d                     conv2d      2      *.2\n"
        "GroupNorm + SiLU + Conv2d  conv2d      2      *.0\n"
        "\n"
        "left    because                                     count  where\n"
        "------  ------------------------------------------  -----  -----\n"
        "Conv2d  kernel_size=(1, 1): torch's own is as fast  2      *.3"
    )
    assert capsys.readouterr().out == f"{report}\n"


@pytest.mark.skipif(not _backend._triton_is_installed, reason="without a GPU's kernels there is nothing to replace")
def test_on_cuda_the_convolution_stays_with_cudnn_and_the_norm_before_it_is_fused():
    norm, conv = torch.nn.GroupNorm(4, 8, device="meta"), torch.nn.Conv2d(8, 8, 3, padding=1, device="meta")
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")  # a fallback would warn
        for module in norm, conv:
            for name, p in module.named_parameters():
                setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, device="cuda")))
        model = torch.nn.Sequential(norm, torch.nn.SiLU(), conv)
        report = imagegen.optimize(model)
        with torch.no_grad(), Calls() as calls:
            y = model(torch.empty(2, 8, 16, 16, device="cuda"))
    assert not report.left
    assert y.shape == (2, 8, 16, 16) and y.is_cuda
    computed = [name for name in calls.names if not name.startswith(("prim::", "aten::empty"))]
    assert len(computed) == 2 and computed[0].startswith("imagegen::group_norm"), computed
    assert computed[1] == "aten::convolution"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available to torch")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["eager", "cuda_graph", "compile"])
def test_on_cuda_a_model_runs_as_it_is_captured_and_compiled(way, dtype):
    vae = pytest.importorskip("diffusers", reason="diffusers is not installed").AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    decode = vae.eval().requires_grad_(False).cuda().decode
    latents = torch.randn(1, 4, 16, 16, device="cuda")
    exact = vae.double().decode(latents.double()).sample
    latents = latents.to(dtype)
    plain = vae.to(dtype).decode(latents).sample
    imagegen.optimize(vae)
    if way == "eager":
        y = decode(latents).sample
    elif way == "compile":
        y = torch.compile(decode)(latents).sample
    else:
        decode(latents)  # what is tuned is tuned before
        graph, zeros = torch.cuda.CUDAGraph(), torch.zeros_like(latents)
        with torch.cuda.graph(graph):
            y = decode(zeros).sample
        zeros.copy_(latents)
        graph.replay()
    error, allowed = ((t.double() - exact).norm() / exact.norm() for t in (y, plain))
    assert error <= 3 * allowed


class Calls(TorchDispatchMode):
    """The names of the operators that are called."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))
