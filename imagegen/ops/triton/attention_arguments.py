"""What the host gives attention's kernels, forward and backward: tensors, strides and compile-time constants."""

import torch


def operands(q, k, v, mask, scale):
    """The arguments every kernel begins with: what the scores are made of."""
    shown = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
    tensors = [x for t in (q, k, v) for x in (t, t.stride()[:3])]
    return *tensors, shown, strides_of_mask(mask), scale, q.size(2), k.size(2), q.size(1), q.size(1) // k.size(1)


def constants(q, k, mask, causal, tensors):
    """tensors: all that are read and written row by row."""
    vector = 16 // q.element_size()
    aligned = all(stride % vector == 0 for t in tensors for stride in t.stride()[:3])
    rows = [t.stride(2) for t in tensors] + list(strides_of_mask(mask)[2:])
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return {
        "BY_KEY": strides_of_mask(mask)[2] == 0,
        "CAUSAL": causal,
        "PRECISION": precision if q.dtype == torch.float32 else "ieee",
        "VECTOR": vector if aligned else 1,
        # Offsets within a tile, or along the mask's keys, could pass 2^31.
        "FAR": max(rows) >= 2**23 or k.size(2) * strides_of_mask(mask)[3] >= 2**31,
    }


def strides_of_mask(mask):
    """Of the four axes; 0 along those it is broadcast over."""
    if mask is None:
        return (0,) * 4
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    return (0,) * (4 - mask.dim()) + tuple(strides)


def masks_scores(mask):
    """Whether the mask has a number for each score, not one for each key: its tiles take registers."""
    return mask is not None and strides_of_mask(mask)[2] != 0


def with_unit_rows(t):
    return t if t.size(3) == 1 or t.stride(3) == 1 else t.contiguous()


def per_row(q):
    return torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
