"""The samplers against closed forms on a Gaussian, where the best denoiser is linear and known."""

import math

import gaussian
import numpy as np
import pytest
import torch
from gaussian import MEAN, STD

from imagegen import samplers
from imagegen.samplers import Schedule
from imagegen.samplers.euler import ancestral

SCHEDULE = Schedule.cosine(steps=1000)


def draw(name, steps, n=8, noise=None, prediction="epsilon", seed=0, **options):
    sampler = samplers.create(name, SCHEDULE, steps=steps, prediction=prediction, **options)
    noise = torch.zeros(n, 1, 2, 2, dtype=torch.float64) if noise is None else noise
    return samplers.sample(gaussian.model(SCHEDULE, prediction), sampler, tuple(noise.shape), noise=noise, seed=seed)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_ddim_transports_a_gaussian_as_its_ode_does(prediction):
    """The probability flow keeps (x_t - alpha_t mean) / std_t, which gives x_0 in closed form; DDIM is of order 1."""
    noise = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(8, 1, 1, 1)
    exact = MEAN + STD * noise
    errors = [(draw("ddim", steps, noise=noise, prediction=prediction) - exact).abs().max() for steps in (100, 1000)]
    assert errors[0] < 0.02
    assert errors[1] < errors[0] / 5


def test_the_predictions_are_three_ways_to_say_the_same():
    noise = torch.randn(4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, two, three = (draw("ddim", 10, noise=noise, prediction=p) for p in ("epsilon", "v", "sample"))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one, three, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.5})])
def test_stochastic_samplers_reach_the_data(name, options):
    sampler = samplers.create(name, SCHEDULE, steps=1000, **options)
    np.testing.assert_allclose(gaussian.moments(sampler, SCHEDULE, "epsilon", 0, 1), [MEAN, STD], atol=0.01)


def test_a_run_has_the_moments_of_its_table():
    sampler = samplers.create("ddpm", SCHEDULE, steps=20)
    noise = torch.randn(64, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = samplers.sample(gaussian.model(SCHEDULE, "epsilon"), sampler, tuple(noise.shape), noise=noise, seed=1)
    np.testing.assert_allclose([x.mean(), x.std()], gaussian.moments(sampler, SCHEDULE, "epsilon", 0, 1), atol=0.01)


@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_ddpm_is_ddim_with_eta_1(prediction, clip):
    one = draw("ddpm", 25, prediction=prediction, clip=clip, seed=5)
    two = draw("ddim", 25, prediction=prediction, clip=clip, seed=5, eta=1.0)
    torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


def test_ddim_without_noise_does_not_depend_on_the_seed():
    noise = torch.ones(2, 1, 2, 2)
    assert torch.equal(draw("ddim", 5, noise=noise, seed=0), draw("ddim", 5, noise=noise, seed=1))
    assert not torch.equal(draw("ddpm", 5, noise=noise, seed=0), draw("ddpm", 5, noise=noise, seed=1))


def test_one_step_gives_the_models_own_x0():
    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = gaussian.model(SCHEDULE, "sample")(noise, torch.tensor([999]))
    torch.testing.assert_close(draw("ddim", 1, noise=noise, prediction="v"), expected)


def test_zero_snr_samples_with_v_and_is_refused_with_epsilon():
    schedule = Schedule.linear(zero_snr=True)
    with pytest.raises(ValueError, match=r"'epsilon' says nothing .* zero SNR"):
        samplers.create("ddim", schedule, steps=5)
    sampler = samplers.create("ddim", schedule, steps=5, prediction="v")
    x = samplers.sample(gaussian.model(schedule, "v"), sampler, (2, 1, 2, 2))
    assert x.isfinite().all()


def test_clip_holds_the_last_x0():
    assert draw("ddim", 10, noise=torch.full((1, 1, 1, 1), 9.0), clip=0.5).abs().max() <= 0.5


@pytest.mark.parametrize("sigma", [0.02, 150.0, 24000.0])
def test_ancestral_noise_levels_lose_no_digits(sigma):
    """At eta = 1, sigma_down is sigma'^2 / sigma; as sqrt(sigma'^2 - sigma_up^2) it is rounding where that is small."""
    down, up = ancestral(sigma, 0.01, 1.0)
    assert down == pytest.approx(0.01**2 / sigma, rel=1e-14)
    assert math.hypot(down, up) == pytest.approx(0.01, rel=1e-14)
    half, up = ancestral(sigma, 0.01, 0.5)
    assert math.hypot(half, up) == pytest.approx(0.01, rel=1e-14)
