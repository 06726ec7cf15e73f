"""The step reads its row and nothing else."""

import numpy as np
import pytest
import torch

from imagegen.samplers import step
from imagegen.samplers.table import columns

X, M, NOISE, H0, H1 = (torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(5))
NAN = torch.full_like(X, float("nan"))


def row(slots=0, **values):
    return np.array([values.get(name, -1.0 if name == "slot" else 0.0) for name in columns(slots)])


def test_all_terms():
    r = row(
        2, s=1, a_x=0.5, a_m=-0.25, c_x=1.5, c_0=2.0, c_m=0.125, c_n=0.75, c_h0=3.0, c_h1=-1.0, q_x=1.0, q_0=4.0, slot=1
    )
    r[1] = 0.5  # s'
    x_next, stored, model_input = step(X, M, r, slots=(H0, H1), noise=NOISE, clip=0.3)
    x0 = (0.5 * X - 0.25 * M).clamp(-0.3, 0.3)
    torch.testing.assert_close(x_next, 1.5 * X + 2 * x0 + 0.125 * M + 0.75 * NOISE + 3 * H0 - H1)
    torch.testing.assert_close(stored, X + 4 * x0)
    torch.testing.assert_close(model_input, 0.5 * x_next)


def test_what_has_coefficient_0_is_not_read():
    x_next, stored, _ = step(X, NAN, row(1, c_x=1.0), slots=(NAN,), noise=NAN)
    torch.testing.assert_close(x_next, X)
    assert stored is None


@pytest.mark.parametrize("guidance", [2.0, torch.tensor([2.0, 0.5])])
def test_guidance_weighs_the_two_outputs(guidance):
    x_next, _, _ = step(X, M, row(c_m=1.0), uncond_output=H0, guidance=guidance)
    g = torch.as_tensor(guidance).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x_next, g * M + (1 - g) * H0)


def test_the_state_keeps_its_dtype():
    x_next, _, _ = step(X.double(), M.bfloat16(), row(c_x=1.0, c_m=1.0))
    assert x_next.dtype == torch.float64
    torch.testing.assert_close(x_next, X.double() + M.bfloat16().double())


@pytest.mark.parametrize(("column", "tensor"), [("c_n", "noise"), ("c_h0", r"slots\[0\]")])
def test_a_missing_tensor_is_named(column, tensor):
    with pytest.raises(ValueError, match=f"step: the row reads {tensor}"):
        step(X, M, row(1, **{column: 1.0}), slots=(None,))


def test_arguments_that_clash_are_named():
    with pytest.raises(ValueError, match="the row has 2 slots, got 1"):
        step(X, M, row(2), slots=(H0,))
    with pytest.raises(ValueError, match="uncond_output and guidance go together"):
        step(X, M, row(), guidance=2.0)
