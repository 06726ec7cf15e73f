import pytest
import torch

from imagegen import ops
from imagegen.nn import BiasAct

TORCH_MODULES = [
    torch.nn.Identity(),
    torch.nn.ReLU(),
    torch.nn.LeakyReLU(0.3),
    torch.nn.SiLU(),
    torch.nn.GELU(),
    torch.nn.Tanh(),
    torch.nn.Sigmoid(),
]


@pytest.mark.parametrize("module", TORCH_MODULES, ids=str)
def test_from_torch_computes_the_same_and_loads_its_state_dict(module):
    ours = BiasAct.from_torch(module.eval())
    ours.load_state_dict(module.state_dict())
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(ours(x), module(x))
    assert not ours.training


@pytest.mark.parametrize("module", [torch.nn.GELU(approximate="tanh"), torch.nn.Softmax()], ids=str)
def test_from_torch_refuses_what_it_cannot_compute(module):
    with pytest.raises(ValueError, match="BiasAct: activation must be one of"):
        BiasAct.from_torch(module)


def test_takes_the_bias_of_a_layer():
    x, linear = torch.randn(4, 6), torch.nn.Linear(6, 3)
    ours = BiasAct(3, "lrelu", clamp=1.0)
    ours.load_state_dict({"bias": linear.bias})
    expected = ops.bias_act(linear(x), act="lrelu", clamp=1.0)
    y = ours(torch.nn.functional.linear(x, linear.weight))
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert ours.bias.grad.shape == (3,)


def test_repr_names_what_was_given():
    assert repr(BiasAct(8, "lrelu", gain=2.0)) == "BiasAct(8, act='lrelu', gain=2.0)"
    assert repr(BiasAct(8, bias=False)) == "BiasAct(8, act='linear', bias=False)"
