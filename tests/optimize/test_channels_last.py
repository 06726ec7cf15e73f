"""What optimize does to the memory format of half precision convolutions on CUDA, shown on CPU and fake tensors."""

import copy
import io
import pickle

import pytest
import torch
from helpers import relative_error
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import imagegen
from imagegen._optimize import channels_last
from imagegen.ops import _backend


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 8, 1)  # which lies in both formats
        self.block = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1))
        self.down = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.eval()

    def forward(self, x):
        return self.down(self.up(self.block(self.pointwise(self.stem(x)))))


def net_in_half():
    return Net().bfloat16()


MOVED = ["stem", "block.2", "up.1", "down"]


@pytest.fixture
def here(monkeypatch):
    """CPU tensors take the place of a GPU's."""
    monkeypatch.setattr(channels_last, "DEVICE", "cpu")


def formats(net):
    return {name: p.stride() for name, p in net.named_parameters()}


def in_channels_last(t):
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def test_weights_are_moved_and_moved_back(here):
    net = net_in_half()
    before, parameters, values = formats(net), list(net.parameters()), copy.deepcopy(net.state_dict())
    report = imagegen.optimize(net)
    assert report.moved == MOVED
    assert all(in_channels_last(net.get_submodule(name).weight) for name in MOVED)
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert net.state_dict().keys() == values.keys()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in values.items())
    assert imagegen.optimize(net).moved == []
    imagegen.restore(net)
    assert formats(net) == before and not any(map(channels_last.was_moved, net.modules()))
    assert all(vars(net.get_submodule(name)).keys() == vars(Net().get_submodule(name)).keys() for name in MOVED)
    assert "weights laid out in channels_last, as cuDNN convolves: 4, stem, block.2, up.1 and 1 more" in str(report)


def test_activations_flow_in_channels_last(here):
    net, x = net_in_half(), torch.randn(2, 4, 6, 10).bfloat16()
    expected = copy.deepcopy(net).double()(x.double())
    eager_error = relative_error(net(x), expected)
    imagegen.optimize(net)
    seen = []
    for name in ("stem", "pointwise", "block", "up", "down"):
        net.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(in_channels_last(y)))
    y = net(x)
    assert seen == [True] * 5
    assert relative_error(y, expected) <= 2 * eager_error
    y.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


def test_what_would_not_gain_stays(here):
    for other in (Net(), net_in_half().to("meta")):
        before = formats(other)
        assert imagegen.optimize(other).moved == [] and formats(other) == before
    nhwc = net_in_half().to(memory_format=torch.channels_last)
    assert imagegen.optimize(nhwc).moved == []
    imagegen.restore(nhwc)
    assert all(in_channels_last(nhwc.get_submodule(name).weight) for name in MOVED)
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1).bfloat16())
    assert imagegen.optimize(nn.Sequential(normed)).moved == []


def test_on_cpu_nothing_is_moved():
    net = net_in_half()
    before = formats(net)
    assert imagegen.optimize(net).moved == [] and formats(net) == before


def test_copies_and_pickles_can_be_restored(here):
    net = net_in_half()
    before = formats(net)
    imagegen.optimize(net)
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(saved, weights_only=False)):
        assert all(in_channels_last(other.get_submodule(name).weight) for name in MOVED)
        imagegen.restore(other)
        assert formats(other) == before
    plain = net_in_half()
    plain.load_state_dict(net.state_dict())
    assert formats(plain) == before and torch.equal(plain.stem.weight, net.stem.weight)


def test_it_compiles(here):
    net, x = net_in_half(), torch.randn(2, 4, 6, 10).bfloat16()
    imagegen.optimize(net)
    with torch.no_grad():
        expected, y = net(x), torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, expected) and y.stride() == expected.stride()


@pytest.mark.skipif(not _backend._triton_is_installed, reason="without a GPU's kernels there is nothing to replace")
def test_on_cuda_nothing_is_turned_around_but_the_images(monkeypatch):
    # cuDNN's rule, which a torch without CUDA does not know; there, turning a fake CUDA tensor around is an error.
    inner = torch.channels_last, torch.contiguous_format
    monkeypatch.setattr(
        torch._C, "_conv_determine_backend_memory_format", lambda x, w, _: inner[not any(map(in_channels_last, (x, w)))]
    )
    with torch.device("meta"):
        net = Net()
    with FakeTensorMode(), torch.no_grad():
        for module in net.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, device="cuda", dtype=torch.float16)))
        assert imagegen.optimize(net).moved == MOVED
        x = torch.empty(2, 4, 6, 10, device="cuda", dtype=torch.float16)
        y = net(x)
        assert y.is_cuda and in_channels_last(y)
        imagegen.restore(net)
        assert net(x).is_contiguous()
