"""nn.GroupNorm stands in for torch.nn.GroupNorm."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from imagegen import nn


@pytest.fixture
def norm():
    norm = torch.nn.GroupNorm(4, 8, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


def test_from_torch_shares_parameters(norm):
    ours = nn.GroupNorm.from_torch(norm.eval(), activation="silu")
    assert ours.weight is norm.weight and ours.bias is norm.bias and not ours.training
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(ours(x), F.silu(norm(x)))


def test_state_dict_loads_both_ways(norm):
    ours = nn.GroupNorm(4, 8, eps=1e-3)
    ours.load_state_dict(norm.state_dict())
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(ours(x), norm(x))
    norm.load_state_dict(ours.state_dict())


def test_without_parameters():
    norm = torch.nn.GroupNorm(4, 8, affine=False)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(nn.GroupNorm.from_torch(norm)(x), norm(x))


def test_scale_and_shift(norm):
    x, scale, shift = torch.randn(2, 8, 5, 5), torch.randn(2, 8), torch.randn(2, 8)
    ours = nn.GroupNorm.from_torch(norm, activation="silu")(x, scale=scale, shift=shift)
    torch.testing.assert_close(ours, F.silu(norm(x) * (1 + scale[..., None, None]) + shift[..., None, None]))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(norm, clone):
    ours = nn.GroupNorm.from_torch(norm, activation="silu")
    theirs = clone(ours)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(theirs(x), ours(x)) and theirs.weight is not ours.weight


def test_trains(norm):
    ours = nn.GroupNorm.from_torch(copy.deepcopy(norm), activation="silu")
    x = torch.randn(2, 8, 5, 5)
    ours(x).square().sum().backward()
    F.silu(norm(x)).square().sum().backward()
    for a, b in zip(ours.parameters(), norm.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_repr():
    assert repr(nn.GroupNorm(4, 8, activation="silu")).endswith(", activation='silu')")
