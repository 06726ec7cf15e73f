import operator
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import nn

from imagegen import _library, compile_backend
from imagegen.ops import _backend


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Where an op has no kernel the graph is rightly left alone: here eager PyTorch stands in, without a warning."""
    ops = ("attention", "conv2d", "conv_transpose2d", "group_norm", "upsample_conv2d")
    lacking = {op for op in ops if _backend.why_not(op, _backend.implementations(op), "cpu", "cpu")}
    monkeypatch.setattr(_backend, "_warned", {(op, "cpu") for op in lacking})
    has_kernel = compile_backend._has_kernel
    monkeypatch.setattr(compile_backend, "_has_kernel", lambda found: found.op in lacking or has_kernel(found))
    return has_kernel


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def fused(function, *tensors, dynamic=False):
    """The names of the ops that function's graph calls; its values are held to the function's own in float64."""
    names = []

    def backend(graph_module, _):
        names.extend(compile_backend.fuse(graph_module))
        graph_module.graph.lint()
        return graph_module.forward

    expected = function(*(t.clone() for t in tensors))
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    actual = compiled(*(t.clone() for t in tensors))
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected)
    return names


def image(*shape):
    return torch.randn(shape or (2, 4, 5, 6), dtype=torch.float64)


WEIGHT, BIAS = image(4, 4, 3, 3), image(4)


def conv(x, bias=BIAS, **options):
    return F.conv2d(x, WEIGHT, bias, **{"padding": 1, **options})


def up(x, **options):
    return F.interpolate(x, **({"scale_factor": 2} | options))


def norm(x):
    return F.group_norm(x, 2, BIAS, BIAS, 1e-3)


def transposed(x, kernel=4, **options):
    weight = torch.linspace(-1, 1, 4 * 3 * kernel**2, dtype=torch.float64).reshape(4, 3, kernel, kernel)
    return F.conv_transpose2d(x, weight, BIAS[:3], **{"stride": 2, "padding": 1, **options})


def batch_norm(x, training=False):
    mean, var = torch.ones(3, dtype=x.dtype), torch.full((3,), 4, dtype=x.dtype)
    return F.batch_norm(x, mean, var, BIAS[:3], BIAS[1:], training)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: conv(x), ["conv2d"]),
        (lambda x: conv(x, padding="same"), ["conv2d"]),
        (lambda x: F.relu(conv(x)), ["conv2d"]),
        (lambda x: conv(x, None) + x, ["conv2d"]),
        (lambda x: x + conv(x), ["conv2d"]),
        (lambda x: torch.tanh(torch.add(conv(x), x)), ["conv2d"]),
        (lambda x: operator.iadd(conv(x), x).sigmoid_(), ["conv2d"]),
        (lambda x: conv(x) + conv(2 * x), ["conv2d", "conv2d"]),
        (lambda x: conv(up(x)), ["upsample_conv2d"]),
        (lambda x: F.silu(conv(up(x, scale_factor=(2.0, 2.0), recompute_scale_factor=True))), ["upsample_conv2d"]),
        (lambda x: F.leaky_relu(conv(up(x)), 0.2), ["upsample_conv2d"]),
        (lambda x: norm(x), ["group_norm"]),
        (lambda x: F.silu(norm(x)), ["group_norm"]),
        (lambda x: conv(F.gelu(norm(x))), ["group_norm", "conv2d"]),
        (lambda x: norm(x.flatten(2)), ["group_norm"]),
        (lambda x: transposed(x), ["conv_transpose2d"]),
        (lambda x: F.relu(batch_norm(transposed(x))), ["conv_transpose2d"]),
        (lambda x: batch_norm(transposed(x, 3, output_padding=1)).relu_(), ["conv_transpose2d"]),
    ],
)
def test_convolutions_and_norms(function, names):
    assert fused(function, image()) == names


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: conv(x, stride=2), []),
        (lambda x: conv(x, padding=0), []),
        (lambda x: conv(x, padding=2, dilation=2), []),
        (lambda x: F.conv2d(x, WEIGHT[:, :2], padding=1, groups=2), []),
        (lambda x: F.conv2d(x, WEIGHT[..., :1, :1]), []),
        (lambda x: conv(x[0]), []),
        (lambda x: conv(up(x, scale_factor=3)), ["conv2d"]),
        (lambda x: conv(up(x, scale_factor=(2, 1))), ["conv2d"]),
        (lambda x: conv(up(x, mode="bilinear")), ["conv2d"]),
        (lambda x: conv(up(x, scale_factor=None, size=(10, 12))), ["conv2d"]),
        (lambda x: F.leaky_relu(norm(x)), ["group_norm"]),
        (lambda x: F.gelu(norm(x), approximate="tanh"), ["group_norm"]),
        (lambda x: transposed(x, stride=1), []),
        (lambda x: transposed(x, 3), []),
        (lambda x: F.conv_transpose2d(x, WEIGHT[:, :2, :1, :1].repeat(1, 1, 4, 4), None, 2, 1, 0, 2), []),
    ],
)
def test_what_only_looks_alike(function, names):
    assert fused(function, image()) == names


def twice(x):
    y = conv(up(x))
    return F.relu(y) + y


def upsampled_twice(x):
    y = up(x)
    return conv(y) + y


def residual_of_another_shape(x):
    return conv(x) + x[:, :, :1]


def residual_scaled(x):
    return torch.add(conv(x), x, alpha=2)


def written_between(x):
    y = up(x)
    x += 1
    return conv(y) + x.sum()


def written_by_name_between(x):
    y = norm(x)
    x.mul_(2)
    return F.silu(y) + x


def written_by_index_between(x):
    y = conv(x)
    z = x + 1
    z[0] = 0
    x[0] = 1
    return (y + z).relu()


def written_by_position_between(x):
    y = up(x)
    z = F.relu(x, True)
    return conv(y) + z.sum()


def mode_changed_between(x):
    y = up(x)
    with torch.autocast("cpu", torch.bfloat16):
        return conv(y)


def residual_is_written(x):
    y = conv(x)
    z = x * 1
    z += y
    return z


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (twice, ["upsample_conv2d"]),
        (upsampled_twice, ["conv2d"]),
        (residual_of_another_shape, ["conv2d"]),
        (residual_scaled, ["conv2d"]),
        (written_between, ["conv2d"]),
        (written_by_name_between, ["group_norm"]),
        (written_by_index_between, ["conv2d"]),
        (written_by_position_between, ["conv2d"]),
        (mode_changed_between, ["conv2d"]),
        (residual_is_written, ["conv2d"]),
    ],
)
def test_values_used_elsewhere_and_memory_written_between(function, names):
    assert fused(function, image()) == names


Q, K, V = image(2, 3, 5, 8), image(2, 3, 7, 8), image(2, 3, 7, 8)
MASK = image(2, 1, 5, 7)


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK, scale=0.5),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK > 0, 0.0),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
        lambda q, k, v: F.scaled_dot_product_attention(k, k, v, is_causal=True),
        lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v,
        lambda q, k, v: F.softmax(q @ k.mT * 0.3, dim=3).matmul(v),
        lambda q, k, v: torch.softmax(0.3 * torch.matmul(q, k.permute(0, 1, 3, 2)), -1) @ v,
        lambda q, k, v: F.dropout(F.softmax((q / 3) @ k.mT / 2 + MASK, -1), 0.5, False) @ v,
        lambda q, k, v: F.softmax(MASK + 0.5 * (q @ k.mT), -1) @ v,
        lambda q, k, v: torch.bmm(torch.bmm(q[0], k[0].mT).softmax(-1), v[0]),
        lambda q, k, v: F.softmax(q[0] @ k[0].mT + MASK[0], -1) @ v[0],
    ],
)
def test_attention(attend):
    assert fused(attend, Q, K, V) == ["attention"]


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),  # aligned at the other corner
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :4]),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]),
        lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
        lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v[..., :4],
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v[:, :1],
        lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).mT,
        lambda q, k, v: (q @ k.mT * MASK).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT * -1).softmax(-1) @ v,
        lambda q, k, v: (q[:, :1] @ k[:, :1].mT + image(2, 3, 5, 7) * 0).softmax(-1) @ v,
        lambda q, k, v: (q[0, 0] @ k[0, 0].mT).softmax(-1) @ v[0, 0],
        lambda q, k, v: F.softmax(q @ k.mT, -1, dtype=torch.float32).double() @ v,
    ],
)
def test_other_products(attend):
    assert fused(attend, Q, K, V) == []


def test_attention_whose_weights_are_used_elsewhere():
    def attend(q, k, v):
        weights = (q @ k.mT).softmax(-1)
        return weights @ v + weights.sum()

    assert fused(attend, Q, K, V) == []


def test_batch_norm_in_training_and_dropout_are_left():
    assert fused(lambda x: F.relu(batch_norm(transposed(x), training=True)), image()) == ["conv_transpose2d"]
    names = []

    def backend(graph_module, _):
        names.extend(compile_backend.fuse(graph_module))
        return graph_module.forward

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5) + F.dropout((q @ k.mT).softmax(-1), 0.5) @ v

    torch.compile(attend, backend=backend)(Q, K, V)
    assert names == []


def test_dynamic_shapes():
    function = torch.compile(
        lambda x: F.silu(norm(conv(up(x)))), backend="imagegen", options={"rest": "eager"}, dynamic=True
    )
    for shape in ((2, 4, 5, 6), (1, 4, 7, 3), (3, 4, 2, 2)):
        x = image(*shape)
        torch.testing.assert_close(function(x), F.silu(norm(conv(up(x)))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.transposed = nn.Sequential(nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))

    def forward(self, x):
        x = x + self.conv(F.silu(self.norm(x)))
        x = self.up(x).cos()
        q = x.flatten(2).mT[:, None]
        x = x + F.scaled_dot_product_attention(q, q, q)[:, 0].mT.unflatten(2, x.shape[2:])
        return self.transposed(x)


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("training", [False, True])
def test_a_model(rest, training):
    model = Net().train(training)
    exact = Net().train(training).double()
    exact.load_state_dict(model.state_dict())
    x = image().float()
    compiled = torch.compile(model, backend="imagegen", options={"rest": rest}, fullgraph=True)
    y, z = compiled(x), exact(x.double())
    assert relative_error(y, z) < 1e-5
    y.square().mean().backward()
    z.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if q.grad.norm() > 1e-9:  # the bias before a batch norm has a gradient of rounding errors alone
            assert relative_error(p.grad, q.grad) < 1e-4, name
    for (name, b), c in zip(model.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(b.double(), c.double(), rtol=1e-4, atol=1e-5, msg=name)


def test_checkpointed_parts_are_fused_too(monkeypatch):
    found = []
    monkeypatch.setattr(compile_backend, "fuse", lambda module, fuse=compile_backend.fuse: found.extend(fuse(module)))

    def function(x):
        return torch.utils.checkpoint.checkpoint(lambda x: conv(up(x)), x, use_reentrant=False)

    x = image().requires_grad_()
    compiled = torch.compile(function, backend="imagegen", options={"rest": "eager"})
    torch.testing.assert_close(compiled(x), function(x))
    assert found == ["upsample_conv2d"]


def test_without_a_kernel_the_graph_is_left(kernels, monkeypatch):
    monkeypatch.setattr(compile_backend, "_has_kernel", kernels)
    monkeypatch.setattr(_library, "load_error", "a test hid the kernels")
    assert fused(lambda x: F.relu(conv(up(norm(x)))), image()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"rest": "jit"}}, "backend imagegen: rest must be 'inductor' or 'eager', got 'jit'"),
        ({"options": {"rest": "eager", "x": 1}}, "backend imagegen: with rest='eager' nothing reads mode=None and"),
        ({"options": {"rest": "eager"}, "mode": "max-autotune"}, "nothing reads mode='max-autotune' and options {}"),
    ],
)
def test_options_that_mean_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        compile_backend.imagegen(None, [], **arguments)


def test_it_is_found_by_name_without_an_import():
    code = """
import torch
f = torch.compile(lambda x: torch.nn.functional.group_norm(x, 2), backend="imagegen", options={"rest": "eager"})
f(torch.ones(1, 4))
import sys
print("imagegen" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
