import math
import time

import pytest

from benchmarks import hush, roofline, timing


class FakeContestant:
    """Takes the listed seconds, one after the other, on a clock that only it moves."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.log = clock, seconds, clock.log

    def before(self):
        self.log.append("before")

    def call(self):
        self.log.append(self)
        self.clock.now += self.seconds[sum(entry is self for entry in self.log) - 1]


class FakeClock:
    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def measure(self, call):
        start = self.now
        call()
        return self.now - start


def test_quantiles_are_linear_between_neighbours():
    assert timing.median([3, 1, 2]) == 2
    assert timing.median([4, 1, 2, 3]) == 2.5
    assert timing.quantile([0, 10, 20, 30, 40, 50], 0.2) == 10
    assert timing.quantile([0, 10, 20, 30, 40, 50], 0.8) == 40
    assert timing.quantile([7], 0.8) == 7


def test_the_ratio_pairs_the_rounds():
    # The machine slows down fourfold for the last two rounds; the ratio of each round is still 2.
    assert timing.ratio([2, 2, 8, 8], [1, 1, 4, 4]) == 2
    # The ratio of the medians of these would be 1.
    assert timing.ratio([1, 2, 9], [2, 1, 3]) == 2


def test_geometric_mean():
    assert timing.geometric_mean([2, 8]) == pytest.approx(4)
    assert timing.geometric_mean([0.5, 2]) == pytest.approx(1)


def test_contestants_take_turns():
    clock = FakeClock()
    a, b = FakeContestant(clock, [1.0] * 9), FakeContestant(clock, [2.0] * 9)
    times = timing.interleave([a, b], 0.0, measure=clock.measure, clock=clock)
    assert times == [[1.0] * timing.MIN_ROUNDS, [2.0] * timing.MIN_ROUNDS]
    assert clock.log == ["before", a, "before", b] * timing.MIN_ROUNDS


def test_rounds_go_on_until_the_time_is_spent():
    clock = FakeClock()
    a, b = FakeContestant(clock, [1.0] * 99), FakeContestant(clock, [3.0] * 99)
    times = timing.interleave([a, b], 20.0, measure=clock.measure, clock=clock)
    assert len(times[0]) == len(times[1]) == 10  # 20 s for each of the two, 4 s a round


def test_rounds_have_a_limit():
    clock = FakeClock()
    a = FakeContestant(clock, [1e-6] * 999)
    assert len(timing.interleave([a], 1.0, measure=clock.measure, clock=clock)[0]) == timing.MAX_ROUNDS


def test_nobody_to_time():
    assert timing.interleave([], 1.0) == []


def test_the_roofline_is_the_nearer_roof():
    roof = {"flops_per_s": {"float32": 100.0}, "copy_bytes_per_s": 10.0}
    assert roofline.fraction(roof, "float32", flop=200, bytes_moved=1, seconds=4.0) == (0.5, "compute")
    assert roofline.fraction(roof, "float32", flop=1, bytes_moved=20, seconds=4.0) == (0.5, "memory")


def test_the_higher_of_two_roofs_counts():
    a = {"flops_per_s": {"float32": 100.0, "bfloat16": 150.0}, "copy_bytes_per_s": 10.0}
    b = {"flops_per_s": {"float32": 90.0, "bfloat16": 200.0}, "copy_bytes_per_s": 11.0}
    best = roofline.higher(a, b)
    assert best == {"flops_per_s": {"float32": 100.0, "bfloat16": 200.0}, "copy_bytes_per_s": 11.0}
    assert math.isclose(roofline.fraction(best, "bfloat16", 100, 0, 1.0)[0], 0.5)


def test_fewer_rounds_where_a_call_is_long():
    clock = FakeClock()
    a = FakeContestant(clock, [1.0] * 9)
    assert timing.interleave([a], 0.0, rounds=2, measure=clock.measure, clock=clock) == [[1.0] * 2]


def test_the_machine_is_quiet_while_something_is_timed(tmp_path, capsys):
    log = tmp_path / "log"
    with hush.hushed(f"echo begin > {log}; echo; cat; echo end >> {log}"):
        assert log.read_text() == "begin\n"
    assert log.read_text() == "begin\nend\n" and not capsys.readouterr().out
    with hush.hushed("echo; exit"):
        time.sleep(0.2)
    assert "ended before the timing did" in capsys.readouterr().out
