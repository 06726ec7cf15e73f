import numpy as np
import pytest

from imagegen import samplers
from imagegen.samplers import Schedule


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("make", [Schedule.linear, Schedule.scaled_linear, Schedule.cosine, Schedule.sigmoid])
def test_alpha_and_sigma_lie_on_the_circle(make, zero_snr):
    schedule = make(steps=100, zero_snr=zero_snr)
    assert schedule.steps == 100
    assert schedule.alpha_bar.dtype == np.float64
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=1e-14)
    assert (schedule.alpha[-1] == 0) == zero_snr


def test_linear_is_the_product_over_the_papers_betas():
    schedule = Schedule.linear()
    betas = [1e-4 + i / 999 * (0.02 - 1e-4) for i in range(1000)]
    expected = np.prod([1 - beta for beta in betas[:500]])
    np.testing.assert_allclose(schedule.alpha_bar[499], expected, rtol=1e-13)


def test_scaled_linear_starts_and_ends_at_its_betas():
    schedule = Schedule.scaled_linear(0.00085, 0.012)
    step = schedule.alpha_bar[-1] / schedule.alpha_bar[-2]
    np.testing.assert_allclose([1 - schedule.alpha_bar[0], 1 - step], [0.00085, 0.012], rtol=1e-12)


def test_cosine_is_the_closed_form_where_beta_is_not_capped():
    def f(t):
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

    schedule = Schedule.cosine(steps=50)
    t = np.arange(1, 50) / 50
    np.testing.assert_allclose(schedule.alpha_bar[:-1], f(t) / f(0), rtol=1e-12)


@pytest.mark.parametrize("alpha_bar", [[0.5, 0.5], [1.0, 0.5], [0.5, -0.1], [], [[0.5]]])
def test_what_is_no_schedule_is_refused(alpha_bar):
    with pytest.raises(ValueError, match="Schedule: alpha_bar must"):
        Schedule(np.array(alpha_bar))


def test_sigmoid_betas_lie_between_their_ends():
    alpha_bar = Schedule.sigmoid().alpha_bar
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    assert (np.diff(beta) > 0).all()
    np.testing.assert_allclose(beta[498:500].mean(), (1e-4 + 0.02) / 2, rtol=1e-2)


def test_any_betas_and_any_sigmas_make_a_schedule():
    np.testing.assert_allclose(Schedule.from_betas([0.1, 0.2]).alpha_bar, [0.9, 0.72])
    schedule = Schedule.from_sigmas([0.1, 1.0, 10.0])
    np.testing.assert_allclose(schedule.sigma / schedule.alpha, [0.1, 1.0, 10.0])
    with pytest.raises(ValueError, match="alpha_bar must fall strictly"):
        Schedule.from_sigmas([1.0, 0.5])


def test_a_flow_is_shifted_towards_noise():
    schedule = Schedule.flow(shift=3.0)
    np.testing.assert_allclose(schedule.shifted(np.array([0.0, 0.5, 1.0])), [0, 0.75, 1])
    sampler = samplers.create("flow_euler", schedule, steps=4)
    np.testing.assert_allclose(sampler.timesteps, 1000 * schedule.shifted(np.array([1, 0.75, 0.5, 0.25])))


def test_the_shift_grows_with_the_resolution():
    """mu is 0.5 at 256 tokens and 1.15 at 4096, linear between and beyond."""
    np.testing.assert_allclose(samplers.resolution_shift(256), np.exp(0.5))
    np.testing.assert_allclose(samplers.resolution_shift(4096), np.exp(1.15))
    np.testing.assert_allclose(samplers.resolution_shift(2176), np.exp((0.5 + 1.15) / 2))


def test_edm_visits_the_sigmas_of_its_paper():
    sampler = samplers.create("edm_euler", Schedule.edm(), steps=5)
    i = np.arange(5)
    sigma = (80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sampler.timesteps, np.log(sigma) / 4)
    np.testing.assert_allclose(sampler.input_scale, 1 / np.hypot(80, 0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.flow(shift=0), "Schedule.flow: shift must be positive, got 0"),
        (lambda: Schedule.flow(steps=0), "Schedule.flow: steps must be at least 1, got 0"),
        (lambda: Schedule.edm(sigma_min=2, sigma_max=1), "sigma_min must be positive and below sigma_max, got 2 and 1"),
        (lambda: Schedule.edm(sigma_data=0), "Schedule.edm: sigma_data must be positive, got 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
