import numpy as np
import pytest
import torch

from imagegen import ops, samplers
from imagegen.samplers import Schedule
from imagegen.samplers.graph import GraphLoop

SCHEDULE = Schedule.cosine()
SHAPE = (2, 1, 4, 4)


def model(x, t):
    return torch.sin(3 * x) + t.reshape(-1, 1, 1, 1) / 1000


def test_image_i_does_not_depend_on_its_batch():
    sampler = samplers.create("ddpm", SCHEDULE, steps=4, clip=1.0)
    eight = samplers.sample(model, sampler, (8, 1, 3, 3), seed=3)
    three = samplers.sample(model, sampler, (3, 1, 3, 3), seed=3)
    later = samplers.sample(model, sampler, (3, 1, 3, 3), seed=3, first=5)
    assert torch.equal(eight[:3], three)
    assert torch.equal(eight[5:], later)
    assert not torch.equal(eight[0], eight[1])


def test_the_seed_decides():
    sampler = samplers.create("ddpm", SCHEDULE, steps=3, clip=1.0)
    one, same, other = (samplers.sample(model, sampler, (2, 1, 2, 2), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    samplers.sample(model, samplers.create("ddpm", SCHEDULE, steps=2), (2, 1, 2, 2))
    assert torch.equal(torch.rand(1), expected)


def test_guidance_doubles_the_batch_and_weighs_its_halves():
    def labelled(x, t):
        assert len(x) == 4
        assert torch.equal(x[:2], x[2:])
        cond, uncond = x.chunk(2)
        return torch.cat([cond, 0 * uncond])

    guided = samplers.create("ddim", SCHEDULE, steps=3, guidance=0.5, clip=1.0)
    plain = samplers.create("ddim", SCHEDULE, steps=3, clip=1.0)
    torch.testing.assert_close(
        samplers.sample(labelled, guided, (2, 1, 2, 2)), samplers.sample(lambda x, t: 0.5 * x, plain, (2, 1, 2, 2))
    )


def test_the_callback_sees_every_state():
    seen = []
    sampler = samplers.create("ddim", SCHEDULE, steps=3, clip=1.0)
    x = samplers.sample(model, sampler, (1, 1, 2, 2), callback=lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1], x)
    assert not torch.equal(seen[0][1], seen[1][1])  # what it was given stays what it was


def test_a_stored_tensor_comes_back_in_its_slot():
    """A hand-made table: the first row stores 2 m, the second returns it."""
    first = [1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 1, 0]
    second = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, -1, 1, 0]
    sampler = samplers.Sampler("by hand", torch.tensor([first, second], dtype=torch.float64).numpy())
    x = samplers.sample(lambda x, t: t.reshape(-1, 1) + 0 * x, sampler, (3, 2))
    assert torch.equal(x, torch.full((3, 2), 2.0))


def test_progress_shows_a_bar(capsys):
    samplers.sample(model, samplers.create("ddim", SCHEDULE, steps=2), (1, 1, 2, 2), progress=True)
    assert "ddim: 100%" in capsys.readouterr().err


def still(x, t):
    """Says that there is no noise: x_0 is x / alpha."""
    return 0 * x


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ALL = sorted(set(samplers.SAMPLERS) - {"ddim_inverse"})


def any_schedule(name):
    if name.startswith("flow"):
        return Schedule.flow(shift=2.0)
    return Schedule.edm() if name.startswith("edm") else Schedule.linear()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_every_sampler_runs(name, guidance):
    sampler = samplers.create(name, any_schedule(name), steps=6, guidance=guidance)
    x = samplers.sample(model, sampler, SHAPE, seed=1)
    assert x.shape == SHAPE
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m", "flow_euler"])
def test_an_image_to_start_from_is_noised_to_the_first_level(name):
    sampler = samplers.create(name, any_schedule(name), steps=10)
    image, noise, seen = seeded(*SHAPE), seeded(*SHAPE, seed=1), []

    def watch(x, t):
        seen.append((x, t))
        return 0 * x

    samplers.sample(watch, sampler, SHAPE, start=image, start_at=0.4, noise=noise)
    assert len(seen) == 4
    alpha, sigma = sampler.starting_at(0.4).start
    torch.testing.assert_close(seen[0][0], sampler.starting_at(0.4).input_scale * (alpha * image + sigma * noise))
    np.testing.assert_allclose([float(t[0]) for _, t in seen], sampler.timesteps[-4:], rtol=1e-6)
    assert (sampler.table[5][-2:] == [alpha, sigma]).all()  # where the step before it leads


def test_history_starts_anew_in_the_middle():
    whole = samplers.create("dpmpp_2m", Schedule.linear(), steps=20)
    tail = samplers.create("dpmpp_2m", Schedule.linear(), steps=20, start_at=0.5)
    h = whole.columns.index("c_h0")
    assert whole.table[10, h] != 0 == tail.table[0, h]
    np.testing.assert_array_equal(whole.table[11:], tail.table[1:])


def test_a_part_of_a_part_is_of_the_whole():
    tail = samplers.create("euler", Schedule.linear(), steps=10, start_at=0.5)
    assert len(tail.starting_at(0.2).table) == 2
    with pytest.raises(ValueError, match=r"start_at=0.8 must leave from 1 to 5 of the 10 steps"):
        tail.starting_at(0.8)


def test_what_is_known_is_kept_and_the_rest_drawn():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    known = seeded(*SHAPE)
    for name in ("ddim", "euler", "dpmpp_2m", "heun", "flow_euler"):
        sampler = samplers.create(name, any_schedule(name), steps=8)
        x = samplers.sample(model, sampler, SHAPE, seed=2, mask=mask, known=known)
        torch.testing.assert_close(x[..., :2], known[..., :2])
        free = samplers.sample(model, sampler, SHAPE, seed=2)
        assert not torch.equal(x[..., 2:], known[..., 2:])
        assert torch.equal(samplers.sample(model, sampler, SHAPE, seed=2, mask=0 * mask + 1, known=known), free)


def test_what_is_known_is_noised_to_every_level():
    """Where nothing is drawn, the state is known x_0 with the noise of its level."""
    sampler = samplers.create("ddim", Schedule.linear(), steps=5)
    known, states = torch.full((64, 1, 16, 16), 0.5), []
    samplers.sample(
        model, sampler, known.shape, mask=torch.zeros(1), known=known, callback=lambda i, x: states.append(x.clone())
    )
    for row, x in zip(sampler.table, states, strict=True):
        np.testing.assert_allclose([x.mean(), x.std()], [0.5 * row[-2], row[-1]], atol=0.02)


def test_ddim_inverse_leads_back_to_the_noise():
    """From an image to its noise and back, with a smooth model and many steps."""
    schedule = Schedule.linear()

    def gentle(x, t):
        return torch.tanh(x) * (t.reshape(-1, 1, 1, 1) / 1000)

    noise = seeded(*SHAPE).double()
    there = samplers.create("ddim", schedule, steps=500)
    back = samplers.create("ddim_inverse", schedule, steps=500)
    image = samplers.sample(gentle, there, SHAPE, noise=noise)
    torch.testing.assert_close(
        samplers.sample(gentle, back, SHAPE, start=image, noise=torch.zeros_like(image)), noise, rtol=0, atol=0.02
    )
    with pytest.raises(ValueError, match="'ddim_inverse' starts from an image, so start must be given"):
        samplers.sample(gentle, back, SHAPE)


def test_a_tensor_from_the_callback_takes_the_place_of_x():
    sampler = samplers.create("euler", Schedule.linear(), steps=3)
    inputs = []

    def watch(x, t):
        inputs.append(x)
        return still(x, t)

    samplers.sample(watch, sampler, SHAPE, callback=lambda i, x: torch.full_like(x, 7.0))
    torch.testing.assert_close(inputs[1], torch.full(SHAPE, 7.0 * sampler.table[0, 1]))


def test_the_log_gets_the_x0_of_every_row(tmp_path):
    sampler = samplers.create("ddim", Schedule.linear(), steps=4, guidance=2.0, clip=1.0)
    logged = []
    x = samplers.sample(model, sampler, SHAPE, log=lambda i, t, x0: logged.append((i, t, x0)))
    assert [(i, t) for i, t, _ in logged] == list(enumerate(sampler.timesteps))
    assert all(x0.abs().max() <= 1 for _, _, x0 in logged)
    torch.testing.assert_close(logged[-1][2], x)  # the last step leads to x_0

    pytest.importorskip("PIL", reason="the sheet is saved with pillow")
    sheet = samplers.ContactSheet(every=2)
    samplers.sample(model, sampler, SHAPE, log=sheet)
    assert sheet.times == sampler.timesteps[::2].tolist()
    sheet.save(tmp_path / "sheet.png", cell=4)
    from PIL import Image

    width, height = Image.open(tmp_path / "sheet.png").size
    assert width == height  # two images, two times
    with pytest.raises(ValueError, match="nothing to show"):
        samplers.ContactSheet().save(tmp_path / "empty.png")


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "heun", "unipc", "ddpm"])
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_counter_on_the_device_steps_as_the_host_does(name, guidance):
    """What a CUDA graph replays, run without one: the table is a tensor, the row a counter, the state in place."""
    sampler = samplers.create(name, Schedule.linear(), steps=5, guidance=guidance, clip=2.0)
    expected = samplers.sample(model, sampler, SHAPE, seed=4)
    x = sampler.init_sigma * ops.randn(SHAPE, seed=4, stream=2)
    settings = {"guidance": guidance, "clip": 2.0, "seed": 4, "model_input_dtype": torch.float32}
    loop = GraphLoop(model, sampler, x, settings)
    for _ in range(len(sampler.table)):
        with torch.no_grad():
            loop.advance()
    torch.testing.assert_close(loop.state[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m", "heun"])
def test_a_cuda_graph_draws_the_same_images(name):
    sampler = samplers.create(name, Schedule.linear(), steps=5, guidance=2.0)
    plain, captured = (
        samplers.sample(model, sampler, SHAPE, seed=4, device="cuda", cuda_graph=graph) for graph in (False, True)
    )
    torch.testing.assert_close(plain, captured, rtol=1e-5, atol=1e-5)


def test_the_model_computes_in_its_own_dtype():
    seen = []

    def bfloat16_model(x, t):
        seen.append(x.dtype)
        return model(x.float(), t).bfloat16()

    sampler = samplers.create("dpmpp_2m", Schedule.linear(), steps=3, guidance=2.0)
    x = samplers.sample(bfloat16_model, sampler, SHAPE, model_input_dtype=torch.bfloat16)
    assert seen == [torch.bfloat16] * 3
    assert x.dtype == torch.float32


def test_every_image_may_have_a_guidance_of_its_own():
    def conditional(x, t):
        cond, uncond = x.chunk(2)
        return torch.cat([torch.sin(cond), torch.cos(uncond)])

    weights = torch.tensor([1.0, 4.0])
    make = {"schedule": Schedule.linear(), "steps": 4, "clip": 1.0}
    both = samplers.sample(conditional, samplers.create("ddim", guidance=weights, **make), SHAPE)
    for i, weight in enumerate(weights):
        alone = samplers.sample(conditional, samplers.create("ddim", guidance=float(weight), **make), SHAPE)
        torch.testing.assert_close(both[i], alone[i])


def test_bad_arguments_are_named():
    sampler = samplers.create("ddim", SCHEDULE, steps=2)
    with pytest.raises(ValueError, match=r"noise must have the shape \(2, 1\), got \(2, 2\)"):
        samplers.sample(model, sampler, (2, 1), noise=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"seed must be from 0 to 2\^64 - 1, got -1"):
        samplers.sample(model, sampler, (2, 1), seed=-1)
    with pytest.raises(ValueError, match="start_at needs start"):
        samplers.sample(model, sampler, (2, 1), start_at=0.5)
    with pytest.raises(ValueError, match=r"start must have the shape \(2, 1\), got \(3, 1\)"):
        samplers.sample(model, sampler, (2, 1), start=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="mask and known go together"):
        samplers.sample(model, sampler, (2, 1), mask=torch.zeros(1))
    with pytest.raises(ValueError, match="cuda_graph needs a CUDA device, got cpu"):
        samplers.sample(model, sampler, (2, 1), cuda_graph=True)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        samplers.ContactSheet(every=0)
