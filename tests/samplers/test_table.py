import numpy as np
import pytest

from imagegen import samplers
from imagegen.samplers import Schedule

SCHEDULE = Schedule.linear()


def test_the_table_can_be_inspected_and_printed():
    sampler = samplers.create("ddim", SCHEDULE, steps=4, prediction="v", guidance=2.0, clip=1.0)
    assert sampler.table.shape == (4, 14)
    assert sampler.table.dtype == np.float64
    assert " ".join(sampler.columns) == "t s' a_x a_m c_x c_0 c_m c_n q_x q_0 q_m slot b_0 b_1"
    assert sampler.timesteps.tolist() == [999, 749, 499, 249]
    assert sampler.init_sigma == 1.0
    lines = str(sampler).splitlines()
    assert lines[0] == "ddim: 4 evaluations, guidance 2.0, clip 1.0"
    assert [line.split()[0] for line in lines[1:]] == ["t", "999", "749", "499", "249"]


def test_a_ddim_row_is_the_papers_formula():
    sampler = samplers.create("ddim", SCHEDULE, steps=2, eta=0.5, clip=1.0, clipped_epsilon=False)
    a, a_next = SCHEDULE.alpha_bar[[999, 499]]
    std = 0.5 * np.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    expected = {"a_x": a**-0.5, "a_m": -np.sqrt(1 - a) / a**0.5, "c_0": a_next**0.5}
    expected |= {"c_m": np.sqrt(1 - a_next - std**2), "c_n": std, "b_0": a_next**0.5, "b_1": np.sqrt(1 - a_next)}
    named = dict(zip(sampler.columns, sampler.table[0], strict=True))
    np.testing.assert_allclose([named[name] for name in expected], list(expected.values()), rtol=1e-12)


def test_without_clipping_x0_is_folded_into_x_and_the_output():
    """x' = alpha' (x - sigma m) / alpha + sigma' m"""
    sampler = samplers.create("ddim", SCHEDULE, steps=2)
    named = dict(zip(sampler.columns, sampler.table[0], strict=True))
    alpha, sigma, alpha_next, sigma_next = *(SCHEDULE.alpha[[999]], SCHEDULE.sigma[[999]]), *named_end(named)
    np.testing.assert_allclose(named["c_x"], alpha_next / alpha, rtol=1e-12)
    np.testing.assert_allclose(named["c_m"], sigma_next - alpha_next * sigma / alpha, rtol=1e-12)
    assert named["c_0"] == 0


def named_end(row):
    return row["b_0"], row["b_1"]


ENDLESS = {"ddim_inverse"}  # it ends in noise


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("name", sorted(set(samplers.SAMPLERS) - ENDLESS))
def test_the_last_row_ends_without_noise(name, steps):
    *_, last = samplers.create(name, schedule_for(name), steps=steps).table
    assert last[7] == 0
    assert last[-2:].tolist() == [1, 0]


def schedule_for(name):
    if name.startswith("flow"):
        return Schedule.flow(shift=3.0)
    return Schedule.edm() if name.startswith("edm") else SCHEDULE


@pytest.mark.parametrize(
    ("spacing", "offset", "times"),
    [
        ("trailing", 0, [999, 799, 599, 399, 199]),
        ("leading", 0, [800, 600, 400, 200, 0]),
        ("leading", 1, [801, 601, 401, 201, 1]),
        ("linspace", 0, [999, 749, 500, 250, 0]),
    ],
)
def test_spacings(spacing, offset, times):
    sampler = samplers.create("ddim", SCHEDULE, steps=5, spacing=spacing, offset=offset)
    assert sampler.timesteps.tolist() == times


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 333, 999, 1000])
def test_times_fall_and_stay_within_the_schedule(spacing, steps):
    times = samplers.create("ddim", SCHEDULE, steps=steps, spacing=spacing).timesteps
    assert len(times) == steps
    assert (np.diff(times) < 0).all()
    assert times[0] <= 999
    assert times[-1] >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "dpm"}, "name must be one of ddpm, ddim, .*, got 'dpm'"),
        ({"name": "flow_euler"}, r"schedule of 'flow_euler' must be Schedule.flow\(…\), got Schedule\(linear"),
        ({"schedule": Schedule.flow()}, "schedule of 'ddim' must be a discrete Schedule or Schedule.angular"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": None}, "steps must be given unless spacing or sigmas is a list"),
        ({"steps": 3, "spacing": [9, 5]}, "steps must be the 2 of spacing or None, got 3"),
        ({"spacing": [5, 9], "steps": None}, "spacing must be one of .* or fall to 0 or more"),
        ({"spacing": [1000, 9], "steps": None}, "spacing must hold times below the schedule's 1000, got 1000"),
        ({"sigmas": "karras"}, "sigmas must be None for 'ddim', which visits times"),
        ({"name": "euler", "sigmas": "even"}, "sigmas must be one of karras, exponential, beta, got 'even'"),
        ({"name": "euler", "sigmas": [3, 0], "steps": None}, "sigmas must end above 0"),
        ({"name": "euler", "sigmas": [3, 1], "spacing": [9, 5], "steps": None}, "can't both be lists"),
        ({"spacing": "leading", "offset": -1}, "offset must not be negative, got -1"),
        ({"name": "edm_euler", "schedule": Schedule.edm(), "spacing": "linspace"}, "which has no times to choose from"),
        ({"schedule": Schedule.angular(), "spacing": [9, 5], "steps": None}, "which has no times to choose from"),
        ({"schedule": Schedule.angular(), "final": "sigma_min"}, "final must be 'zero' on AngularSchedule"),
        ({"name": "flow_euler", "schedule": Schedule.flow(), "sigmas": [2, 1], "steps": None}, "at most 1, got 2"),
        ({"name": "lcm", "spacing": "leading"}, "spacing must be 'trailing' or a list for this sampler, got 'leading'"),
        ({"name": "lcm", "steps": 51}, "steps must be from 1 to the teacher's 50, got 51"),
        ({"name": "flow_euler", "schedule": Schedule.flow(), "spacing": "leading"}, "spacing 'leading' never sees"),
        ({"name": "pndm", "warmup": "runge_kutta", "steps": 3}, "needs at least 4 steps, got 3"),
        ({"name": "euler", "churn": -1}, "churn must not be negative, got -1"),
        ({"name": "unipc", "solver": "heun"}, "solver must be bh1 or bh2, got 'heun'"),
        ({"name": "dpmpp_2m", "order": 4}, "order must be 1, 2 or 3, got 4"),
        ({"compat": "k-diffusion"}, "compat must be one of None, diffusers, got 'k-diffusion'"),
        ({"final": "one"}, "final must be one of zero, sigma_min, got 'one'"),
        ({"threshold": 2.0}, "threshold must be above 0 and at most 1, or None, got 2.0"),
        ({"threshold": 0.9, "clip": 0.5}, "clip must be at least 1 with threshold, got 0.5"),
        ({"rescale": 2.0}, "rescale must be from 0 to 1, got 2.0"),
        ({"start_at": 0.0}, "start_at must be above 0 and at most 1, got 0.0"),
        ({"start_at": 0.1}, "start_at=0.1 must leave from 1 to 5 of the 5 steps"),
        ({"steps": 1001}, "steps must be from 1 to the schedule's 1000, got 1001"),
        ({"prediction": "noise"}, "prediction must be one of epsilon, v, sample, flow, got 'noise'"),
        ({"spacing": "even"}, "spacing must be one of trailing, leading, linspace, got 'even'"),
        ({"spacing": "leading", "offset": 300}, "offset 300 leads past the schedule's last time 999"),
        ({"clip": 0}, "clip must be positive or None, got 0"),
        ({"eta": 2}, "eta must be from 0 to 1, got 2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    arguments = {"name": "ddim", "schedule": SCHEDULE, "steps": 5} | arguments
    with pytest.raises(ValueError, match=message):
        samplers.create(**arguments)


def test_an_option_of_another_sampler_is_refused():
    with pytest.raises(TypeError, match="create: 'ddpm' has no option 'eta'; its options are variance, noise_scale"):
        samplers.create("ddpm", SCHEDULE, steps=5, eta=0.5)


def test_lists_of_times_and_of_noise_levels_are_visited_as_they_are():
    times, levels = [999, 850, 233, 24], [14.615, 3.861, 0.652, 0.152]
    assert samplers.create("dpmpp_2m", SCHEDULE, spacing=times).timesteps.tolist() == times
    assert samplers.create("flow_euler", Schedule.flow(shift=3.0), spacing=times).timesteps.tolist() == times
    assert samplers.create("lcm", SCHEDULE, spacing=times).timesteps.tolist() == times
    sampler = samplers.create("euler", SCHEDULE, sigmas=levels)
    assert sampler.init_sigma == levels[0]
    np.testing.assert_allclose(sampler.table[:, -1], [*levels[1:], 0])
    sampler = samplers.create("dpmpp_2m", Schedule.flow(), sigmas=[1.0, 0.5, 0.2], final="sigma_min")
    np.testing.assert_allclose(sampler.table[:, -1], [0.5, 0.2, 0.001])
