import numpy as np
import pytest
import torch
from helpers import backends, check_error

from imagegen.ops import randn, sampler_step, sampler_step_
from imagegen.ops.sampler_step import columns

BACKENDS = pytest.mark.parametrize("backend, device", backends("sampler_step"))
SHAPE = (3, 4, 6, 5)


def row(slots=0, **coefficients):
    """A row of zeros but for these; h0 … name c_h0 …, s the column s'."""
    names = columns(slots)
    values = dict.fromkeys(names, 0.0) | {"s'": 1.0, "slot": -1.0} | coefficients
    assert len(values) == len(names), f"no such column among {coefficients}"
    return np.array([values[name] for name in names])


# Every column at once, all different.
FULL = {"t": 500, "s'": 0.9, "a_x": 1.1, "a_m": -0.45, "c_x": 0.35, "c_0": 0.6, "c_m": 0.15, "c_n": 0.25, "c_h0": -0.2,
        "c_h1": 0.12, "q_x": -0.3, "q_0": 0.8, "q_m": 0.7, "slot": 1, "b_0": 0.95, "b_1": 0.31}  # fmt: skip


def normals(*shape, n=1, dtype=torch.float32, device="cpu"):
    tensors = [torch.randn(shape, device=device).to(dtype) for _ in range(n)]
    return tensors[0] if n == 1 else tensors


def test_columns_are_those_of_the_samplers():
    from imagegen.samplers import table

    for slots in range(6):
        assert columns(slots) == table.columns(slots)


def test_formula():
    """The specification against the formula, written out once more."""
    x, m, u, h0, h1, noise, known, known_noise = normals(*SHAPE, n=8, dtype=torch.float64)
    mask = torch.rand(3, 1, 6, 5, dtype=torch.float64)
    g = torch.tensor([7.5, 1.0, 0.0])
    r = type("Row", (), FULL)
    x_next, stored, model_input = sampler_step(
        x, m, row(2, **FULL), uncond_output=u, guidance=g, slots=(h0, h1), noise=noise, clip=0.8, mask=mask,
        known=known, known_noise=known_noise, backend="eager",
    )  # fmt: skip
    g = g.double()[:, None, None, None]
    mm = g * m + (1 - g) * u
    x0 = (r.a_x * x + r.a_m * mm).clamp(-0.8, 0.8)
    expected = r.c_x * x + r.c_0 * x0 + r.c_m * mm + r.c_n * noise + r.c_h0 * h0 + r.c_h1 * h1
    expected = mask * expected + (1 - mask) * (r.b_0 * known + r.b_1 * known_noise)
    torch.testing.assert_close(x_next, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(stored, r.q_x * x + r.q_0 * x0 + r.q_m * mm, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(model_input, torch.cat([0.9 * expected] * 2), rtol=1e-13, atol=1e-13)


def test_rescaled_guidance_has_the_conditional_outputs_deviation():
    x, m, u = normals(*SHAPE, n=3, dtype=torch.float64)
    x_next, _, _ = sampler_step(x, m, row(c_m=1), uncond_output=u, guidance=9.0, rescale=1.0, backend="eager")
    torch.testing.assert_close(x_next.flatten(1).std(1), m.flatten(1).std(1))
    half, _, _ = sampler_step(x, m, row(c_m=1), uncond_output=u, guidance=9.0, rescale=0.5, backend="eager")
    torch.testing.assert_close(half, (x_next + 9 * m - 8 * u) / 2)


@pytest.mark.parametrize("clip", [None, 1.2])
@pytest.mark.parametrize("threshold", [0.5, 0.995, 1.0])
def test_threshold_is_the_quantile_of_each_image(threshold, clip):
    x = normals(*SHAPE, dtype=torch.float64) * torch.tensor([0.1, 2.0, 5.0])[:, None, None, None]
    x0, _, _ = sampler_step(x, x, row(a_x=1, c_0=1), threshold=threshold, clip=clip, backend="eager")
    for image, bounded in zip(x, x0, strict=True):
        s = torch.quantile(image.abs().flatten(), threshold).clamp(1, clip)
        torch.testing.assert_close(bounded, image.clamp(-s, s) / s)


def test_generated_noise_is_randn():
    x = normals(*SHAPE)
    x_next, _, _ = sampler_step(x, x, row(c_n=1), seed=5, step=9, first=2, backend="eager")
    assert torch.equal(x_next, randn(SHAPE, seed=5, step=9, first=2))
    blended, _, _ = sampler_step(
        x, x, row(c_n=1, b_1=1), seed=5, step=9, mask=torch.zeros(()), known=x, backend="eager"
    )
    assert torch.equal(blended, randn(SHAPE, seed=5, step=9, stream=1))


def test_what_has_coefficient_zero_is_not_read():
    nan = torch.full(SHAPE, float("nan"))
    x = normals(*SHAPE)
    x_next, stored, _ = sampler_step(
        x, nan, row(2, c_x=2.0), slots=(None, nan), noise=nan, uncond_output=nan, guidance=2.0, backend="eager"
    )
    assert torch.equal(x_next, 2 * x)
    assert stored is None
    with pytest.raises(ValueError, match=r"the row reads slots\[0\], but it was not given"):
        sampler_step(x, x, row(1, c_h0=1.0), slots=(None,), backend="eager")
    with pytest.raises(ValueError, match="the row reads noise, but it was not given"):
        sampler_step(x, x, row(c_n=1.0), backend="eager")


def test_rows_of_their_own_for_every_image():
    x, m, h = normals(*SHAPE, n=3)
    rows = np.stack([row(1, c_x=1.0), row(1, c_m=2.0, q_m=1.0, slot=0), row(1, c_h0=3.0, q_x=1.0, slot=0)])
    h[:2] = float("nan")
    x_next, stored, _ = sampler_step(x, m, rows, slots=(h,), backend="eager")
    assert torch.equal(x_next, torch.stack([x[0], 2 * m[1], 3 * h[2]]))
    assert torch.equal(stored, torch.stack([0 * x[0], m[1], x[2]]))
    state = torch.stack([x, h])
    sampler_step_(state, m, rows, backend="eager")
    assert torch.equal(state[0], x_next)
    assert torch.equal(state[1, 1:], stored[1:])
    assert state[1, 0].isnan().all()


def test_counter_on_the_device_picks_the_row():
    table = torch.tensor(np.stack([row(c_x=float(i), c_n=1.0) for i in range(5)]))
    x = normals(*SHAPE)
    for step in (torch.tensor(3), torch.tensor([0, 4, 2])):
        x_next, stored, model_input = sampler_step(x, x, table, step=step, seed=1, backend="eager")
        for b in range(3):
            i = int(step.expand(3)[b])
            torch.testing.assert_close(x_next[b], i * x[b] + randn(SHAPE, seed=1, step=i)[b])
        assert stored is None
        assert torch.equal(model_input, x_next)


def test_next_model_input():
    x = normals(*SHAPE)
    x_next, _, model_input = sampler_step(x, x, row(c_x=2.0), backend="eager")
    assert model_input is x_next
    _, _, model_input = sampler_step(x, x, row(c_x=2.0, **{"s'": 0.5}), model_input_dtype=torch.bfloat16)
    assert torch.equal(model_input, x.bfloat16())
    _, _, model_input = sampler_step(x, x, row(c_x=2.0), uncond_output=x, guidance=2.0)
    assert torch.equal(model_input, torch.cat([2 * x, 2 * x]))
    assert sampler_step(x, x, row(c_x=2.0), copies=0)[2] is None


X = torch.ones(2, 3)
BAD_CALLS = [
    (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
    (TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64", {"x": X.long()}),
    (ValueError, "x must have from 1 to 8 dimensions, got 0", {"x": torch.zeros(())}),
    (
        ValueError,
        "model_output must have shape (2, 3) to match x (2, 3), got (3, 2)",
        {"model_output": torch.ones(3, 2)},
    ),
    (ValueError, "uncond_output and guidance go together, only one was given", {"guidance": 2.0}),
    (
        ValueError,
        "guidance must have shape (2,) to match x (2, 3), got (3,)",
        {"guidance": torch.ones(3), "uncond_output": X},
    ),
    (ValueError, "rescale must be from 0 to 1, got 1.5", {"rescale": 1.5}),
    (TypeError, "slots[0] must have x's dtype torch.float32, got torch.bfloat16", {"slots": [X.bfloat16()]}),
    (ValueError, "noise must have shape (2, 3) to match x (2, 3), got (2,)", {"noise": torch.ones(2)}),
    (ValueError, "row must have shape (n,) or (2, n), got (3, 14)", {"row": np.zeros((3, 14))}),
    (
        ValueError,
        "row must have 14 columns and one for each of at most 8 slots, got 14 columns and 1 slots",
        {"slots": [X]},
    ),
    (TypeError, "row must be float32 or float64, got torch.int64", {"row": torch.zeros(14).long()}),
    (ValueError, "the row's slot must be from -1 to -1, got 0", {"row": np.zeros(14)}),
    (ValueError, "the row's slot must be from -1 to 0, got 0.5", {"row": row(1, slot=0.5), "slots": [None]}),
    (
        TypeError,
        "row must be a tensor where step is one, got ndarray",
        {"row": np.zeros((3, 14)), "step": torch.tensor(0)},
    ),
    (ValueError, "row must have shape (steps, n), got (14,)", {"step": torch.tensor(0)}),
    (
        ValueError,
        "step must be a number or an int64 tensor of shape () or (2,), got torch.int64 (3,)",
        {"step": torch.zeros(3).long()},
    ),
    (ValueError, "seed must be from 0 to 2^64 - 1, got -1", {"seed": -1}),
    (ValueError, "step must be from 0 to 2^32 - 1, got -1", {"step": -1}),
    (ValueError, "clip must be positive, got 0", {"clip": 0}),
    (ValueError, "threshold must be in (0, 1], got 1.5", {"threshold": 1.5}),
    (ValueError, "clip must be at least 1 with threshold, got 0.5", {"threshold": 0.5, "clip": 0.5}),
    (ValueError, "mask and known go together, only one was given", {"mask": X}),
    (
        ValueError,
        "mask must broadcast to the shape of x (2, 3), got (2, 2)",
        {"mask": torch.ones(2, 2), "known": X},
    ),
    (ValueError, "copies must be 0, 1 or 2, got 3", {"copies": 3}),
    (
        TypeError,
        "model_input_dtype must be float32, bfloat16, float16 or float64, got torch.int8",
        {"model_input_dtype": torch.int8},
    ),
]


@pytest.mark.parametrize("error, message, arguments", BAD_CALLS, ids=[call[1] for call in BAD_CALLS])
def test_errors(error, message, arguments):
    arguments = {"x": X, "model_output": X, "row": row()} | arguments
    check_error(error, f"sampler_step: {message}", lambda: sampler_step(**arguments))


def test_inplace_refuses_gradients():
    state = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match="sampler_step_: works in place and has no gradient"):
        sampler_step_(state, torch.ones(2, 3, requires_grad=True), row())
    with pytest.raises(ValueError, match="sampler_step_: state must be a tensor"):
        sampler_step_(torch.ones(3), torch.ones(3), row())


def test_gradcheck_of_the_specification():
    x, m, u, h0, h1, noise, known, new_noise = normals(2, 3, 2, n=8, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, m, u, h0, h1, noise, known, new_noise)]

    def function(x, m, u, h0, h1, noise, known, new_noise):
        return sampler_step(
            x, m, row(2, **FULL), uncond_output=u, guidance=3.0, rescale=0.7, slots=(h0, h1), noise=noise,
            threshold=0.8, mask=torch.full((2,), 0.3), known=known, known_noise=new_noise, backend="eager",
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, leaves)
