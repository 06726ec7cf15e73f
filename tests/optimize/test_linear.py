import copy
import pickle

import pytest
import torch
from helpers import relative_error
from torch import nn

import imagegen
from imagegen._optimize import linear
from imagegen.ops._layout import memory_format

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """As on a machine where oneDNN is the faster library, for matrices of any size."""
    monkeypatch.setattr(linear, "FASTER", True)
    monkeypatch.setattr(linear, "_FEWEST", 1)


def rows():
    return torch.randn(3, 7, 33)


def rows_apart():
    return torch.randn(2, 5, 66)[..., ::2]


def one_row():
    return torch.randn(33)


def repeated():
    return torch.randn(1, 33).expand(6, 33)


def images():
    return torch.randn(2, 33, 5, 7)


def images_channels_last():
    return images().to(memory_format=torch.channels_last)


def images_channels_last_slice():
    return torch.randn(2, 66, 5, 7).to(memory_format=torch.channels_last)[:, :33]


def images_apart():
    return torch.randn(2, 33, 5, 14)[..., ::2]


def one_pixel():
    return torch.randn(3, 33, 1, 1)


CASES = [(lambda bias: nn.Linear(33, 19, bias), make) for make in (rows, rows_apart, one_row, repeated)]
CASES += [
    (lambda bias: nn.Conv2d(33, 19, 1, bias=bias), make)
    for make in (images, images_channels_last, images_channels_last_slice, images_apart, one_pixel)
]
every_case = pytest.mark.parametrize(("build", "make"), CASES, ids=lambda f: f.__name__.strip("<>"))


def optimized(layer):
    assert [r.by for r in imagegen.optimize(layer).replaced] == ["oneDNN"]
    return layer


def calls_of_onednn(profile):
    return sum(e.count for e in profile.key_averages() if e.key == "mkldnn::_linear_pointwise")


@every_case
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients(build, make, bias):
    layer = build(bias)
    twin = copy.deepcopy(layer).double()
    x = make()
    results = []
    with torch.profiler.profile() as profile:
        optimized(layer)(x)
    assert any(e.key in ("imagegen::linear", "imagegen::pointwise") for e in profile.key_averages())
    for module, t in (layer, x), (twin, x.double()):
        t = t.detach().requires_grad_()
        y = module(t)
        y.square().sum().backward()
        results.append([y, t.grad, *(p.grad for p in module.parameters())])
    for ours, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) < 1e-6
    assert memory_format(layer(x)) is memory_format(x)


@every_case
def test_gradients_of_gradients(build, make):
    layer = build(True)
    twin = copy.deepcopy(layer).double()
    x = make()
    results = []
    for module, t in (optimized(layer), x), (twin, x.double()):
        t = t.detach().requires_grad_()
        tensors = [t, *module.parameters()]
        first = torch.autograd.grad(module(t).pow(3).sum(), tensors, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for ours, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) < 1e-5


@pytest.mark.parametrize(("layer", "make"), [(nn.Linear(33, 19), rows), (nn.Conv2d(33, 19, 1), images)])
def test_forward_mode(layer, make):
    layer, x = copy.deepcopy(layer), make()
    twin, tangent = copy.deepcopy(layer).double(), torch.randn_like(x)
    _, ours = torch.func.jvp(optimized(layer), (x,), (tangent,))
    assert relative_error(ours, torch.func.jvp(twin, (x.double(),), (tangent.double(),))[1]) < 1e-6


def test_gradients_of_each_sample():
    layer, x = optimized(nn.Linear(33, 19)), torch.randn(4, 33)
    grads = torch.func.vmap(torch.func.grad(lambda x: layer(x).square().sum()))(x)
    assert relative_error(grads, torch.func.grad(lambda x: layer(x).square().sum())(x)) < 1e-6


def test_what_onednn_does_not_take_stays_with_torch():
    layer = nn.Linear(33, 19)
    twin = copy.deepcopy(layer)
    jagged = torch.nested.nested_tensor([torch.randn(2, 33), torch.randn(5, 33)], layout=torch.jagged)
    assert torch.equal(optimized(layer)(jagged).values(), twin(jagged).values())
    sparse = torch.randn(4, 33).to_sparse()
    assert torch.equal(layer(sparse), twin(sparse))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.randn(5, 32))


def test_half_precision_and_layers_without_a_weight_are_not_replaced():
    bare = nn.Linear(33, 19)
    del bare.weight
    for layer in nn.Linear(33, 19).bfloat16(), nn.Conv2d(33, 19, 1).double(), bare:
        assert imagegen.optimize(layer).replaced == []


def test_other_dtypes_and_autocast_stay_with_torch():
    net = nn.Sequential(nn.Linear(33, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    imagegen.optimize(net)
    net[1].double()
    with torch.profiler.profile() as profile:
        net[0](torch.randn(5, 33)), net[1](torch.randn(5, 8).double())
        with torch.autocast("cpu"):
            assert net[2](torch.randn(5, 8)).dtype == torch.bfloat16
    assert calls_of_onednn(profile) == 1


def test_small_products_stay_with_mkl(monkeypatch):
    monkeypatch.setattr(linear, "_FEWEST", 5 * 33 * 8)
    layer = optimized(nn.Linear(33, 8))
    for rows, calls in (4, 0), (5, 1):
        with torch.profiler.profile() as profile:
            layer(torch.randn(rows, 33))
        assert calls_of_onednn(profile) == calls


def test_the_gradient_of_a_weight_over_many_rows(monkeypatch):
    monkeypatch.setattr(linear, "_LARGEST_TRANSPOSED", 0)
    layer, x = optimized(nn.Linear(33, 19)), rows()
    layer(x).sum().backward()
    assert relative_error(layer.weight.grad, x.double().sum((0, 1)).expand(19, 33)) < 1e-6


def test_nothing_is_replaced_where_mkl_is_as_fast(monkeypatch):
    monkeypatch.setattr(linear, "FASTER", False)
    report = imagegen.optimize(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1)))
    assert report.replaced == []
    assert [(left.name, left.why) for left in report.left] == [("1", "kernel_size=(1, 1): torch's own is as fast")]


def test_layers_on_other_devices_are_not_replaced():
    report = imagegen.optimize(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1)).to("meta"))
    assert report.replaced == []


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"groups": 2}])
def test_other_convolutions_are_left(options):
    (left,) = imagegen.optimize(nn.Conv2d(4, 4, 1, **options)).left
    assert left.was == "Conv2d"


def test_restore_pickle_and_a_second_call():
    net = nn.Sequential(nn.Linear(33, 19), nn.Conv2d(33, 19, 1))
    imagegen.optimize(net)
    assert imagegen.optimize(net).kept == 2 and not imagegen.optimize(net).left
    loaded = pickle.loads(pickle.dumps(net))
    x = rows()
    torch.testing.assert_close(loaded[0](x), net[0](x), rtol=0, atol=0)
    imagegen.restore(net)
    assert [type(layer) for layer in net] == [nn.Linear, nn.Conv2d]


# Not test_aot_dispatch_dynamic, which takes twenty seconds; test_compile traces as well.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("make", [images, images_channels_last])
def test_operators(make):
    weight, bias = torch.randn(19, 33, 1, 1, requires_grad=True), torch.randn(19, requires_grad=True)
    inputs = {
        "linear": (rows(), weight.detach().flatten(1), bias),
        "pointwise": (make().requires_grad_(), weight, bias),
    }
    for name, tensors in inputs.items():
        torch.library.opcheck(getattr(torch.ops.imagegen, name).default, tensors, test_utils=CHECKS)


def test_compile():
    net = nn.Sequential(nn.Linear(33, 19), nn.SiLU()).eval()
    x = rows()
    expected = net(x)
    imagegen.optimize(net)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), expected)
