"""ops.attention against its specification in float64, on every backend that can run here."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, backends, check, check_error
from hypothesis import given, settings
from hypothesis import strategies as st

from imagegen import _library, ops
from imagegen.ops import eager

BACKENDS = backends("attention")
needs_library = pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))
needs_cpu = pytest.mark.skipif(not any(p.id == "cpu" and not p.marks for p in BACKENDS), reason="no cpu kernel")
# (B, H, Hk, Lq, Lk, D): the head dims of image models, text's 77 keys, whole vectors and rests of queries, keys and
# head dim, one query, one key, more queries than keys and fewer, shared heads.
SHAPES = [
    (2, 2, 2, 64, 64, 64),
    (1, 2, 2, 65, 77, 40),
    (2, 3, 1, 33, 129, 72),
    (1, 4, 2, 100, 31, 80),
    (1, 1, 1, 1, 200, 96),
    (1, 2, 2, 17, 1, 88),
    (1, 1, 1, 40, 50, 160),
    (1, 1, 1, 34, 33, 512),
    (3, 2, 1, 5, 7, 1),
    (2, 1, 1, 130, 260, 8),
    (1, 1, 1, 3, 3, 13),
]


def make(B, H, Hk, Lq, Lk, D, dtype=torch.float32, device="cpu"):
    return [torch.randn(B, h, n, D, device=device).to(dtype) for h, n in ((H, Lq), (Hk, Lk), (Hk, Lk))]


def reference(causal=False, scale=None):
    return lambda q, k, v, mask: eager.attention(q, k, v, mask, causal, scale or q.size(-1) ** -0.5)


def ours(causal=False, scale=None, backend=None):
    return lambda q, k, v, mask: ops.attention(q, k, v, mask=mask, causal=causal, scale=scale, backend=backend)


def check_all(q, k, v, mask=None, *, causal=False, scale=None, backend=None, **options):
    # The softmax of one key is constant: the gradients of q and k are exactly 0, and rounding is all there is to see.
    if options.get("gradients", True) and k.size(2) == 1:
        v = v.detach()
    return check(ours(causal, scale, backend), reference(causal, scale), q, k, v, mask, **options)


def boolean_mask(*shape, device="cpu"):
    """Random, and True for the first key: no query without a key."""
    mask = torch.rand(shape, device=device) < 0.7
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, causal, backend, device):
    q, k, v = make(*shape, device=device)
    check_all(q, k, v, causal=causal, backend=backend, gradients=shape[4] > 1)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] > 8], ids=str)
def test_half_precision(shape, dtype, causal, backend, device):
    q, k, v = make(*shape, dtype=dtype, device=device)
    check_all(q, k, v, causal=causal, backend=backend)


@needs_cpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_instruction_sets(capability, mask, dtype):
    q, k, v = make(2, 4, 2, 71, 150, 44, dtype=dtype)
    m = {None: None, "boolean": boolean_mask(2, 1, 71, 150), "additive": torch.randn(4, 71, 150).to(dtype)}[mask]
    check_all(q, k, v, m, causal=True, backend="cpu")


# Float and few keys, which fill their vectors: whole tiles of queries and rests, panels of unlike widths.
FEW_KEYS = [(2, 4, 2, 131, 77, 80), (1, 2, 2, 64, 16, 512), (1, 1, 1, 70, 160, 208), (3, 2, 1, 66, 31, 64)]


@needs_cpu
@pytest.mark.parametrize("kind", [None, "boolean", "additive"])
@pytest.mark.parametrize("shape", FEW_KEYS, ids=str)
def test_few_keys(capability, shape, kind):
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in make(*shape))
    mask = {None: None, "boolean": boolean_mask(*shape[3:5]), "additive": torch.randn(shape[3:5])}[kind]
    check_all(q, k, v, mask, backend="cpu")
    threads = torch.get_num_threads()
    y = ops.attention(q, k, v, mask=mask, backend="cpu")
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert torch.equal(y, ops.attention(q, k, v, mask=mask, backend="cpu"))
    finally:
        torch.set_num_threads(threads)


@needs_cpu
@pytest.mark.parametrize("Lk", [1, 14, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 77, 80, 96, 112, 144, 159, 160, 161])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks_of_few_keys(kind, Lk):
    """What is hidden has no say: every other element is as torch's, and gradients of rows that see nothing are 0."""
    q, k, v = (t.requires_grad_() for t in make(2, 4, 2, 67, Lk, 64))
    seen = boolean_mask(2, 4, 67, Lk)
    seen[0, :, 3], seen[1, 2, 60:], seen[:, :, 40, : Lk - 1] = False, False, False
    storage = torch.full((2, 4, 67, Lk + 5), float("nan"))  # beyond the rows of the mask
    storage[..., :Lk] = torch.zeros(()).where(seen, -torch.inf)
    mask = seen if kind == "boolean" else storage[..., :Lk]
    y = check_all(q, k, v, mask, backend="cpu", gradients=False)
    _, lse = torch.ops.imagegen.attention(q, k, v, mask, False, 0.125)
    nothing = ~seen.any(-1)
    assert y[nothing].eq(0).all() and torch.equal(lse == -torch.inf, nothing)
    (dq,) = torch.autograd.grad(ops.attention(q, k, v, mask=mask, backend="cpu").square().sum(), q)
    assert dq[nothing].eq(0).all() and dq.isfinite().all()


@needs_cpu
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_broadcast_masks_of_few_keys(kind):
    q, k, v = make(2, 4, 2, 67, 77, 64)
    shapes = [(77,), (2, 1, 1, 77), (67, 1), (67, 77), (4, 67, 77), (2, 1, 67, 77), (4, 1, 77), (1, 1, 1, 1), ()]
    for shape in shapes:
        mask = torch.rand(shape) < 0.7 if kind == "boolean" else torch.randn(shape)
        check_all(q, k, v, mask, backend="cpu", gradients=False)
    strided = torch.randn(2, 77, 67, 3)[..., 1].mT[:, None]
    check_all(q, k, v, strided > -0.5 if kind == "boolean" else strided, backend="cpu", gradients=False)


# What a mask of each shape is for, against q (2, 4, 37, D) and k (2, 4, 45, D).
MASKS = {
    "keys": (45,),
    "keys of each image": (2, 1, 1, 45),
    "queries": (37, 1),
    "scores": (37, 45),
    "scores of each head": (4, 37, 45),
    "scores of each image": (2, 1, 37, 45),
    "all": (2, 4, 37, 45),
    "one": (1, 1, 1, 1),
    "number": (),
}


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["boolean", "additive", "additive_half", "additive_float_beside_half"])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_masks(shape, kind, causal, backend, device):
    """Every shape a mask may broadcast from; the gradient of an additive one has that shape."""
    q, k, v = make(2, 4, 2, 37, 45, 24, dtype=torch.bfloat16 if "half" in kind else torch.float32, device=device)
    mask = torch.rand(shape, device=device) < 0.7 if kind == "boolean" else torch.randn(shape, device=device).to(q)
    to_float = kind == "additive_float_beside_half"  # its gradient is as good as half precision makes it
    # A mask with one number for all keys of a query changes nothing: its gradient is 0, and what we give is rounding.
    constant = kind != "boolean" and (not shape or shape[-1] == 1)
    y = check(
        lambda q, k, v, m: ours(causal, None, backend)(q, k, v, m.float() if to_float else m),
        reference(causal),
        *(q, k, v, mask),
        gradients=not constant,
    )
    if constant and not causal:
        torch.testing.assert_close(y, ops.attention(q, k, v, backend=backend), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_transposed_and_strided_masks(kind, backend, device):
    q, k, v = make(2, 2, 2, 40, 50, 16, device=device)
    mask = torch.randn(2, 50, 40, 3, device=device)[..., 1].mT[:, None]
    check_all(q, k, v, mask > -0.5 if kind == "boolean" else mask, backend=backend)


@needs_cpu
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["scores", "scores of each image", "keys", "by key", "every second key"])
def test_masks_of_many_keys(kind, causal, capability):
    """Blocks of keys that nothing sees at both ends and in between, queries whose keys lie in the last ones alone."""
    q, k, v = make(2, 2, 2, 150, 1310, 16)  # with two threads several blocks of queries
    mask = torch.rand(150, 1310) < 0.3
    mask[:, :260], mask[:, 500:800], mask[:, 1290:] = False, False, False
    mask[3, :1200], mask[44] = False, False
    mask = {
        "scores": mask,
        "scores of each image": torch.stack([mask, mask.flip(1)])[:, None],
        "keys": mask[:1],
        "by key": mask.T.contiguous().T,
        "every second key": torch.stack([mask, ~mask], -1).flatten(1)[:, ::2],
    }[kind]
    check_all(q, k, v, mask, causal=causal, backend="cpu")


def _joined(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


LAYOUTS = {
    "heads outermost": lambda q, k, v: (q, k, v),
    "heads joined": lambda q, k, v: (_joined(q), _joined(k), _joined(v)),
    "fused projection": lambda q, k, v: torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2).permute(2, 0, 3, 1, 4),
    "heads outside of parts": lambda q, k, v: torch.stack([t.transpose(1, 2) for t in (q, k, v)], 3).permute(
        3, 0, 2, 1, 4
    ),
    "slices": lambda *qkv: [F.pad(t, (3, 4, 1, 1, 2, 2), value=float("nan"))[:, 2:-2, 1:-1, 3:-4] for t in qkv],
    "steps of two": lambda *qkv: [torch.stack([t, t * float("nan")], -1)[..., 0] for t in qkv],
}


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, backend, device):
    q, k, v = LAYOUTS[layout](*make(2, 3, 3, 35, 35, 40, dtype=dtype, device=device))
    y = check_all(q, k, v, backend=backend)
    assert y.stride() == ops.attention(q, k, v, backend="eager").stride()
    if layout in ("heads joined", "fused projection", "heads outside of parts"):
        assert y.transpose(1, 2).is_contiguous()  # so that joining the heads is a view
    else:
        assert y.is_contiguous()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_incoming_gradient_of_any_layout(backend, device):
    tensors = [t.requires_grad_() for t in make(1, 2, 2, 9, 20, 16, device=device)]
    expected = torch.autograd.grad(reference()(*tensors, None).sum(), tensors)
    y = ours(backend=backend)(*tensors, None)
    for grad in (torch.ones_like(y), torch.ones((), device=device).expand(y.shape), _joined(torch.ones_like(y))):
        for a, e in zip(torch.autograd.grad(y, tensors, grad, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_queries_that_attend_to_nothing(kind, dtype, backend, device):
    q, k, v = (t.requires_grad_() for t in make(2, 2, 2, 50, 200, 40, dtype=dtype, device=device))
    mask = torch.ones(2, 1, 50, 200, dtype=torch.bool, device=device)
    mask[0, :, 7], mask[1], mask[0, :, 9, :150] = False, False, False
    if kind == "additive":
        mask = torch.zeros(mask.shape, device=device, dtype=dtype).masked_fill(~mask, -torch.inf).requires_grad_()
    y = ops.attention(q, k, v, mask=mask, backend=backend)
    assert y[1].eq(0).all() and y[0, :, 7].eq(0).all() and y[0, :, 9].ne(0).any()
    y.float().square().sum().backward()
    assert q.grad[1].eq(0).all() and q.grad[0, :, 7].eq(0).all() and q.grad[0, :, 9].ne(0).any()
    assert k.grad[1].eq(0).all() and v.grad[1].eq(0).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    if kind == "additive":
        assert mask.grad[mask == -torch.inf].eq(0).all() and mask.grad[0].ne(0).any()
    q, k, v = (t.detach() for t in (q, k, v))
    check_all(q, k, v, mask.detach(), backend=backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_causal_is_aligned_at_the_last_query(backend, device):
    """More queries than keys: the first ones attend to nothing. Fewer: the last one attends to every key."""
    for Lq, Lk in ((60, 40), (40, 60)):
        q, k, v = make(1, 2, 2, Lq, Lk, 16, device=device)
        y = ops.attention(q, k, v, causal=True, backend=backend)
        mask = torch.arange(Lk, device=device) <= torch.arange(Lq, device=device)[:, None] + Lk - Lq
        torch.testing.assert_close(y, ops.attention(q, k, v, mask=mask, backend=backend))
        assert y[:, :, : max(0, Lq - Lk)].eq(0).all()
        torch.testing.assert_close(y[:, :, -1:], ops.attention(q[:, :, -1:], k, v, backend=backend))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 3, 4, 8), (2, 0, 1, 3, 4, 8), (2, 2, 2, 0, 4, 8), (2, 2, 1, 3, 0, 8)], ids=str
)
def test_empty(shape, backend, device):
    tensors = [t.requires_grad_() for t in make(*shape, device=device)]
    y = ops.attention(*tensors, causal=True, backend=backend)
    assert y.shape == tensors[0].shape and y.eq(0).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(y.sum(), tensors))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_scales(scale, backend, device):
    """From a plain mean of the values to one key alone, where scores lie hundreds apart."""
    q, k, v = make(1, 2, 2, 40, 300, 32, device=device)
    q = q.round(decimals=1)
    check_all(q, k, v, scale=scale, backend=backend, fp32=1e-5 if scale <= 1 else 1e-4)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_scores_that_overflow_an_exponential(backend, device):
    """Scores of thousands keep few digits in float: what counts is that nothing overflows on the way."""
    q, k, v = make(1, 1, 1, 20, 100, 16, device=device)
    for mask in (torch.full((100,), 1e4, device=device), torch.linspace(-1e4, 1e4, 100, device=device)):
        check_all(q, k, v, mask, backend=backend, gradients=False, fp32=2e-3)
    check_all(1e3 * q, k, v, backend=backend, gradients=False, fp32=2e-3)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(dtype, backend, device):
    q, k, v = make(1, 2, 2, 40, 140, 24, dtype=dtype, device=device)
    q[0, 0, 5, 3] = float("nan")
    nan = ops.attention(q, k, v, backend=backend).isnan()
    assert nan[0, 0, 5].all() and nan.sum() == 24
    q[0, 0, 5, 3], k[0, 1, 130, 2] = 1.0, float("nan")
    nan = ops.attention(q, k, v, backend=backend).isnan()
    assert nan[0, 1].all() and not nan[0, 0].any()
    hidden = torch.arange(140, device=device) != 130
    assert not ops.attention(q, k, v, mask=hidden, backend=backend).isnan().any()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_agrees_with_torch(backend, device):
    q, k, v = make(2, 4, 2, 30, 45, 40, device=device)
    mask = boolean_mask(2, 1, 30, 45, device=device)
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ops.attention(q, k, v, mask=mask, scale=0.3, backend=backend), expected)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_long(causal, backend, device):
    """Several blocks of queries and of keys."""
    check_all(*make(1, 1, 1, 700, 900, 40, device=device), causal=causal, backend=backend)


@needs_cpu
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("shape", [(1, 3, 3, 700, 300, 40), (2, 2, 1, 90, 77, 80), (5, 1, 1, 3, 900, 64)], ids=str)
def test_same_bits_for_any_number_of_threads(shape, kind):
    q, k, v = make(*shape)
    mask = torch.randn(shape[3], shape[4]) if kind == "additive" else boolean_mask(shape[0], 1, shape[3], shape[4])
    tensors = [t.requires_grad_() for t in (q, k, v, mask) if t.is_floating_point()]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3, 5):
            torch.set_num_threads(threads)
            y = ops.attention(q, k, v, mask=mask, causal=True, backend="cpu")
            results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@needs_cpu
def test_memory_grows_with_the_length_alone():
    """65536 keys: the scores would take 17 GB in float, and forward and backward fit in an address space of a few."""
    q, k, v = (t.requires_grad_() for t in make(1, 1, 1, 64, 65536, 8))
    ops.attention(q, k, v, backend="cpu").sum().backward()
    assert q.grad.isfinite().all()


@needs_cpu
def test_log_sum_exp():
    q, k, v = make(2, 4, 2, 37, 150, 24)
    mask = torch.rand(37, 150) < 0.5
    mask[4] = False
    _, lse = torch.ops.imagegen.attention(q, k, v, mask, False, 0.3)
    scores = 0.3 * q.double() @ k.double().repeat_interleave(2, 1).mT
    expected = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    assert lse.is_contiguous() and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 70),
    st.integers(2, 140),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(["none", "boolean", "additive"]),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_random_problems(B, Hk, heads_per_kv, Lq, Lk, D, causal, kind, axes, dtype):
    q, k, v = make(B, Hk * heads_per_kv, Hk, Lq, Lk, D, dtype=dtype)
    shape = [n if has else 1 for n, has in zip((B, q.size(1), Lq, Lk), axes, strict=True)]
    mask = {"none": None, "boolean": torch.rand(shape) < 0.5, "additive": torch.randn(shape).to(dtype)}[kind]
    results = []
    for function in (ours(causal), reference(causal)):
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in (q, k, v, mask) if t is not None]
        wanted = [t for t in leaves if t.requires_grad]
        y = function(*leaves, *[None] * (4 - len(leaves)))
        results.append([y, *torch.autograd.grad((y * (q + 2)).sum(), wanted)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask_shape", [None, (5, 6), (2, 1, 1, 6), (2, 4, 5, 6)], ids=str)
def test_gradcheck(mask_shape, causal, backend, device):
    tensors = [t.requires_grad_() for t in make(2, 4, 2, 5, 6, 3, dtype=torch.float64, device=device)]
    if mask_shape:
        tensors.append(torch.randn(mask_shape, dtype=torch.float64, device=device, requires_grad=True))
    function = lambda q, k, v, mask=None: ours(causal, 0.7, backend)(q, k, v, mask)  # noqa: E731
    fast = backend == "triton"  # one random direction: under the interpreter a call takes long, and each element is two
    assert torch.autograd.gradcheck(function, tensors, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=fast)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_one_tensor_as_q_k_and_v(backend, device):
    x = torch.randn(1, 2, 6, 3, dtype=torch.float64, device=device, requires_grad=True)
    function = lambda x: ops.attention(x, x, x, backend=backend)  # noqa: E731
    fast = backend == "triton"
    assert torch.autograd.gradcheck(function, x, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=fast)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "second"])
def test_one_gradient_at_a_time(create_graph, wanted, backend, device):
    tensors = [*make(1, 2, 1, 9, 12, 8, dtype=torch.float64, device=device)]
    tensors.append(torch.randn(9, 12, dtype=torch.float64, device=device))
    tensors[wanted].requires_grad_()
    gradients = [
        torch.autograd.grad(f(*tensors).square().sum(), tensors[wanted], create_graph=create_graph)[0]
        for f in (ours(backend=backend), reference())
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].requires_grad == create_graph


@needs_cpu
@pytest.mark.parametrize("layout", ["heads outermost", "heads joined"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_opcheck(layout, masked):
    q, k, v = LAYOUTS[layout](*make(2, 4, 2, 9, 12, 8))
    mask = torch.randn(9, 12) if masked else None
    leaves = [t if t is None else t.detach().requires_grad_() for t in (q, k, v, mask)]
    for tensors in ((q, k, v, mask), leaves):
        torch.library.opcheck(torch.ops.imagegen.attention.default, (*tensors, True, 0.3))
    out, lse = torch.ops.imagegen.attention(q, k, v, mask, True, 0.3)
    inputs = (torch.randn_like(out), q, k, v, mask, out, lse, True, 0.3, masked)
    torch.library.opcheck(torch.ops.imagegen.attention_backward.default, inputs)


@needs_cpu
def test_compile():
    function = lambda q, k, v, m: ops.attention(q, k, v, mask=m, causal=True)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for shape in ((2, 4, 2, 20, 30, 16), (3, 6, 2, 33, 40, 24)):
        for layout in ("heads outermost", "heads joined"):
            tensors = [*LAYOUTS[layout](*make(*shape)), torch.randn(shape[0], 1, shape[3], shape[4])]
            tensors = [t.requires_grad_() for t in tensors]
            y, expected = compiled(*tensors), function(*tensors)
            assert torch.equal(y, expected) and y.stride() == expected.stride()
            grad = torch.randn(y.shape)
            for a, e in zip(*(torch.autograd.grad(t, tensors, grad) for t in (y, expected)), strict=True):
                torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend, device", [*BACKENDS, pytest.param("eager", "cpu", id="eager")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, backend, device):
    q, k, v = make(1, 2, 2, 20, 30, 16, device=device)
    mask = torch.randn(20, 30, device=device)
    leaf = q.requires_grad_()
    with torch.autocast(device, dtype):
        y = ops.attention(leaf, k.to(dtype), v, mask=mask, backend=backend)
        assert ops.attention(q.double(), k.double(), v.double(), backend="eager").dtype == torch.float64
    assert y.dtype == dtype
    y.sum().backward()
    assert leaf.grad.dtype == torch.float32
    if backend != "eager":
        assert torch.equal(y, ops.attention(*(t.detach().to(dtype) for t in (q, k, v)), mask=mask, backend=backend))


q = torch.randn(2, 6, 10, 8)
k = torch.randn(2, 3, 12, 8)
ERRORS = [
    (TypeError, "q must be float32, bfloat16, float16 or float64, got torch.int64", {"q": q.long()}),
    (ValueError, "q must have shape (B, H, Lq, D), got (6, 10, 8)", {"q": q[0]}),
    (ValueError, "q must have a head dimension D of 1 to 512, got 513", {"q": torch.zeros(2, 6, 10, 513)}),
    (ValueError, "q must have a head dimension D of 1 to 512, got 0", {"q": torch.zeros(2, 6, 10, 0)}),
    (TypeError, "k must have q's dtype torch.float32, got torch.bfloat16", {"k": k.bfloat16()}),
    (TypeError, "v must have q's dtype torch.float32, got torch.float64", {"v": k.double()}),
    (ValueError, "k must have shape (2, Hk, Lk, 8) to match q (2, 6, 10, 8), got (2, 3, 12, 7)", {"k": k[..., 1:]}),
    (ValueError, "k must have shape (2, Hk, Lk, 8) to match q (2, 6, 10, 8), got (1, 3, 12, 8)", {"k": k[:1]}),
    (ValueError, "k must have shape (2, Hk, Lk, 8) to match q (2, 6, 10, 8), got (3, 12, 8)", {"k": k[0]}),
    (ValueError, "k must have a number of heads that divides q's 6, got 4", {"k": torch.zeros(2, 4, 12, 8)}),
    (ValueError, "k must have a number of heads that divides q's 6, got 0", {"k": torch.zeros(2, 0, 12, 8)}),
    (ValueError, "v must have k's shape (2, 3, 12, 8), got (2, 3, 11, 8)", {"v": k[:, :, 1:]}),
    (
        TypeError,
        "mask must be torch.bool, q's dtype torch.float32 or torch.float32, got torch.int64",
        {"mask": q.long()},
    ),
    (
        ValueError,
        "mask must have a shape that broadcasts to (B, H, Lq, Lk) = (2, 6, 10, 12), got (2, 12)",
        {"mask": torch.zeros(2, 12)},
    ),
    (
        ValueError,
        "mask must have a shape that broadcasts to (B, H, Lq, Lk) = (2, 6, 10, 12), got (1, 1, 1, 1, 1)",
        {"mask": torch.zeros(1, 1, 1, 1, 1)},
    ),
    (ValueError, "scale must be positive and finite, got 0", {"scale": 0.0}),
    (ValueError, "scale must be positive and finite, got -0.5", {"scale": -0.5}),
    (ValueError, "scale must be positive and finite, got inf", {"scale": float("inf")}),
]


@pytest.mark.parametrize("error, message, change", ERRORS, ids=[m[:60] for _, m, _ in ERRORS])
def test_errors(error, message, change):
    a = {"q": q, "k": k, "v": k, "mask": None, "scale": 0.5} | change
    operator = lambda: torch.ops.imagegen.attention(a["q"], a["k"], a["v"], a["mask"], False, a["scale"])  # noqa: E731
    check_error(error, f"attention: {message}", lambda: ops.attention(**a), operator if BACKENDS else None)


def test_devices_must_agree():
    elsewhere = torch.empty(2, 3, 12, 8, device="meta")
    for argument in ("k", "v", "mask"):
        with pytest.raises(ValueError, match=f"attention: {argument} must be on q's device cpu, got meta"):
            ops.attention(**({"q": q, "k": k, "v": k} | {argument: elsewhere}))


@needs_cpu
def test_backward_checks_its_arguments():
    out, lse = torch.ops.imagegen.attention(q, k, k, None, False, 0.5)
    for change, message in (
        ({"grad": out[:1]}, "attention: grad must have q's shape (2, 6, 10, 8), got (1, 6, 10, 8)"),
        ({"grad": out.half()}, "attention: grad must have q's dtype torch.float32, got torch.float16"),
        ({"out": out[..., 1:]}, "attention: out must have q's shape (2, 6, 10, 8), got (2, 6, 10, 7)"),
        ({"lse": lse[:1]}, "attention: lse must be contiguous of shape (2, 6, 10) and dtype torch.float32, got (1,"),
        ({"lse": lse.double()}, "attention: lse must be contiguous of shape (2, 6, 10) and dtype torch.float32, got"),
        ({"needs": True}, "attention: mask must be additive to have a gradient"),
    ):
        a = {"grad": out, "out": out, "lse": lse, "needs": False} | change
        with pytest.raises(RuntimeError) as raised:
            torch.ops.imagegen.attention_backward(a["grad"], q, k, k, None, a["out"], a["lse"], False, 0.5, a["needs"])
        assert message in str(raised.value)
