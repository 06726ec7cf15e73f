"""The order that each sampler claims, on a Gaussian whose solution is known."""

import gaussian
import numpy as np
import pytest

from imagegen.samplers import Schedule

EDM = (Schedule.edm(sigma_min=0.02), "edm")
FLOW = (Schedule.flow(), "flow")
DISCRETE = (Schedule.from_sigmas(np.geomspace(0.02, 80, 16384)), "v")
ANGULAR = (Schedule.angular(), "v")


def order(name, target, steps, **options):
    """The observed order between `steps` and half of them."""
    coarse, fine = (gaussian.error(name, *target, n, **options) for n in (steps // 2, steps))
    return np.log2(coarse / fine)


DETERMINISTIC = [
    ("euler", EDM, 1, {}),
    ("edm_euler", EDM, 1, {}),
    ("heun", EDM, 2, {}),
    ("dpm_2", EDM, 2, {}),
    *[("lms", EDM, p, {"order": p}) for p in (1, 2, 3, 4)],
    *[("dpmpp_2m", EDM, p, {"order": p}) for p in (1, 2, 3)],
    ("dpmpp_2m", EDM, 2, {"solver": "heun"}),
    ("edm_dpmpp_2m", EDM, 2, {}),
    *[("deis", EDM, p, {"order": p}) for p in (1, 2, 3)],
    *[("unipc", EDM, p, {"order": p, "solver": b, "corrector": False}) for p in (1, 2, 3) for b in ("bh1", "bh2")],
    *[("unipc", EDM, p + 1, {"order": p, "solver": b}) for p in (1, 2) for b in ("bh1", "bh2")],
    *[("sa_solver", EDM, p, {"order": p, "corrector_order": 0, "tau": 0}) for p in (1, 2, 3)],
    ("sa_solver", EDM, 3, {"order": 2, "corrector_order": 3, "tau": 0}),
    ("dpmpp_2s_ancestral", EDM, 2, {"eta": 0}),
    ("dpmpp_sde", EDM, 2, {"eta": 0}),
    ("flow_euler", FLOW, 1, {}),
    ("flow_heun", FLOW, 2, {}),
    *[(name, FLOW, 2, {}) for name in ("dpmpp_2m", "unipc", "deis")],
    ("ddim", DISCRETE, 1, {}),
    ("ddim", ANGULAR, 1, {"final": "zero"}),
    *[("pndm", DISCRETE, 2, {"warmup": warmup}) for warmup in ("repeat", "runge_kutta")],
    ("ipndm", DISCRETE, 1, {"order": 1}),
    *[("ipndm", DISCRETE, 2, {"order": p}) for p in (2, 3, 4)],
    *[(name, DISCRETE, 2, {}) for name in ("dpmpp_2m", "unipc", "deis", "heun", "dpm_2")],
]
STOCHASTIC = [
    ("euler_ancestral", EDM, 1, {}),
    ("dpm_2_ancestral", EDM, 2, {}),
    ("dpmpp_2s_ancestral", EDM, 2, {}),
    ("dpmpp_sde", EDM, 2, {}),
    *[("dpmpp_2m_sde", EDM, 2, {"solver": solver}) for solver in ("midpoint", "heun")],
    ("dpmpp_3m_sde", EDM, 2, {}),
    *[("sa_solver", EDM, p, {"order": p, "corrector_order": 0, "tau": 1}) for p in (1, 2)],
    ("heun", EDM, 1, {"churn": 1.0}),
    ("ddpm", DISCRETE, 1, {}),
    ("ddim", DISCRETE, 1, {"eta": 1.0}),
]


def named(cases):
    return [pytest.param(*case, id=f"{case[0]}-{case[1][1]}-{case[3]}") for case in cases]


@pytest.mark.parametrize(("name", "target", "claimed", "options"), named(DETERMINISTIC))
def test_the_claimed_order_shows(name, target, claimed, options):
    assert order(name, target, 256, **{"final": "sigma_min", **options}) > claimed - 0.4


@pytest.mark.parametrize(("name", "target", "claimed", "options"), named(STOCHASTIC))
def test_the_claimed_order_shows_in_distribution(name, target, claimed, options):
    assert order(name, target, 256, **{"final": "sigma_min", **options}) > claimed - 0.4


@pytest.mark.parametrize(
    "name", ["ddpm", "ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "deis", "unipc"]
)
def test_with_a_thousand_steps_every_sampler_reaches_the_data(name):
    assert gaussian.error(name, Schedule.cosine(), "v", 1000) < 0.01


def test_zero_snr_starts_from_pure_noise_without_a_cap():
    """Samplers that work on alpha and sigma start at alpha = 0 exactly, at order 1, and are none the worse."""
    for name in ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "deis", "sa_solver"):
        assert gaussian.error(name, Schedule.linear(zero_snr=True), "v", 200) < 0.02, name
