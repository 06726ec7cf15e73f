"""imagegen.integrations.diffusers.AttnProcessor against the processor diffusers uses by default."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers.models.attention_processor import Attention, AttnProcessor2_0  # noqa: E402

from imagegen.integrations.diffusers import AttnProcessor  # noqa: E402


def compare(model, *inputs, **options):
    with torch.no_grad():
        model.set_attn_processor(AttnProcessor2_0())
        expected = model(*inputs, **options)
        model.set_attn_processor(AttnProcessor())
        mine = model(*inputs, **options)
    expected, mine = (t if isinstance(t, torch.Tensor) else t.sample for t in (expected, mine))
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=2e-5)
    return mine


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_text_to_image_unet(masked):
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    options = {"encoder_attention_mask": torch.arange(11)[None] < torch.tensor([[5], [11]])} if masked else {}
    compare(unet, torch.randn(2, 4, 16, 16), 7, torch.randn(2, 11, 24), **options)


def test_autoencoder():
    """One wide head over an image, with group norm and a residual connection."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    compare(vae, torch.randn(1, 3, 32, 32))


OPTIONS = {
    "plain": {},
    "norm_cross": {"cross_attention_norm": "layer_norm", "cross_attention_dim": 24},
    "qk_norm": {"qk_norm": "layer_norm"},
    "rescaled": {"rescale_output_factor": 2.0, "residual_connection": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_layer(options):
    layer = Attention(32, heads=4, dim_head=8, **options)
    context = torch.randn(2, 7, 24) if "cross_attention_dim" in options else None
    layer.set_attn_processor = layer.set_processor
    y = compare(layer, torch.randn(2, 9, 32), context)
    assert y.shape == (2, 9, 32)


def test_training_gives_the_same_gradients():
    layer, x, gradients = Attention(32, heads=4, dim_head=8), torch.randn(2, 9, 32), []
    for processor in (AttnProcessor2_0(), AttnProcessor()):
        layer.set_processor(processor)
        gradients.append(torch.autograd.grad(layer(x).square().sum(), layer.parameters()))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_unknown_names():
    import imagegen.integrations.diffusers as integration

    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        integration.Nothing  # noqa: B018
