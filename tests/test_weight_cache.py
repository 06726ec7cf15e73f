import pytest
import torch

from imagegen import _library, ops, weight_cache

pytestmark = pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))


@pytest.fixture(autouse=True)
def limit():
    before = weight_cache.limit()
    weight_cache.clear()
    yield before
    weight_cache.set_limit(before)
    weight_cache.clear()


X = torch.randn(1, 64, 4, 4)
WEIGHTS = [torch.randn(64, 64, 3, 3) for _ in range(4)]
ONE = 25 * 64 * 64 * 4


def run(weight):
    """Misses of one convolution, whose result is checked."""
    before = weight_cache.misses()
    y = ops.upsample_conv2d(X, weight)
    torch.testing.assert_close(y, ops.upsample_conv2d(X, weight, backend="eager"), rtol=1e-4, atol=1e-3)
    return weight_cache.misses() - before


def test_a_weight_is_transformed_once():
    assert [run(WEIGHTS[0]) for _ in range(3)] == [1, 0, 0]
    assert weight_cache.size() == ONE
    weight_cache.clear()
    assert weight_cache.size() == 0 and run(WEIGHTS[0]) == 1


def test_keeps_to_the_limit():
    weight_cache.set_limit(2 * ONE)
    for weight in WEIGHTS:
        run(weight)
        assert weight_cache.size() <= 2 * ONE
    weight_cache.set_limit(0)
    assert weight_cache.size() == 0
    assert [run(WEIGHTS[0]) for _ in range(2)] == [1, 1] and weight_cache.size() == 0


def test_a_model_too_large_keeps_what_fits():
    weight_cache.set_limit(2 * ONE)
    for weight in WEIGHTS[:3]:
        run(weight)
    assert [run(weight) for weight in 4 * WEIGHTS[:3]] == 4 * [0, 0, 1]


def test_a_model_that_is_gone_makes_room():
    weight_cache.set_limit(2 * ONE)
    for weight in WEIGHTS[:2]:
        run(weight)
    assert sum(run(weight) for weight in 20 * WEIGHTS[2:]) < 20
    assert [run(weight) for weight in WEIGHTS[2:]] == [0, 0]


def test_half_of_the_memory_by_default(limit):
    assert 1 << 28 < limit < 1 << 45


@pytest.mark.parametrize("size", [-1, 1.5, True, "1 GB"])
def test_refuses_what_is_no_size(size):
    with pytest.raises(ValueError, match=r"weight_cache\.set_limit: size must be a number of bytes, at least 0, got"):
        weight_cache.set_limit(size)
