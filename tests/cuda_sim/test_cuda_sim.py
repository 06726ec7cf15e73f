"""The simulator itself: a correct kernel passes in every order of its warps, a kernel with a bug does not."""

import ctypes

import pytest
import torch
from cuda_sim import simulator


def run(bug):
    """The error of the kernel with this bug and what the simulator said, for each order of the warps."""
    library = ctypes.CDLL(str(simulator.build([simulator.HERE / "faulty.cu"])))
    library.running_sum.restype = ctypes.c_char_p
    x = torch.randn(128)
    for order in ("forward", "reverse", "random"):
        y = torch.full_like(x, float("nan"))
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SIM_ORDER", order)
            said = library.running_sum(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), bug)
        yield (y - x.cumsum(0)).abs().max().item(), said and said.decode()


def test_a_correct_kernel_is_right_in_every_order():
    for error, said in run(bug=0):
        assert error < 1e-5
        assert said is None


def test_a_missing_barrier_shows():
    assert any(not error < 1e-5 for error, _ in run(bug=1))


@pytest.mark.parametrize("bug", [2, 4])
def test_a_barrier_that_a_part_of_a_warp_does_not_reach_is_a_deadlock(bug):
    assert all("deadlock" in said for _, said in run(bug))


def test_shared_memory_starts_as_nan():
    assert all(error != error for error, _ in run(bug=3))
