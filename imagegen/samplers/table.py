"""A sampler is a table: one row of float64 coefficients per model evaluation, all known before the loop.

    x_0     = clip(a_x x + a_m m)                                m is the model's output, guided
    x'      = c_x x + c_0 x_0 + c_m m + c_n noise + sum_k c_hk h[k]
    h[slot] = q_x x + q_0 x_0 + q_m m                            slot -1 stores nothing; x is the old x
    x'      = mask x' + (1 - mask) (b_0 known + b_1 noise')      inpainting: the signal and noise x' should hold
    input'  = s' x'                                              the next model input

A coefficient of exactly 0 means that the tensor is not read: it may be missing, or hold NaN. Slots are physical:
nothing is shifted, so that pointers never change. A method of two stages stores the finished part of its second one; a
predictor and its corrector start from the same x, so that the correction is a sum over history alone.
"""

import numpy as np

from ..ops.sampler_step import columns


def slots_of(row):
    """How many history slots a row or table of this width has."""
    return np.shape(row)[-1] - len(columns(0))


def x0_row(row, c_x=0.0, c_0=1.0):
    """The row without slots whose x' is c_x x + c_0 x_0, with the x_0 of `row`."""
    values = {"s'": 1, "a_x": row[2], "a_m": row[3], "c_x": c_x, "c_0": c_0, "slot": -1, "b_0": 1}
    return [values.get(name, 0.0) for name in columns(0)]


class Table:
    """Builds the rows along a path in the papers' own formulas.

    x, x0, m, n and h[k] are unit vectors over the columns of x', so that `alpha * x0 + sigma * n` is the row's part c.
    """

    def __init__(self, path, slots=0):
        self.path = path
        self.x, self.x0, self.m, self.n, *self.h = np.eye(4 + slots)
        self._rows, self._scales = [], []

    def epsilon(self, point, clipped=None):
        """The noise in x; by default the one that goes with the clipped x_0 where x_0 is clipped."""
        return self.path.epsilon(point, self.x, self.x0, self.m, self.path.clipped if clipped is None else clipped)

    def ring(self, i, slots=None):
        """(the stored tensors before evaluation i, newest first; the slot that evaluation i overwrites)."""
        slots = len(self.h) if slots is None else slots
        return [self.h[(i - j) % slots] for j in range(1, slots + 1)], i % slots if slots else -1

    def add(self, here, x_next, to, store=None, slot=0):
        """The row of the evaluation at `here`: x_next and store are combinations of the unit vectors."""
        a = self.path.x0_coefficients(here)
        stores = store is not None and len(self.h) > 0
        c, q = self._folded(x_next, a, here), self._folded(store if stores else np.zeros_like(self.x), a, here)[:3]
        if not (c[1] or q[1] or np.isfinite(a).all()):  # x_0, infinite at zero SNR, is not read
            a = (0.0, 0.0)
        row = np.array([here.t, 1.0, *a, *c, *q, slot if stores else -1, to.alpha, to.sigma], np.float64)
        if not np.isfinite(row).all():
            names = np.array(columns(len(self.h)))[~np.isfinite(row)]
            raise ValueError(f"create: the row at t = {here.t:g} is not finite in {', '.join(names)}")
        self._rows.append(row)
        self._scales.append(here.scale)

    def add_second_stage(self, here, x_next, to):
        """A row that adds to what the row before stored in slot 0.

        What it takes of x is stored, too, where the first stage made that of x, x_0 and m alone, without noise: numbers
        of the size of sigma that would cancel in float32 then do so here, and x isn't read.
        """
        self.add(here, x_next, to)
        first, second = self._rows[-2:]
        c_x, c_n, q_x = 4, 7, len(first) - 6
        if not first[c_n]:
            first[q_x : q_x + 3] += second[c_x] * first[c_x:c_n]
            second[c_x] = 0

    def _folded(self, combination, a, here):
        """Where x_0 is not clipped it is linear in x and m, too: three reads and roundings become two."""
        if combination[1] and not self.path.clipped:
            if not np.isfinite(a).all():
                raise ValueError(
                    f"create: prediction {self.path.prediction!r} says nothing about x_0 at t = {here.t:g}, where the "
                    "schedule has zero SNR; train with prediction 'v' or 'sample', or take spacing 'leading'"
                )
            combination = combination + combination[1] * (a[0] * self.x + a[1] * self.m - self.x0)
        # 1 - 1 leaves 1e-16, which would be a tensor to read
        return np.where(np.abs(combination) < 1e-15 * np.abs(combination).max(), 0, combination)

    @property
    def input_scale(self):
        return self._scales[0]

    def array(self):
        """(evaluations, 14 + slots): every row scales the input of the next, and stores only what a later row reads."""
        table = np.stack(self._rows)
        table[:, 1] = [*self._scales[1:], 1.0]
        slot = columns(len(self.h)).index("slot")
        read = set()
        for row in table[::-1]:
            if row[slot] not in read:
                row[slot - 3 : slot], row[slot] = 0, -1
            read.discard(row[slot])
            read |= {k for k in range(len(self.h)) if row[8 + k]}
        return table
