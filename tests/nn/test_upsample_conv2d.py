import copy
import pickle

import pytest
import torch

from imagegen import nn


def pair(bias=True):
    torch_module = torch.nn.Sequential(
        torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(5, 7, 3, padding=1, bias=bias)
    )
    return torch_module, nn.UpsampleConv2d.from_torch(torch_module[1])


@pytest.mark.parametrize("bias", [True, False])
def test_from_torch_shares_the_parameters(bias):
    theirs, ours = pair(bias)
    x = torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.weight is theirs[1].weight and ours.bias is theirs[1].bias


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_of_the_convolution(bias):
    conv = torch.nn.Conv2d(5, 7, 3, padding=1, bias=bias)
    module = nn.UpsampleConv2d(5, 7, bias=bias)
    module.load_state_dict(conv.state_dict())
    conv.load_state_dict(module.state_dict())
    assert torch.equal(module.weight, conv.weight)


def test_padding_same_is_padding_one():
    conv = torch.nn.Conv2d(5, 7, 3, padding="same")
    x = torch.randn(1, 5, 4, 4)
    expected = conv(torch.nn.functional.interpolate(x, scale_factor=2))
    torch.testing.assert_close(nn.UpsampleConv2d.from_torch(conv)(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 5, "padding": 1}, r"conv must have kernel_size=\(3, 3\), got \(5, 5\)"),
        ({"kernel_size": 3}, r"conv must have padding=\(1, 1\), got \(0, 0\)"),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, r"conv must have stride=\(1, 1\), got \(2, 2\)"),
        ({"kernel_size": 3, "padding": 1, "groups": 5}, "conv must have groups=1, got 5"),
        (
            {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
            "conv must have padding_mode='zeros', got 'reflect'",
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_from_torch_refuses_other_convolutions(options, message):
    with pytest.raises(ValueError, match=message):
        nn.UpsampleConv2d.from_torch(torch.nn.Conv2d(5, 5, **options))


def test_activation():
    theirs, _ = pair()
    module = nn.UpsampleConv2d.from_torch(theirs[1], activation="silu")
    x = torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(module(x), torch.nn.functional.silu(theirs(x)))


def test_copies_and_moves():
    _, module = pair()
    x = torch.randn(2, 5, 4, 6)
    y = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), y)
        assert twin.weight is not module.weight
    assert module.double()(x.double()).dtype == torch.float64
    assert module.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_training_step_moves_the_output():
    _, module = pair()
    x = torch.randn(2, 5, 4, 6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = module(x)
    before.square().mean().backward()
    optimizer.step()
    assert module(x).square().mean() < before.square().mean()


def test_repr():
    assert repr(nn.UpsampleConv2d(5, 7)) == "UpsampleConv2d(5, 7, activation='linear')"
    assert repr(nn.UpsampleConv2d(5, 7, bias=False, activation="relu")) == (
        "UpsampleConv2d(5, 7, bias=False, activation='relu')"
    )
