"""Every sampler against the diffusers scheduler of its name, over the whole trajectory, with the same noise.

In float64 against diffusers run in double only a wrong formula shows: 1e-8. Where diffusers' own formula loses more
than that to rounding, fifty digits take its place. In float32 the table may lose 2e-5 of that.
A covering part of the option mixes runs by default, all of them with `-m slow`.
"""

import itertools
import warnings
import zlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from imagegen import ops, samplers
from imagegen.samplers import Schedule

pytest.importorskip("diffusers", reason="the reference of these tests")
import diffusers_oracle as oracle
import exact_oracle

STEPS = (1, 2, 4, 20, 50)
DOUBLE, SINGLE = 1e-8, 2e-5
# What a state in float32 loses, on four grids: where few elements decide, one grid may happen to suit them.
GRIDS = [lambda t, unit=unit: (t / unit).float().double() * unit for unit in (1.0, 0.83, 0.67, 0.59)]


@dataclass
class Case:
    """One mix of options in diffusers' words and in ours."""

    label: str
    stem: str
    cls: str
    config: dict
    name: str
    schedule: object
    ours: dict
    call: dict = field(default_factory=dict)
    hard: bool = False  # zero SNR, where float32 loses digits: held in float64 alone
    set_timesteps: dict = field(default_factory=dict)  # in place of a number of steps
    begin: int = 0  # the timestep to start from


BETAS = {
    "linear": ({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}, Schedule.linear),
    "scaled_linear": (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        Schedule.scaled_linear,
    ),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, Schedule.cosine),
}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
SIGMAS = {
    None: {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}
CLIP = ({"clip": 1.0}, {"clip_sample": True})
THRESHOLD = (
    {"threshold": 0.9, "clip": 1.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
)
UNCLIPPED = ({}, {})
FINALS = {final: {"final_sigmas_type": final} for final in ("zero", "sigma_min")}


def mixes(
    stem,
    cls,
    name,
    *,
    betas=BETAS,
    predictions=PREDICTIONS,
    spacings=("trailing", "leading", "linspace"),
    sigmas=(None,),
    zero_snr=(False,),
    clips=(UNCLIPPED,),
    finals=({"final": "zero"}, {}),
    options=(({}, {}),),
    steps=STEPS,
    call=(({}, {}),),
):
    """Cases of every combination; options, clips, call are pairs (ours, theirs), call's theirs going to `step`."""
    finals = [finals] if isinstance(finals, tuple) else finals
    for beta, p, spacing, s, zero, clip, final, option, c, n in itertools.product(
        betas, predictions, spacings, sigmas, zero_snr, clips, finals, options, call, steps
    ):
        offset = 1 if spacing == "leading" else 0
        theirs = {**BETAS[beta][0], "prediction_type": PREDICTIONS[p], **clip[1], **final[1], **option[1], **SIGMAS[s]}
        theirs |= {"timestep_spacing": spacing, "steps_offset": offset}
        if len(zero_snr) > 1:
            theirs["rescale_betas_zero_snr"] = zero
        ours = {"steps": n, "prediction": p, "spacing": spacing, "offset": offset, "sigmas": s, "compat": "diffusers"}
        label = f"{name}-{beta}-{p}-{spacing}-{s}-{zero=}-{clip[0]}-{final[0]}-{option[0]}-{c[0]}-{n}"
        schedule = BETAS[beta][1](zero_snr=zero)
        ours |= {**clip[0], **final[0], **option[0], **c[0]}
        yield Case(label, stem, cls, theirs, name, schedule, ours, c[1], zero)


def ddim():
    call = [
        ({"eta": eta, "clipped_epsilon": use}, {"eta": eta, "use_clipped_model_output": use})
        for eta, use in ((0.0, False), (0.7, False), (1.0, True))
    ]
    unclipped = ({}, {"clip_sample": False})
    threshold = (THRESHOLD[0], THRESHOLD[1] | {"clip_sample": False})
    finals = [({"final": "zero"}, {}), ({"final": "sigma_min"}, {"set_alpha_to_one": False})]
    yield from mixes(
        "ddim",
        "DDIMScheduler",
        "ddim",
        zero_snr=(False, True),
        clips=(unclipped, CLIP, threshold),
        call=call,
        finals=finals,
    )
    yield from mixes(
        "ddim_inverse",
        "DDIMInverseScheduler",
        "ddim_inverse",
        spacings=("trailing", "leading"),
        predictions=("epsilon", "v"),
        clips=(unclipped,),
    )


def ddpm():
    unclipped = ({}, {"clip_sample": False})
    threshold = (THRESHOLD[0], THRESHOLD[1] | {"clip_sample": False})
    options = [({"variance": v}, {"variance_type": f"fixed_{v}"}) for v in ("small", "large")]
    yield from mixes(
        "ddpm", "DDPMScheduler", "ddpm", zero_snr=(False, True), clips=(unclipped, CLIP, threshold), options=options
    )


def euler():
    finals = [({"final": f}, FINALS[f]) for f in FINALS]
    churn = [({}, {}), ({"churn": 5.0, "noise_scale": 1.003}, {"s_churn": 5.0, "s_noise": 1.003})]
    yield from mixes(
        "euler_discrete",
        "EulerDiscreteScheduler",
        "euler",
        sigmas=SIGMAS,
        zero_snr=(False, True),
        finals=finals,
        call=churn,
    )
    yield from mixes(
        "euler_ancestral_discrete",
        "EulerAncestralDiscreteScheduler",
        "euler_ancestral",
        predictions=("epsilon", "v"),
        zero_snr=(False, True),
    )


def karras_samplers():
    yield from mixes("heun_discrete", "HeunDiscreteScheduler", "heun", sigmas=SIGMAS, clips=(UNCLIPPED, CLIP))
    yield from mixes("lms_discrete", "LMSDiscreteScheduler", "lms", sigmas=SIGMAS)
    more = {"sigmas": SIGMAS, "predictions": ("epsilon", "v")}
    yield from mixes("k_dpm_2_discrete", "KDPM2DiscreteScheduler", "dpm_2", **more)
    yield from mixes("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler", "dpm_2_ancestral", **more)
    yield from mixes("dpmsolver_sde", "DPMSolverSDEScheduler", "dpmpp_sde", **more)


def pndm():
    finals = [({"final": "sigma_min"}, {}), ({"final": "zero"}, {"set_alpha_to_one": True})]
    for warmup, steps in (("repeat", STEPS), ("runge_kutta", (4, 20, 50))):
        options = [({"warmup": warmup}, {"skip_prk_steps": warmup == "repeat"})]
        yield from mixes(
            "pndm", "PNDMScheduler", "pndm", predictions=("epsilon", "v"), finals=finals, options=options, steps=steps
        )
    for n in STEPS:
        ours = {"steps": n, "prediction": "v", "compat": "diffusers"}
        yield Case(f"ipndm-{n}", "ipndm", "IPNDMScheduler", {}, "ipndm", Schedule.angular(), ours)


def _flow_of(stem, cls, name, options, finals, flow_sigmas=True):
    for shift, option, final, n in itertools.product((1.0, 3.0), options, finals, STEPS):
        config = dict(
            use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction", **option[1], **final[1]
        )
        ours = dict(steps=n, prediction="flow", compat="diffusers", **option[0], **final[0])
        label = f"{name}-flow-{shift}-{option[0]}-{final[0]}-{n}"
        yield Case(label, stem, cls, config, name, Schedule.flow(shift), ours, hard=True)


def dpmpp():
    finals = [({"final": f}, FINALS[f]) for f in FINALS]
    scheduler = ("dpmsolver_multistep", "DPMSolverMultistepScheduler")
    for kind, name, orders in (
        ("dpmsolver++", "dpmpp_2m", (1, 2, 3)),
        ("sde-dpmsolver++", "dpmpp_2m_sde", (1, 2)),
        ("sde-dpmsolver++", "dpmpp_3m_sde", (3,)),
    ):
        options = []
        for order, solver, last, settle in itertools.product(
            orders, ("midpoint", "heun"), (False, True), (True, False)
        ):
            ours = {"order": order, "solver": solver, "euler_at_final": last, "lower_order_final": settle}
            theirs = {"solver_order": order, "solver_type": solver, "euler_at_final": last, "lower_order_final": settle}
            options.append((ours, theirs | {"algorithm_type": kind}))
        more = {"sigmas": SIGMAS, "zero_snr": (False, True), "clips": (UNCLIPPED, THRESHOLD), "finals": finals}
        yield from mixes(*scheduler, name, **more, options=options[:1])
        yield from mixes(*scheduler, name, sigmas=SIGMAS, finals=finals, options=options[1:], predictions=("epsilon",))
        yield from _flow_of(*scheduler, name, options, finals)


def deis():
    options = [
        ({"order": o, "lower_order_final": l}, {"solver_order": o, "lower_order_final": l})
        for o in (1, 2, 3)
        for l in (True, False)
    ]
    finals = ({"final": "sigma_min"}, {})
    scheduler = ("deis_multistep", "DEISMultistepScheduler", "deis")
    yield from mixes(*scheduler, sigmas=SIGMAS, clips=(UNCLIPPED, THRESHOLD), finals=finals, options=options)
    yield from _flow_of(*scheduler, options, [finals])


def unipc():
    options = [
        (
            {"order": o, "solver": b, "uncorrected": u},
            {"solver_order": o, "solver_type": b, "disable_corrector": list(u)},
        )
        for o, b, u in itertools.product((2, 1, 3), ("bh2", "bh1"), ((), (0, 1)))
    ]
    scheduler = ("unipc_multistep", "UniPCMultistepScheduler", "unipc")
    finals = [({"final": f}, FINALS[f]) for f in FINALS]
    clips = (UNCLIPPED, THRESHOLD)
    yield from mixes(*scheduler, sigmas=SIGMAS, options=options[:1], clips=clips, finals=finals, zero_snr=(False, True))
    yield from mixes(*scheduler, sigmas=SIGMAS, options=options[1:], finals=finals, predictions=("epsilon",))
    yield from _flow_of(*scheduler, options, finals)


def sa_solver():
    options = [
        ({"order": p, "corrector_order": c}, {"predictor_order": p, "corrector_order": c})
        for p, c in ((1, 1), (2, 2), (3, 3), (3, 4), (2, 1))
    ]
    scheduler = ("sasolver", "SASolverScheduler", "sa_solver")
    finals = ({"final": "sigma_min"}, {})
    yield from mixes(*scheduler, sigmas=SIGMAS, options=options, finals=finals, clips=(UNCLIPPED, THRESHOLD))
    yield from _flow_of(*scheduler, options, [finals])


def consistency():
    unclipped = ({}, {"clip_sample": False})
    threshold = (THRESHOLD[0], THRESHOLD[1] | {"clip_sample": False})
    more = {"spacings": ("trailing",), "zero_snr": (False, True), "clips": (unclipped, CLIP, threshold)}
    yield from mixes("lcm", "LCMScheduler", "lcm", **more)
    call = [({"eta": eta}, {"eta": eta}) for eta in (0.0, 0.3, 1.0)]
    yield from mixes("tcd", "TCDScheduler", "tcd", **more, call=call, finals=({"final": "sigma_min"}, {}))


def edm():
    for p, sigmas, final, n in itertools.product(("epsilon", "v_prediction"), ("karras", "exponential"), FINALS, STEPS):
        config = dict(prediction_type=p, sigma_schedule=sigmas, **FINALS[final])
        ours = {
            "steps": n,
            "prediction": "edm" if p == "epsilon" else "edm_v",
            "sigmas": sigmas,
            "final": final,
            "compat": "diffusers",
        }
        label = f"{p}-{sigmas}-{final}-{n}"
        if (n, final) == (1, "sigma_min"):
            continue  # their last noise level is their first: nothing moves
        for churn in (0.0, 20.0):
            yield Case(
                f"edm_euler-{label}-{churn}",
                "edm_euler",
                "EDMEulerScheduler",
                config,
                "edm_euler",
                Schedule.edm(),
                ours | {"churn": churn},
                {"s_churn": churn},
            )
        for order, (eta, kind), solver, clip in itertools.product(
            (1, 2, 3), ((0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")), ("midpoint", "heun"), (UNCLIPPED, THRESHOLD)
        ):
            if order == 3 and eta:
                continue  # diffusers has no such update for EDM
            theirs = config | {"solver_order": order, "algorithm_type": kind, "solver_type": solver} | clip[1]
            mine = ours | {"order": order, "eta": eta, "solver": solver} | clip[0]
            yield Case(
                f"edm_dpmpp-{label}-{order}-{kind}-{solver}-{clip[0]}",
                "edm_dpmsolver_multistep",
                "EDMDPMSolverMultistepScheduler",
                theirs,
                "edm_dpmpp_2m",
                Schedule.edm(),
                mine,
            )


def flow():
    for shift, n in itertools.product((1.0, 3.0), STEPS):
        ours = {"steps": n, "spacing": "linspace", "compat": "diffusers"}
        for sigmas, stochastic in itertools.product(SIGMAS, (False, True)):
            config = dict(shift=shift, stochastic_sampling=stochastic, **SIGMAS[sigmas])
            yield Case(
                f"flow_euler-{shift}-{sigmas}-{stochastic}-{n}",
                "flow_match_euler_discrete",
                "FlowMatchEulerDiscreteScheduler",
                config,
                "flow_euler",
                Schedule.flow(shift),
                ours | {"sigmas": sigmas, "stochastic": stochastic},
            )
        yield Case(
            f"flow_heun-{shift}-{n}",
            "flow_match_heun_discrete",
            "FlowMatchHeunDiscreteScheduler",
            {"shift": shift},
            "flow_heun",
            Schedule.flow(shift),
            ours,
        )


AYS_TIMES = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # Sabour et al., "Align Your Steps", 2024
AYS_SIGMAS = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152]


def lists():
    config, schedule = BETAS["scaled_linear"]
    for stem, cls, name in (
        ("euler_discrete", "EulerDiscreteScheduler", "euler"),
        ("heun_discrete", "HeunDiscreteScheduler", "heun"),
        ("dpmsolver_multistep", "DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("ddpm", "DDPMScheduler", "ddpm"),
    ):
        theirs = config | ({"clip_sample": False} if name == "ddpm" else {})
        ours = {"spacing": AYS_TIMES, "compat": "diffusers"}
        yield Case(f"{name}-times", stem, cls, theirs, name, schedule(), ours, set_timesteps={"timesteps": AYS_TIMES})
    for p in ("epsilon", "v"):
        ours = {"sigmas": AYS_SIGMAS, "prediction": p, "compat": "diffusers"}
        given = {"sigmas": [*AYS_SIGMAS, 0.0]}
        theirs = config | {"prediction_type": PREDICTIONS[p]}
        yield Case(
            f"euler-sigmas-{p}", "euler_discrete", "EulerDiscreteScheduler", theirs, "euler", schedule(), ours,
            set_timesteps=given,
        )  # fmt: skip
    given = {"sigmas": [1.0, 0.9, 0.5, 0.1]}
    yield Case(
        "flow-sigmas", "flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler", {}, "flow_euler",
        Schedule.flow(), given, set_timesteps=given,
    )  # fmt: skip


def started_in_the_middle():
    """Of 20 steps the last 12."""
    for stem, cls, name, per_step in (
        ("euler_discrete", "EulerDiscreteScheduler", "euler", 1),
        ("euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", "euler_ancestral", 1),
        ("heun_discrete", "HeunDiscreteScheduler", "heun", 2),
        ("k_dpm_2_discrete", "KDPM2DiscreteScheduler", "dpm_2", 2),
        ("lms_discrete", "LMSDiscreteScheduler", "lms", 1),
        ("dpmsolver_multistep", "DPMSolverMultistepScheduler", "dpmpp_2m", 1),
        ("deis_multistep", "DEISMultistepScheduler", "deis", 1),
        ("unipc_multistep", "UniPCMultistepScheduler", "unipc", 1),
        ("sasolver", "SASolverScheduler", "sa_solver", 1),
        ("ddim", "DDIMScheduler", "ddim", 1),
    ):
        finals = {"final": "sigma_min"} if name in ("deis", "sa_solver") else {}
        clip = {"clip_sample": False} if name == "ddim" else {}
        for beta in ("scaled_linear", "cosine"):
            config, schedule = BETAS[beta]
            config = config | clip | {"timestep_spacing": "trailing"}
            ours = {"steps": 20, "start_at": 0.6, "compat": "diffusers"} | finals
            yield Case(f"{name}-{beta}", stem, cls, config, name, schedule(), ours, begin=8 * per_step)


FAMILIES = (
    ddim,
    ddpm,
    euler,
    karras_samplers,
    pndm,
    dpmpp,
    deis,
    unipc,
    sa_solver,
    consistency,
    edm,
    flow,
    lists,
    started_in_the_middle,
)


def relative(a, b):
    return float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-9))


def run(sampler, dtype, keep=lambda t: t):
    """x after every row, from the oracle's noise; keep(t) is what memory makes of outputs and states."""
    x, states, slots = oracle.X.to(dtype) * sampler.init_sigma, [], [None] * sampler.slots
    scale = sampler.input_scale
    for i, row in enumerate(sampler.table):
        output = keep(oracle.model(keep(scale * x), row[0]))
        x, stored, _ = ops.sampler_step(
            x,
            output,
            row,
            slots=slots,
            noise=oracle.NOISE[i].to(dtype),
            backend="eager",
            clip=sampler.clip,
            threshold=sampler.threshold,
        )
        x = keep(x)
        if stored is not None:
            slots[int(row[sampler.columns.index("slot")])] = keep(stored)
        scale = row[1]
        states.append(x)
    return torch.stack(states)


def check(case):
    """None, or what differs."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            theirs, times, init = oracle.trajectory(
                case.stem,
                case.cls,
                case.config,
                None if case.set_timesteps else case.ours["steps"],
                set_timesteps=case.set_timesteps,
                begin=case.begin,
                **case.call,
            )
        except Exception:
            return "refused"  # by diffusers
    if not theirs.isfinite().all():
        return "refused"
    try:
        sampler = samplers.create(case.name, case.schedule, **case.ours)
    except ValueError as error:
        return "refused" if "not finite" in str(error) or "zero SNR" in str(error) else repr(error)
    if case.name in ANCESTRAL and _loses_sigma_down(sampler.path):
        return "refused"
    if len(times) != len(sampler.timesteps) or abs(sampler.timesteps - times).max() > 1e-6:
        return f"times {sampler.timesteps[:4]} … and {times[:4]} …"
    if abs(sampler.init_sigma - init) > 1e-9 * init:
        return f"init_sigma {sampler.init_sigma} and {init}"
    states = run(sampler, torch.float64)
    if not (error := max(map(relative, states, theirs))) <= DOUBLE:
        # One of the two lost digits: fifty of them say which.
        exact = exact_oracle.trajectory(sampler, case.ours)
        if exact is None or not max(map(relative, states, exact)) <= DOUBLE:
            return f"float64 error {error:.1e}"
        theirs = exact
    if case.hard:
        return None
    if not (error := relative(run(sampler, torch.float32)[-1], theirs[-1])) <= SINGLE:
        # Few steps and high orders weigh what is rounded: no float32 state can do better than one rounded alone.
        forced = max(relative(run(sampler, torch.float64, keep=grid)[-1], theirs[-1]) for grid in GRIDS)
        # A step rounds up to sixteen products and sums where this rounds x and the outputs once.
        if not error <= 16 * forced:
            return f"float32 error {error:.1e}, of which rounding the state forces {forced:.1e}"
    return None


ANCESTRAL = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_sde")


def _loses_sigma_down(path):
    """Whether diffusers' sqrt(sigma'^2 - sigma_up^2), which is sigma'^2 / sigma, is half rounding."""
    return any(to.sigma and 2**-53 * (here.sigma / to.sigma) ** 2 > 1e-8 for here, to in path.jumps())


def verify(cases):
    outcomes = {case.label: check(case) for case in cases}
    wrong = {label: why for label, why in outcomes.items() if why not in (None, "refused")}
    shown = "\n".join(f"{label}: {why}" for label, why in list(wrong.items())[:40])
    assert not wrong, f"{len(wrong)} of {len(outcomes)} differ:\n{shown}"
    checked = sum(why is None for why in outcomes.values())
    assert checked > 0.6 * len(outcomes), f"diffusers accepts only {checked} of {len(outcomes)}"


def covering(cases):
    """The first case, in an order of no meaning, to show each pair of options of a sampler."""
    seen = set()
    for case in sorted(cases, key=lambda case: zlib.crc32(case.label.encode())):
        options = [f"{k}={v}" for k, v in {"schedule": case.schedule, **case.ours, **case.call}.items()]
        width = 1 if case.name.startswith("dpm_2") else 2  # their constructor takes half a second
        pairs = {(case.name, *pair) for pair in itertools.combinations(options, width)}
        if pairs - seen:
            seen |= pairs
            yield case


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_pair_of_options(family):
    verify(covering(family()))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_mix(family):
    verify(family())


LOSSES = {
    # sqrt(1 - alpha'^2 - std^2) is the root of a rounding error where std is the whole noise
    "ddim": "ddim-scaled_linear-v-trailing-None-zero=True-{}-{'final': 'zero'}-{}-"
    "{'eta': 1.0, 'clipped_epsilon': True}-20",
    # x + (sigma' - sigma) epsilon leaves x_1 the rounding of x, which is 24,000 times as large
    "heun": "heun-cosine-sample-linspace-beta-zero=False-{'clip': 1.0}-{'final': 'zero'}-{}-{}-2",
    # the weights of three epsilons, each much larger than their sum
    "deis": "deis-cosine-v-trailing-beta-zero=False-{}-{'final': 'sigma_min'}-"
    "{'order': 3, 'lower_order_final': True}-{}-20",
    # powers of lambda itself, where ours are of lambda - lambda': the small weights of close points cancel
    "sa_solver": "sa_solver-cosine-epsilon-trailing-beta-zero=False-{}-{'final': 'sigma_min'}-"
    "{'order': 3, 'corrector_order': 4}-{}-50",
}


@pytest.mark.parametrize("family", (ddim, karras_samplers, deis, sa_solver), ids=LOSSES)
def test_where_diffusers_in_double_loses_digits(family):
    """Ours keeps to fifty digits at least a hundred times as well."""
    case = next(case for case in family() if case.label in LOSSES.values())
    theirs, _, _ = oracle.trajectory(case.stem, case.cls, case.config, case.ours["steps"], **case.call)
    sampler = samplers.create(case.name, case.schedule, **case.ours)
    exact = exact_oracle.trajectory(sampler, case.ours)
    ours = max(map(relative, run(sampler, torch.float64), exact))
    assert ours < 1e-9
    assert max(map(relative, theirs, exact)) > 100 * ours
