"""Which tile attention's Triton kernels run with, by a stopwatch that is told what to say."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from triton.runtime.errors import OutOfResources

from imagegen import ops
from imagegen.ops.triton import attention_tiles, fastest
from imagegen.ops.triton.fastest import launch_fastest


@pytest.fixture
def timed(monkeypatch):
    """The tiles that were timed, in order; a tile's time is the tile itself."""
    timed = []

    def do_bench(run, **_):
        timed.append(None)
        timed[-1] = run()
        return timed[-1]

    monkeypatch.setattr(fastest, "_chosen", {})
    monkeypatch.setattr(fastest.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.use_deterministic_algorithms(False)
    return timed


def launched(calls, candidates, fails=()):
    """The tile of the launch that counts, the last."""
    ran = []

    def launch(tile):
        if tile in fails:
            raise OutOfResources(232448, 233472, "shared memory")
        ran.append(tile)
        return tile

    launch_fastest(calls, candidates, launch)
    return ran[-1]


def test_the_fastest_runs_and_is_remembered(timed):
    assert launched("a", (3, 1, 2)) == 1
    assert timed == [3, 1, 2]
    assert launched("a", (3, 1, 2)) == 1
    assert timed == [3, 1, 2]
    assert launched("b", (5, 6)) == 5  # another class
    assert timed == [3, 1, 2, 5, 6]


def test_a_tile_that_the_gpu_has_no_room_for_is_dropped(timed):
    assert launched("a", (3, 1, 2), fails=[1]) == 2


def test_where_no_tile_fits_the_launch_says_why(timed):
    with pytest.raises(OutOfResources, match="shared memory"):
        launched("a", (3, 1), fails=[1, 3])


def test_a_single_tile_is_not_timed(timed):
    assert launched("a", (3,)) == 3
    assert timed == []


def test_nothing_is_timed_in_a_capture(timed, monkeypatch):
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert launched("a", (3, 1)) == 3
    assert timed == []
    assert launched("a", (3, 1)) == 1
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert launched("a", (3, 1)) == 1  # what came before the capture counts in it


def test_results_that_have_to_repeat_are_those_of_the_first(timed):
    launched("a", (3, 1))
    torch.use_deterministic_algorithms(True)
    assert launched("a", (3, 1)) == launched("b", (3, 1)) == 3
    assert len(timed) == 2


def test_classes_of_attention(timed, monkeypatch):
    """Head dim, element size, what the mask costs and whether all keys are held; each on its device."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    classes = []
    monkeypatch.setattr(attention_tiles, "launch_fastest", lambda calls, tiles, launch: classes.append((calls, tiles)))

    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 1)

    for shape in ((64, 2, False, False), (64, 2, False, True), (80, 2, False, False)):
        attention_tiles.launch_with_fastest_tile(OnGpu, attention_tiles.forward_tiles, shape, None)
    assert len({calls for calls, _ in classes}) == 3
    assert all(len(tiles) > 1 and len(set(tiles)) == len(tiles) for _, tiles in classes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_tiles_are_timed_and_a_graph_has_the_fastest(monkeypatch):
    monkeypatch.setattr(fastest, "_chosen", {})
    torch.use_deterministic_algorithms(False)
    q, k, v = torch.randn(3, 1, 2, 300, 64, device="cuda", dtype=torch.bfloat16)
    y = ops.attention(q, k, v, backend="triton")
    assert len(fastest._chosen) == 1
    torch.testing.assert_close(y, ops.attention(q, k, v, backend="eager"), rtol=2e-2, atol=2e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.attention(q, k, v, backend="triton")
    graph.replay()
    assert torch.equal(captured, y)
