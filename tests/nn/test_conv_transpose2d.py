import copy
import pickle

import pytest
import torch

from imagegen import nn


def convolution(bias=True, **options):
    options = {"kernel_size": 4, "stride": 2, "padding": 1} | options
    return torch.nn.ConvTranspose2d(5, 7, bias=bias, **options)


def normalisation(**options):
    norm = torch.nn.BatchNorm2d(7, **options).eval()
    for t in (norm.running_mean, norm.weight, norm.bias):
        if t is not None:
            torch.nn.init.normal_(t)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 3, "output_padding": 1},
        {"stride": 1, "padding": 0},
        {"kernel_size": (3, 4), "stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0)},
    ],
    ids=str,
)
def test_from_torch_shares_the_parameters(bias, options):
    theirs = convolution(bias, **options)
    ours = nn.ConvTranspose2d.from_torch(theirs)
    x = torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.weight is theirs.weight and ours.bias is theirs.bias


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_of_the_convolution(bias):
    conv = convolution(bias)
    module = nn.ConvTranspose2d(5, 7, 4, 2, 1, bias=bias)
    module.load_state_dict(conv.state_dict())
    conv.load_state_dict(module.state_dict())
    assert torch.equal(module.weight, conv.weight)


def test_output_size():
    theirs = convolution(kernel_size=3)
    ours = nn.ConvTranspose2d.from_torch(theirs)
    x = torch.randn(2, 5, 4, 6)
    for output_size in (None, (7, 11), (8, 11), (8, 12)):
        torch.testing.assert_close(ours(x, output_size), theirs(x, output_size))
    with pytest.raises(ValueError, match="requested an output size"):
        ours(x, (9, 12))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folded_normalisation(bias, affine):
    theirs = torch.nn.Sequential(convolution(bias), normalisation(affine=affine, eps=1e-3), torch.nn.ReLU())
    ours = nn.ConvTranspose2d.from_torch(theirs[0], theirs[1], activation="relu")
    x = torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not ours.scale.requires_grad and not ours.shift.requires_grad


def test_folded_normalisation_is_in_the_state_dict():
    module = nn.ConvTranspose2d.from_torch(convolution(), normalisation())
    twin = nn.ConvTranspose2d.from_torch(convolution(), normalisation())
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 4, 6)
    assert torch.equal(twin(x), module(x))


def test_folded_normalisation_keeps_float32_beside_half_precision():
    module = nn.ConvTranspose2d.from_torch(convolution().bfloat16(), normalisation())
    assert module.scale.dtype == module.shift.dtype == torch.float32
    assert module(torch.randn(2, 5, 4, 6).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 5}, "conv must have groups=1, got 5"),
        ({"dilation": 2}, r"conv must have dilation=\(1, 1\), got \(2, 2\)"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_from_torch_refuses_other_convolutions(options, message):
    with pytest.raises(ValueError, match=message):
        nn.ConvTranspose2d.from_torch(torch.nn.ConvTranspose2d(5, 5, 3, **options))


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (torch.nn.BatchNorm2d(7), "norm must be in evaluation"),
        (torch.nn.BatchNorm2d(7, track_running_stats=False).eval(), "with running statistics"),
        (torch.nn.BatchNorm2d(6).eval(), "norm must have conv's 7 channels, got 6"),
    ],
    ids=["training", "no statistics", "channels"],
)
def test_from_torch_refuses_other_normalisations(norm, message):
    with pytest.raises(ValueError, match=message):
        nn.ConvTranspose2d.from_torch(convolution(), norm)


def test_copies_and_moves():
    module = nn.ConvTranspose2d.from_torch(convolution(), normalisation(), "tanh")
    x = torch.randn(2, 5, 4, 6)
    y = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), y)
        assert twin.weight is not module.weight
    assert module.double()(x.double()).dtype == torch.float64
    assert module.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_training_step_moves_the_output():
    module = nn.ConvTranspose2d.from_torch(convolution(), normalisation())
    x = torch.randn(2, 5, 4, 6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    before = module(x)
    before.square().mean().backward()
    optimizer.step()
    assert module(x).square().mean() < before.square().mean()


def test_repr():
    assert repr(nn.ConvTranspose2d(5, 7, 4, 2, 1)) == (
        "ConvTranspose2d(5, 7, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1), activation='linear')"
    )
