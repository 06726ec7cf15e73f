import math

import torch

from .randn import normal


def sampler_step(
    x,
    slots,
    model_output,
    uncond_output,
    noise,
    mask,
    known,
    known_noise,
    row,
    index,
    guidance,
    scale,
    rescale,
    clip,
    threshold,
    seed,
    step,
    first,
    store,
    copies,
    shared,
    model_input_dtype,
):
    c = coefficients(row, index, x)

    def noise_of(stream, given):
        if given is None and seed is not None:
            given = normal(x.shape, seed, step if index is None else index, stream, first, x.device)
        return given

    m = _guide(_compute(model_output), _compute(uncond_output), _per_sample(guidance, x), scale, rescale)
    x0 = None
    if not (_is_zero(c["c_0"]) and _is_zero(c["q_0"])):
        x0 = _bound(_sum(c, x, a_x=x, a_m=m), clip, threshold)
    x_next = _sum(
        c,
        x,
        c_x=x,
        c_0=x0,
        c_m=m,
        c_n=None if _is_zero(c["c_n"]) else noise_of(0, noise),
        **{f"c_h{k}": h if h is not None and h.shape == x.shape else None for k, h in enumerate(slots)},
    )
    if mask is not None:
        new_noise = None if _is_zero(c["b_1"]) else noise_of(1, known_noise)
        mask = _compute(mask)
        x_next = mask * x_next + (1 - mask) * _sum(c, x, b_0=known, b_1=new_noise)
    stored = _sum(c, x, q_x=x, q_0=x0, q_m=m).to(x.dtype) if store else None
    model_input = None
    if copies:
        model_input = (c["s'"] * x_next).to(model_input_dtype)
        model_input = torch.cat([model_input] * copies) if copies > 1 else model_input
    return [t for t in (None if shared else x_next.to(x.dtype), stored, model_input) if t is not None]


def sampler_step_(state, *arguments):
    *operands, copies, model_input_dtype = arguments
    slots = len(state) - 1
    x_next, *others = sampler_step(state[0], state[1:].unbind(), *operands, slots > 0, copies, False, model_input_dtype)
    if slots:
        slot = coefficients(*operands[6:8], state[0])["slot"]
        for k in range(slots):
            state[1 + k].copy_(torch.where(torch.as_tensor(slot == k, device=state.device), others[0], state[1 + k]))
    state[0].copy_(x_next)
    return others[-1] if copies else state.new_empty(0)


def columns(slots):
    """The names of a row's columns for a sampler that keeps `slots` tensors of history."""
    before, after = ("t", "s'", "a_x", "a_m", "c_x", "c_0", "c_m", "c_n"), ("q_x", "q_0", "q_m", "slot", "b_0", "b_1")
    return (*before, *(f"c_h{k}" for k in range(slots)), *after)


def coefficients(row, index, x):
    """Column name -> number, or a tensor (B, 1, …) where every sample has a row of its own."""
    if isinstance(row, torch.Tensor):
        row = row if index is None else row[index]
        row = row.tolist() if row.dim() == 1 else row.to(x.device, _compute_dtype(x)).unbind(1)
        row = [_per_sample(c, x) for c in row]
    return dict(zip(columns(len(row) - len(columns(0))), row, strict=True))


def first_pass(x, model_output, uncond_output, row, index, guidance, scale, rescale, clip, threshold):
    """(B,) tensors a kernel needs before it starts, without waiting for the device: the factor on the guided output, or
    None, and s of the threshold, or None."""
    if not (threshold or (rescale and uncond_output is not None)):
        return None, None
    if row.dim() == 1 or (index is not None and index.dim() == 0):
        row = (row if index is None else row[index])[None]
    else:
        row = row if index is None else row[index]
    c = dict(zip(columns(row.size(1) - len(columns(0))), (_per_sample(c, x) for c in row.unbind(1)), strict=True))
    m, uncond, factor = _compute(model_output), _compute(uncond_output), None
    if uncond is not None:
        g = _per_sample(guidance, x) if guidance is not None else torch.full((), scale, device=x.device, dtype=m.dtype)
        cond, m = m, g * m + _times(1 - g, uncond)
        if rescale:
            factor = rescale * _std(cond) / _std(m) + (1 - rescale)
            m = m * _per_sample(factor, m)
    bound = (
        _quantile((_times(c["a_x"], _compute(x)) + _times(c["a_m"], m)).abs().flatten(1), threshold)
        if threshold
        else None
    )
    return factor, bound if bound is None else bound.clamp(1, clip)


def _guide(cond, uncond, guidance, scale, rescale):
    if uncond is None:
        return cond
    g = scale if guidance is None else guidance
    m = _times(g, cond) + _times(1 - g, uncond)
    if rescale:
        m = m * (rescale * _per_sample(_std(cond) / _std(m), m) + (1 - rescale))
    return m


def _std(t):
    """t.flatten(1).std(1), which warns of images of one element."""
    t = t.flatten(1)
    return ((t - t.mean(1, keepdim=True)).square().sum(1) / (t.size(1) - 1)).sqrt()


def _bound(x0, clip, threshold):
    if threshold is None or x0.numel() == 0:
        return x0 if clip is None else x0.clamp(-clip, clip)
    s = _per_sample(_quantile(x0.abs().flatten(1), threshold).clamp(1, clip), x0)
    return torch.maximum(torch.minimum(x0, s), -s) / s


def _quantile(t, q):
    """torch.quantile(t, q, dim=1), which takes no more than 16 million elements."""
    rank = q * (t.size(1) - 1)
    low, high = math.floor(rank), math.ceil(rank)
    ordered = t.sort(1).values
    value = ordered[:, low].lerp(ordered[:, high], rank - low)
    return torch.where(t.isnan().any(1), math.nan, value)


def _sum(c, x, **terms):
    """The sum of coefficient times tensor; one whose coefficient is 0 is not read."""
    total = torch.zeros_like(x, dtype=_compute_dtype(x))
    for name, tensor in terms.items():
        if _is_zero(c[name]):
            continue
        if tensor is None:
            given = {"c_n": "noise", "b_0": "known", "b_1": "known_noise"}.get(name) or f"slots[{name[3:]}]"
            raise ValueError(f"sampler_step: the row reads {given}, but it was not given")
        total = total + _times(c[name], _compute(tensor))
    return total


def _times(c, t):
    """c t, where a coefficient of 0 does not read t."""
    if isinstance(c, torch.Tensor):
        return torch.where(c == 0, 0, c * t)
    return c * t if c else torch.zeros_like(t)


def _is_zero(c):
    return not c.any() if isinstance(c, torch.Tensor) else c == 0


def _per_sample(c, x):
    return c.to(_compute_dtype(x)).reshape(-1, *[1] * (x.dim() - 1)) if isinstance(c, torch.Tensor) else c


def _compute(t):
    return t if t is None else t.to(_compute_dtype(t))


def _compute_dtype(t):
    return torch.promote_types(t.dtype, torch.float32)
