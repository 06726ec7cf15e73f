import copy
import pickle

import pytest
import torch

from imagegen import nn, ops


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [1, "same"])
def test_from_torch_shares_the_parameters(bias, padding):
    theirs = torch.nn.Conv2d(5, 7, 3, padding=padding, bias=bias).eval()
    ours = nn.Conv2d.from_torch(theirs)
    x = torch.randn(2, 5, 9, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert ours.weight is theirs.weight and ours.bias is theirs.bias and not ours.training


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_of_the_convolution(bias):
    theirs, ours = torch.nn.Conv2d(5, 7, 3, padding=1, bias=bias), nn.Conv2d(5, 7, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 1}, r"Conv2d: conv must have kernel_size=\(3, 3\), got \(1, 1\)"),
        ({"kernel_size": 3}, r"Conv2d: conv must have padding=\(1, 1\), got \(0, 0\)"),
        ({"kernel_size": 3, "padding": 1, "dilation": 2}, r"Conv2d: conv must have dilation=\(1, 1\), got \(2, 2\)"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, "padding_mode='zeros', got 'circular'"),
    ],
    ids=str,
)
def test_from_torch_refuses_other_convolutions(options, message):
    with pytest.raises(ValueError, match=message):
        nn.Conv2d.from_torch(torch.nn.Conv2d(5, 5, **options))


def test_fuses_what_is_around():
    module = nn.Conv2d(5, 7, activation="silu")
    x, residual = torch.randn(2, 5, 9, 6), torch.randn(2, 7, 9, 6)
    scale, shift = torch.randn(2, 2, 5)
    expected = ops.conv2d(
        x,
        module.weight,
        module.bias,
        residual=residual,
        scale=scale,
        shift=shift,
        input_activation="relu",
        activation="silu",
    )
    assert torch.equal(module(x, residual, scale, shift, "relu"), expected)


def test_copies_and_pickles():
    module = nn.Conv2d(5, 7, bias=False, activation="relu")
    x = torch.randn(1, 5, 4, 4)
    for twin in copy.deepcopy(module), pickle.loads(pickle.dumps(module)):
        assert torch.equal(twin(x), module(x)) and repr(twin) == repr(module)
    assert repr(module) == "Conv2d(5, 7, bias=False, activation='relu')"
