"""Denoising diffusion in pixel space, class-conditional where the data has classes.

Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020: the network, the objective.
Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022: the target v.
Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022: the null class and the guided sampler.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .. import samplers
from ..nn import GroupNorm, UpsampleConv2d


def timestep_embedding(t, channels):  # t (B,) -> (B, channels)
    """Sines and cosines of t at frequencies falling from 1 to 1/10000 (Vaswani et al., 2017, section 3.5)."""
    half = channels // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def zeroed(layer):
    """The layer with zero weights: a residual branch that starts as the identity trains from the first step."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


SCHEDULES = {
    "cosine": samplers.Schedule.cosine,
    "linear": samplers.Schedule.linear,
    "scaled_linear": samplers.Schedule.scaled_linear,
}
TARGETS = {
    "v": lambda x0, epsilon, alpha, sigma: alpha * epsilon - sigma * x0,
    "epsilon": lambda x0, epsilon, alpha, sigma: epsilon,
    "sample": lambda x0, epsilon, alpha, sigma: x0,
}


def norm(channels, activation="linear"):
    return GroupNorm(math.gcd(8, channels), channels, activation=activation)


class ResBlock(nn.Module):
    """x + conv(silu(gn(conv(silu(gn(x)))) * (1 + scale) + shift)), scale and shift linear in the embedding."""

    def __init__(self, in_channels, out_channels, embedding_channels):
        super().__init__()
        self.norm1 = norm(in_channels, "silu")
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = nn.Linear(embedding_channels, 2 * out_channels)
        self.norm2 = norm(out_channels, "silu")
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, embedding):
        scale, shift = self.scale_shift(embedding).chunk(2, dim=1)
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h, scale, shift))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """Every pixel attends to every other: x + proj(attention(qkv(gn(x))))."""

    def __init__(self, channels, head_channels=32):
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // head_channels))
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # (B, heads, H*W, C/heads) each
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(2, 3).reshape(B, C, H, W))


class UNet(nn.Module):
    """The network of DDPM: residual blocks on the way down, their outputs joined in again on the way up.

    forward(x, t, label): x (B, C, H, W), t (B,), label (B,) with `classes` as the null class -> (B, C, H, W).
    H and W must be divisible by 2^(levels - 1). Attention runs on the coarsest level only.
    """

    def __init__(self, channels, classes, width, multipliers, blocks):
        super().__init__()
        widths = [width * m for m in multipliers]
        embedding_channels = 4 * width
        self.width = width
        self.time = nn.Sequential(
            nn.Linear(width, embedding_channels), nn.SiLU(), nn.Linear(embedding_channels, embedding_channels)
        )
        self.label = nn.Embedding(classes + 1, embedding_channels)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)

        def res_blocks(*in_channels, out):
            return nn.ModuleList(ResBlock(c, out, embedding_channels) for c in in_channels)

        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for before, here in zip([width, *widths], widths, strict=False):
            self.down.append(res_blocks(before, *[here] * (blocks - 1), out=here))
            self.downsample.append(nn.Conv2d(here, here, 3, stride=2, padding=1))
        self.downsample[-1] = nn.Identity()

        self.middle = res_blocks(widths[-1], widths[-1], out=widths[-1])
        self.attention = SelfAttention(widths[-1])

        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for below, here in zip([widths[-1], *widths[:0:-1]], widths[::-1], strict=True):
            self.upsample.append(UpsampleConv2d(below, here))
            self.up.append(res_blocks(2 * here, *[2 * here] * (blocks - 1), out=here))
        self.upsample[0] = nn.Identity()

        self.head = nn.Sequential(norm(widths[0], "silu"), zeroed(nn.Conv2d(widths[0], channels, 3, padding=1)))

    def forward(self, x, t, label):
        embedding = F.silu(self.time(timestep_embedding(t, self.width)) + self.label(label))
        h = self.stem(x)
        skips = []
        for blocks, downsample in zip(self.down, self.downsample, strict=True):
            for block in blocks:
                h = block(h, embedding)
                skips.append(h)
            h = downsample(h)
        h = self.middle[0](h, embedding)
        h = self.middle[1](self.attention(h), embedding)
        for blocks, upsample in zip(self.up, self.upsample, strict=True):
            h = upsample(h)
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.head(h)


class Diffusion(nn.Module):
    """The objective, and the sampler it trains the network for.

        x_t = alpha_t x_0 + sigma_t epsilon     v = alpha_t epsilon - sigma_t x_0     loss = |unet(x_t, t, label) - v|^2

    Args:
        image_shape: (C, H, W), C of 1 or 3.
        classes: how many; 0 is unconditional.
        width, multipliers, blocks: channels of the finest level, their multiple on each level, blocks per level.
        schedule: "cosine", "linear" or "scaled_linear".
        prediction: "v", "epsilon" or "sample", what the network learns.
        label_dropout: how often the null class stands in for the label, so that one network learns both outputs that
            guidance combines.
    """

    def __init__(
        self,
        image_shape,
        classes=0,
        *,
        width=32,
        multipliers=(1, 2, 4),
        blocks=1,
        schedule="cosine",
        prediction="v",
        label_dropout=0.1,
    ):
        super().__init__()
        channels, H, W = image_shape
        coarsest = 2 ** (len(multipliers) - 1)
        if H % coarsest or W % coarsest:
            raise ValueError(
                f"Diffusion: {len(multipliers)} levels need image sides divisible by {coarsest}, got {H}x{W}; "
                "load the data at another size or give fewer multipliers"
            )
        if width < 2 or width % 2:  # the times' sines and cosines share it
            raise ValueError(f"Diffusion: width must be even and positive, got {width}")
        if blocks < 1:
            raise ValueError(f"Diffusion: blocks must be at least 1, got {blocks}")
        if schedule not in SCHEDULES:
            raise ValueError(f"Diffusion: schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if prediction not in TARGETS:
            raise ValueError(f"Diffusion: prediction must be one of {', '.join(TARGETS)}, got {prediction!r}")
        self.image_shape, self.classes = (channels, H, W), classes
        self.prediction, self.label_dropout = prediction, label_dropout
        self.schedule = SCHEDULES[schedule]()
        self.unet = UNet(channels, classes, width, multipliers, blocks)
        self.register_buffer("alpha", torch.tensor(self.schedule.alpha, dtype=torch.float32), persistent=False)
        self.register_buffer("sigma", torch.tensor(self.schedule.sigma, dtype=torch.float32), persistent=False)

    def forward(self, x0, label):
        """The training loss of images x0 (B, C, H, W) in [-1, 1] with labels (B,)."""
        B, T = len(x0), len(self.alpha)
        # One time from each of B equal strata: less variance than B independent draws (Kingma et al., 2021, I.1).
        t = (torch.arange(B, device=x0.device) + torch.rand(B, device=x0.device)).mul(T / B).long().clamp(max=T - 1)
        alpha, sigma = self.alpha[t].view(B, 1, 1, 1), self.sigma[t].view(B, 1, 1, 1)
        epsilon = torch.randn_like(x0)
        dropped = torch.rand(B, device=x0.device) < self.label_dropout
        m = self.unet(alpha * x0 + sigma * epsilon, t, label.masked_fill(dropped, self.classes))
        return F.mse_loss(m, TARGETS[self.prediction](x0, epsilon, alpha, sigma))

    def sample(
        self, n, *, label=None, seed=0, sampler="ddim", steps=50, guidance=None, batch_size=64, progress=False, **more
    ):
        """Draw n images (n, C, H, W) in [-1, 1]; image i depends on seed, i and its label alone.

        Args:
            label: (n,) integers; None takes the classes in turn, image i having class i % classes.
            sampler, steps, more: as in `imagegen.samplers.create`.
            guidance: weight of the conditional output; None is plain conditional sampling.
            batch_size: images the network sees at a time.
        """
        if label is None:
            label = torch.arange(n) % max(1, self.classes)
        label = label.to(self.alpha.device)
        table = samplers.create(
            sampler, self.schedule, steps=steps, prediction=self.prediction, guidance=guidance, clip=1.0, **more
        )
        batches = [
            samplers.sample(
                self._denoiser(part, guided=guidance is not None),
                table,
                (len(part), *self.image_shape),
                seed=seed,
                progress=progress,
                device=part.device,
                first=i * batch_size,
            )
            for i, part in enumerate(label.split(batch_size))
        ]
        return torch.cat(batches)

    def _denoiser(self, label, guided):
        """model(x, t) for the sampling loop; guided, the second half of x gets the null class."""
        if guided:
            label = torch.cat([label, torch.full_like(label, self.classes)])
        return lambda x, t: self.unet(x.contiguous(memory_format=torch.channels_last), t, label)
