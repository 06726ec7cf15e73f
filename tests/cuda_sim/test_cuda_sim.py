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


PRODUCT = simulator.HERE / "faulty_product.cu"
PRODUCT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}
SCHEDULES = [(order, landing) for order in ("forward", "reverse", "random") for landing in ("late", "early")]


def product_errors(bug, dtype=torch.bfloat16):
    """The error of the tensor-core product with this bug, and what was said, for every schedule."""
    library = ctypes.CDLL(str(simulator.build([PRODUCT])))
    product = getattr(library, f"product_{PRODUCT_NAMES[dtype]}")
    product.restype = ctypes.c_char_p
    a, b = torch.randn(32, 128).to(dtype), torch.randn(64, 128).to(dtype)
    for order, landing in SCHEDULES:
        c = torch.full((32 * 64 + 1,), float("nan"))
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SIM_ORDER", order)
            environment.setenv("SIM_ASYNC", landing)
            said = product(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)), 128, bug)
        yield (c[:-1].view(32, 64) - a.float() @ b.float().T).abs().max().item(), said and said.decode()


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-4), (torch.float16, 1e-4), (torch.float32, 0.1)])
def test_matrix_instructions_multiply(dtype, bound):
    for error, said in product_errors(0, dtype):
        assert error < bound  # tf32 keeps three digits
        assert said is None


@pytest.mark.parametrize("bug", [1, 2, 3])
def test_an_asynchronous_copy_used_or_overwritten_too_early_shows(bug):
    assert any(not error < 1e-4 for error, _ in product_errors(bug))


def test_operands_not_in_tf32_are_refused():
    assert all("not in tf32" in said for _, said in product_errors(6, torch.float32))


def wgmma_errors(bug, columns=32, layout=0):
    """The error of the warpgroup's product with this bug in each schedule; layout: of its operand in shared memory."""
    library = ctypes.CDLL(str(simulator.build([simulator.HERE / "faulty_wgmma.cu"])))
    product = getattr(library, f"product_{columns}")
    product.restype = ctypes.c_char_p
    a, b = torch.randn(64, 128).bfloat16(), torch.randn(128, columns).bfloat16()
    for order, landing in SCHEDULES:
        c = torch.full((64, columns), float("nan"))
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SIM_ORDER", order)
            environment.setenv("SIM_ASYNC", landing)
            said = product(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)), layout, bug)
        assert said is None
        yield (c - a.float() @ b.float()).abs().max().item()


@pytest.mark.parametrize("columns", [32, 128])
@pytest.mark.parametrize("layout", range(4))
def test_warpgroups_multiply(layout, columns):
    assert all(error < 1e-4 for error in wgmma_errors(0, columns, layout))


@pytest.mark.parametrize("bug", [1, 2])
def test_a_warpgroups_product_waited_for_too_late_shows(bug):
    assert any(not error < 1e-4 for error in wgmma_errors(bug))


def copied_sums(bug, joined=False):
    """The error of the sum over rows that the copy engine brings, and what was said, in each schedule."""
    library = ctypes.CDLL(str(simulator.build([simulator.HERE / "faulty_copy_tensor.cu"])))
    library.sum_of_rows.restype = ctypes.c_char_p
    x = torch.randn(3, 2, 64, 48).bfloat16()
    x = (x.transpose(1, 2).contiguous().transpose(1, 2) if joined else x)[..., :40]
    for order, landing in SCHEDULES:
        y = torch.full((64,), float("nan"))
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SIM_ORDER", order)
            environment.setenv("SIM_ASYNC", landing)
            strides = map(ctypes.c_int64, x.stride()[:3])
            said = library.sum_of_rows(ctypes.c_void_p(x.data_ptr()), *strides, ctypes.c_void_p(y.data_ptr()), bug)
        expected = torch.nn.functional.pad(x[2, 1].float().sum(0), (0, 24))  # beyond the tensor there are zeros
        yield (y - expected).abs().max().item(), said and said.decode()


@pytest.mark.parametrize("joined", [False, True])
def test_boxes_of_a_tensor_arrive(joined):
    for error, said in copied_sums(0, joined):
        assert said is None
        assert error < 1e-5


@pytest.mark.parametrize("bug", [1, 2, 3])
def test_a_box_read_or_overwritten_too_early_shows(bug):
    assert any(said or not error < 1e-5 for error, said in copied_sums(bug))


def test_a_barrier_that_is_not_there_yet_shows():
    assert any(said and "nobody initialised" in said for _, said in copied_sums(4))


CLUSTER = simulator.HERE / "faulty_cluster.cu"


def cluster_sums(bug, schedules=SCHEDULES):
    """The error of the sums that blocks of a cluster bring each other's rows for, and what was said, by schedule."""
    library = ctypes.CDLL(str(simulator.build([CLUSTER])))
    library.sums_of_rows.restype = ctypes.c_char_p
    x = torch.randn(32, 64)
    for order, landing in schedules:
        y = torch.full((4, 64), float("nan"))
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SIM_ORDER", order)
            environment.setenv("SIM_ASYNC", landing)
            said = library.sums_of_rows(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), bug)
        yield (y - x.sum(0) * torch.arange(1, 5)[:, None]).abs().max().item(), said and said.decode()


def test_blocks_of_a_cluster_copy_to_each_other():
    for error, said in cluster_sums(0):
        assert said is None
        assert error < 1e-4


@pytest.mark.parametrize("bug", [1, 2])
def test_a_stage_that_the_other_block_still_reads_shows(bug):
    """In one of four random schedules where it is one warp that lags behind: many of them."""
    assert any(said is None and not error < 1e-4 for error, said in cluster_sums(bug, [("random", "early")] * 64))


@pytest.mark.parametrize(
    "bug, says",
    [(3, "a block that has ended"), (4, "nobody initialised"), (5, "a block that has ended"), (6, "deadlock")],
)
def test_blocks_of_a_cluster_that_are_not_there_or_waited_for_in_vain_show(bug, says):
    assert any(said and says in said for _, said in cluster_sums(bug))


@pytest.mark.parametrize(
    "source, sanitizer, bug, says",
    [
        (PRODUCT, "thread", 0, None),
        (PRODUCT, "thread", 1, "data race"),
        (PRODUCT, "thread", 2, "data race"),
        (PRODUCT, "address", 0, None),
        (PRODUCT, "address", 4, "heap-buffer-overflow"),
        (PRODUCT, "address", 5, "heap-buffer-overflow"),
        (CLUSTER, "thread", 0, None),
        (CLUSTER, "thread", 1, "data race"),
        (CLUSTER, "thread", 2, "data race"),
    ],
)
def test_sanitizers_see_races_and_accesses_out_of_bounds(source, sanitizer, bug, says):
    program = simulator.build_program([source.with_name(f"{source.stem}_main.cpp"), source], sanitizer)
    printed, said = simulator.run_program(program, bug)
    if says:
        assert says in said
    else:
        assert printed == "ran 64\n"
        assert simulator.found_nothing(said), said
