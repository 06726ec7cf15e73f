"""The one step of every sampler."""

import torch


def step(x, model_output, row, *, uncond_output=None, guidance=None, slots=(), noise=None, clip=None):
    """Advance x by one row of a sampler's table (the formulas are in `samplers.table`).

    Args:
        x: the state (B, …), float32 or float64 whatever the model computes in.
        model_output: the model's output, of x's shape; conditional where guided.
        row: float64 array (14 + slots,).
        uncond_output, guidance: the unconditional output and the weight g, a number or a tensor (B,); or neither.
        slots: the stored tensors, read where the row's c_hk is not 0.
        noise: unit normal of x's shape, needed where the row's c_n is not 0.
        clip: bound on |x_0|, or None.

    Returns: (x', the tensor to store in slot row["slot"] or None, the next model input s' x').
    Raises: ValueError where a tensor that the row reads is missing.
    """
    _t, s, a_x, a_m, c_x, c_0, c_m, c_n, *c_h, q_x, q_0, q_m, slot, _b_0, _b_1 = row.tolist()
    if len(slots) != len(c_h):
        raise ValueError(f"step: the row has {len(c_h)} slots, got {len(slots)}")
    if (uncond_output is None) != (guidance is None):
        raise ValueError("step: uncond_output and guidance go together, only one was given")
    m = model_output.to(x.dtype)
    if uncond_output is not None:
        m = _guide(m, uncond_output.to(x.dtype), guidance)
    x0 = _combine(x, {"x": (a_x, x), "model_output": (a_m, m)}) if c_0 or q_0 else None
    if clip is not None and x0 is not None:
        x0 = x0.clamp(-clip, clip)
    history = {f"slots[{k}]": (c, h) for k, (c, h) in enumerate(zip(c_h, slots, strict=True))}
    x_next = _combine(x, {"x": (c_x, x), "x_0": (c_0, x0), "model_output": (c_m, m), "noise": (c_n, noise), **history})
    stored = _combine(x, {"x": (q_x, x), "x_0": (q_0, x0), "model_output": (q_m, m)}) if slot >= 0 else None
    return x_next, stored, x_next if s == 1 else s * x_next


def _guide(cond, uncond, guidance):
    if isinstance(guidance, torch.Tensor):
        guidance = guidance.to(cond).reshape(-1, *[1] * (cond.dim() - 1))
    return guidance * cond + (1 - guidance) * uncond


def _combine(like, terms):
    total = torch.zeros_like(like)
    for name, (coefficient, tensor) in terms.items():
        if coefficient == 0:
            continue
        if tensor is None:
            raise ValueError(f"step: the row reads {name} (coefficient {coefficient:.3g}), but it was not given")
        total.add_(tensor, alpha=coefficient)
    return total
