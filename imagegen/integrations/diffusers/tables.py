"""For each scheduler of diffusers: the path that its times and noise levels make, and the rows along it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ...samplers.consistency import boundary, lcm, tcd
from ...samplers.ddim import ddim
from ...samplers.ddpm import ddpm
from ...samplers.deis import deis
from ...samplers.dpm_2 import dpm_2, dpm_2_ancestral
from ...samplers.dpmpp import dpmpp
from ...samplers.dpmpp_singlestep import dpmpp_sde
from ...samplers.euler import euler, euler_ancestral
from ...samplers.flow import flow_euler, flow_heun
from ...samplers.heun import heun
from ...samplers.lms import lms
from ...samplers.path import Path, Point
from ...samplers.pndm import ipndm, pndm
from ...samplers.sa_solver import sa_solver
from ...samplers.unipc import unipc

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}


@dataclass(frozen=True)
class Kind:
    """path(scheduler) and rows(scheduler's config, options of its step) -> builder of rows.

    only: config entries that have a table, with their values. scaled: the model's input is scaled. evaluations: how
    many a step takes.
    original(config, t): the (c_x, c_0) of what the output calls the original sample.
    returns_original: a step that returns a tuple returns that as its second.
    step_of(scheduler, i): the step that starts at timestep number i.
    always_draws: noise is drawn for every step, used or not.
    """

    path: Callable
    rows: Callable
    only: tuple = ()
    scaled: bool = False
    evaluations: int = 1
    clips: bool = True
    original: Callable = lambda config, t: (0.0, 1.0)
    returns_original: bool = False
    step_of: Callable | None = None
    always_draws: bool = False

    def check(self, config):
        for name, allowed in self.only:
            if config.get(name) not in allowed:
                raise ValueError(
                    f"scheduler: config.{name} must be {' or '.join(map(str, allowed))}, got {config.get(name)!r}"
                )

    def bounds(self, config):
        """The clip and threshold of `ops.sampler_step`."""
        if self.clips and config.get("thresholding"):
            return {"threshold": config.dynamic_thresholding_ratio, "clip": config.sample_max_value}
        if self.clips and config.get("clip_sample"):
            return {"clip": config.clip_sample_range}
        return {}

    def build(self, scheduler, options, begin):
        """(the path from the scheduler's timestep number `begin` on, the builder of its rows)."""
        path = self.path(scheduler)
        path = replace(path, clipped=bool(self.bounds(scheduler.config)))
        rows = self.rows(scheduler.config, options)
        if begin:
            step_of = self.step_of or (lambda scheduler, i: (i + self.evaluations - 1) // self.evaluations)
            path = path.tail(step_of(scheduler, begin))
        return path, rows


def _path(scheduler, points, **more):
    points = tuple(points)
    prediction = _PREDICTIONS[scheduler.config.get("prediction_type", "epsilon")]
    return Path(points, **{"prediction": prediction, "compat": True, "steps": len(points) - 1, **more})


def _on_times(scheduler, times=None, final=None, strides=False):
    """Points at training times, from alphas_cumprod."""
    alpha_bar = scheduler.alphas_cumprod.double().tolist()
    final = float(scheduler.final_alpha_cumprod) if final is None else final

    def at(t):
        bar = alpha_bar[int(t)] if t >= 0 else final
        return Point(float(t) if t >= 0 else -1.0, math.sqrt(bar), math.sqrt(1 - bar))

    times = scheduler.timesteps.tolist() if times is None else times
    points = [*map(at, times), at(-1)]
    if not strides:
        return _path(scheduler, points, at=at)
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return _path(scheduler, points, at=at, stride=stride, landings=tuple(at(t - stride) for t in times))


def _pndm_path(scheduler):
    times = scheduler.timesteps.tolist()
    if scheduler.config.skip_prk_steps:
        times = [*times[:1], *times[2:]] if len(times) > 1 else times
    else:
        prk = scheduler.prk_timesteps.tolist()
        times = [*prk[::4], *scheduler.plms_timesteps.tolist()]
    return _on_times(scheduler, times, strides=True)


def _pndm_step_of(scheduler, i):
    """Its second timestep repeats the first step; Runge-Kutta steps take four each."""
    if scheduler.config.skip_prk_steps:
        return i - 1
    if i < 12:
        raise ValueError(f"step: can't start within the Runge-Kutta steps, at timestep number {i}")
    return i - 9


def _pndm_rows(config, options):
    warmup = "repeat" if config.skip_prk_steps else "runge_kutta"

    def rows(path):
        # From the middle no step is repeated, for the rest of the scheduler's times repeats none.
        return ipndm(replace(path, compat=False)) if path.earlier else pndm(path, warmup=warmup)

    return rows


def _levels(scheduler, evaluations=1):
    """The noise level of every step and of the end; a scheduler of two evaluations lists most of them twice."""
    sigmas = scheduler.sigmas.double().tolist()
    if evaluations == 1:
        return sigmas
    n = (len(scheduler.timesteps) + 1) // 2
    return [sigmas[0], *(sigmas[i] for i in range(1, 2 * n, 2))]


def _exploding(scheduler, evaluations=1, compat=True):
    def point(sigma):
        return Point(0.0, 1.0, sigma, 1 / math.hypot(1, sigma))

    return _path(scheduler, map(point, _levels(scheduler, evaluations)), between=point, compat=compat)


def _preserving(scheduler):
    flow = scheduler.config.get("use_flow_sigmas")

    def point(t, sigma):
        if flow:
            return Point(t, 1 - sigma, sigma)
        alpha = 1 / math.hypot(1, sigma)
        return Point(t, alpha, sigma * alpha)

    times = [*map(float, scheduler.timesteps.tolist()), -1.0]
    return _path(scheduler, map(point, times, _levels(scheduler)))


def _straight(scheduler, evaluations=1):
    points = [Point(0.0, 1 - sigma, sigma) for sigma in _levels(scheduler, evaluations)]
    return _path(scheduler, points, prediction="flow")


def _edm(scheduler):
    sigma_data = scheduler.config.sigma_data
    prediction = "edm" if scheduler.config.prediction_type == "epsilon" else "edm_v"

    def point(sigma):
        return Point(0.0, 1.0, sigma, 1 / math.hypot(sigma, sigma_data))

    points = map(point, _levels(scheduler))
    return _path(scheduler, points, prediction=prediction, sigma_data=sigma_data, between=point)


def _churned(config, options):
    return partial(
        euler,
        churn=options.get("s_churn", 0.0),
        churn_min=options.get("s_tmin", 0.0),
        churn_max=options.get("s_tmax", math.inf),
        noise_scale=options.get("s_noise", 1.0),
    )


def _multistep(config, options):
    sde = config.algorithm_type.startswith("sde")
    return partial(
        dpmpp,
        order=config.solver_order,
        eta=1.0 if sde else 0.0,
        solver=config.solver_type,
        lower_order_final=config.lower_order_final,
        euler_at_final=config.euler_at_final,
    )


def _plain(rows):
    return lambda config, options: rows


_PLUS_PLUS = ("algorithm_type", ("dpmsolver++", "sde-dpmsolver++"))
TABLES = {
    "DDIMScheduler": Kind(
        partial(_on_times, strides=True),
        lambda config, options: partial(
            ddim, eta=options.get("eta", 0.0), clipped_epsilon=options.get("use_clipped_model_output", False)
        ),
    ),
    "DDPMScheduler": Kind(
        partial(_on_times, final=1.0),
        lambda config, options: partial(ddpm, variance=config.variance_type.split("_")[1]),
        only=(("variance_type", ("fixed_small", "fixed_large", "fixed_small_log")),),
    ),
    "PNDMScheduler": Kind(_pndm_path, _pndm_rows, step_of=_pndm_step_of),
    "LCMScheduler": Kind(
        _on_times,
        lambda config, options: partial(lcm, timestep_scaling=config.timestep_scaling),
        original=lambda config, t: boundary(config.timestep_scaling * t),
        returns_original=True,
    ),
    "TCDScheduler": Kind(
        lambda scheduler: _on_times(scheduler, final=float(scheduler.alphas_cumprod[0])),
        lambda config, options: partial(tcd, eta=options.get("eta", 0.3)),
        clips=False,
    ),
    "EulerDiscreteScheduler": Kind(_exploding, _churned, scaled=True),
    "EulerAncestralDiscreteScheduler": Kind(_exploding, _plain(euler_ancestral), scaled=True),
    "HeunDiscreteScheduler": Kind(partial(_exploding, evaluations=2), _plain(heun), scaled=True, evaluations=2),
    "KDPM2DiscreteScheduler": Kind(partial(_exploding, evaluations=2), _plain(dpm_2), scaled=True, evaluations=2),
    "KDPM2AncestralDiscreteScheduler": Kind(
        partial(_exploding, evaluations=2), _plain(dpm_2_ancestral), scaled=True, evaluations=2
    ),
    "DPMSolverSDEScheduler": Kind(  # without compat: the noise of its two stages goes together, as its Brownian tree's
        partial(_exploding, evaluations=2, compat=False),
        lambda config, options: partial(dpmpp_sde, noise_scale=options.get("s_noise", 1.0)),
        scaled=True,
        evaluations=2,
    ),
    "LMSDiscreteScheduler": Kind(
        _exploding, lambda config, options: partial(lms, order=options.get("order", 4)), scaled=True
    ),
    "DPMSolverMultistepScheduler": Kind(_preserving, _multistep, only=(_PLUS_PLUS, ("variance_type", (None,)))),
    "DEISMultistepScheduler": Kind(
        _preserving,
        lambda config, options: partial(deis, order=config.solver_order, lower_order_final=config.lower_order_final),
    ),
    "UniPCMultistepScheduler": Kind(
        _preserving,
        lambda config, options: partial(
            unipc,
            order=config.solver_order,
            solver=config.solver_type,
            lower_order_final=config.lower_order_final,
            uncorrected=tuple(config.disable_corrector),
        ),
        only=(("predict_x0", (True,)), ("solver_p", (None,))),
    ),
    "SASolverScheduler": Kind(
        _preserving,
        lambda config, options: partial(
            sa_solver,
            order=config.predictor_order,
            corrector_order=config.corrector_order,
            lower_order_final=config.lower_order_final,
            **({} if config.tau_func is None else {"tau": config.tau_func}),
        ),
        only=(("algorithm_type", ("data_prediction",)),),
        always_draws=True,
    ),
    "EDMEulerScheduler": Kind(_edm, _churned, scaled=True),
    "EDMDPMSolverMultistepScheduler": Kind(_edm, _multistep, only=(_PLUS_PLUS,), scaled=True),
    "FlowMatchEulerDiscreteScheduler": Kind(
        _straight, lambda config, options: partial(flow_euler, stochastic=config.stochastic_sampling)
    ),
    "FlowMatchHeunDiscreteScheduler": Kind(partial(_straight, evaluations=2), _plain(flow_heun), evaluations=2),
}
