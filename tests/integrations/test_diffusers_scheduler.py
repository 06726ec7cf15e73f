"""The scheduler that replaces a diffusers scheduler: the same calls, the same images."""

import copy
import inspect

import pytest
import torch

pytest.importorskip("diffusers", reason="the scheduler replaces one of diffusers")
import diffusers
import diffusers_oracle

from imagegen.integrations.diffusers import scheduler
from imagegen.integrations.diffusers.tables import TABLES

diffusers.utils.logging.set_verbosity_error()
SHAPE = (2, 3, 4, 4)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS = [
    ("DDIMScheduler", SD),
    ("DDIMScheduler", {"timestep_spacing": "linspace", "prediction_type": "v_prediction"}),
    ("DDIMScheduler", SD | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "trailing", "thresholding": True}),
    ("PNDMScheduler", SD | {"skip_prk_steps": True, "prediction_type": "v_prediction"}),
    ("PNDMScheduler", {}),
    ("LCMScheduler", SD),
    ("TCDScheduler", SD),
    ("EulerDiscreteScheduler", SD),
    ("EulerDiscreteScheduler", SD | {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerAncestralDiscreteScheduler", SD),
    ("HeunDiscreteScheduler", SD),
    ("KDPM2DiscreteScheduler", SD),
    ("KDPM2AncestralDiscreteScheduler", SD),
    ("LMSDiscreteScheduler", SD),
    ("DPMSolverMultistepScheduler", SD | {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", SD | {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    ("DEISMultistepScheduler", SD),
    ("UniPCMultistepScheduler", SD | {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
    ("SASolverScheduler", SD),
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {}),
]
cases = pytest.mark.parametrize(("name", "config"), CONFIGS, ids=lambda v: v if isinstance(v, str) else "")


def stock(name, config):
    return getattr(diffusers, name)(**config)


def model(x, t):
    return 0.75 * x + 0.3 * torch.sin(1.7 * x.roll(1, -1) + float(t) / 300)


def run(scheduler, steps=10, dtype=torch.float32, skip=0, by_index=False, **options):
    """What a pipeline does, from the step number `skip` on."""
    generator = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(steps)
    begin = skip * scheduler.order
    if by_index:
        scheduler.set_begin_index(begin)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float32).to(dtype) * getattr(
        scheduler, "init_noise_sigma", 1.0
    )
    if skip:
        x = x * 0.5
    accepted = inspect.signature(scheduler.step).parameters
    options |= {"generator": generator} if "generator" in accepted else {}
    for t in scheduler.timesteps[begin:]:
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = model(model_input.float(), t).to(dtype)
        x = scheduler.step(output, t, x, **options, return_dict=False)[0].to(dtype)
    return x


def relative(a, b):
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def test_every_table_has_a_case():
    assert {name for name, _ in CONFIGS} | {"DPMSolverSDEScheduler"} == set(TABLES)


@cases
def test_it_gives_what_the_scheduler_gives(name, config):
    theirs = stock(name, config)
    ours = scheduler(theirs)
    assert relative(run(ours), run(theirs)) < 2e-4
    assert relative(run(ours, steps=4), run(theirs, steps=4)) < 2e-4  # set_timesteps starts afresh


@cases
def test_it_starts_in_the_middle(name, config):
    theirs = stock(name, config)
    if name == "PNDMScheduler":
        pytest.skip("diffusers repeats its first step wherever it starts, and so skips a time")
    by_index = hasattr(theirs, "set_begin_index")
    expected = run(theirs, skip=4, by_index=by_index)
    assert relative(run(scheduler(theirs), skip=4, by_index=by_index), expected) < 2e-4


@pytest.mark.parametrize(("skip_prk_steps", "skip"), [(True, 4), (False, 14)])
def test_pndm_started_in_the_middle_runs_through(skip_prk_steps, skip):
    """From there it is close to DDIM with many more steps; diffusers skips a time and is not."""
    ours = scheduler(diffusers.PNDMScheduler(**SD, skip_prk_steps=skip_prk_steps))
    ddim = scheduler(diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False))
    ours.set_timesteps(20)
    t = int(ours.timesteps[skip])
    ddim.set_timesteps(1000)
    expected = run(ddim, steps=1000, skip=999 - t)
    assert relative(run(ours, steps=20, skip=skip), expected) < 0.02


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"eta": 0.7}),
        ("DDIMScheduler", {"eta": 1.0, "use_clipped_model_output": True}),
        ("EulerDiscreteScheduler", {"s_churn": 3.0, "s_noise": 1.01}),
        ("TCDScheduler", {"eta": 0.8}),
        ("LMSDiscreteScheduler", {"order": 2}),
    ],
)
def test_the_options_of_step(name, options):
    theirs = stock(name, SD)
    assert relative(run(scheduler(theirs), **options), run(theirs, **options)) < 2e-4


def test_the_sde_of_two_stages():
    """Without its noise, which diffusers takes from a Brownian tree and our table makes of independent draws."""
    theirs = diffusers_oracle.load("dpmsolver_sde", double=False).DPMSolverSDEScheduler(**SD)
    diffusers_oracle.set_noise(torch.zeros(SHAPE))
    ours = scheduler(theirs)
    assert relative(run(ours, s_noise=0.0), run(theirs, s_noise=0.0)) < 2e-4
    assert relative(run(ours, s_noise=0.0, skip=4), run(theirs, s_noise=0.0, skip=4)) < 2e-4
    assert not torch.equal(run(ours), run(ours, s_noise=0.0))


def test_a_bfloat16_model_keeps_a_float32_state():
    theirs = stock("DPMSolverMultistepScheduler", SD)
    exact = run(theirs, steps=20)
    ours, rounded = (relative(run(s, steps=20, dtype=torch.bfloat16), exact) for s in (scheduler(theirs), theirs))
    assert ours < rounded


def test_a_sample_that_was_changed_is_taken_as_it_is():
    ours = scheduler(diffusers.DDIMScheduler(**SD))
    ours.set_timesteps(4)
    t, x = ours.timesteps, torch.randn(SHAPE, dtype=torch.bfloat16)
    first = ours.step(model(x, 0), t[0], x).prev_sample
    first.zero_()
    second = ours.step(torch.zeros_like(x), t[1], first).prev_sample
    assert second.abs().max() == 0


@cases
def test_it_is_a_scheduler_of_the_same_class(name, config, tmp_path):
    theirs = stock(name, config)
    ours = scheduler(theirs)
    assert isinstance(ours, getattr(diffusers, name))
    assert dict(ours.config) == dict(theirs.config)
    assert inspect.signature(ours.step) == inspect.signature(theirs.step)
    assert inspect.signature(ours.set_timesteps) == inspect.signature(theirs.set_timesteps)
    assert ours.order == theirs.order
    ours.save_config(tmp_path)
    assert type(getattr(diffusers, name).from_pretrained(tmp_path)) is getattr(diffusers, name)
    again = type(ours).from_config(ours.config)
    assert type(again) is type(ours)
    assert type(scheduler(ours)) is type(ours)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
def test_the_output_holds_the_original_sample(name):
    theirs, x = stock(name, SD), torch.randn(SHAPE)
    ours = scheduler(theirs)
    outputs = []
    for s in (ours, theirs):
        s.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        outputs.append(s.step(model(s.scale_model_input(x, s.timesteps[0]), 0), s.timesteps[0], x, generator=generator))
    ours, theirs = outputs
    field = "denoised" if name == "LCMScheduler" else "pred_original_sample"
    torch.testing.assert_close(ours.prev_sample, theirs.prev_sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-4, atol=1e-4)
    assert ours[0] is ours["prev_sample"] is ours.prev_sample


def test_a_pipeline_draws_the_same_images():
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(generator=generator, num_inference_steps=5, eta=0.5, output_type="np").images)
        pipe.scheduler = scheduler(pipe.scheduler)
    assert abs(images[0] - images[1]).max() < 1e-4


def test_noise_is_added_as_before():
    theirs = stock("EulerDiscreteScheduler", SD)
    ours = scheduler(theirs)
    x, noise = torch.randn(2, *SHAPE)
    for s in (ours, theirs):
        s.set_timesteps(10)
        s.set_begin_index(3)
    t = theirs.timesteps[3:4]
    assert torch.equal(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t))


def test_it_can_be_copied():
    ours = scheduler(diffusers.UniPCMultistepScheduler(**SD))
    run(ours)
    assert torch.equal(run(copy.deepcopy(ours)), run(ours))


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"scheduler: must be one of DDIMScheduler, .*, got VQDiffusionScheduler"):
        scheduler(diffusers.VQDiffusionScheduler(num_vec_classes=4))
    with pytest.raises(ValueError, match=r"config.algorithm_type must be dpmsolver.* got 'dpmsolver'"):
        scheduler(diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"))
    with pytest.raises(ValueError, match=r"config.variance_type must be fixed_small or .* got 'learned'"):
        scheduler(diffusers.DDPMScheduler(variance_type="learned"))
    with pytest.raises(ValueError, match=r"config.variance_type must be None, got 'learned'"):
        scheduler(diffusers.DPMSolverMultistepScheduler(variance_type="learned"))
    ours, x = scheduler(diffusers.DDIMScheduler()), torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="set_timesteps must be called first"):
        ours.step(x, 999, x)
    ours.set_timesteps(2)
    with pytest.raises(ValueError, match="timestep must be one of the scheduler's, got 7"):
        ours.step(x, 7, x)
    ours.step(x, 500, x)
    with pytest.raises(ValueError, match="timestep must be 0, got 500"):
        ours.step(x, 500, x)
    with pytest.raises(ValueError, match="options must stay those of the first step"):
        ours.step(x, 0, x, eta=1.0)
    ours.step(x, 0, x)
    with pytest.raises(ValueError, match="the last timestep is done"):
        ours.step(x, 0, x)
