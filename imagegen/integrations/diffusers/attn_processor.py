from ... import ops


class AttnProcessor:
    """Computes diffusers' Attention with imagegen.ops.attention: the images of its default processor, sooner.

        unet.set_attn_processor(AttnProcessor())

    Takes what AttnProcessor2_0 takes: group and spatial norms, norms of q and k, cross-attention, masks, images
    (B, C, H, W) as well as sequences (B, L, C).
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **_):
        x, residual = hidden_states, hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        image_size = x.shape[2:] if x.ndim == 4 else None
        if image_size:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)

        y = self._attend(attn, x, encoder_hidden_states, attention_mask)
        for module in attn.to_out:  # a projection, then dropout
            y = module(y)

        if image_size:
            y = y.transpose(1, 2).unflatten(2, image_size)
        if attn.residual_connection:
            y = y + residual
        return y / attn.rescale_output_factor

    def _attend(self, attn, x, context, mask):
        q = attn.to_q(x)
        if context is None:
            context = x
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        B, Lk = context.shape[:2]
        head_dim = q.shape[-1] // attn.heads
        q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (q, attn.to_k(context), attn.to_v(context)))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, Lk, B).unflatten(0, (B, attn.heads))
        return ops.attention(q, k, v, mask=mask).transpose(1, 2).flatten(2)
