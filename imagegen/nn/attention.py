import torch
import torch.nn.functional as F

from .. import ops


class Attention(torch.nn.Module):
    """Multi-head self- or cross-attention: projections, attention, projection; see imagegen.ops.attention.

        q, k, v = x Wq, c Wk, c Wv    per head; c is the context, or x
        y = attention(rotate(norm(q)), rotate(norm(k)), v) Wout     norm and rotate where asked

    The projections of x are one matrix product, and attention reads its heads from there without a copy.

    Args:
        dim: channels of x and of the output.
        heads: number of heads.
        context_dim: channels of the context of cross-attention. None: x's own, and the context is optional.
        kv_heads: number of heads of k and v, a divisor of heads; None is heads.
        head_dim: None is dim / heads.
        bias, out_bias: whether the projections have biases.
        qk_norm: whether q and k are RMS-normalised over each head, with a learned weight.
        eps: of that norm.

    Loads the state_dict of torch.nn.MultiheadAttention (whatever its batch_first: x is (B, L, dim) here) and of
    diffusers' Attention unchanged. from_torch takes either module.
    Source: Vaswani et al., "Attention Is All You Need", 2017; norm: Henry et al., "Query-Key Normalization for
        Transformers", 2020; rotation: Su et al., "RoFormer", 2021.
    """

    def __init__(
        self,
        dim,
        heads=8,
        *,
        context_dim=None,
        kv_heads=None,
        head_dim=None,
        bias=True,
        out_bias=True,
        qk_norm=False,
        eps=1e-6,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        if head_dim is None and dim % heads:
            raise ValueError(f"Attention: heads must divide dim {dim} where head_dim is None, got {heads}")
        self.head_dim = head_dim or dim // heads
        factory = {"device": device, "dtype": dtype}
        q_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if context_dim is None:
            self.qkv = torch.nn.Linear(dim, q_dim + 2 * kv_dim, bias, **factory)
        else:
            self.q = torch.nn.Linear(dim, q_dim, bias, **factory)
            self.kv = torch.nn.Linear(context_dim, 2 * kv_dim, bias, **factory)
        self.out = torch.nn.Linear(q_dim, dim, out_bias, **factory)
        self.norm_q = torch.nn.RMSNorm(self.head_dim, eps, **factory) if qk_norm else None
        self.norm_k = torch.nn.RMSNorm(self.head_dim, eps, **factory) if qk_norm else None

    @classmethod
    def from_torch(cls, attention):
        """The same attention, with copies of the parameters of a torch.nn.MultiheadAttention or diffusers Attention.

        Raises: ValueError where the module does more than this one.
        """
        options = _options_of_torch if isinstance(attention, torch.nn.MultiheadAttention) else _options_of_diffusers
        parameter = next(attention.parameters())
        self = cls(**options(attention), device=parameter.device, dtype=parameter.dtype)
        self.load_state_dict(attention.state_dict())
        return self.train(attention.training)

    def forward(self, x, context=None, *, mask=None, causal=False, rotary=None, rotary_pairs="neighbours"):
        """Attend from x (B, Lq, dim) to context (B, Lk, context_dim), or to x.

        Args:
            mask, causal: as imagegen.ops.attention takes them; mask broadcasts to (B, heads, Lq, Lk).
            rotary: angles (Lq, head_dim / 2), or with leading axes that broadcast to (B, heads, Lq, head_dim / 2), by
                which q and k are rotated in pairs of channels. For self-attention.
            rotary_pairs: as imagegen.ops.attention takes it.

        Returns: (B, Lq, dim).
        """
        if rotary is not None and context is not None:
            raise ValueError("Attention: rotary must be None where a context is given: its positions are not x's")
        q, k, v = (self._heads(t) for t in self._project(x, context))
        norms = {}
        if self.norm_q is not None:
            norms = {"q_norm": self.norm_q.weight, "k_norm": self.norm_k.weight, "norm_eps": self.norm_q.eps}
        if rotary is not None:
            rotary = rotary.cos(), rotary.sin()
        y = ops.attention(q, k, v, mask=mask, causal=causal, **norms, rotary=rotary, rotary_pairs=rotary_pairs)
        return self.out(y.transpose(1, 2).flatten(2))

    def _project(self, x, context):
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        if hasattr(self, "q"):
            if context is None:
                raise ValueError("Attention: context must be given: this module was made with a context_dim")
            return self.q(x), *self.kv(context).split(sizes[1:], -1)
        if context is None:
            return self.qkv(x).split(sizes, -1)
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x, weight[: sizes[0]], None if bias is None else bias[: sizes[0]])
        kv = F.linear(context, weight[sizes[0] :], None if bias is None else bias[sizes[0] :])
        return q, *kv.split(sizes[1:], -1)

    def _heads(self, t):
        return t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._adopt(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _adopt(self, state, prefix):
        """Rename and join the parameters of torch.nn.MultiheadAttention and of diffusers' Attention."""
        q_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for kind in ("weight", "bias"):
            parts = next(
                (
                    [state.pop(prefix + name) for name in names]
                    for names in (
                        [f"in_proj_{kind}"],
                        [f"{n}_proj_{kind}" for n in "qkv"],
                        [f"to_{n}.{kind}" for n in "qkv"],
                    )
                    if all(prefix + name in state for name in names)
                ),
                None,
            )
            if parts is not None:
                q, k, v = parts[0].split([q_dim, kv_dim, kv_dim]) if len(parts) == 1 else parts
                joined = {"q": q, "kv": torch.cat([k, v])} if hasattr(self, "q") else {"qkv": torch.cat([q, k, v])}
                state.update({f"{prefix}{name}.{kind}": t for name, t in joined.items()})
            for name in ("out_proj", "to_out.0"):
                if f"{prefix}{name}.{kind}" in state:
                    state[f"{prefix}out.{kind}"] = state.pop(f"{prefix}{name}.{kind}")

    def extra_repr(self):
        return f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"


def _options_of_torch(attention):
    _refuse(
        attention,
        {
            "bias_k": attention.bias_k is not None,
            "add_zero_attn": attention.add_zero_attn,
            "dropout in training": attention.dropout > 0 and attention.training,
            "kdim other than vdim": attention.kdim != attention.vdim,
        },
    )
    return {
        "dim": attention.embed_dim,
        "heads": attention.num_heads,
        "context_dim": None if attention._qkv_same_embed_dim else attention.kdim,
        "bias": attention.in_proj_bias is not None,
        "out_bias": attention.out_proj.bias is not None,
    }


def _options_of_diffusers(attention):
    norm = attention.norm_q
    _refuse(
        attention,
        {
            "group_norm": attention.group_norm is not None,
            "spatial_norm": attention.spatial_norm is not None,
            "norm_cross": bool(attention.norm_cross),
            "added_kv_proj_dim": attention.added_kv_proj_dim is not None,
            "residual_connection": attention.residual_connection,
            "rescale_output_factor": attention.rescale_output_factor != 1,
            "dropout in training": attention.dropout > 0 and attention.training,
            f"norm_q {type(norm).__name__}": norm is not None and not _is_rms_norm(norm, _head_dim(attention)),
            "out_dim": attention.to_out[0].out_features != attention.to_q.in_features,
        },
    )
    return {
        "dim": attention.to_q.in_features,
        "heads": attention.heads,
        "context_dim": attention.to_k.in_features if attention.is_cross_attention else None,
        "kv_heads": attention.to_k.out_features // _head_dim(attention),
        "head_dim": _head_dim(attention),
        "bias": attention.to_q.bias is not None,
        "out_bias": attention.to_out[0].bias is not None,
        "qk_norm": norm is not None,
        **({"eps": norm.eps} if norm is not None else {}),
    }


def _is_rms_norm(norm, dim):
    return type(norm).__name__ == "RMSNorm" and norm.weight is not None and norm.weight.numel() == dim


def _head_dim(attention):
    return attention.to_q.out_features // attention.heads


def _refuse(attention, features):
    present = [name for name, there in features.items() if there]
    if present:
        raise ValueError(f"Attention: {type(attention).__name__} must be without {', '.join(present)}")
