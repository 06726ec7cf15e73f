"""Operators that are linear in x and in weight.

With C(x, w) for one, X(g, w) and W(g, x) for its two gradients, <g, C(x, w)> = <x, X(g, w)> = <w, W(g, x)>: each one's
gradients are the other two.
"""

from .. import _library
from ._precision import allow_tf32

# For the CUDA operators to ask while they run: what torch.compile traced follows the switch too, as torch's own do.
_library.define("allow_tf32(Tensor x) -> bool", lambda x: allow_tf32())


def register(op, *, fakes, setup_contexts, backwards):
    """Attach to C, X and W of `op`, and to their Triton twins, what `_library.register` takes, one each.

    backwards are functions of the operators (C, X, W): they make the backward of each of the three.
    """
    for twin in "", "_triton":
        names = [f"{op}{part}{twin}" for part in ("", "_backward_input", "_backward_weight")]
        operators = [_library.op(name) for name in names]
        for name, fake, setup_context, backward in zip(names, fakes, setup_contexts, backwards, strict=True):
            autocast = (0, 1, 2) if name == names[0] else ()  # x, weight and bias
            _library.register(
                name, fake=fake, setup_context=setup_context, backward=backward(*operators), autocast=autocast
            )
