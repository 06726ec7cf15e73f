"""The samplers against closed forms on a Gaussian, where the best denoiser is linear and known."""

import numpy as np
import pytest
import torch

from imagegen import samplers
from imagegen.samplers import Schedule

MEAN, STD = 0.3, 0.5
SCHEDULE = Schedule.cosine(steps=1000)


def best_model(prediction, schedule=SCHEDULE):
    """E[prediction | x_t] for data drawn from N(MEAN, STD^2)."""

    def model(x, t):
        i = int(t[0])
        alpha, sigma = schedule.alpha[i], schedule.sigma[i]
        marginal = alpha**2 * STD**2 + sigma**2
        x0 = MEAN + alpha * STD**2 / marginal * (x - alpha * MEAN)
        epsilon = sigma / marginal * (x - alpha * MEAN)
        return {"epsilon": epsilon, "v": alpha * epsilon - sigma * x0, "sample": x0}[prediction]

    return model


def draw(name, steps, n=8, noise=None, prediction="epsilon", seed=0, **options):
    sampler = samplers.create(name, SCHEDULE, steps=steps, prediction=prediction, **options)
    noise = torch.zeros(n, 1, 2, 2, dtype=torch.float64) if noise is None else noise
    return samplers.sample(best_model(prediction), sampler, tuple(noise.shape), noise=noise, seed=seed)


def closed_form_moments(sampler):
    """Mean and variance after the table's last row, from N(0, 1): every row is affine in x here."""
    mean, variance = 0.0, 1.0
    for row in sampler.table:
        t, _, a_x, a_m, c_x, c_0, c_m, c_n = row[:8]
        alpha, sigma = SCHEDULE.alpha[int(t)], SCHEDULE.sigma[int(t)]
        gain = sigma / (alpha**2 * STD**2 + sigma**2)  # of epsilon in x
        slope = c_x + c_0 * a_x + (c_0 * a_m + c_m) * gain
        mean = slope * mean - (c_0 * a_m + c_m) * gain * alpha * MEAN
        variance = slope**2 * variance + c_n**2
    return mean, variance


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
    mean, variance = closed_form_moments(samplers.create(name, SCHEDULE, steps=1000, **options))
    np.testing.assert_allclose([mean, variance**0.5], [MEAN, STD], atol=0.01)


def test_a_run_has_the_moments_of_its_table():
    sampler = samplers.create("ddpm", SCHEDULE, steps=20)
    noise = torch.randn(64, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = samplers.sample(best_model("epsilon"), sampler, tuple(noise.shape), noise=noise, seed=1)
    mean, variance = closed_form_moments(sampler)
    np.testing.assert_allclose([x.mean(), x.std()], [mean, variance**0.5], atol=0.01)


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
    expected = best_model("sample")(noise, torch.tensor([999]))
    torch.testing.assert_close(draw("ddim", 1, noise=noise, prediction="v"), expected)


def test_zero_snr_samples_with_v_and_is_refused_with_epsilon():
    schedule = Schedule.linear(zero_snr=True)
    with pytest.raises(ValueError, match=r"'epsilon' says nothing .* zero SNR"):
        samplers.create("ddim", schedule, steps=5)
    sampler = samplers.create("ddim", schedule, steps=5, prediction="v")
    x = samplers.sample(best_model("v", schedule), sampler, (2, 1, 2, 2))
    assert x.isfinite().all()


def test_clip_holds_the_last_x0():
    assert draw("ddim", 10, noise=torch.full((1, 1, 1, 1), 9.0), clip=0.5).abs().max() <= 0.5
