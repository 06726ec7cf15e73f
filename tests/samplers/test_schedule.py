import numpy as np
import pytest

from imagegen.samplers import Schedule


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("make", [Schedule.linear, Schedule.scaled_linear, Schedule.cosine])
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
