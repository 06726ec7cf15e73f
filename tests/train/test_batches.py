import itertools

from imagegen.train.batches import Batches


def indices(start=0, stop=6, **options):
    return list(Batches(10, 4, **{"start": start, "stop": stop, "seed": 0, **options}))


def test_every_pass_visits_every_image_once():
    flat = list(itertools.chain(*indices(stop=5)))
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_a_later_start_sees_the_same_batches():
    assert indices(start=3) == indices()[3:]


def test_processes_share_a_batch():
    halves = zip(indices(rank=0, world=2), indices(rank=1, world=2), strict=True)
    assert [sorted(a + b) for a, b in halves] == [sorted(batch) for batch in indices()]


def test_batches_may_be_larger_than_the_data():
    (batch,) = Batches(3, 8, start=0, stop=1, seed=0)
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]
