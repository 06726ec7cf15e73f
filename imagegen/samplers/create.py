"""Samplers by name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from .consistency import lcm, tcd
from .ddim import ddim, ddim_inverse
from .ddpm import ddpm
from .deis import deis
from .dpm_2 import dpm_2, dpm_2_ancestral
from .dpmpp import dpmpp
from .dpmpp_singlestep import dpmpp_2s_ancestral, dpmpp_sde
from .euler import euler, euler_ancestral
from .flow import flow_euler, flow_heun
from .heun import heun
from .lms import lms
from .path import (
    EDM_PREDICTIONS,
    PREDICTIONS,
    Grid,
    discrete_path,
    distilled_path,
    exploding_path,
    inverse_path,
    preserving_path,
    straight_path,
)
from .pndm import ipndm, pndm
from .sa_solver import sa_solver
from .sampler import Sampler
from .schedule import AngularSchedule, EDMSchedule, FlowSchedule, Schedule
from .spacing import SIGMAS, SPACINGS
from .unipc import unipc


@dataclass(frozen=True)
class Kind:
    """How one name is built: rows(path, **options) along path(grid), on these kinds of schedule.

    faults: those of diffusers' grid for this sampler (see `path.Grid`), in force with compat="diffusers".
    """

    rows: Callable
    path: Callable
    schedules: tuple = (Schedule,)
    faults: frozenset = frozenset()


def _on_times(rows, path=discrete_path, schedules=(Schedule,), faults=("strides",)):
    return Kind(rows, path, schedules, frozenset(faults))


def _exploding(rows, schedules=(Schedule, EDMSchedule), faults=()):
    return Kind(rows, exploding_path, schedules, frozenset(faults))


def _preserving(rows, schedules=(Schedule, FlowSchedule, EDMSchedule), faults=("rounds_karras", "truncates")):
    return Kind(rows, preserving_path, schedules, frozenset(faults))


_MULTISTEP_FAULTS = ("rounds_karras", "truncates", "spares_cosine")
_REPEATS = ("rounds_karras", "truncates", "repeats_end")

SAMPLERS = {
    "ddpm": _on_times(ddpm, schedules=(Schedule, AngularSchedule), faults=()),
    "ddim": _on_times(ddim, schedules=(Schedule, AngularSchedule)),
    "ddim_inverse": _on_times(ddim_inverse, inverse_path),
    "euler": _exploding(euler),
    "euler_ancestral": _exploding(euler_ancestral),
    "heun": _exploding(heun),
    "dpm_2": _exploding(dpm_2, faults=("rounds_karras",)),
    "dpm_2_ancestral": _exploding(dpm_2_ancestral, faults=("rounds_karras",)),
    "lms": _exploding(lms),
    "pndm": _on_times(pndm),
    "ipndm": _on_times(ipndm, schedules=(Schedule, AngularSchedule), faults=()),
    "deis": _preserving(deis, faults=_REPEATS),
    "dpmpp_2m": _preserving(partial(dpmpp, order=2), faults=_MULTISTEP_FAULTS),
    "dpmpp_2m_sde": _preserving(partial(dpmpp, order=2, eta=1.0), faults=_MULTISTEP_FAULTS),
    "dpmpp_3m_sde": _preserving(partial(dpmpp, order=3, eta=1.0), faults=_MULTISTEP_FAULTS),
    "dpmpp_2s_ancestral": _exploding(dpmpp_2s_ancestral),
    "dpmpp_sde": _exploding(dpmpp_sde),
    "unipc": _preserving(unipc, faults=(*_REPEATS, "nudges_start")),
    "sa_solver": _preserving(sa_solver, faults=_REPEATS),
    "lcm": _on_times(lcm, distilled_path, faults=()),
    "tcd": _on_times(tcd, distilled_path, faults=("ignores_clip",)),
    "flow_euler": Kind(flow_euler, straight_path, (FlowSchedule,)),
    "flow_heun": Kind(flow_heun, straight_path, (FlowSchedule,)),
    "edm_euler": _exploding(euler, (EDMSchedule,)),
    "edm_dpmpp_2m": _preserving(partial(dpmpp, order=2), (EDMSchedule,)),
}

_SCHEDULE_NAMES = {
    Schedule: "a discrete Schedule",
    FlowSchedule: "Schedule.flow(…)",
    EDMSchedule: "Schedule.edm(…)",
    AngularSchedule: "Schedule.angular()",
}


def create(
    name,
    schedule,
    *,
    steps=None,
    prediction=None,
    spacing="trailing",
    sigmas=None,
    offset=0,
    final="zero",
    guidance=None,
    rescale=0.0,
    clip=None,
    threshold=None,
    start_at=1.0,
    compat=None,
    **options,
):
    """The sampler `name` as a table of coefficients along a schedule.

    Args:
        name: one of `samplers.SAMPLERS`.
        schedule: a `Schedule`, the one the model was trained on.
        steps: how many steps to take; a sampler of two evaluations a step has 2 steps - 1 rows. None counts a list
            given as spacing or sigmas.
        prediction: what the model returns. "epsilon", "v" = (alpha epsilon - sigma x_0) / sqrt(alpha^2 + sigma^2),
            "sample" = x_0, "flow" = epsilon - x_0; on an EDM schedule "edm", the network inside Karras et al.'s
            preconditioning, or "edm_v", its negative. None is the schedule's own: "epsilon", "flow" or "edm".
        spacing: which times are visited: "trailing", "leading" (from `offset` up), "linspace", or a falling list.
        sigmas: the noise levels sigma/alpha (on a flow: sigma) between the first and last of these: "karras",
            "exponential" or "beta" (needs scipy), or a falling list of them. None takes those of the times. The ends
            are the whole schedule's for deis, dpmpp_2m(_sde), dpmpp_3m_sde, unipc and sa_solver.
        offset: added to "leading" times.
        final: where the last step leads: "zero", no noise, or "sigma_min", the least noise of training.
        guidance: weight g of the conditional output in m = g m_c + (1-g) m_u, a number or one per image (B,);
            None evaluates the model once per image (Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022).
        rescale: phi, how far the guided output takes on the conditional one's standard deviation (Lin et al., 2023).
        clip: x_0 is held within [-clip, clip]; None leaves it.
        threshold: x_0 is held within ±s and divided by s, the larger of 1 and this quantile of |x_0| per image, up to
            clip (Saharia et al., "Photorealistic Text-to-Image Diffusion …", 2022, section 2.3; they take 0.995).
        start_at: take the last start_at · steps steps alone, from an image with that much noise; see `samplers.sample`.
        compat: "diffusers" reproduces the known faults of its scheduler of that name.
        options: the sampler's own: eta, order, solver, noise_scale, …, as its function in this package documents.

    Returns: a `Sampler`.
    Raises: ValueError or TypeError that names the argument.
    """
    if name not in SAMPLERS:
        raise ValueError(f"create: name must be one of {', '.join(SAMPLERS)}, got {name!r}")
    kind = SAMPLERS[name]
    if not isinstance(schedule, kind.schedules):
        allowed = " or ".join(_SCHEDULE_NAMES[schedule] for schedule in kind.schedules)
        raise ValueError(f"create: schedule of {name!r} must be {allowed}, got {schedule!r}")
    _check_choice("compat", compat, (None, "diffusers"))
    _check_choice("final", final, ("zero", "sigma_min"))
    _check_bounds(clip, threshold, rescale)
    _check_options(name, kind.rows, options)
    faults = kind.faults if compat else frozenset()
    if "ignores_clip" in faults:
        clip = threshold = None
    grid = Grid(
        schedule,
        _count(steps, spacing, sigmas),
        _prediction(prediction, schedule),
        _listed("spacing", spacing, SPACINGS),
        _levels(name, kind, sigmas, spacing),
        offset,
        final,
        clipped=clip is not None or threshold is not None,
        compat=compat is not None,
        faults=faults,
    )
    build = partial(kind.rows, **options)
    sampler = Sampler.built(
        name, kind.path(grid), build, guidance=guidance, rescale=rescale, clip=clip, threshold=threshold
    )
    return sampler if start_at == 1 else sampler.starting_at(start_at)


def _check_choice(argument, value, choices):
    if value not in choices:
        raise ValueError(f"create: {argument} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _check_bounds(clip, threshold, rescale):
    if clip is not None and not clip > 0:
        raise ValueError(f"create: clip must be positive or None, got {clip}")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"create: threshold must be above 0 and at most 1, or None, got {threshold}")
    if threshold is not None and clip is not None and clip < 1:
        raise ValueError(f"create: clip must be at least 1 with threshold, got {clip}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"create: rescale must be from 0 to 1, got {rescale}")


def _check_options(name, rows, options):
    own = [p.name for p in inspect.signature(rows).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in own:
            has = f"its options are {', '.join(own)}" if own else "it has none"
            raise TypeError(f"create: {name!r} has no option {option!r}; {has}")


def _prediction(prediction, schedule):
    if isinstance(schedule, EDMSchedule):
        choices, own = EDM_PREDICTIONS, "edm"
    else:
        choices, own = PREDICTIONS, "flow" if isinstance(schedule, FlowSchedule) else "epsilon"
    prediction = own if prediction is None else prediction
    _check_choice("prediction", prediction, choices)
    return prediction


def _count(steps, spacing, sigmas):
    lists = {k: len(v) for k, v in {"spacing": spacing, "sigmas": sigmas}.items() if not isinstance(v, str | None)}
    if len(lists) > 1:
        raise ValueError("create: spacing and sigmas can't both be lists")
    for argument, length in lists.items():
        if steps is not None and steps != length:
            raise ValueError(f"create: steps must be the {length} of {argument} or None, got {steps}")
        return length
    if steps is None:
        raise ValueError("create: steps must be given unless spacing or sigmas is a list")
    if steps < 1:
        raise ValueError(f"create: steps must be at least 1, got {steps}")
    return steps


def _listed(argument, value, names):
    """A name, or a falling list as an array."""
    if isinstance(value, str):
        _check_choice(argument, value, names)
        return value
    value = np.asarray(value, np.float64)
    if value.ndim != 1 or not len(value) or not (np.diff(value) < 0).all() or not (value >= 0).all():
        raise ValueError(f"create: {argument} must be one of {', '.join(names)}, or fall to 0 or more, got {value}")
    return value


def _levels(name, kind, sigmas, spacing):
    if sigmas is None:
        return None
    if kind.path in (discrete_path, inverse_path, distilled_path):
        raise ValueError(f"create: sigmas must be None for {name!r}, which visits times; give spacing a list of them")
    if not isinstance(spacing, str):
        raise ValueError("create: sigmas must be None where spacing is a list")
    sigmas = _listed("sigmas", sigmas, SIGMAS)
    if not isinstance(sigmas, str) and sigmas[-1] == 0:
        raise ValueError("create: sigmas must end above 0; final says where the last step leads")
    return sigmas
