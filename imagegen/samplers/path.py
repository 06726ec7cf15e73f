"""The points that a sampler visits, the signal and noise there, and what the model's output means at each of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .schedule import AngularSchedule, EDMSchedule, FlowSchedule, Schedule
from .spacing import ramp, time_of, timesteps

PREDICTIONS = ("epsilon", "v", "sample", "flow")
EDM_PREDICTIONS = ("edm", "edm_v")


@dataclass(frozen=True)
class Point:
    """x = alpha x_0 + sigma epsilon; the model is told t and sees scale x."""

    t: float
    alpha: float
    sigma: float
    scale: float = 1.0

    @property
    def lam(self):
        """Half the logarithm of the signal-to-noise ratio: -inf for pure noise, inf at the end."""
        with np.errstate(divide="ignore"):
            return float(np.log(self.alpha) - np.log(self.sigma))


@dataclass(frozen=True, eq=False)
class Path:
    """n points where the model is evaluated, then the one where sampling ends.

    A path that starts in the middle is the last part of one of `steps`, and `earlier` are the points it leaves out.
    between(sigma) is the point of a noise level off the grid, at(t) that of a training time. compat: with the faults of
    diffusers, of which `stride` is that a step leads so many times down, to `landings`, not to the next point.
    """

    points: tuple
    prediction: str
    init_sigma: float = 1.0
    sigma_data: float | None = None
    between: Callable | None = None
    at: Callable | None = None
    landings: tuple | None = None
    stride: int | None = None
    clipped: bool = False
    compat: bool = False
    steps: int = 0
    earlier: tuple = ()

    @property
    def n(self):
        return len(self.points) - 1

    def __getitem__(self, i):
        return self.points[i]

    def jumps(self):
        """(here, to) of every step."""
        return list(zip(self.points[:-1], self.landings or self.points[1:], strict=True))

    def tail(self, i):
        """The path from its point i on."""
        landings = self.landings and self.landings[i:]
        return replace(self, points=self.points[i:], landings=landings, earlier=self.points[:i])

    def known_at(self, i, most):
        """How many of the points i, i - 1, … history holds, up to `most`. Pure noise, lambda = -inf, is no node."""
        known = 1
        while known < min(most, i + 1) and math.isfinite(self[i - known].lam):
            known += 1
        return known

    def order_at(self, i, order, *, settles_below=0):
        """The order of step i: `order`, or less where history is short, in the last steps of a path of fewer steps than
        settles_below, and in a step to no noise."""
        if i == self.n - 1 and self[i + 1].sigma == 0:
            return 1
        return min(self.known_at(i, order), self.n - i if self.steps < settles_below else order)

    def x0_coefficients(self, point):
        """(a_x, a_m) with x_0 = a_x x + a_m m."""
        alpha, sigma = point.alpha, point.sigma
        if self.prediction == "epsilon":
            return (1 / alpha, -sigma / alpha) if alpha else (math.inf, -math.inf)
        if self.prediction == "v":
            length = math.hypot(alpha, sigma)
            return alpha / length**2, -sigma / length
        if self.prediction == "sample":
            return 0.0, 1.0
        if self.prediction == "flow":
            return 1 / (alpha + sigma), -sigma / (alpha + sigma)
        variance = sigma**2 + self.sigma_data**2
        sign = 1 if self.prediction == "edm" else -1
        return self.sigma_data**2 / variance, sign * sigma * self.sigma_data / math.sqrt(variance)

    def epsilon(self, point, x, x0, m, clipped):
        """The noise in x as a combination of x, x0 and m: the model's own, or the one that goes with the clipped x0."""
        alpha, sigma = point.alpha, point.sigma
        if clipped:
            return (x - alpha * x0) / sigma
        if self.prediction == "epsilon":
            return m
        if self.prediction == "v":
            length = math.hypot(alpha, sigma)
            return sigma / length**2 * x + alpha / length * m
        if self.prediction == "flow":
            return (x + alpha * m) / (alpha + sigma)
        a_x, a_m = self.x0_coefficients(point)
        return (x - alpha * (a_x * x + a_m * m)) / sigma


@dataclass(frozen=True, eq=False)
class Grid:
    """What `create` was asked for, in its words. faults names the faults of diffusers' grid, none where compat is off:

    strides: steps lead steps // n times down, not to the next time. repeats_end: the last noise level twice in place of
    a smaller one. rounds_karras, truncates, spares_cosine: times made integers, karras ones rounded, but not those of a
    cosine schedule. nudges_start: a flow starts at 1 - 1e-6. ignores_clip: x_0 is not clipped.
    """

    schedule: object
    steps: int
    prediction: str
    spacing: object = "trailing"
    sigmas: object = None
    offset: int = 0
    final: str = "zero"
    clipped: bool = False
    compat: bool = False
    faults: frozenset = frozenset()

    def path(self, points, **more):
        return Path(
            tuple(points),
            prediction=self.prediction,
            clipped=self.clipped,
            compat=self.compat,
            steps=len(points) - 1,
            **more,
        )

    def times(self, **options):
        """The training times that spacing names or lists."""
        if isinstance(self.spacing, str):
            return timesteps(self.spacing, self.steps, self.schedule.steps, self.offset, **options)
        if self.spacing[0] >= self.schedule.steps:
            raise ValueError(
                f"create: spacing must hold times below the schedule's {self.schedule.steps}, got {self.spacing[0]:g}"
            )
        return self.spacing

    def refuse_times(self):
        """Where a schedule has no times to choose from."""
        if not isinstance(self.spacing, str) or self.spacing != "trailing":
            raise ValueError(
                f"create: spacing must be 'trailing' on {self.schedule}, which has no times to choose from"
            )

    def ramp(self, high, low, n):
        """n noise levels of the kind that sigmas names; without faults, final="sigma_min" is the last of n + 1."""
        rho = getattr(self.schedule, "rho", 7.0)
        return ramp(self.sigmas, high, low, n + self.ends_at_sigma_min, rho)[:n]

    @property
    def ends_at_sigma_min(self):
        return self.final == "sigma_min" and not self.compat

    def told(self, t):
        """The times the model is told for noise levels between training times: theirs, or integers in diffusers."""
        karras = isinstance(self.sigmas, str) and self.sigmas == "karras"
        if karras and "rounds_karras" in self.faults:
            spared = "spares_cosine" in self.faults and self.schedule.kind == "cosine"
            return np.trunc(t) if spared else np.round(t)
        return np.trunc(t) if "truncates" in self.faults else t


def discrete_path(grid):
    """Training times of a variance-preserving schedule, or the points of an angular one."""
    schedule = grid.schedule
    if isinstance(schedule, AngularSchedule):
        grid.refuse_times()
        if grid.final != "zero":
            raise ValueError(
                f"create: final must be 'zero' on {schedule}, which has no least noise, got {grid.final!r}"
            )
        t, alpha, sigma = schedule.visited(np.linspace(1, 0, grid.steps + 1))
        return grid.path([Point(*p) for p in zip(t, alpha, sigma, strict=True)])
    end = Point(-1.0, 1.0, 0.0) if grid.final == "zero" else Point(-1.0, schedule.alpha[0], schedule.sigma[0])

    def at(t):
        t = int(t)
        return Point(float(t), schedule.alpha[t], schedule.sigma[t]) if t >= 0 else end

    t = grid.times()
    if "strides" not in grid.faults:
        return grid.path([*map(at, t), end], at=at)
    stride = schedule.steps // len(t)
    return grid.path([*map(at, t), end], at=at, landings=tuple(at(u - stride) for u in t), stride=stride)


def inverse_path(grid):
    """`discrete_path` from the end to the start. The model sees x where a step starts but is told where it leads, as
    the step that it undoes was told."""
    path = discrete_path(grid)
    *points, end = path.points
    up = points[::-1]
    if path.stride:
        starts = [path.at(min(to.t - path.stride, grid.schedule.steps - 1)) for to in up]
    else:
        starts = [end, *up[:-1]]
    told = [replace(start, t=to.t) for start, to in zip(starts, up, strict=True)]
    return replace(path, points=(*told, up[-1]), landings=tuple(up))


def distilled_path(grid):
    """Times of the teacher that a consistency model was distilled from, 50 trailing ones (Luo et al., 2023)."""
    if isinstance(grid.spacing, str):
        if grid.spacing != "trailing":
            raise ValueError(f"create: spacing must be 'trailing' or a list for this sampler, got {grid.spacing!r}")
        teacher = min(50, grid.schedule.steps)
        if not 1 <= grid.steps <= teacher:
            raise ValueError(f"create: steps must be from 1 to the teacher's {teacher}, got {grid.steps}")
        times = np.arange(teacher, 0, -1) * (grid.schedule.steps // teacher) - 1
        picked = np.floor(np.linspace(0, teacher, grid.steps, endpoint=False)).astype(int)
        grid = replace(grid, spacing=times[picked])
    return discrete_path(grid)


def training_sigmas(schedule, compat):
    """sigma / alpha at every training time. Pure noise, which has none, becomes the most that float16 can tell.

    diffusers takes 2^-24 for alpha_bar even where that is more than at the time before; then its sigmas fall at the
    end of training.
    """
    alpha_bar = schedule.alpha_bar.copy()
    if alpha_bar[-1] == 0:
        alpha_bar[-1] = 2.0**-24 if compat else min(2.0**-24, alpha_bar[-2] / 4)
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def exploding_path(grid):
    """x = x_0 + sigma epsilon (Karras et al., 2022); a variance-preserving model sees x / sqrt(1 + sigma^2)."""
    if isinstance(grid.schedule, EDMSchedule):
        return _edm_path(grid)
    table = training_sigmas(grid.schedule, grid.compat)
    t = grid.times(rounded=False)
    sigma = np.interp(t, np.arange(len(table)), table)
    if grid.sigmas is not None:
        low = table[0] if grid.ends_at_sigma_min else sigma[-1]
        sigma = grid.ramp(sigma[0], low, grid.steps) if isinstance(grid.sigmas, str) else grid.sigmas
        t = grid.told(time_of(sigma, table))
    end = table[0] if grid.final == "sigma_min" else 0.0
    leading = isinstance(grid.spacing, str) and grid.spacing == "leading"

    def point(t, sigma):
        return Point(float(t), 1.0, float(sigma), 1 / math.hypot(1, sigma))

    return grid.path(
        [*map(point, t, sigma), point(-1.0, end)],
        init_sigma=float(math.hypot(sigma.max(), 1) if leading else sigma.max()),
        between=lambda sigma: point(time_of(sigma, table), sigma),
    )


def preserving_path(grid):
    """The model's own alpha and sigma, as the exponential integrators take them; for EDM x = x_0 + sigma epsilon."""
    if isinstance(grid.schedule, EDMSchedule):
        return _edm_path(grid)
    if isinstance(grid.schedule, FlowSchedule):
        listed = not isinstance(grid.spacing, str) or not isinstance(grid.sigmas, str | None)
        return _diffusers_flow_path(grid) if grid.compat and not listed else straight_path(grid)
    table = training_sigmas(grid.schedule, grid.compat)
    if grid.sigmas is None:
        t = grid.times(extra=1)
        alpha_bar = np.interp(t, np.arange(len(table)), grid.schedule.alpha_bar)
        sigma = np.interp(t, np.arange(len(table)), table)
        exact = (alpha_bar == 0) & (not grid.compat)
        sigma = np.where(exact, math.inf, sigma)
    else:
        named = isinstance(grid.sigmas, str)
        sigma = grid.ramp(table[-1], table[0], grid.steps) if named else grid.sigmas
        t = grid.told(time_of(sigma, table))
    end = table[0] if grid.final == "sigma_min" else 0.0
    if "repeats_end" in grid.faults and grid.sigmas is not None and grid.final == "sigma_min":
        end = sigma[-1]

    def point(t, sigma):
        alpha = 1 / math.hypot(1, sigma)
        return Point(float(t), alpha, float(sigma * alpha) if alpha else 1.0)

    return grid.path([*map(point, t, sigma), point(-1.0, end)])


def straight_path(grid):
    """x = (1 - sigma) x_0 + sigma epsilon at shifted sigmas.

    spacing "linspace" goes from 1 to the smallest sigma of training, "trailing" from 1 by equal steps to 1/n. Lists of
    times or sigmas are taken as they are.
    """
    schedule, n = grid.schedule, grid.steps
    low = 1 / schedule.steps
    end = schedule.shifted(low) if grid.final == "sigma_min" else 0.0
    if not isinstance(grid.spacing, str):
        return _straight(grid, grid.spacing / schedule.steps, end)
    if grid.spacing == "leading":
        raise ValueError("create: spacing 'leading' never sees pure noise, which a flow starts from; take 'trailing'")
    if grid.final == "sigma_min":
        sigma = schedule.shifted(np.linspace(1, low, n + 1)[:n])
    elif grid.spacing == "linspace":
        ends = np.array([1.0, low])  # diffusers shifts them, too, before it shifts what lies between
        sigma = schedule.shifted(np.linspace(*(schedule.shifted(ends) if grid.compat else ends), n))
    else:
        sigma = schedule.shifted(np.linspace(1, 0, n + 1)[:n])
    if isinstance(grid.sigmas, str):
        sigma = grid.ramp(sigma[0], end or sigma[-1], n)
    elif grid.sigmas is not None:
        sigma = grid.sigmas
    return _straight(grid, sigma, end)


def _straight(grid, sigma, end):
    if sigma[0] > 1:
        raise ValueError(f"create: a flow's sigmas must be at most 1, got {sigma[0]:g}")
    t = grid.told(sigma * grid.schedule.steps)
    points = [Point(float(u), 1 - float(s), float(s)) for u, s in zip([*t, -1.0], [*sigma, end], strict=True)]
    return grid.path(points)


def _diffusers_flow_path(grid):
    """diffusers' multistep samplers never start a flow at 1: they take 1 - 1/steps, or (UniPC) 1 - 1e-6; both then
    truncate the times, and take the end that final="sigma_min" names from betas that the model never had."""
    schedule, n = grid.schedule, grid.steps
    low = 1 / schedule.steps
    if "nudges_start" in grid.faults:
        sigma = schedule.shifted(np.linspace(1, low, n + 1)[:-1])
        sigma[0] -= 1e-6
    else:
        sigma = schedule.shifted(1 - np.linspace(1, low, n + 1))[::-1][:-1]
    end = 0.0
    if grid.final == "sigma_min":
        end = sigma[-1] if "repeats_end" in grid.faults else training_sigmas(Schedule.linear(), False)[0]
    return _straight(replace(grid, faults=grid.faults | {"truncates"}), sigma, end)


def _edm_path(grid):
    """Karras et al., 2022, table 1: c_in scales the model's input, c_noise = ln(sigma) / 4 is its time."""
    schedule = grid.schedule
    grid.refuse_times()
    if isinstance(grid.sigmas, str) or grid.sigmas is None:
        kind = grid.sigmas or "karras"
        sigma = replace(grid, sigmas=kind).ramp(schedule.sigma_max, schedule.sigma_min, grid.steps)
        if (
            grid.compat and kind == "exponential" and grid.steps == 1
        ):  # diffusers turns its ramp round: one step is its end
            sigma = np.array([schedule.sigma_min])
    else:
        sigma = grid.sigmas

    def point(sigma):
        c_noise = math.log(sigma) / 4 if sigma else -1.0
        return Point(c_noise, 1.0, float(sigma), 1 / math.hypot(sigma, schedule.sigma_data))

    end = schedule.sigma_min if grid.final == "sigma_min" else 0.0
    return grid.path(
        [*map(point, sigma), point(end)],
        init_sigma=math.hypot(schedule.sigma_max, 1) if grid.compat else float(sigma[0]),
        sigma_data=schedule.sigma_data,
        between=point,
    )
