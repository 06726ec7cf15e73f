"""torch.compile(model, backend="imagegen"): the ops where a graph has them, Inductor or eager for the rest."""

import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import ops
from ._optimize.modules import scale_and_shift
from .ops import _backend
from .ops._activation import LRELU_SLOPE
from .ops._check import DTYPES


def imagegen(graph_module, example_inputs, *, mode=None, options=None):
    """The backend "imagegen" of torch.compile; it need not be imported.

    Become one op each, where their values are used nowhere else:

    - nearest-2x F.interpolate, a 3x3 convolution of stride 1 and padding 1, and an activation;
    - such a convolution, the addition of a tensor, and an activation;
    - F.group_norm and an activation;
    - a transposed convolution that doubles the size, F.batch_norm in eval, and an activation;
    - F.scaled_dot_product_attention, and softmax(q @ k.mT * scale + mask) @ v, both without dropout.

    Forward and backward: the ops are differentiable, and whatever is not one of the above, F.batch_norm in training and
    attention with dropout among it, is compiled as it is.

    options: {"rest": "inductor"} (default) or {"rest": "eager"}, what runs the rest of the graph; any other entry, and
        mode, go to Inductor.
    Raises: ValueError for another "rest", or options that nobody would read.
    """
    options = dict(options or {})
    rest = options.pop("rest", "inductor")
    if rest not in ("inductor", "eager"):
        raise ValueError(f"backend imagegen: rest must be 'inductor' or 'eager', got {rest!r}")
    if rest == "eager" and (options or mode):
        raise ValueError(f"backend imagegen: with rest='eager' nothing reads mode={mode!r} and options {options}")
    for module in graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            fuse(module)
    if rest == "eager":
        return graph_module.forward
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **options}
    return compile_fx(graph_module, example_inputs, config_patches=patches)


def fuse(graph_module):
    """Rewrite the graph in place; the names of the ops it calls now, in the order they were found."""
    graph, fused = graph_module.graph, []
    for node in list(graph.nodes):
        find = _FINDERS.get(_call(node)[0])
        candidates = find(node) if find and _value(node) is not None else ()
        found = next((c for c in candidates if _has_kernel(c) and _nothing_happens_between(c.nodes)), None)
        if found:
            _replace(graph, found)
            fused.append(found.op)
    graph_module.recompile()
    return fused


@dataclass
class Found:
    """Nodes of a graph, in their order, whose last value function(*args, **kwargs) computes by the op."""

    op: str
    nodes: list
    function: Callable
    args: tuple
    kwargs: dict


def _replace(graph, found):
    last = found.nodes[-1]
    with graph.inserting_before(last):
        new = graph.call_function(found.function, found.args, found.kwargs)
    new.meta.update(last.meta)
    last.replace_all_uses_with(new)
    for node in reversed(found.nodes):
        graph.erase_node(node)


def _has_kernel(found):
    device = _value(found.nodes[-1]).device.type
    table = _backend.implementations(found.op)
    backends = [name for name in _backend.PREFERENCE.get(device, ()) if name != "eager"]
    return _backend.forced is not None or any(_backend.why_not(found.op, table, b, device) is None for b in backends)


def _nothing_happens_between(nodes):
    """Whether the first nodes may run as late as the last: nothing between them writes to memory or changes a mode."""
    node = nodes[0]
    while node is not nodes[-1]:
        node = node.next
        if node not in nodes and _has_effect(node):
            return False
    return True


def _has_effect(node):
    """Whether the node may write to memory that others see, or change a mode: in doubt it does."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    if not node.users or node.target in _EFFECTS or isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = "out" in node.kwargs or node.kwargs.get("inplace") or any(argument is True for argument in node.args)
    return bool(in_place) or (name.endswith("_") and not name.endswith("__"))


# Each finder yields what the op may stand for around a node, the longest stretch first.


def _find_conv2d(node):
    args = _call(node)[1]
    x, *parameters = args["input"], args["weight"], args["bias"]
    plain = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    if not _is_image(x) or _shape(parameters[0])[2:] != (3, 3) or not _geometry_is(args, plain):
        return
    source, before = _call(x)
    if source == "interpolate" and _is_nearest_2x(before) and _only_user(x) is node and _is_image(before["input"]):
        nodes, activation = _with_activation([x, node])
        yield Found("upsample_conv2d", nodes, ops.upsample_conv2d, (before["input"], *parameters), activation)
    nodes, residual = _with_residual([node])
    nodes, activation = _with_activation(nodes)
    yield Found("conv2d", nodes, ops.conv2d, (x, *parameters), {**activation, "residual": residual})
    yield Found("conv2d", [node], ops.conv2d, (x, *parameters), {})


def _find_group_norm(node):
    args = _call(node)[1]
    if _dtype(args["input"]) not in DTYPES:
        return
    nodes, activation = _with_activation([node])
    positional = (args["input"], args["num_groups"], args["weight"], args["bias"])
    yield Found("group_norm", nodes, ops.group_norm, positional, {**activation, "eps": args["eps"]})
    yield Found("group_norm", [node], ops.group_norm, positional, {"eps": args["eps"]})


def _find_conv_transpose2d(node):
    args = _call(node)[1]
    kernel = _shape(args["weight"])[2:]
    doubling = {"stride": 2, "padding": 1, "dilation": 1, "groups": 1, "output_padding": int(kernel == (3, 3))}
    if kernel not in ((3, 3), (4, 4)) or not _is_image(args["input"]) or not _geometry_is(args, doubling):
        return
    nodes, norm = [node], None
    name, norm_args = _call(_only_user(node))
    if name == "batch_norm" and norm_args["input"] is node and not norm_args["training"]:
        nodes.append(_only_user(node))
        norm = tuple(norm_args[k] for k in ("running_mean", "running_var", "weight", "bias", "eps"))
    nodes, activation = _with_activation(nodes)
    positional = (args["input"], args["weight"], args["bias"], doubling["output_padding"])
    yield Found("conv_transpose2d", nodes, _conv_transpose2d, (*positional, norm), activation)
    yield Found("conv_transpose2d", [node], _conv_transpose2d, (*positional, None), {})


def _conv_transpose2d(x, weight, bias, output_padding, norm, activation="linear"):
    scale, shift = scale_and_shift(*norm) if norm else (None, None)
    return ops.conv_transpose2d(
        x, weight, bias, output_padding=output_padding, scale=scale, shift=shift, activation=activation
    )


def _find_scaled_dot_product_attention(node):
    args = _call(node)[1]
    q, k, v, causal = args["query"], args["key"], args["value"], args["is_causal"]
    if args["dropout_p"] or not all(map(_is_image, (q, k, v))) or (causal and _shape(q)[2] != _shape(k)[2]):
        return
    heads = [_shape(t)[1] for t in (q, k, v)]
    if heads[1] != heads[2] or (heads[0] != heads[1] and not args["enable_gqa"]):
        return
    if _shape(k) != _shape(v) or _shape(q)[0] != _shape(k)[0] or not 1 <= _shape(q)[3] <= 512:
        return
    options = {"mask": args["attn_mask"], "causal": causal, "scale": args["scale"]}
    yield Found("attention", [node], ops.attention, (q, k, v), options)


def _find_softmax(node):
    """softmax(q @ k.mT * scale + mask) @ v of four axes or three, without dropout."""
    args = _call(node)[1]
    if args["dim"] not in (-1, len(_shape(node)) - 1) or args["dtype"] is not None:
        return
    after = _weighted_sum(node)
    before, mask, scale = _scaled_scores(args["input"], node)
    if not after or not before:
        return
    product = _call(before[0])[1]
    q, k_transposed, v = product["input"], product["other"], _call(after[-1])[1]["other"]
    (*batch, _, d), (*batch_k, d_k, n), shape_v = _shape(q), _shape(k_transposed), _shape(v)
    if len(batch) not in (1, 2) or batch != batch_k or d != d_k or tuple(shape_v) != (*batch, n, d):
        return
    if not 1 <= d <= 512 or _dtype(q) not in DTYPES or not 0 < scale < math.inf:
        return
    yield Found("attention", [*before, node, *after], _attention, (q, k_transposed, v, mask, scale), {})


def _weighted_sum(weights):
    """The nodes of `weights @ v`, a dropout that does nothing among them, or None."""
    nodes = [_only_user(weights)]
    name, args = _call(nodes[0])
    if name == "dropout" and not (args["training"] and args["p"]):
        weights = nodes[0]
        nodes.append(_only_user(weights))
        name, args = _call(nodes[-1])
    return nodes if name == "matmul" and args["input"] is weights else None


def _scaled_scores(scores, user):
    """(nodes, mask, scale) of q @ k.mT * scale + mask; no nodes where `scores` is something else."""
    nodes, mask, scale = [], None, 1.0
    name, args = _call(scores)
    if name == "add" and _only_user(scores) is user:
        nodes, user = [scores, *nodes], scores
        scores, mask = args["input"], args["other"]
        if _call(scores)[0] not in _PRODUCTS or _only_user(scores) is not user:
            scores, mask = mask, scores
        if not _is_mask(mask, _shape(nodes[0]), _shape(scores)):
            return [], None, 1.0
        name, args = _call(scores)
    if name in ("mul", "truediv") and _only_user(scores) is user:
        nodes, user = [scores, *nodes], scores
        scores, number = args["input"], args["other"]
        if name == "mul" and isinstance(scores, (int, float)):
            scores, number = number, scores
        if not isinstance(number, (int, float)) or number == 0:
            return [], None, 1.0
        scale = number if name == "mul" else 1 / number
        name, args = _call(scores)
    return ([scores, *nodes] if name == "matmul" and _only_user(scores) is user else []), mask, scale


def _attention(q, k_transposed, v, mask, scale):
    q, k, v = (t if t.dim() == 4 else t.unsqueeze(1) for t in (q, k_transposed.mT, v))
    if mask is not None and mask.dim() == 3 and k_transposed.dim() == 3:
        mask = mask.unsqueeze(1)
    output = ops.attention(q, k, v, mask=mask, scale=scale)
    return output if k_transposed.dim() == 4 else output.squeeze(1)


def _with_residual(nodes):
    """(nodes, residual): with the addition of another tensor of the same shape, where that is all that is done."""
    name, args = _call(_only_user(nodes[-1]))
    if name not in ("add", "add_") or args["alpha"] != 1:
        return nodes, None
    if name == "add_" and args["input"] is not nodes[-1]:  # that would write to the residual
        return nodes, None
    residual = args["other"] if args["input"] is nodes[-1] else args["input"]
    same = (_shape(residual), _dtype(residual)) == (_shape(nodes[-1]), _dtype(nodes[-1]))
    return ([*nodes, _only_user(nodes[-1])], residual) if same and residual is not nodes[-1] else (nodes, None)


def _with_activation(nodes):
    """(nodes, {"activation": its name}): with the activation behind them, where that is all that sees their value."""
    name, args = _call(_only_user(nodes[-1]))
    known = _ACTIVATIONS.get(name)
    if known == "lrelu" and args["negative_slope"] != LRELU_SLOPE:
        known = None
    if known == "gelu" and args["approximate"] != "none":
        known = None
    return ([*nodes, _only_user(nodes[-1])], {"activation": known}) if known else (nodes, {"activation": "linear"})


def _call(node):
    """(name, arguments by name) of what the node calls, where it is known here, else (None, {})."""
    if not isinstance(node, torch.fx.Node) or node.op not in ("call_function", "call_method"):
        return None, {}
    name, signature = _CALLS.get(node.target, (None, None))
    if name is None:
        return None, {}
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:  # another overload
        return None, {}
    bound.apply_defaults()
    return name, bound.arguments


def _only_user(node):
    return next(iter(node.users)) if len(node.users) == 1 else None


def _value(node):
    """The fake tensor that stands for the node's value, or None where it is no tensor."""
    value = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _shape(node):
    value = _value(node)
    return () if value is None else tuple(value.shape)


def _dtype(node):
    value = _value(node)
    return None if value is None else value.dtype


def _is_image(node):
    """Whether the ops take the node's value: four axes, floating point."""
    return len(_shape(node)) == 4 and _dtype(node) in DTYPES


def _geometry_is(args, values):
    """Whether each argument is the number expected of it, or a pair of it."""
    if args["padding"] == "same" and values["stride"] == 1:  # of 3x3, whose padding is then 1
        args = {**args, "padding": 1}
    return all(
        tuple(args[name]) in ((n,), (n, n)) if _is_pair(args[name]) else args[name] == n for name, n in values.items()
    )


def _is_pair(value):
    return isinstance(value, (tuple, list))


def _is_nearest_2x(args):
    factor = args["scale_factor"]
    twice = tuple(factor) == (2, 2) if _is_pair(factor) else factor == 2
    return twice and args["size"] is None and args["mode"] == "nearest" and not args["antialias"]


def _is_mask(node, total, scores):
    """Whether a sum of shape `total` is one of scores and what ops.attention takes as an additive mask."""
    return _dtype(node) in DTYPES and total == scores


def _binary(input, other): ...


def _add(input, other, alpha=1): ...


def _softmax(input, dim=None, _stacklevel=3, dtype=None): ...


def _activation(input, inplace=False): ...


def _leaky_relu(input, negative_slope=0.01, inplace=False): ...


def _gelu(input, approximate="none"): ...


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1): ...


def _transposed(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1): ...


def _sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False): ...


# name here -> (signature, whatever a graph may call for it)
_KNOWN = {
    "conv2d": (_conv2d, torch.conv2d),
    "conv_transpose2d": (_transposed, torch.conv_transpose2d),
    "interpolate": (F.interpolate, F.interpolate),
    "group_norm": (F.group_norm, F.group_norm),
    "batch_norm": (F.batch_norm, F.batch_norm),
    "scaled_dot_product_attention": (_sdpa, F.scaled_dot_product_attention),
    "dropout": (F.dropout, F.dropout),
    "softmax": (_softmax, F.softmax, torch.softmax, "softmax"),
    "matmul": (_binary, operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"),
    "mul": (_binary, operator.mul, torch.mul, "mul"),
    "truediv": (_binary, operator.truediv, torch.div, "div"),
    "add": (_add, operator.add, torch.add, "add"),
    "add_": (_add, operator.iadd, "add_"),
    "relu": (_activation, F.relu, torch.relu, torch.relu_, "relu", "relu_"),
    "silu": (_activation, F.silu),
    "tanh": (_activation, F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"),
    "sigmoid": (_activation, F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"),
    "leaky_relu": (_leaky_relu, F.leaky_relu),
    "gelu": (_gelu, F.gelu),
}
_CALLS = {
    target: (name, inspect.signature(signature)) for name, (signature, *targets) in _KNOWN.items() for target in targets
}
_ACTIVATIONS = {name: name for name in ("relu", "silu", "gelu", "tanh", "sigmoid")} | {"leaky_relu": "lrelu"}
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_PRODUCTS = ("matmul", "mul", "truediv")
_EFFECTS = {torch.amp.autocast_mode._enter_autocast, operator.setitem, operator.delitem}
_EFFECTS |= {getattr(operator, f"i{name}") for name in _ARITHMETIC}
_FINDERS = {
    "conv2d": _find_conv2d,
    "group_norm": _find_group_norm,
    "conv_transpose2d": _find_conv_transpose2d,
    "scaled_dot_product_attention": _find_scaled_dot_product_attention,
    "softmax": _find_softmax,
}
