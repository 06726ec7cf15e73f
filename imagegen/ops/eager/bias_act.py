import torch.nn.functional as F

from .._activation import ACTIVATIONS


def bias_act(x, b, dim, act, alpha, gain, clamp):
    if b is not None:
        x = x + b.reshape([-1 if d == dim else 1 for d in range(x.dim())])
    y = F.leaky_relu(x, alpha) if act == "lrelu" else ACTIVATIONS[act](x)
    y = y * gain
    return y if clamp is None else y.clamp(-clamp, clamp)
