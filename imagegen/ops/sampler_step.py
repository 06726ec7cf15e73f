"""One step of any diffusion sampler: guidance, solver, noise and the next model input in one pass over memory."""

import numpy as np
import torch

from .. import _library
from . import _backend, eager
from ._check import DTYPES, check_dtype, check_same_device, check_same_dtype, check_shape, explain
from ._layout import empty_model_input
from .eager.sampler_step import columns
from .randn import check_counter, signed

MAX_SLOTS = 8
_WIDTH = len(columns(0))
_FLOAT64 = np.dtype(np.float64)  # one object: `is` takes a third of ==


def sampler_step(
    x,
    model_output,
    row,
    *,
    uncond_output=None,
    guidance=None,
    rescale=0.0,
    slots=(),
    noise=None,
    seed=None,
    step=0,
    first=0,
    clip=None,
    threshold=None,
    mask=None,
    known=None,
    known_noise=None,
    copies=None,
    model_input_dtype=None,
    backend=None,
):
    """Advance x by one row of a sampler's table.

        m      = g model_output + (1 - g) uncond_output          where guided, else model_output
        m      = (rescale std(model_output) / std(m) + 1 - rescale) m
        x_0    = clip(a_x x + a_m m)
        x'     = c_x x + c_0 x_0 + c_m m + c_n noise + sum_k c_hk slots[k]
        stored = q_x x + q_0 x_0 + q_m m                         for slots[slot]; nothing where slot is -1
        x'     = mask x' + (1 - mask) (b_0 known + b_1 noise')   where masked
        input' = s' x'                                           the next model input

    A coefficient of exactly 0 means that the tensor is not read: it may be missing, or hold NaN.

    Args:
        x: the state (B, …), at most 8 axes; float32, bfloat16, float16 or float64.
        model_output: the model's output, of x's shape and any of these dtypes; conditional where guided.
        row: 14 + K coefficients for K slots, in the order of `columns(K)`: a row of `Sampler.table`, a sequence of
            numbers, or a tensor (14 + K,). (B, 14 + K) gives every image a row of its own. With `step` a tensor, the
            whole table (steps, 14 + K).
        uncond_output, guidance: the unconditional output and g, a number or a tensor (B,); or neither.
        rescale: how far the guided output gets the standard deviation of model_output, from 0 to 1, image by image.
        slots: K tensors of x's shape and dtype; None for one that nothing was stored in yet.
        noise: unit normal of x's shape. None takes `randn(x.shape, seed=seed, step=step, stream=0, first=first)`.
        seed, step, first: see `randn`. step may be an int64 tensor () or (B,) on x's device, a counter that a
            captured CUDA graph advances: then the row applied is row[step].
        clip: bound on |x_0|, or None.
        threshold: dynamic thresholding: with s the quantile of |x_0| at `threshold` in (0, 1] over each image, held
            within [1, clip], x_0 becomes clip(x_0, -s, s) / s.
        mask, known: where mask is 1, x' is kept; where it is 0, x' is the known x_0 noised to its level. Both
            broadcast to x's shape. known_noise: the unit normal noise'; None takes stream 1 of the seed.
        copies: how many copies of the next model input to write, one after the other along the batch: 0, 1, 2; None
            is 2 where guided, else 1.
        model_input_dtype: dtype of the next model input; None is x's.
        backend: "eager", "cpu", "cuda", "triton" or None, which takes the first one ready on x's device.

    Returns: (x', stored or None, the next model input or None). x' and stored have x's dtype and strides. Where a copy
        of the next model input holds the same bits as x', x' is that copy and shares its memory. What the host can't
        read without waiting, a row that is a tensor, is taken to store something wherever it has slots.
    Gradients: of any order, in every floating tensor but row.
    Raises: ValueError or TypeError that names the argument.
    Source: Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022; Lin et al., "Common Diffusion Noise Schedules and
        Sample Steps are Flawed", 2023 (rescale); Saharia et al., "Photorealistic Text-to-Image Diffusion Models with
        Deep Language Understanding", 2022 (threshold); the rows' sources are named by the samplers.
    """
    arguments = (
        model_output, row, uncond_output, guidance, rescale, noise, seed, step, first, clip, threshold, mask, known,
        known_noise, copies, model_input_dtype,
    )  # fmt: skip
    try:
        run = _backend.choose("sampler_step", _IMPLEMENTATIONS, backend, x, flop=lambda: 10 * x.numel())
        if run is eager.sampler_step:
            _check(x, slots, *arguments)
        on_host, copies, operands = _operands(run is eager.sampler_step, *arguments[:-1])
        dtype = model_input_dtype or x.dtype
        store = len(slots) > 0 if on_host is None else bool(on_host[-3] >= 0)
        same = copies > 0 and on_host is not None and on_host[1] == 1 and dtype == x.dtype
        shared = same and copies == 2 and _as_copies_lie(x)
        outputs = run(
            x, _filled(slots, x) if slots else slots, *operands, store, 0 if same and copies == 1 else copies, shared,
            dtype,
        )  # fmt: skip
    except Exception:
        explain(_check, x, slots, *arguments)
        raise
    stored = outputs[0 if shared else 1] if store else None
    if shared:
        return outputs[-1][: x.size(0)], stored, outputs[-1]
    return outputs[0], stored, outputs[0] if same and copies == 1 else outputs[-1] if copies else None


def sampler_step_(
    state,
    model_output,
    row,
    *,
    uncond_output=None,
    guidance=None,
    rescale=0.0,
    noise=None,
    seed=None,
    step=0,
    first=0,
    clip=None,
    threshold=None,
    mask=None,
    known=None,
    known_noise=None,
    copies=None,
    model_input_dtype=None,
    backend=None,
):
    """Advance state (1 + K, B, …) in place: x is state[0], slots[k] is state[1 + k], stored goes where it belongs.

    Everything else is `sampler_step`'s. Every image of a batch may store in a slot of its own.

    Returns: the next model input, or None where copies is 0.
    Gradients: none; a state or output that asks for them is refused.
    """
    if not isinstance(state, torch.Tensor) or state.dim() < 2 or len(state) == 0:
        shape = tuple(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
        raise ValueError(f"sampler_step_: state must be a tensor (1 + K, B, …), got {shape}")
    if torch.is_grad_enabled() and any(
        isinstance(t, torch.Tensor) and t.requires_grad for t in (state, model_output, uncond_output, noise, known)
    ):
        raise ValueError("sampler_step_: works in place and has no gradient; call sampler_step, or under no_grad")
    arguments = (
        model_output, row, uncond_output, guidance, rescale, noise, seed, step, first, clip, threshold, mask, known,
        known_noise, copies, model_input_dtype,
    )  # fmt: skip
    try:
        run = _backend.choose(
            "sampler_step_", _INPLACE_IMPLEMENTATIONS, backend, state, flop=lambda: 10 * state.numel()
        )
        if run is eager.sampler_step_:
            _check(state[0], state[1:], *arguments)
        _, copies, operands = _operands(run is eager.sampler_step_, *arguments[:-1])
        model_input = run(state, *operands, copies, model_input_dtype or state.dtype)
    except Exception:
        explain(_check, state[0], state[1:], *arguments)
        raise
    return model_input if copies else None


def _operands(
    on_eager, model_output, row, uncond_output, guidance, rescale, noise, seed, step, first, clip, threshold, mask,
    known, known_noise, copies,
):  # fmt: skip
    """(the row where the host can read it, copies, what the operators take between state and outputs)."""
    if (uncond_output is None) != (guidance is None):
        raise ValueError("sampler_step: uncond_output and guidance go together, only one was given")
    if seed is not None and not 0 <= seed < 2**64:  # what an int64 can't say
        raise ValueError(f"sampler_step: seed must be from 0 to 2^64 - 1, got {seed}")
    row, on_host = _read(row)
    if mask is not None:
        mask, known = _blend(model_output, mask, known)
    scale, index = 1.0, None
    if guidance is not None and not isinstance(guidance, torch.Tensor):
        scale, guidance = float(guidance), None
    if isinstance(step, torch.Tensor):
        index, step = step, 0
    if copies is None:
        copies = 1 if uncond_output is None else 2
    return (
        on_host,
        copies,
        (
            model_output,
            uncond_output,
            noise,
            mask,
            known,
            known_noise,
            on_host.tolist() if on_eager and on_host is not None else row,
            index,
            guidance,
            scale,
            float(rescale),
            None if clip is None else float(clip),
            None if threshold is None else float(threshold),
            None if seed is None else signed(seed),
            step,
            first,
        ),
    )


def _read(row):
    """The row as a tensor, and as an array where it is one that the host can read."""
    if isinstance(row, torch.Tensor):
        return row, None
    if not (isinstance(row, np.ndarray) and row.dtype is _FLOAT64 and row.flags.writeable):
        row = np.array(row, np.float64)
    return torch.from_numpy(row), row if row.ndim == 1 else None


def _filled(slots, x):
    """Slots as the operators take them: one that nothing was stored in has no elements."""
    return [x.new_empty(0) if h is None else h for h in slots]


def _blend(x, mask, known):
    mask = mask if mask.is_floating_point() else mask.to(x.dtype)
    return mask.expand(x.shape), known.expand(x.shape)


def _as_copies_lie(x):
    """Whether one copy of the next model input has x's strides."""
    return x.is_contiguous() or (x.dim() == 4 and x.size(1) > 1 and x.is_contiguous(memory_format=torch.channels_last))


def _check(
    x, slots, model_output, row, uncond_output, guidance, rescale, noise, seed, step, first, clip, threshold, mask,
    known, known_noise, copies, model_input_dtype,
):  # fmt: skip
    check_dtype("sampler_step", "x", x)
    if not 1 <= x.dim() <= 8:
        raise ValueError(f"sampler_step: x must have from 1 to 8 dimensions, got {x.dim()}")
    _check_like("model_output", model_output, x)
    if (uncond_output is None) != (guidance is None):
        raise ValueError("sampler_step: uncond_output and guidance go together, only one was given")
    if uncond_output is not None:
        _check_like("uncond_output", uncond_output, x)
    if isinstance(guidance, torch.Tensor):
        check_same_device("sampler_step", "guidance", guidance, x)
        check_dtype("sampler_step", "guidance", guidance)
        check_shape("sampler_step", "guidance", guidance, x.shape[:1], x)
    if not 0 <= rescale <= 1:
        raise ValueError(f"sampler_step: rescale must be from 0 to 1, got {rescale}")
    for k, h in enumerate(slots):
        if h is not None:
            check_same_device("sampler_step", f"slots[{k}]", h, x)
            check_same_dtype("sampler_step", f"slots[{k}]", h, x)
            check_shape("sampler_step", f"slots[{k}]", h, x.shape, x)
    if noise is not None:
        _check_like("noise", noise, x)
    _check_row(x, row, step, len(slots))
    check_counter("sampler_step", 0 if seed is None else seed, step if isinstance(step, int) else 0, first, len(x))
    if clip is not None and not clip > 0:
        raise ValueError(f"sampler_step: clip must be positive, got {clip}")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"sampler_step: threshold must be in (0, 1], got {threshold}")
    if threshold is not None and clip is not None and clip < 1:
        raise ValueError(f"sampler_step: clip must be at least 1 with threshold, got {clip}")
    if (mask is None) != (known is None):
        raise ValueError("sampler_step: mask and known go together, only one was given")
    for name, t in (("mask", mask), ("known", known)):
        if t is not None:
            check_same_device("sampler_step", name, t, x)
            _check_broadcasts(name, t, x)
    if known is not None:
        check_dtype("sampler_step", "known", known)
    if known_noise is not None:
        _check_like("known_noise", known_noise, x)
    if copies not in (None, 0, 1, 2):
        raise ValueError(f"sampler_step: copies must be 0, 1 or 2, got {copies}")
    if model_input_dtype not in (None, *DTYPES):
        raise TypeError(
            f"sampler_step: model_input_dtype must be float32, bfloat16, float16 or float64, got {model_input_dtype}"
        )


def _check_like(name, t, x):
    check_same_device("sampler_step", name, t, x)
    check_dtype("sampler_step", name, t)
    check_shape("sampler_step", name, t, x.shape, x)


def _check_broadcasts(name, t, x):
    try:
        t.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"sampler_step: {name} must broadcast to the shape of x {tuple(x.shape)}, got {tuple(t.shape)}"
        ) from None


def _check_row(x, row, step, slots):
    shape = tuple(np.shape(row))
    indexed = isinstance(step, torch.Tensor)
    if indexed:
        check_same_device("sampler_step", "step", step, x)
        if step.dtype != torch.int64 or tuple(step.shape) not in ((), (len(x),)):
            raise ValueError(
                f"sampler_step: step must be a number or an int64 tensor of shape () or ({len(x)},), "
                f"got {step.dtype} {tuple(step.shape)}"
            )
    wanted = "(steps, n)" if indexed else f"(n,) or ({len(x)}, n)"
    if not (len(shape) == 2 if indexed else len(shape) == 1 or (len(shape) == 2 and shape[0] == len(x))):
        raise ValueError(f"sampler_step: row must have shape {wanted}, got {shape}")
    if indexed and not isinstance(row, torch.Tensor):
        raise TypeError(f"sampler_step: row must be a tensor where step is one, got {type(row).__name__}")
    if isinstance(row, torch.Tensor) and row.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"sampler_step: row must be float32 or float64, got {row.dtype}")
    if shape[-1] != _WIDTH + slots or slots > MAX_SLOTS:
        raise ValueError(
            f"sampler_step: row must have {_WIDTH} columns and one for each of at most {MAX_SLOTS} slots, "
            f"got {shape[-1]} columns and {slots} slots"
        )
    if len(shape) == 1 and not isinstance(row, torch.Tensor):
        slot = float(row[-3])
        if slot not in range(-1, slots):
            raise ValueError(f"sampler_step: the row's slot must be from -1 to {slots - 1}, got {slot:g}")


def _fake(x, slots, *rest):
    *_, store, copies, shared, dtype = rest
    outputs = [torch.empty_like(x) for _ in range(store + (not shared))]
    return outputs + ([empty_model_input(x, copies, dtype)] if copies else [])


def _fake_inplace(state, *rest):
    *_, copies, dtype = rest
    return empty_model_input(state[0], copies, dtype)


def _sampler_step_triton(x, slots, *arguments):
    from .triton.sampler_step_kernel import sampler_step  # here, not above: importing Triton takes a second

    *operands, _, copies, _, dtype = arguments
    _check_operator(x, slots, operands, copies, dtype)
    return sampler_step(x, slots, *arguments)


def _sampler_step_inplace_triton(state, *arguments):
    from .triton.sampler_step_kernel import sampler_step_

    *operands, copies, dtype = arguments
    _check_operator(state[0], state[1:], operands, copies, dtype)
    return sampler_step_(state, *arguments)


def _check_operator(x, slots, operands, copies, model_input_dtype):
    (
        model_output, uncond_output, noise, mask, known, known_noise, row, index, guidance, scale, rescale, clip,
        threshold, _, step, first,
    ) = operands  # fmt: skip
    guidance = (scale if guidance is None else guidance) if uncond_output is not None else None
    slots = [None if h.shape == (0,) and x.shape != (0,) else h for h in slots]
    _check(
        x, slots, model_output, row, uncond_output, guidance, rescale, noise, None, step if index is None else index,
        first, clip, threshold, mask, known, known_noise, copies, model_input_dtype,
    )  # fmt: skip


_TENSORS = 7  # model_output … row: of them only the row has no gradient


def _setup_context(ctx, inputs, output):
    x, slots, *operands = inputs
    *tensors, row, index, guidance = operands[: _TENSORS + 2]
    ctx.options = operands[_TENSORS + 2 :]
    ctx.save_for_backward(row, index, x, guidance, *tensors, *slots)


def _backward(ctx, grads):
    """Through the specification, which knows the derivatives of quantiles and deviations."""
    row, index, *tensors = ctx.saved_tensors
    x, slots, *operands = ctx.needs_input_grad
    *of_tensors, _, _, guidance = operands[: _TENSORS + 2]
    wanted = [x, guidance, *of_tensors, *slots]
    run = _gradients if torch.is_grad_enabled() else _library.op("sampler_step_backward")
    found = iter(run(grads, row, index, tensors, wanted, *ctx.options))
    x, guidance, *others = (next(found) if wants else None for wants in wanted)
    of_tensors, slots = others[: len(of_tensors)], others[len(of_tensors) :]
    return (x, slots, *of_tensors, None, None, guidance, *(None for _ in ctx.options))


def _gradients(grads, row, index, tensors, wanted, *options):
    """Gradients of the wanted tensors; differentiable in their turn under create_graph=True."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [
            None if t is None else _leaf(t, wants, create_graph) for t, wants in zip(tensors, wanted, strict=True)
        ]
        x, guidance, *others = leaves
        of_tensors, slots = others[: _TENSORS - 1], others[_TENSORS - 1 :]
        outputs = eager.sampler_step(x, slots, *of_tensors, row, index, guidance, *options)
        pairs = zip(outputs, grads, strict=True)
        outputs, grads = zip(*((y, g) for y, g in pairs if y.requires_grad), strict=True)
        asked = [leaf for leaf, wants in zip(leaves, wanted, strict=True) if wants]
        found = torch.autograd.grad(outputs, asked, grads, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(asked, found, strict=True)]


def _leaf(t, wants, create_graph):
    # A view, so that one tensor passed twice gets the gradient of each.
    return t.view_as(t) if create_graph else t.detach().requires_grad_(wants)


_OPTIONS = "float scale, float rescale, float? clip, float? threshold, int? seed, int step, int first"
_OPERANDS = (
    "Tensor model_output, Tensor? uncond_output, Tensor? noise, Tensor? mask, Tensor? known, Tensor? known_noise, "
    f"Tensor row, Tensor? index, Tensor? guidance, {_OPTIONS}"
)
_OUTPUTS = "bool store, int copies, bool shared, ScalarType model_input_dtype"
_library.define(
    "sampler_step_backward(Tensor[] grads, Tensor row, Tensor? index, Tensor?[] tensors, bool[] wanted, "
    f"{_OPTIONS}, {_OUTPUTS}) -> Tensor[]",
    _gradients,
)
_library.register(
    "sampler_step_backward",
    fake=lambda grads, row, index, tensors, wanted, *options: [
        torch.empty_like(t) for t, wants in zip(tensors, wanted, strict=True) if wants
    ],
)
_library.define(
    f"sampler_step_triton(Tensor x, Tensor[] slots, {_OPERANDS}, {_OUTPUTS}) -> Tensor[]", _sampler_step_triton
)
_library.define(
    f"sampler_step_triton_(Tensor(a!) state, {_OPERANDS}, int copies, ScalarType model_input_dtype) -> Tensor",
    _sampler_step_inplace_triton,
)
for twin in ("", "_triton"):
    _library.register(f"sampler_step{twin}", fake=_fake, setup_context=_setup_context, backward=_backward)
    _library.register(f"sampler_step{twin}_", fake=_fake_inplace)

_IMPLEMENTATIONS = {
    "eager": eager.sampler_step,
    "cpu": _library.past_autograd("sampler_step"),
    "cuda": _library.past_autograd("sampler_step"),
    "triton": _library.past_autograd("sampler_step_triton"),
}
_INPLACE_IMPLEMENTATIONS = {
    "eager": eager.sampler_step_,
    "cpu": _library.past_autograd("sampler_step_"),
    "cuda": _library.past_autograd("sampler_step_"),
    "triton": _library.past_autograd("sampler_step_triton_"),
}
