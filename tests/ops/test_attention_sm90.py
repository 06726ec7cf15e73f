"""attention's kernel for sm_90a without a GPU: values and bounds in the simulator, and what nvcc makes of it."""

import itertools

import pytest
import torch
from cuda_ahead_of_time import kernels
from cuda_sim import simulator
from helpers import relative_error
from test_attention_gpu import MASKS, make, sanitized_program
from test_cuda_build import needs_nvcc

from imagegen.ops import eager

# (B, H, Hk, Lq, Lk, D), causal: each bucket of head dims, two warpgroups and three, one to four tiles of keys, rests of
# everything, shared heads, more queries than keys.
SHAPES = [
    ((1, 2, 1, 35, 77, 40), False),
    ((1, 4, 1, 150, 77, 40), False),
    ((1, 1, 1, 193, 100, 64), True),
    ((2, 1, 1, 20, 77, 80), False),
    ((1, 2, 1, 20, 100, 88), True),
    ((1, 1, 1, 130, 260, 104), True),
    ((1, 1, 1, 65, 161, 160), False),
    ((1, 2, 1, 20, 81, 200), True),
    ((1, 2, 2, 5, 3, 8), True),
]


@pytest.fixture(autouse=True)
def sm90(monkeypatch):
    monkeypatch.setenv("SIM_ARCHITECTURE", "90")


def attend(q, k, v, mask=None, causal=False, scale=0.2):
    return simulator.load("attention").attention(q, k, v, mask, causal, scale)


def check(q, k, v, mask=None, causal=False, scale=None):
    """Holds the output to twice the error of rounding the right one, and the log-sum-exp to float32."""
    scale = scale or q.size(-1) ** -0.5
    out, lse = attend(q, k, v, mask, causal, scale)
    q, k, v = (t.double() for t in (q, k, v))
    expected = eager.attention(q, k, v, mask, causal, scale)
    assert relative_error(out, expected) < 2 * relative_error(expected.to(out.dtype), expected)
    scores = q @ k.repeat_interleave(q.size(1) // k.size(1), 1).mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        shown = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.size(2) - q.size(2))
        scores = scores.masked_fill(~shown, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-5, atol=1e-5)
    assert out[lse == -torch.inf].eq(0).all()
    return out


@pytest.mark.parametrize("shape, causal", SHAPES, ids=str)
def test_values(shape, causal):
    dtype = torch.float16 if shape[0] == 2 else torch.bfloat16
    out = check(*make(*shape, dtype, joined=True), causal=causal)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    shape = (1, 2, 1, 37, 100, 24)
    m = MASKS[mask](*shape[:2], *shape[3:5])
    if mask == "boolean":
        m[..., 7, :] = False
    check(*make(*shape, torch.bfloat16), m if mask != "head" else m.bfloat16(), causal=True)


def test_least_float_as_a_mask_is_a_mean():
    q, k, v = make(1, 1, 1, 3, 90, 8, torch.bfloat16)
    mask = torch.full((90,), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16)
    y, _ = attend(q, k, v, mask, scale=3.0)
    assert relative_error(y, v.double().mean(2, keepdim=True).expand(y.shape)) < 1e-2


def test_which_kernel_runs(monkeypatch):
    """This one, whose tiles add up in an order of their own, for what it takes; else that of every architecture."""

    def same_as_elsewhere(*tensors):
        here = attend(*tensors)[0]
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("SIM_ARCHITECTURE", "80")
            return torch.equal(here, attend(*tensors)[0])

    q, k, v = make(1, 1, 1, 20, 100, 24, torch.bfloat16)
    assert not same_as_elsewhere(q, k, v)
    assert same_as_elsewhere(q.float(), k.float(), v.float())
    assert same_as_elsewhere(torch.nn.functional.pad(q, (1, 0))[..., 1:], k, v)
    assert same_as_elsewhere(q, k[:, :, :1].expand_as(k), v)  # the copy engine has no stride of 0
    assert same_as_elsewhere(*make(1, 1, 1, 20, 40, 264, torch.bfloat16))


def test_schedules_agree_to_the_bit(monkeypatch):
    """Whichever warp runs ahead, whenever a copy lands and whenever a product reads."""
    q, k, v = make(1, 1, 1, 70, 250, 72, torch.bfloat16)
    results = []
    for order, landing in itertools.product(("forward", "reverse", "random"), ("late", "early")):
        monkeypatch.setenv("SIM_ORDER", order)
        monkeypatch.setenv("SIM_ASYNC", landing)
        results.append(attend(q, k, v, causal=True))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    assert results[0][0].isfinite().all()


def test_address_sanitizer_finds_nothing():
    program = sanitized_program("address")
    for head_dim in (40, 72):
        printed, said = simulator.run_program(program, "bf16", head_dim, "sm90", order="random")
        assert printed == "ran\n"
        assert simulator.found_nothing(said), said


@pytest.mark.slow
@needs_nvcc
def test_no_kernel_waits_for_each_product():
    for kernel in kernels("attention_sm90", "90a"):
        assert kernel.instructions["UTMALDG"], kernel.name
        # The first scores; scores and output in the loop; the last output.
        assert kernel.sass.count("WARPGROUP.DEPBAR") <= 4, kernel.name
