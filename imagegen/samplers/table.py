"""A sampler is a table: one row of float64 coefficients per model evaluation, all known before the loop.

    x_0     = clip(a_x x + a_m m)                                m is the model's output, guided
    x'      = c_x x + c_0 x_0 + c_m m + c_n noise + sum_k c_hk h[k]
    h[slot] = q_x x + q_0 x_0 + q_m m                            slot -1 stores nothing; x is the old x
    x'      = mask x' + (1 - mask) (b_0 known + b_1 noise')      inpainting: the signal and noise x' should hold
    input'  = s' x'                                              the next model input

A coefficient of exactly 0 means that the tensor is not read: it may be missing, or hold NaN.
"""

import numpy as np

_BEFORE_SLOTS = ("t", "s'", "a_x", "a_m", "c_x", "c_0", "c_m", "c_n")
_AFTER_SLOTS = ("q_x", "q_0", "q_m", "slot", "b_0", "b_1")


def columns(slots):
    """The names of a row's columns for a sampler that keeps `slots` tensors of history."""
    return (*_BEFORE_SLOTS, *(f"c_h{k}" for k in range(slots)), *_AFTER_SLOTS)


def slots_of(row):
    """How many history slots a row or table of this width has."""
    return np.shape(row)[-1] - len(columns(0))


class Table:
    """Builds the rows along a path in the papers' own formulas.

    x, x0, m, n and h[k] are unit vectors over the columns of x', so that `alpha * x0 + sigma * n` is the row's part c.
    """

    def __init__(self, path, slots=0):
        self.path = path
        self.x, self.x0, self.m, self.n, *self.h = np.eye(4 + slots)
        self._rows = []

    def epsilon(self, i):
        return self.path.epsilon(i, self.x, self.x0, self.m)

    def add(self, i, x_next, store=None, slot=-1):
        """The row of evaluation i: x_next and store are combinations of the unit vectors."""
        path = self.path
        q = np.zeros(3) if store is None else store[:3]
        a, b = path.x0_coefficients(i), (path.alpha[i + 1], path.sigma[i + 1])
        row = np.array([path.t[i], 1.0, *a, *x_next, *q, slot, *b], np.float64)
        if not np.isfinite(row).all():
            names = np.array(columns(len(self.h)))[~np.isfinite(row)]
            raise ValueError(f"create: the row at t = {path.t[i]} is not finite in {', '.join(names)}")
        self._rows.append(row)

    def array(self):
        return np.stack(self._rows)
