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
    row = samplers.create("ddim", SCHEDULE, steps=2, eta=0.5).table[0]
    a, a_next = SCHEDULE.alpha_bar[[999, 499]]
    std = 0.5 * np.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    expected = {"a_x": a**-0.5, "a_m": -np.sqrt(1 - a) / a**0.5, "c_0": a_next**0.5}
    expected |= {"c_m": np.sqrt(1 - a_next - std**2), "c_n": std, "b_0": a_next**0.5, "b_1": np.sqrt(1 - a_next)}
    named = dict(zip(samplers.create("ddim", SCHEDULE, steps=2).columns, row, strict=True))
    np.testing.assert_allclose([named[name] for name in expected], list(expected.values()), rtol=1e-12)


@pytest.mark.parametrize("name", list(samplers.SAMPLERS))
def test_the_last_row_ends_without_noise(name):
    *_, last = samplers.create(name, SCHEDULE, steps=7).table
    assert last[7] == 0
    assert last[-2:].tolist() == [1, 0]


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
        ({"name": "dpm"}, "name must be one of ddpm, ddim, got 'dpm'"),
        ({"steps": 0}, "steps must be from 1 to the schedule's 1000, got 0"),
        ({"steps": 1001}, "steps must be from 1 to the schedule's 1000, got 1001"),
        ({"prediction": "noise"}, "prediction must be one of epsilon, v, sample, got 'noise'"),
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
    with pytest.raises(TypeError, match="eta"):
        samplers.create("ddpm", SCHEDULE, steps=5, eta=0.5)
