import functools
import math

import pytest
import torch
from cuda_sim import simulator
from helpers import DTYPES, backends
from triton_ahead_of_time import compile_kernel

from imagegen import _library
from imagegen.ops import _backend, eager, randn
from imagegen.ops.eager.randn import philox, philox_bits

BACKENDS = pytest.mark.parametrize("backend, device", [pytest.param("eager", "cpu", id="eager"), *backends("randn")])
# Of the others every bit and normal is compared with these.
STATISTICS = pytest.mark.parametrize(
    "backend, device", [b for b in (pytest.param("eager", "cpu", id="eager"), *backends("randn")) if b.id != "triton"]
)
SIZE = 1 << 17


@functools.lru_cache(maxsize=8)
def draw(backend, device, shape=(1, SIZE), **options):
    options = {"seed": 0} | options
    return randn(shape, backend=backend, device=device, **options)


def words(*numbers):
    return [torch.tensor([n]) for n in numbers]


def test_published_vectors_of_philox():
    """The known answers that come with Random123 for philox4x32, 10 rounds."""
    ones = 0xFFFFFFFF
    for counter, key, answer in (
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        assert [int(word) for word in philox(words(*counter), key)] == list(answer)


def test_counter_holds_element_sample_step_and_stream():
    bits = philox_bits((2, 9), seed=7, step=11, stream=5, first=20, device="cpu")
    expected = philox(words(2, 21, 11, 5), 7)
    assert [int(word[1, 2]) for word in bits] == [int(word) for word in expected]


@BACKENDS
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 64), (5, 3, 7, 41), (2, 5000)])
def test_bits_are_equal_and_normals_nearly(backend, device, shape):
    arguments = -2, 2**32 - 2, 2**16 - 1, 2**32 - len(shape) - 5
    run = _backend.implementations("randn")[backend]
    for dtype in (torch.int32, torch.float32):
        ours, theirs = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        run(ours, *arguments)
        eager.randn(theirs, *arguments)
        ulp = torch.finfo(torch.float32).eps * theirs.abs()
        assert ((ours - theirs).abs() <= (0 if dtype == torch.int32 else 4 * ulp)).all()


@STATISTICS
def test_normals_are_right_to_a_few_units_in_the_last_place(backend, device):
    """Where float64 has an answer for the same words: a million of them, the rare tails included."""
    ours, theirs = torch.empty(4, SIZE, device=device), torch.empty(4, SIZE, device=device)
    _backend.implementations("randn")[backend](ours, 5, 0, 0, 0)
    eager.randn(theirs, 5, 0, 0, 0)
    assert ((ours - theirs).abs() / theirs.abs()).max() < 5 * torch.finfo(torch.float32).eps


@pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
def test_every_instruction_set(capability):
    for shape in ((1, 1), (3, 5), (2, 63), (2, 65), (2, 5000)):
        for dtype in (torch.int32, torch.float32, torch.bfloat16, torch.float16):
            ours, theirs = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
            _library.op("randn")(ours, 9, 8, 7, 6)
            eager.randn(theirs, 9, 8, 7, 6)
            if dtype == torch.int32:
                assert torch.equal(ours, theirs)
            else:
                torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
def test_same_bits_on_any_number_of_threads():
    results, before = [], torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(randn((3, 100_001), seed=1, backend="cpu"))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@STATISTICS
def test_moments_and_distribution(backend, device):
    z = draw(backend, device).double().flatten()
    n = z.numel()
    # Five standard errors of each moment of a normal.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((z**power).mean().item() - moment) < 5 * math.sqrt(variance / n), f"moment {power}"
    assert kolmogorov_smirnov(z) < 1.95  # 1 in 1000
    tail = (z.abs() > 4).double().mean().item()
    assert tail == pytest.approx(math.erfc(4 / math.sqrt(2)), abs=5 * math.sqrt(6.3e-5 / n))


def kolmogorov_smirnov(z):
    """sqrt(n) times the greatest distance between the distributions."""
    n = z.numel()
    cdf = torch.special.ndtr(z.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64, device=z.device) / n
    return math.sqrt(n) * max((steps[1:] - cdf).max().item(), (cdf - steps[:-1]).max().item())


@STATISTICS
@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 1 << 32}, {"step": 1}, {"stream": 1}, {"first": 1}])
def test_independent_of_other_sequences(backend, device, other):
    a, b = draw(backend, device).double().flatten(), draw(backend, device, **other).double().flatten()
    bound = 5 / math.sqrt(a.numel())
    for shift in (0, 1, 2, 4):  # also of its neighbours in the same Philox block and in the next
        assert abs((a * b.roll(shift)).mean().item()) < bound
        assert abs(((a**2 - 1) * (b.roll(shift) ** 2 - 1)).mean().item()) < 2 * bound


@STATISTICS
def test_neighbours_are_independent(backend, device):
    a = draw(backend, device, (2, SIZE)).double()
    bound = 5 / math.sqrt(SIZE)
    assert abs((a[0] * a[1]).mean().item()) < bound
    for shift in (1, 2, 3, 4, 64):
        assert abs((a[0] * a[0].roll(shift)).mean().item()) < bound
        assert abs(((a[0] ** 2 - 1) * (a[0].roll(shift) ** 2 - 1)).mean().item()) < 2 * bound


@STATISTICS
def test_pairs_fill_the_circle_evenly(backend, device):
    pairs = draw(backend, device).double().reshape(-1, 2)
    angle = torch.atan2(pairs[:, 1], pairs[:, 0]) / (2 * math.pi) + 0.5
    counts = torch.histc(angle, 64, 0, 1)
    expected = len(pairs) / 64
    assert ((counts - expected) ** 2 / expected).sum().item() < 63 + 5 * math.sqrt(2 * 63)


@BACKENDS
def test_image_i_of_a_batch_is_image_i(backend, device):
    z = draw(backend, device, (5, 3, 7, 9), seed=3, step=4)
    for i in range(5):
        assert torch.equal(draw(backend, device, (1, 3, 7, 9), seed=3, step=4, first=i)[0], z[i])
    assert torch.equal(draw(backend, device, (2, 3, 7, 9), seed=3, step=4, first=2), z[2:4])
    # Element e of an image is element e of a longer one.
    assert torch.equal(draw(backend, device, (5, 100), seed=3, step=4), z.reshape(5, -1)[:, :100])


@BACKENDS
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0, 2), (2, 1, 3), (5, 7, 11, 13), (64, 3)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_shapes_and_dtypes_round_the_same_normals(backend, device, shape, dtype):
    z = draw(backend, device, shape, seed=2**64 - 1, step=2**32 - 1, stream=2**16 - 1, dtype=dtype)
    assert z.shape == shape
    assert z.dtype == dtype
    rounded = draw(backend, device, shape, seed=2**64 - 1, step=2**32 - 1, stream=2**16 - 1).to(dtype)
    # float64 has a kernel of its own, whose float32 normals may round otherwise.
    torch.testing.assert_close(z, rounded, rtol=5e-7 if dtype == torch.float64 else 0, atol=0)


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, "shape must have an axis of images, got ()", {"shape": ()}),
        (ValueError, "seed must be from 0 to 2^64 - 1, got -1", {"seed": -1}),
        (ValueError, "seed must be from 0 to 2^64 - 1, got 18446744073709551616", {"seed": 2**64}),
        (ValueError, "step must be from 0 to 2^32 - 1, got 4294967296", {"step": 2**32}),
        (ValueError, "stream must be from 0 to 2^16 - 1, got 65536", {"stream": 2**16}),
        (ValueError, "first must be from 0 to 2^32 - 2 for 2 images, got 4294967295", {"first": 2**32 - 1}),
        (TypeError, "dtype must be float32, bfloat16, float16 or float64, got torch.int64", {"dtype": torch.int64}),
    ],
)
def test_errors(error, message, options):
    with pytest.raises(error) as caught:
        randn(**{"shape": (2, 3), "seed": 0} | options)
    assert str(caught.value) == f"randn: {message}"


def test_cuda_kernel_in_the_simulator():
    operator = simulator.load("randn").randn
    for shape in ((1, 1), (3, 5), (2, 63), (2, 1500)):
        for dtype in (torch.int32, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            ours, theirs = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
            operator(ours, -9, 8, 7, 6)
            eager.randn(theirs, -9, 8, 7, 6)
            if dtype == torch.int32:
                assert torch.equal(ours, theirs)
            else:
                eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
                torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=0)


def test_triton_kernel_compiles_ahead_of_time():
    pytest.importorskip("triton", reason="triton is not installed")
    numbers = dict.fromkeys(("size", "seed", "step", "stream", "first"), "i64")
    variants = [
        {"signature": {"out": out} | numbers, "constants": {"BITS": bits, "BLOCK": 256}, "divisible": ["out", "size"]}
        for out, bits in (("*fp32", False), ("*bf16", False), ("*i32", True))
    ]
    for builds in compile_kernel("imagegen.ops.triton.randn_kernel", "randn_kernel", variants):
        for build in builds:
            print(build)
            assert build["stack"] == build["local"] == 0, "spills"
            assert build["registers"] <= 64
