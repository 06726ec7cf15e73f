"""What can be said of attention's GPU kernels without a GPU: values, races and bounds in the simulator; registers,
spills and matrix instructions of what the compilers make. test_attention.py runs them on a GPU where there is one."""

import itertools

import pytest
import torch
from cuda_sim import simulator
from helpers import DTYPES, check, relative_error
from triton_ahead_of_time import MATRIX, compile_kernel

from imagegen.ops import eager

# (B, H, Hk, Lq, Lk, D): each bucket of head dims, whole tiles and rests of queries, keys and head dim, shared heads.
SHAPES = [
    (1, 2, 1, 35, 77, 40),
    (1, 1, 1, 70, 70, 64),
    (2, 1, 1, 20, 45, 80),
    (1, 1, 1, 20, 40, 160),
    (1, 2, 2, 5, 3, 13),
    (1, 2, 1, 17, 35, 264),
]
MASKS = {
    "none": lambda B, H, Lq, Lk: None,
    "boolean": lambda B, H, Lq, Lk: torch.rand(B, 1, Lq, Lk) < 0.7,
    "keys": lambda B, H, Lq, Lk: torch.randn(B, 1, 1, Lk),
    "head": lambda B, H, Lq, Lk: torch.randn(H, Lq, Lk),
}


class Simulated(torch.autograd.Function):
    """The CUDA operators as the simulator runs them."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal, scale):
        out, lse = simulator.load("attention").attention(q, k, v, mask, causal, scale)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.options = causal, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[3]
        operator = simulator.load("attention").attention_backward
        dq, dk, dv, dmask = operator(grad, *ctx.saved_tensors, *ctx.options, needs)
        return dq, dk, dv, dmask if needs else None, None, None


def make(B, H, Hk, Lq, Lk, D, dtype, joined=False):
    def heads(h, length):
        return torch.randn(B, length, h, D).transpose(1, 2) if joined else torch.randn(B, h, length, D)

    return [heads(h, length).to(dtype) for h, length in ((H, Lq), (Hk, Lk), (Hk, Lk))]


def check_simulated(q, k, v, mask=None, causal=False, **options):
    scale = q.size(-1) ** -0.5
    return check(
        lambda *tensors: Simulated.apply(*tensors, causal, scale),
        lambda *tensors: eager.attention(*tensors, causal, scale),
        *(q, k, v, mask),
        **options,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_kernels_in_the_simulator(shape, dtype):
    q, k, v = make(*shape, dtype, joined=True)
    y = check_simulated(q, k, v, causal=shape[3] % 2 == 0)
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_kernels_mask_in_the_simulator(mask, dtype):
    shape = (2, 2, 1, 37, 45, 24)
    q, k, v = make(*shape, dtype)
    m = MASKS[mask](*shape[:2], *shape[3:5])
    if mask == "boolean":
        m[..., 0] = True
    check_simulated(q, k, v, m if mask != "head" else m.to(dtype), causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_kernels_mask_wide_heads_in_the_simulator(dtype):
    q, k, v = make(1, 2, 1, 5, 20, 300, dtype)
    check_simulated(q, k, v, torch.randn(2, 1, 20), causal=True)


def test_cuda_kernels_take_any_place_and_stride():
    q, k, v = make(1, 2, 2, 20, 30, 24, torch.bfloat16)
    expected = Simulated.apply(q, k, v, None, False, 0.2)
    larger = [torch.nn.functional.pad(t, (3, 4, 1, 1), value=float("nan"))[..., 1:-1, 3:-4] for t in (q, k, v)]
    assert torch.equal(Simulated.apply(*larger, None, False, 0.2), expected)
    stepping = [torch.stack([t, t * float("nan")], -1)[..., 0] for t in (q, k, v)]
    assert torch.equal(Simulated.apply(*stepping, None, False, 0.2), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_without_a_key_in_the_simulator(dtype):
    q, k, v = (t.requires_grad_() for t in make(1, 1, 1, 70, 66, 16, dtype))
    mask = torch.ones(70, 66, dtype=torch.bool)
    mask[7], mask[64:] = False, False
    y = Simulated.apply(q, k, v, mask, True, 0.25)  # the first four see nothing either
    hidden = torch.tensor([*range(4), 7, *range(64, 70)])
    assert y[:, :, hidden].eq(0).all() and y[:, :, 8].ne(0).any()
    y.float().square().sum().backward()
    assert q.grad[:, :, hidden].eq(0).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_least_float_as_a_mask_is_a_mean():
    """What others write for a hidden key: where all keys have it, their mean, as in eager PyTorch."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = make(1, 1, 1, 3, 40, 8, dtype)
        mask = torch.full((40,), torch.finfo(dtype).min, dtype=dtype)
        y = Simulated.apply(q, k, v, mask, False, 3.0)
        assert relative_error(y, v.double().mean(2, keepdim=True).expand(y.shape)) < 1e-2


def test_schedules_agree_to_the_bit(monkeypatch):
    """Whichever warp runs ahead and whenever a copy lands."""
    q, k, v = (t.requires_grad_() for t in make(1, 2, 1, 70, 100, 72, torch.bfloat16))
    mask = torch.randn(1, 100).requires_grad_()
    results = []
    for order, landing in itertools.product(("forward", "reverse", "random"), ("late", "early")):
        monkeypatch.setenv("SIM_ORDER", order)
        monkeypatch.setenv("SIM_ASYNC", landing)
        y = Simulated.apply(q, k, v, mask, True, 0.3)
        results.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v, mask))])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_what_the_cuda_kernels_do_not_take():
    q = torch.zeros(1, 1, 2, 8, dtype=torch.float64)
    message = "attention: the cuda kernel takes float32, bfloat16 or float16, q is torch.float64"
    with pytest.raises(RuntimeError, match=message):
        simulator.load("attention").attention(q, q, q, None, False, 1.0)


def sanitized_program(sanitizer):
    names = ("attention", "attention_sm90", "attention_backward")
    kernels = [simulator.ROOT / f"csrc/ops/cuda/{name}_kernel.cu" for name in names]
    return simulator.build_program([simulator.HERE / "attention_main.cpp", *kernels], sanitizer)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("head_dims", [(40, 72), pytest.param((160, 200, 264, 512), marks=pytest.mark.slow)], ids=str)
def test_sanitizers_find_nothing(sanitizer, dtype, head_dims):
    program = sanitized_program(sanitizer)
    for head_dim in head_dims:
        printed, said = simulator.run_program(program, dtype, head_dim, order="random")
        assert printed == "ran\n"
        assert simulator.found_nothing(said), said


# What a block may have of shared memory where Triton compiles for sm_80: what sm_86, sm_89 and sm_120 give.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}


def triton_tiles(kernel, architecture, D, *, Lk=4096, dtype="bf16", mask=None, causal=True):
    """The tiles that the host side chooses from."""
    from imagegen.ops.triton import attention_tiles as host

    size, capability = {"bf16": 2, "fp16": 2, "fp32": 4}[dtype], architecture // 10
    if kernel == "attention_kernel":
        whole = Lk <= host.WHOLE_KEYS and D <= host.WIDEST
        return host.forward_tiles(D, size, mask == "scores", whole, capability)
    return getattr(host, kernel.removeprefix("attention_").replace("_kernel", "_tiles"))(D, size, capability)


def triton_variant(kernel, architecture, D, tile, *, Lk=4096, dtype="bf16", mask=None, causal=True):
    """How the host side launches this kernel; mask: None, "keys" (boolean, one for all queries) or "scores"."""
    from imagegen.ops.triton import attention_tiles as host

    size, strides = {"bf16": 2, "fp16": 2, "fp32": 4}[dtype], ["i32"] * 3
    element = f"*{dtype}"
    signature = dict.fromkeys("qkv", element) | {f"{name}_strides": strides for name in "qkv"}
    signature |= {"mask_strides": ["i32"] * 4, "scale": "fp32"} | dict.fromkeys(("Lq", "Lk", "H", "group"), "i32")
    signature |= {"lse": "*fp32"}
    constants = {"BY_KEY": mask != "scores", "CAUSAL": causal, "VECTOR": 16 // size, "FAR": False}
    constants["PRECISION"] = "tf32x3" if dtype == "fp32" else "ieee"
    if mask is None:
        constants["mask"] = None
    else:
        signature |= {"mask": "*u8" if mask == "keys" else element, "mask_strides": ["i32"] * 3 + ["constexpr"]}
        constants["mask_strides.3"] = 1
    widest = host.WIDEST
    if kernel == "attention_kernel":
        whole = Lk <= host.WHOLE_KEYS and D <= host.WIDEST
        BN, N1 = host.pieces(Lk) if whole else (tile.columns, 0)
        signature |= {"out": element, "out_strides": strides}
        constants |= {"BM": tile.rows, "BN": BN, "N1": N1, "WHOLE": whole}
    else:
        signature |= {"grad": element, "grad_strides": strides, "delta": "*fp32"}
        if kernel == "attention_query_gradient_kernel":
            signature |= {"delta_of_p": "*fp32", "dq": element, "dq_strides": strides}
        elif kernel == "attention_key_gradient_kernel":
            widest = host.WIDEST_OF_KEYS
            signature |= {"dk": element, "dk_strides": strides, "dv": element, "dv_strides": strides}
        else:
            signature |= {"dmask": element, "dmask_strides": ["i32"] * 4, "sizes": ["i32"] * 4, "B": "i32"}
            constants |= {"SUM_QUERIES": False, "SUM_KEYS": False}
        constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns}
    constants |= host.head_pieces(D, size, widest)
    return {
        "signature": signature,
        "constants": constants,
        "divisible": [name for name, type in signature.items() if str(type).startswith("*") and name != "mask"],
        "options": {"num_warps": tile.warps, "num_stages": tile.stages},
        "architectures": [architecture],
    }


def check_ahead_of_time(kernel, cases):
    """cases: (architecture, D, options, tile); none may spill, all multiply by their architecture's instruction."""
    variants = [triton_variant(kernel, architecture, D, tile, **options) for architecture, D, options, tile in cases]
    module = "attention_backward_kernel" if kernel in GRADIENTS else kernel
    builds = [build for (build,) in compile_kernel(f"imagegen.ops.triton.{module}", kernel, variants)]
    for (architecture, D, options, tile), build in zip(cases, builds, strict=True):
        told = {name: build[name] for name in ("registers", "stack", "spills", "shared", "tensor_memory", "matrix")}
        build["case"] = f"sm_{architecture} D={D} {options} {tuple(tile)} {told}"
        build["limit"] = SHARED[architecture]
        print(kernel, build["case"])
    assert [b["case"] for b in builds if b["spills"] or b["stack"] or b["local"]] == [], "spills"
    assert [b["case"] for b in builds if [*b["matrix"]] != [MATRIX[b["architecture"]]]] == [], "matrix instructions"
    assert [b["case"] for b in builds if b["shared"] > b["limit"] or b["tensor_memory"] > 512] == [], "too large"


def with_tiles(kernel, cases, every=False):
    """The cases (architecture, D, options), each with the tile that is its first, or with every one."""
    pytest.importorskip("triton", reason="triton is not installed")
    for architecture, D, options in cases:
        tiles = triton_tiles(kernel, architecture, D, **options)
        yield from ((architecture, D, options, tile) for tile in (tiles if every else tiles[:1]))


GRADIENTS = [f"attention_{of}_gradient_kernel" for of in ("query", "key", "mask")]
HEAD_DIMS = (40, 64, 72, 80, 128, 160, 256, 512)
LONG, TEXT = {"mask": "keys"}, {"Lk": 77, "mask": "keys", "causal": False}


def test_pieces_that_triton_holds():
    """Two powers of two: of the head dims of image models, and of the keys of a text."""
    host = pytest.importorskip("imagegen.ops.triton.attention_tiles")
    expected = {40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 88: (64, 32), 128: (128, 0), 160: (128, 32)}
    for D, held in expected.items():
        assert host.head_pieces(D, 2, host.WIDEST) == {"D": D, "D0": held[0], "D1": held[1], "CHUNK": 0}
    assert host.head_pieces(512, 2, host.WIDEST) == {"D": 512, "D0": 256, "D1": 0, "CHUNK": 64}  # q is read again
    assert host.pieces(77) == (64, 16) and host.WHOLE_KEYS >= 77


def test_triton_forward_compiles_ahead_of_time():
    cases = itertools.product(SHARED, [D for D in HEAD_DIMS if D != 256], [LONG])
    short = itertools.product(SHARED, (40, 80), [TEXT])
    check_ahead_of_time("attention_kernel", [*with_tiles("attention_kernel", [*cases, *short])])


@pytest.mark.parametrize("kernel", GRADIENTS)
def test_triton_gradients_compile_ahead_of_time(kernel):
    check_ahead_of_time(kernel, [*with_tiles(kernel, [(80, 64, LONG), (90, 128, LONG), (100, 40, LONG)])])


@pytest.mark.slow
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("architecture", SHARED)
def test_every_triton_tile_of_the_forward(architecture, D):
    masks = [{}, LONG, {"mask": "scores"}, TEXT, TEXT | {"mask": "scores"}]
    cases = [(architecture, D, options) for options in masks]
    check_ahead_of_time("attention_kernel", [*with_tiles("attention_kernel", cases, every=True)])


@pytest.mark.slow
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("kernel", GRADIENTS)
def test_every_triton_tile_of_the_gradients(kernel, architecture, D):
    check_ahead_of_time(kernel, [*with_tiles(kernel, [(architecture, D, LONG)], every=True)])
