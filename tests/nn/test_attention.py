import pytest
import torch

from imagegen import nn
from imagegen.ops import eager


def rotate(x, angles):
    return eager.attention_rows(x, None, angles.cos(), angles.sin(), 0.0, False)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("context_dim", [None, 24], ids=["self", "cross"])
def test_equals_torch(context_dim, bias):
    theirs = torch.nn.MultiheadAttention(32, 4, bias=bias, kdim=context_dim, vdim=context_dim, batch_first=True).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    mine = nn.Attention.from_torch(theirs)
    assert not mine.training
    x, context = torch.randn(2, 9, 32), torch.randn(2, 7, context_dim or 32)
    torch.testing.assert_close(mine(x, context), theirs(x, context, context)[0])
    if context_dim is None:
        torch.testing.assert_close(mine(x), theirs(x, x, x)[0])


def test_masks_and_causality_reach_the_op():
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    mine, x = nn.Attention.from_torch(theirs), torch.randn(2, 6, 16)
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = theirs(x, x, x, attn_mask=future)[0]
    torch.testing.assert_close(mine(x, mask=~future), expected)
    torch.testing.assert_close(mine(x, causal=True), expected)


def test_loads_the_state_dict_of_torch_inside_a_model():
    theirs = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.MultiheadAttention(8, 2))
    mine = torch.nn.Sequential(torch.nn.Linear(8, 8), nn.Attention(8, 2))
    state = theirs.state_dict()
    mine.load_state_dict(state)
    assert set(state) == set(theirs.state_dict())  # the caller's own is left alone
    assert torch.equal(mine[1].qkv.weight, theirs[1].in_proj_weight)
    mine.load_state_dict(mine.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.qkv\.weight"):
        mine.load_state_dict({k: v for k, v in state.items() if "in_proj_weight" not in k})


DIFFUSERS = {
    "self": {},
    "bias": {"bias": True},
    "cross": {"cross_attention_dim": 24},
    "shared heads": {"kv_heads": 2},
    "norms": {"qk_norm": "rms_norm", "eps": 1e-5},
    "wide heads": {"dim_head": 16},
}


@pytest.mark.parametrize("options", DIFFUSERS.values(), ids=DIFFUSERS)
def test_equals_diffusers(options):
    processor = pytest.importorskip("diffusers.models.attention_processor", reason="diffusers is not installed")
    theirs = processor.Attention(32, heads=4, **{"dim_head": 8, **options})
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    mine = nn.Attention.from_torch(theirs)
    x = torch.randn(2, 9, 32)
    context = torch.randn(2, 7, 24) if "cross_attention_dim" in options else None
    if "kv_heads" in options:  # diffusers' own processor does not share heads
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (theirs.to_q(x), theirs.to_k(x), theirs.to_v(x)))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        expected = theirs.to_out[0](y.transpose(1, 2).flatten(2))
    else:
        expected = theirs(x, context)
    torch.testing.assert_close(mine(x, context), expected, rtol=1e-4, atol=1e-5)


def test_refuses_what_it_does_not_do():
    processor = pytest.importorskip("diffusers.models.attention_processor", reason="diffusers is not installed")
    for options, word in (
        ({"norm_num_groups": 4}, "group_norm"),
        ({"residual_connection": True}, "residual_connection"),
        ({"qk_norm": "layer_norm"}, "norm_q LayerNorm"),
        ({"rescale_output_factor": 2.0}, "rescale_output_factor"),
    ):
        with pytest.raises(ValueError, match=f"Attention must be without {word}"):
            nn.Attention.from_torch(processor.Attention(32, heads=4, dim_head=8, **options))
    for options, word in (({"add_bias_kv": True}, "bias_k"), ({"add_zero_attn": True}, "add_zero_attn")):
        with pytest.raises(ValueError, match=f"MultiheadAttention must be without {word}"):
            nn.Attention.from_torch(torch.nn.MultiheadAttention(8, 2, **options))
    with pytest.raises(ValueError, match="without dropout in training"):
        nn.Attention.from_torch(torch.nn.MultiheadAttention(8, 2, dropout=0.1))
    with pytest.raises(ValueError, match="heads must divide dim 10 where head_dim is None, got 4"):
        nn.Attention(10, 4)
    with pytest.raises(ValueError, match="context must be given"):
        nn.Attention(8, 2, context_dim=6)(torch.randn(1, 3, 8))
    with pytest.raises(ValueError, match="rotary must be None"):
        nn.Attention(8, 2)(torch.randn(1, 3, 8), torch.randn(1, 3, 8), rotary=torch.zeros(3, 2))


def test_rotation_makes_scores_relative():
    """<rotate(q, i), rotate(k, j)> depends on i - j alone, and lengths stay."""
    frequency = torch.tensor([1.0, 0.3, 0.01])
    q, k = torch.randn(6), torch.randn(6)
    at = lambda x, position: rotate(x[None], position * frequency[None])[0]  # noqa: E731
    torch.testing.assert_close(at(q, 5) @ at(k, 2), at(q, 13) @ at(k, 10))
    torch.testing.assert_close(at(q, 7).norm(), q.norm())
    assert not torch.allclose(at(q, 5) @ at(k, 2), at(q, 5) @ at(k, 3))


def test_rotary_and_norms_in_the_module():
    attention = nn.Attention(16, 2, qk_norm=True, bias=False)
    x, angles = torch.randn(2, 5, 16), torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in attention.qkv(x).chunk(3, -1))
    q, k = rotate(attention.norm_q(q), angles), rotate(attention.norm_k(k), angles)
    expected = attention.out(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, rotary=angles), expected)


def test_trains():
    attention = nn.Attention(16, 2, kv_heads=1, qk_norm=True)
    attention(torch.randn(2, 5, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())
