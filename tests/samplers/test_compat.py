"""compat="diffusers" reproduces the faults of diffusers; each test shows one, and that the default is without it.

That compat is what diffusers does is test_parity's to show.
"""

import gaussian
import numpy as np
import pytest

from imagegen import samplers
from imagegen.samplers import Schedule
from imagegen.samplers.spacing import time_of

LINEAR = Schedule.linear()
EDM = (Schedule.edm(sigma_min=0.02), "edm")


def both(name, schedule, **options):
    """(ours, as diffusers)"""
    return [samplers.create(name, schedule, compat=compat, **options) for compat in (None, "diffusers")]


def errors(name, schedule, prediction, steps, **options):
    """The error on a Gaussian: (ours, as diffusers)"""
    return [gaussian.error(name, schedule, prediction, steps, compat=c, **options) for c in (None, "diffusers")]


def column(sampler, name):
    return sampler.table[:, sampler.columns.index(name)]


PLAIN = ("ddim", "euler", "euler_ancestral", "heun", "lms", "dpm_2", "deis", "dpmpp_2m", "dpmpp_2m_sde", "unipc")


@pytest.mark.parametrize("name", [*PLAIN, "sa_solver", "lcm", "pndm", "dpmpp_2s_ancestral"])
def test_where_no_fault_is_in_play_there_is_one_table(name):
    ours, theirs = both(name, LINEAR, steps=20)
    np.testing.assert_array_equal(ours.table, theirs.table)
    assert ours.init_sigma == theirs.init_sigma


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_ddim_leads_to_the_next_time_not_a_stride_down(name):
    """With linspace the stride T // n is less than the spacing, so that x is not where the next row takes it to be."""
    ours, theirs = both(name, LINEAR, steps=20, spacing="linspace")
    assert column(ours, "b_0")[2] == LINEAR.alpha[int(ours.timesteps[3])]
    assert column(theirs, "b_0")[2] == LINEAR.alpha[int(theirs.timesteps[2]) - 50]


def test_ddim_inverse_leads_up_from_the_time_before():
    ours, theirs = both("ddim_inverse", LINEAR, steps=7, prediction="v")
    assert column(ours, "b_0").tolist() == [LINEAR.alpha[int(t)] for t in ours.timesteps]
    assert not np.allclose(ours.table, theirs.table)  # 1000 / 7 is no integer


def test_ddim_keeps_the_epsilon_of_the_clipped_x0():
    """So that eta = 1 is DDPM with clipping, too."""
    ddpm = samplers.create("ddpm", LINEAR, steps=10, clip=1.0).table
    ours, theirs = both("ddim", LINEAR, steps=10, clip=1.0, eta=1.0)
    np.testing.assert_allclose(ours.table, ddpm, rtol=1e-9, atol=1e-12)
    assert column(ours, "c_m").max() == 0 < column(theirs, "c_m").max()


def test_tcd_clips():
    ours, theirs = both("tcd", LINEAR, steps=4, clip=1.0)
    assert (ours.clip, theirs.clip) == (1.0, None)


def test_ddpm_ends_without_noise():
    ours, theirs = both("ddpm", LINEAR, steps=10, variance="large")
    assert column(ours, "c_n")[-1] == 0
    assert column(theirs, "c_n")[-1] > 0.1


def test_euler_churns_before_the_model_is_called():
    """Noise added after the call is noise that the model has not seen: the result is too noisy."""
    right, wrong = errors("euler", *EDM, 64, churn=20.0, final="sigma_min")
    assert right < wrong / 1.5


def test_lms_started_in_the_middle_starts_at_order_1():
    right, wrong = errors("lms", LINEAR, "epsilon", 50, start_at=0.8)
    assert right < wrong / 5


def test_pndm_averages_epsilons_not_raw_outputs():
    ours, theirs = both("pndm", LINEAR, steps=20, prediction="v")
    epsilon = samplers.create("pndm", LINEAR, steps=20, prediction="epsilon")
    assert not np.allclose(column(ours, "c_h0"), column(theirs, "c_h0"))
    np.testing.assert_allclose(column(ours, "c_h0"), column(epsilon, "c_h0"))


def test_ipndm_keeps_the_x0_of_pure_noise():
    right, wrong = errors("ipndm", Schedule.angular(), "v", 8)
    assert right < wrong / 2


def test_the_noise_levels_of_zero_snr_fall_throughout():
    ours, theirs = both("euler", Schedule.linear(zero_snr=True), steps=1000, spacing="leading")
    assert (np.diff(column(ours, "b_1")) < 0).all()
    assert theirs.init_sigma == pytest.approx(np.hypot(column(theirs, "b_1").max(), 1))  # not the first: 15406 and 4096
    assert column(theirs, "b_1")[0] > 3 * 4096


def test_zero_snr_is_exact_for_samplers_of_alpha_and_sigma():
    ours, theirs = both("dpmpp_2m", Schedule.linear(zero_snr=True), steps=20, prediction="v")
    assert ours.start == (0, 1)
    assert theirs.start[0] > 1e-4


@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
def test_the_model_is_told_the_time_of_its_noise_level(sigmas):
    pytest.importorskip("scipy", reason="sigmas='beta' needs it")
    ours, theirs = both("dpmpp_2m", LINEAR, steps=20, sigmas=sigmas)
    levels = np.sqrt(1 / LINEAR.alpha_bar - 1)
    visited = column(ours, "b_1")[:-1] / column(ours, "b_0")[:-1]
    np.testing.assert_allclose(ours.timesteps[1:], time_of(visited, levels), rtol=1e-9, atol=1e-9)
    assert (theirs.timesteps % 1 == 0).all()
    assert (ours.timesteps % 1 != 0).any()


@pytest.mark.parametrize("name", ["deis", "unipc", "dpmpp_2m"])
def test_a_ramp_to_sigma_min_wastes_no_evaluation(name):
    ours, theirs = both(name, LINEAR, steps=10, sigmas="karras", final="sigma_min")
    assert column(ours, "b_1")[-2] > 1.5 * column(ours, "b_1")[-1]
    assert column(theirs, "b_1")[-2] == pytest.approx(column(theirs, "b_1")[-1])


def test_a_flow_is_shifted_once():
    schedule = Schedule.flow(shift=3.0)
    ours, theirs = both("flow_euler", schedule, steps=10, spacing="linspace")
    assert ours.timesteps[-1] == pytest.approx(1000 * schedule.shifted(1e-3))
    assert theirs.timesteps[-1] == pytest.approx(1000 * schedule.shifted(schedule.shifted(1e-3)))


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_a_flow_starts_from_pure_noise(name):
    ours, theirs = both(name, Schedule.flow(), steps=10)
    assert ours.start == (0, 1)
    assert theirs.start[0] > 0


def test_edm_starts_at_sigma_max():
    ours, theirs = both("edm_euler", Schedule.edm(), steps=4)
    assert ours.init_sigma == 80
    assert theirs.init_sigma == np.hypot(80, 1)


def test_one_exponential_step_starts_at_sigma_max():
    ours, theirs = both("edm_euler", Schedule.edm(), steps=1, sigmas="exponential")
    assert [round(np.exp(4 * sampler.timesteps[0]), 9) for sampler in (ours, theirs)] == [80, 0.002]


def test_the_third_order_is_one():
    """The authors' and diffusers' second difference counts half: their errors fall as those of order 2."""
    (coarse, theirs_coarse), (fine, theirs_fine) = (
        errors("dpmpp_2m", *EDM, n, order=3, final="sigma_min") for n in (64, 128)
    )
    assert np.log2(coarse / fine) > 2.8
    assert np.log2(theirs_coarse / theirs_fine) < 2.1


def test_the_third_order_of_the_sde_has_the_right_sign():
    right, wrong = errors("dpmpp_3m_sde", *EDM, 64, final="sigma_min")
    assert right < wrong / 20


def test_the_stages_of_dpmpp_sde_share_their_noise():
    right, wrong = errors("dpmpp_sde", *EDM, 64, final="sigma_min")
    assert right < wrong / 5


def test_unipc_bh1_ends_at_zero_where_diffusers_is_nan():
    assert gaussian.error("unipc", LINEAR, "v", 20, solver="bh1") < 0.05


def test_churn_without_noise_still_lifts_what_the_model_is_told():
    """noise_scale is Karras et al.'s S_noise: 0 is legal and leaves every step at its own level."""
    sampler = samplers.create("edm_euler", Schedule.edm(), steps=6, churn=2.0, noise_scale=0.0)
    still = samplers.create("edm_euler", Schedule.edm(), steps=6)
    assert (sampler.timesteps > still.timesteps).all()
    assert not column(sampler, "c_n").any()
    assert sampler.init_sigma == still.init_sigma
