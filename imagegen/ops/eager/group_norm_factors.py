import torch


def group_norm_factors(x, num_groups, weight, bias, eps, scale, shift):
    dtype = torch.promote_types(x.dtype, torch.float32)
    groups = x.to(dtype).reshape(x.size(0), num_groups, -1)
    var, mean = torch.var_mean(groups, -1, correction=0, keepdim=True)
    channels = x.size(1) // num_groups
    rstd = (var + eps).rsqrt().expand(-1, -1, channels).flatten(1)
    mean = mean.expand(-1, -1, channels).flatten(1)
    gain = rstd if weight is None else rstd * weight
    offset = -mean * gain if bias is None else bias - mean * gain
    if scale is not None:
        gain, offset = gain * (1 + scale), offset * (1 + scale)
    return gain.to(dtype), (offset if shift is None else offset + shift).to(dtype)
