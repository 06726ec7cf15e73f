import copy

import pytest
import torch
from helpers import relative_error

import imagegen

diffusers = pytest.importorskip("diffusers", reason="optimize's part for diffusers needs diffusers")

CHANNELS = {"block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1}


def decode(model):
    return model.decode(torch.randn(1, 4, 6, 10).to(model.dtype)).sample


def autoencode(model):
    return model(torch.randn(2, 3, 16, 24).to(model.dtype)).sample


def encode_and_decode(model):  # between the two, forward rounds to bytes
    latents = model.encode(torch.randn(2, 3, 16, 24).to(model.dtype)).latents
    return torch.cat([latents.flatten(), decode(model).flatten()])


def denoise(model):
    return model(torch.randn(2, model.config.in_channels, 8, 12).to(model.dtype), torch.tensor([3, 7])).sample


def denoise_with_text(model, **more):
    text = torch.randn(2, 5, 12).to(model.dtype)
    return model(torch.randn(2, 4, 8, 12).to(model.dtype), torch.tensor([3, 7]), text, **more)


def control(model):
    image = torch.randn(2, 3, 64, 96).to(model.dtype)
    down, mid = denoise_with_text(model, controlnet_cond=image, return_dict=False)
    return torch.cat([t.flatten() for t in (*down, mid)])


def autoencoder_kl():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**blocks, **CHANNELS)


def vq_model():
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=16,
        **CHANNELS,
    )


def autoencoder_tiny():
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
    )


def unet(down="DownBlock2D", up="AttnUpBlock2D", **options):
    types = {"down_block_types": (down, "AttnDownBlock2D"), "up_block_types": (up, "UpBlock2D")}
    return diffusers.UNet2DModel(sample_size=8, attention_head_dim=8, **types, **CHANNELS, **options)


def unet_with_resnets_that_resample():
    return unet("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", resnet_time_scale_shift="scale_shift")


def conditional(kind=diffusers.UNet2DConditionModel, **options):
    return kind(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        **CHANNELS,
        **options,
    )


def unet_with_text():
    return conditional(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def controlnet():
    model = conditional(diffusers.ControlNetModel, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for parameter in model.parameters():  # its last layers begin as zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model


MODELS = {
    "AutoencoderKL": (autoencoder_kl, decode),
    "AutoencoderTiny": (autoencoder_tiny, encode_and_decode),
    "VQModel": (vq_model, autoencode),
    "UNet2DModel": (unet, denoise),
    "UNet2DModel-scale_shift": (unet_with_resnets_that_resample, denoise),
    "UNet2DConditionModel": (unet_with_text, lambda model: denoise_with_text(model).sample),
    "ControlNetModel": (controlnet, control),
}
every_model = pytest.mark.parametrize(("make", "run"), MODELS.values(), ids=MODELS)


def run_seeded(run, model):
    torch.manual_seed(0)
    return run(model)


@every_model
def test_outputs(make, run):
    model = make().eval()
    with torch.no_grad():
        exact = run_seeded(run, copy.deepcopy(model).double())
        assert imagegen.optimize(model).replaced
        assert relative_error(run_seeded(run, model), exact) < 1e-5
        assert relative_error(run_seeded(run, model.double()), exact) < 1e-11


@every_model
def test_gradients_in_training(make, run):
    model = make().double().train()
    twin = copy.deepcopy(model)
    imagegen.optimize(model)
    for m in (model, twin):
        run_seeded(run, m).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None), name
        if p.grad is not None and q[1].grad.norm() > 1e-9:  # a key's bias has none but rounding
            assert relative_error(p.grad, q[1].grad) < 1e-8, name


@every_model
def test_restore(make, run):
    model = make().eval()
    kinds, state = [type(module) for module in model.modules()], list(model.state_dict())
    with torch.no_grad():
        y = run_seeded(run, model)
        imagegen.optimize(model)
        assert list(model.state_dict()) == state
        assert imagegen.optimize(model).replaced == []
        imagegen.restore(model)
        assert torch.equal(run_seeded(run, model), y)
    assert [type(module) for module in model.modules()] == kinds


def test_a_decoder_runs_fused(calls):
    model = autoencoder_kl().eval()
    report = imagegen.optimize(model)
    with torch.no_grad():
        decode(model)
    resnets = 2 + 2 * 2  # in the middle, then layers_per_block + 1 in each of two blocks
    assert calls.count("group_norm") == 2 * resnets + 2  # with the attention's and the last
    assert calls.count("conv2d") == 2 * resnets + 2  # with the first and the last
    assert (calls.count("upsample_conv2d"), calls.count("attention")) == (1, 1)
    blocks = [r for r in report.replaced if r.was == "ResnetBlock2D" and r.name.startswith("decoder.")]
    assert len(blocks) == resnets


def test_hooks_inside_a_block_are_named_and_fire():
    model = unet().eval()
    resnet = model.down_blocks[0].resnets[0]
    seen = []
    resnet.norm1.register_forward_hook(lambda module, args, output: seen.append(output))
    resnet.conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        run_seeded(denoise, twin)
        report = imagegen.optimize(model)
        run_seeded(denoise, model)
    assert len(seen) == 4
    torch.testing.assert_close(seen[2:], seen[:2], rtol=1e-4, atol=1e-5)
    left = {left.name: left.why for left in report.left if left.was == "ResnetBlock2D"}
    assert left == {"down_blocks.0.resnets.0": "GroupNorm has forward hooks, which would be bypassed"}


def test_hooks_that_come_later_fire():
    model = autoencoder_tiny().eval()
    imagegen.optimize(model)
    block, seen = model.decoder.layers[2], []
    for module in (block.conv, block.conv[1], block.fuse):
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    decode(model)
    assert len(seen) == 4  # one activation serves both places in a block


@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0"])
def test_stock_attention_processors_are_replaced(processor, calls):
    model = unet_with_text().eval()
    model.set_attn_processor(getattr(diffusers.models.attention_processor, processor)())
    with torch.no_grad():
        y = run_seeded(denoise_with_text, model).sample
        imagegen.optimize(model)
        torch.testing.assert_close(run_seeded(denoise_with_text, model).sample, y, rtol=1e-4, atol=1e-5)
    assert calls.count("attention") == 2 * (1 + 2 + 1)


def test_other_attention_processors_are_kept_and_named(calls):
    model = unet_with_text().eval()
    used = []

    class Processor(diffusers.models.attention_processor.AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            used.append(self)
            return super().__call__(*args, **kwargs)

    model.down_blocks[0].attentions[0].transformer_blocks[0].attn2.set_processor(Processor())
    report = imagegen.optimize(model)
    assert [left.why for left in report.left if left.was == "Attention"] == ["its processor is Processor"]
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Processor())
    with torch.no_grad():
        denoise_with_text(model)
    assert len(used) == 2 and calls.count("attention") == 2 * (1 + 2 + 1) - 2


def test_heads_too_large_for_the_op_are_left():
    attention = diffusers.models.attention_processor.Attention(query_dim=4, heads=1, dim_head=520)
    report = imagegen.optimize(attention)
    assert [left.why for left in report.left] == ["its heads have 520 channels, above 512"]


def test_an_adapter_in_a_block_is_not_bypassed():
    """As LoRA's are: the module is exchanged for one that calls it and adds something."""

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return self.base(x) + 1

    model = unet().eval()
    imagegen.optimize(model)
    resnet = model.mid_block.resnets[0]
    resnet.conv1 = Adapter(resnet.conv1)
    with torch.no_grad():
        y = run_seeded(denoise, model)
        imagegen.restore(model)
        torch.testing.assert_close(y, run_seeded(denoise, model), rtol=1e-4, atol=1e-5)


def test_dropout_draws_as_before():
    model = unet(dropout=0.5).train()
    with torch.no_grad():
        y = run_seeded(denoise, model)
        imagegen.optimize(model)
        torch.testing.assert_close(run_seeded(denoise, model), y, rtol=1e-4, atol=1e-5)


def test_an_upsampling_to_another_size(calls):
    model = unet_with_text().eval()
    x, text = torch.randn(1, 4, 7, 9), torch.randn(1, 5, 12)  # odd: the skip connection says the size
    with torch.no_grad():
        y = model(x, 3, text).sample
        imagegen.optimize(model)
        torch.testing.assert_close(model(x, 3, text).sample, y, rtol=1e-4, atol=1e-5)
    assert "upsample_conv2d" not in calls


def test_a_pipeline():
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=10)
    pipeline = diffusers.DDIMPipeline(unet=unet(), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def generate():
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipeline(generator=generator, num_inference_steps=2, output_type="np").images)

    images = generate()
    report = imagegen.optimize(pipeline)
    assert all(r.name.startswith("unet.") for r in report.replaced)
    torch.testing.assert_close(generate(), images, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compile():
    model = unet().eval()
    with torch.no_grad():
        imagegen.optimize(model)
        y = run_seeded(denoise, model)
        torch._dynamo.reset()
        model.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(run_seeded(denoise, model), y, rtol=1e-4, atol=1e-5)
