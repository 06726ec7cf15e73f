import torch


def group_norm_factors(x, num_groups, weight, bias, eps, scale, shift):
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(x.size(0), num_groups, -1)
    var, mean = torch.var_mean(groups, -1, correction=0)
    return factors(mean, var, x.size(1) // num_groups, weight, bias, eps, scale, shift)


def factors(mean, var, channels, weight, bias, eps, scale, shift):
    """Of groups of so many channels with this mean and variance, (B, groups)."""
    rstd = (var + eps).rsqrt().repeat_interleave(channels, 1)
    mean = mean.repeat_interleave(channels, 1)
    gain = rstd if weight is None else rstd * weight
    offset = -mean * gain if bias is None else bias - mean * gain
    if scale is not None:
        gain, offset = gain * (1 + scale), offset * (1 + scale)
    return gain.to(mean.dtype), (offset if shift is None else offset + shift).to(mean.dtype)
