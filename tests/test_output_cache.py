import threading

import pytest
import torch

from imagegen import _library, ops, output_cache

pytestmark = [
    pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error)),
    pytest.mark.skipif(torch.__version__ < (2, 11), reason="outputs stay in torch's memory before 2.11"),
]

X = torch.randn(1, 4, 256, 256)  # 1 MB
BYTES = X.numel() * X.element_size()


LIMIT = output_cache.limit()


@pytest.fixture(autouse=True)
def kept():
    output_cache.clear()
    output_cache.set_limit(LIMIT)
    yield
    output_cache.set_limit(0)  # as every other test has it


def double(x=X):
    return ops.bias_act(x, gain=2.0, backend="cpu")


def test_the_next_output_takes_the_memory_of_the_last():
    y = double()
    where = y.data_ptr()
    assert output_cache.size() == 0
    del y
    assert output_cache.size() == BYTES
    y = double()
    assert y.data_ptr() == where and output_cache.size() == 0
    torch.testing.assert_close(y, 2 * X)


def test_memory_in_use_is_nobody_elses():
    first, part = double(), double(X + 1)[:, 1]  # a view holds on to the whole
    second = double(X + 2)
    torch.testing.assert_close(first, 2 * X)
    torch.testing.assert_close(part, 2 * (X + 1)[:, 1])
    torch.testing.assert_close(second, 2 * (X + 2))


def test_neighbours_join_for_a_larger_output():
    large = torch.randn(4, 4, 256, 256)
    y = double(large)
    where = y.data_ptr()
    del y
    small = [double(x) for x in large]
    assert {y.data_ptr() for y in small} == {where + i * BYTES for i in range(4)}
    del small[1], small[1]
    assert output_cache.size() == 2 * BYTES
    pair = double(large[1:3])
    assert pair.data_ptr() == where + BYTES
    del small, pair
    assert output_cache.size() == 4 * BYTES
    y = double(large)
    assert y.data_ptr() == where
    torch.testing.assert_close(y, 2 * large)


@pytest.mark.parametrize("held", [0, 1])
def test_takes_no_more_than_was_in_use_at_most(held):
    in_use = [double() for _ in range(held)]
    outputs = [double() for _ in range(3)]
    del outputs
    assert output_cache.size() == 3 * BYTES
    y = double(torch.randn(16, 256, 256))  # larger than what is kept, which goes
    assert output_cache.size() == 0
    del y
    assert output_cache.size() == 4 * BYTES
    y = double(torch.randn(20, 256, 256))
    assert output_cache.size() == 0
    del y, in_use
    assert output_cache.size() == (5 + held) * BYTES


def test_what_was_unused_for_longest_goes_first():
    first, between, second = double(), double(), double()  # between keeps the two apart
    where = first.data_ptr()
    del second, first
    output_cache.set_limit(BYTES)
    assert double().data_ptr() == where
    torch.testing.assert_close(between, 2 * X)


def test_small_outputs_are_torchs():
    double(X[..., :-1])
    assert output_cache.size() == 0


def test_keeps_to_the_limit():
    output_cache.set_limit(2 * BYTES)
    outputs = [double() for _ in range(3)]
    del outputs
    assert output_cache.size() == 2 * BYTES
    output_cache.set_limit(BYTES)
    assert output_cache.size() == BYTES
    output_cache.set_limit(0)
    double()
    assert output_cache.size() == 0
    double().resize_(2 * X.numel())  # torch's own


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_strides_dtype_and_gradient_are_as_always(memory_format):
    x = torch.randn(2, 64, 128, 128, dtype=torch.bfloat16).to(memory_format=memory_format).requires_grad_()
    y = ops.group_norm(x, 8, activation="silu", backend="cpu")
    assert y.stride() == x.stride() and y.dtype == x.dtype and y.storage_offset() == 0
    y.sum().backward()
    assert x.grad.stride() == x.stride() and bool(x.grad.isfinite().all())
    assert y.untyped_storage().nbytes() == y.numel() * 2
    with pytest.raises(RuntimeError, match="not resizable"):
        y.detach().resize_(2 * y.numel())


def test_threads_may_drop_what_others_made():
    made = [double() for _ in range(4)]
    threads = [threading.Thread(target=made.pop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert output_cache.size() == 4 * BYTES


def test_a_sixteenth_of_the_memory_by_default():
    assert 1 << 24 < LIMIT < 1 << 42


@pytest.mark.parametrize("size", [-1, 1.5, True, "1 GB"])
def test_refuses_what_is_no_size(size):
    with pytest.raises(ValueError, match=r"output_cache\.set_limit: size must be a number of bytes, at least 0, got"):
        output_cache.set_limit(size)
