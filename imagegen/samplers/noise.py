"""Seeds made of several integers."""

import numpy as np


def mixed_seed(*key):
    """One 64-bit seed from several non-negative integers; nearby keys give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
