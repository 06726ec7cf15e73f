import pytest
import torch

from imagegen import samplers
from imagegen.samplers import Schedule

SCHEDULE = Schedule.cosine()


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


def test_bad_arguments_are_named():
    sampler = samplers.create("ddim", SCHEDULE, steps=2)
    with pytest.raises(ValueError, match=r"noise must have the shape \(2, 1\), got \(2, 2\)"):
        samplers.sample(model, sampler, (2, 1), noise=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"seed must be from 0 to 2\^64 - 1, got -1"):
        samplers.sample(model, sampler, (2, 1), seed=-1)
