"""ops.attention with norms and rotation of q and k against its specification in float64."""

import pytest
import torch
from helpers import DTYPES, backends, check, check_error

from imagegen import _library, ops
from imagegen.ops import attention_rows, eager

BACKENDS = backends("attention")
needs_cpu = pytest.mark.skipif(not any(p.id == "cpu" and not p.marks for p in BACKENDS), reason="no cpu kernel")
EPS = 1e-5


def make(B, H, Hk, L, D, dtype=torch.float32, Lk=None, device="cpu"):
    """q, k, v, q_norm, k_norm."""
    rows = [2 * torch.randn(B, h, n, D, device=device) for h, n in ((H, L), (Hk, Lk or L), (Hk, Lk or L))]
    return [t.to(dtype) for t in (*rows, *(torch.rand(2, D, device=device) + 0.5))]


def angles(*shape, device="cpu"):
    theta = 3 * torch.randn(shape, device=device)
    return theta.cos(), theta.sin()


def ours(rotary=None, pairs="neighbours", mask=None, causal=False, backend=None):
    return lambda q, k, v, q_norm, k_norm: ops.attention(
        q,
        k,
        v,
        mask=mask,
        causal=causal,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=EPS,
        rotary=rotary,
        rotary_pairs=pairs,
        backend=backend,
    )


def reference(rotary=None, pairs="neighbours", mask=None, causal=False):
    def run(q, k, v, q_norm, k_norm):
        compute = torch.promote_types(q.dtype, torch.float32)
        q_norm, k_norm, cos, sin = (
            t if t is None else t.to(compute) for t in (q_norm, k_norm, *(rotary or [None] * 2))
        )
        how = cos, sin, EPS, pairs == "halves"
        q_rows, k_rows = eager.attention_rows(q, q_norm, *how), eager.attention_rows(k, k_norm, *how)
        return eager.attention(q_rows, k_rows, v, mask, causal, q.size(-1) ** -0.5).to(q.dtype)

    return run


def test_the_specification_is_what_it_says():
    """By torch's own norm, and by complex numbers: a pair turned by an angle is one multiplied by e^(i angle)."""
    x, norm, theta = torch.randn(2, 3, 5, 8).double(), torch.rand(8).double(), torch.randn(5, 4).double()
    torch.testing.assert_close(
        eager.attention_rows(x, norm, None, None, EPS, False), torch.nn.functional.rms_norm(x, (8,), norm, EPS)
    )
    turn = torch.polar(torch.ones_like(theta), theta)
    neighbours = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)
    torch.testing.assert_close(eager.attention_rows(x, None, theta.cos(), theta.sin(), EPS, False), neighbours)
    halves = torch.complex(x[..., :4], x[..., 4:]) * turn
    halves = torch.cat([halves.real, halves.imag], -1)
    torch.testing.assert_close(eager.attention_rows(x, None, theta.cos(), theta.sin(), EPS, True), halves)


@pytest.mark.parametrize("halves", [False, True], ids=attention_rows.PAIRS)
def test_rotates_as_diffusers_does(halves):
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="diffusers is not installed")
    x, (cos, sin) = torch.randn(2, 3, 5, 8), angles(5, 4)
    spread = (lambda t: torch.cat([t, t], -1)) if halves else (lambda t: t.repeat_interleave(2, -1))
    expected = embeddings.apply_rotary_emb(x, (spread(cos), spread(sin)), use_real_unbind_dim=-2 if halves else -1)
    torch.testing.assert_close(eager.attention_rows(x, None, cos, sin, EPS, halves), expected)


# (B, H, Hk, L, D): whole vectors and rests, several blocks of keys, shared heads, the least head dim.
SHAPES = [
    (2, 2, 2, 40, 64),
    (1, 4, 2, 65, 40),
    (2, 2, 1, 33, 72),
    (1, 1, 1, 230, 128),
    (2, 3, 1, 7, 2),
    (1, 1, 1, 20, 512),
]


@needs_cpu
@pytest.mark.parametrize("pairs", attention_rows.PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, pairs):
    rotary = angles(shape[3], shape[4] // 2)
    check(ours(rotary, pairs), reference(rotary, pairs), *make(*shape))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pairs", attention_rows.PAIRS)
def test_half_precision(pairs, dtype, backend, device):
    rotary = angles(65, 20, device=device)
    check(ours(rotary, pairs, backend=backend), reference(rotary, pairs), *make(2, 4, 2, 65, 40, dtype, device=device))


@needs_cpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("pairs", attention_rows.PAIRS)
def test_instruction_sets(capability, pairs, dtype):
    rotary = angles(71, 22)
    check(ours(rotary, pairs, causal=True), reference(rotary, pairs, causal=True), *make(2, 4, 2, 71, 44, dtype))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("with_q", [False, True], ids=["", "q_norm"])
@pytest.mark.parametrize("with_k", [False, True], ids=["", "k_norm"])
@pytest.mark.parametrize("with_rotary", [False, True], ids=["", "rotary"])
def test_each_alone(with_rotary, with_k, with_q, backend, device):
    q, k, v, q_norm, k_norm = make(1, 2, 2, 20, 24, device=device)
    rotary = angles(20, 12, device=device) if with_rotary else None
    tensors = q, k, v, q_norm if with_q else None, k_norm if with_k else None
    check(ours(rotary, backend=backend), reference(rotary), *tensors)


@needs_cpu
@pytest.mark.parametrize("shape", [(1, 2, 2, 50, 40), (1, 4, 2, 71, 64)], ids=str)
def test_norms_where_keys_are_not_the_queries(shape):
    check(ours(), reference(), *make(*shape, Lk=77))


# Of angles, against q (2, 4, 9, 8) and k (2, 4, 9, 8).
ROTARY = [(4,), (9, 4), (2, 1, 9, 4), (4, 9, 4), (2, 4, 9, 4), (1, 1, 1, 4)]


@needs_cpu
@pytest.mark.parametrize("shape", ROTARY, ids=str)
def test_rotations_that_broadcast(shape):
    rotary = angles(*shape)
    check(ours(rotary), reference(rotary), *make(2, 4, 4, 9, 8))


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_masks(dtype):
    """Rows out of a fused projection, a transposed table of angles, a weight with steps."""
    q, k, v, q_norm, k_norm = make(2, 3, 3, 35, 40, dtype)
    q, k, v = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2).permute(2, 0, 3, 1, 4)
    rotary = [t.mT for t in angles(20, 35)]
    mask = torch.rand(35, 35) < 0.8
    mask[:, 0] = True
    y = check(ours(rotary, mask=mask), reference(rotary, mask=mask), q, k, v, q_norm.repeat_interleave(2)[::2], k_norm)
    assert y.transpose(1, 2).is_contiguous()


@needs_cpu
def test_weights_of_another_dtype_and_steps_of_two():
    q, k, v, q_norm, k_norm = make(1, 2, 2, 9, 8, torch.bfloat16)
    expected = ours()(q, k, v, q_norm, k_norm)
    steps = lambda t: torch.stack([t, t * float("nan")], -1)[..., 0]  # noqa: E731
    assert torch.equal(ours()(steps(q), steps(k), v, q_norm.double(), k_norm.float()), expected)


@needs_cpu
def test_is_the_kernel_over_the_prepared_rows():
    """Bit for bit, so that the backward, which prepares them anew, sees the rows the forward saw."""
    for dtype in DTYPES:
        q, k, v, q_norm, k_norm = make(2, 2, 2, 300, 40, dtype)
        rotary = angles(300, 20)
        rows = [
            torch.ops.imagegen.attention_rows(x, norm.float(), *rotary, EPS, False)
            for x, norm in ((q, q_norm), (k, k_norm))
        ]
        assert torch.equal(ours(rotary)(q, k, v, q_norm, k_norm), ops.attention(*rows, v))


@needs_cpu
def test_same_bits_for_any_number_of_threads():
    tensors = [t.requires_grad_() for t in make(3, 4, 2, 200, 40)]
    rotary = angles(200, 20)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            y = ours(rotary)(*tensors)
            results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@needs_cpu
@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 8), (2, 0, 1, 3, 8), (2, 2, 2, 0, 8)], ids=str)
def test_empty(shape):
    tensors = [t.requires_grad_() for t in make(*shape)]
    y = ours(angles(shape[3], 4))(*tensors)
    assert y.shape == tensors[0].shape
    assert all(g.eq(0).all() for g in torch.autograd.grad(y.sum(), tensors))


@needs_cpu
@pytest.mark.parametrize("pairs", attention_rows.PAIRS)
def test_gradcheck(pairs):
    tensors = [t.requires_grad_() for t in make(2, 2, 1, 4, 4, torch.float64)]
    rotary = [t.double() for t in angles(4, 2)]
    assert torch.autograd.gradcheck(ours(rotary, pairs), tensors)
    assert torch.autograd.gradgradcheck(ours(rotary, pairs), tensors)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_angles_that_are_learned(backend, device):
    q, k, v, *_ = make(1, 2, 2, 4, 4, torch.float64, device=device)
    theta = torch.randn(4, 2, dtype=torch.float64, device=device, requires_grad=True)
    function = lambda theta: ops.attention(q, k, v, rotary=(theta.cos(), theta.sin()), backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, theta, fast_mode=backend == "triton")


@needs_cpu
@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "second"])
def test_one_gradient_at_a_time(create_graph, wanted):
    tensors = make(1, 2, 1, 9, 8, torch.float64)
    tensors[wanted].requires_grad_()
    rotary = [t.double() for t in angles(9, 4)]
    gradients = [
        torch.autograd.grad(f(rotary)(*tensors).square().sum(), tensors[wanted], create_graph=create_graph)[0]
        for f in (ours, reference)
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].requires_grad == create_graph


@needs_cpu
def test_opcheck():
    q, k, v, q_norm, k_norm = make(2, 4, 2, 9, 8)
    cos, sin = angles(9, 4)
    for norms in ((q_norm, k_norm), (None, k_norm)):
        leaves = [t if t is None else t.clone().requires_grad_() for t in (q, k, v, torch.randn(9, 9), *norms)]
        arguments = (*leaves, cos, sin, EPS, True, False, 0.3)
        torch.library.opcheck(torch.ops.imagegen.attention_over_rows.default, arguments)
    for norm in (q_norm, None):
        torch.library.opcheck(torch.ops.imagegen.attention_rows.default, (q, norm, cos, sin, EPS, True))
        arguments = (q.clone(), q, norm, cos, sin, EPS, False)
        torch.library.opcheck(torch.ops.imagegen.attention_rows_backward.default, arguments)


@needs_cpu
def test_compile():
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [t.requires_grad_() for t in make(2, 4, 2, 20, 16, dtype)]
        rotary = angles(20, 8)
        function = torch.compile(ours(rotary), fullgraph=True)
        y, expected = function(*tensors), ours(rotary)(*tensors)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        grad = torch.randn_like(y)
        for a, e in zip(*(torch.autograd.grad(t, tensors, grad) for t in (y, expected)), strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend, device", [*BACKENDS, pytest.param("eager", "cpu", id="eager")])
def test_autocast(backend, device):
    """Parameters stay in float32, q, k and v run in autocast's dtype."""
    q, k, v, q_norm, k_norm = make(1, 2, 2, 20, 16, device=device)
    leaf = q_norm.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = ours(angles(20, 8, device=device), backend=backend)(q, k, v, leaf, k_norm)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert leaf.grad.dtype == torch.float32 and leaf.grad.ne(0).any()


q, k, _, norm, _ = make(2, 6, 3, 10, 8)
cos, sin = angles(10, 4)
ERRORS = [
    (ValueError, "q_norm must have shape (8,), got (7,)", {"q_norm": norm[1:]}),
    (ValueError, "k_norm must have shape (8,), got (1, 8)", {"k_norm": norm[None]}),
    (ValueError, "norm_eps must be at least 0 and finite, got -1", {"q_norm": norm, "norm_eps": -1}),
    (ValueError, "norm_eps must be at least 0 and finite, got inf", {"q_norm": norm, "norm_eps": float("inf")}),
    (
        ValueError,
        "rotary must have shapes that broadcast to q's (B, H, L, D/2) = (2, 6, 10, 4), got (10, 8)",
        {"rotary": (torch.zeros(10, 8), sin)},
    ),
    (
        ValueError,
        "rotary must have shapes that broadcast to k's (B, H, L, D/2) = (2, 3, 10, 4), got (6, 10, 4)",
        {"rotary": angles(6, 10, 4)},
    ),
    (
        ValueError,
        "rotary must have shapes that broadcast to k's (B, H, L, D/2) = (2, 3, 12, 4), got (10, 4)",
        {"rotary": (cos, sin), "k": torch.zeros(2, 3, 12, 8)},
    ),
    (ValueError, "rotary must be a pair of one shape, got (10, 4) and (1, 4)", {"rotary": (cos, sin[:1])}),
    (
        ValueError,
        "rotary must be None where D is odd, got D = 7",
        {"rotary": (cos, sin), "q": q[..., 1:], "k": k[..., 1:]},
    ),
]


@pytest.mark.parametrize("error, message, change", ERRORS, ids=[m[:60] for _, m, _ in ERRORS])
def test_errors(error, message, change):
    a = {"q": q, "k": k, "q_norm": None, "k_norm": None, "norm_eps": 1e-6, "rotary": None} | change

    def operator():
        norms = a["q_norm"], a["k_norm"], *(a["rotary"] or (None, None))
        torch.ops.imagegen.attention_over_rows(a["q"], a["k"], a["k"], None, *norms, a["norm_eps"], False, False, 0.5)

    check_error(error, f"attention: {message}", lambda: ops.attention(v=a["k"], **a), operator if BACKENDS else None)


def test_errors_of_python_alone():
    for error, message, change in (
        (TypeError, "rotary must be a pair (cos, sin)", {"rotary": cos}),
        (TypeError, "q_norm must be float32, bfloat16, float16 or float64, got torch.int64", {"q_norm": norm.long()}),
        (TypeError, "rotary must be a tensor, got float", {"rotary": (1.0, 0.0)}),
        (ValueError, "q_norm must be on q's device cpu, got meta", {"q_norm": norm.to("meta")}),
        (
            ValueError,
            "rotary_pairs must be one of neighbours, halves, got 'quarters'",
            {"rotary": (cos, sin), "rotary_pairs": "quarters"},
        ),
    ):
        check_error(error, f"attention: {message}", lambda change=change: ops.attention(q, k, k, **change))


@pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
def test_operators_check_their_dtypes():
    for arguments, message in (
        ((q, norm.double(), None, None), "x_norm must be torch.float32, got torch.float64"),
        ((q, None, cos.double(), sin.double()), "rotary must be torch.float32, got torch.float64"),
        ((q, None, cos, None), "rotary must be a pair (cos, sin)"),
    ):
        with pytest.raises(RuntimeError) as raised:
            torch.ops.imagegen.attention_rows(*arguments, EPS, False)
        assert f"attention: {message}" in str(raised.value)
