// attention: out = softmax(scale * q k^T + mask) v, and its gradients.
#pragma once
#include <cstdint>

#include "common/scalar.h"

namespace imagegen {

constexpr int64_t kAttentionMaxHeadDim = 512;

// A tensor (B, heads, L, D) whose elements along D are neighbours; null where absent.
template <class Void>
struct AttentionTensor {
  Void* p;
  int64_t batch_stride, head_stride, row_stride;
};
using AttentionInput = AttentionTensor<const void>;
using AttentionOutput = AttentionTensor<void>;

enum class AttentionMaskKind : int { none, boolean, additive };

// Broadcast to (B, H, Lq, Lk): strides are 0 along the axes it does not have.
struct AttentionMask {
  AttentionMaskKind kind;
  const void* p;
  Dtype dtype;  // of an additive mask
  int64_t batch_stride, head_stride, q_stride, k_stride;
};

struct AttentionParams {
  AttentionInput q;  // [B, H, Lq, D]
  AttentionInput k;  // [B, Hk, Lk, D]
  AttentionInput v;  // [B, Hk, Lk, D]
  AttentionMask mask;
  AttentionOutput out;   // [B, H, Lq, D]: written by the forward, read by the backward
  void* lse;             // [B, H, Lq]: likewise; float, double for double q
  AttentionInput grad;   // [B, H, Lq, D], of out, for the backward
  AttentionOutput dq;    // [B, H, Lq, D]
  AttentionOutput dk;    // [B, Hk, Lk, D]
  AttentionOutput dv;    // [B, Hk, Lk, D]
  void* dmask;           // contiguous in the mask's own shape and dtype, or null
  int64_t mask_size[4];  // that shape's four axes, for the backward on CUDA
  float* delta;          // [B, H, Lq]: workspace of the backward on CUDA
  Dtype dtype;
  bool causal;  // query i sees the keys up to i + k_len - q_len
  double scale;
  int64_t batch, heads, kv_heads, q_len, k_len, head_dim;
  int64_t multiprocessors;  // of the GPU
};

}  // namespace imagegen

#ifdef TORCH_STABLE_ONLY  // the host's half: kernel files see no torch
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdio>

#include "common/check.h"

namespace imagegen {

inline void check_attention_mask(const Tensor& mask, const Tensor& q, int64_t k_len) {
  check_same_device("attention", "mask", mask, q, "q");
  const ScalarType type = mask.scalar_type();
  IMAGEGEN_CHECK(type == ScalarType::Bool || type == q.scalar_type() || type == ScalarType::Float,
                 "attention: mask must be torch.bool, q's dtype ", dtype_string(q.scalar_type()),
                 " or torch.float32, got ", dtype_string(type));
  const std::vector<int64_t> full{q.size(0), q.size(1), q.size(2), k_len};
  bool broadcasts = mask.dim() <= 4;
  for (int64_t d = 0; broadcasts && d < mask.dim(); ++d)
    broadcasts = mask.size(d) == 1 || mask.size(d) == full[4 - mask.dim() + d];
  IMAGEGEN_CHECK(broadcasts,
                 "attention: mask must have a shape that broadcasts to (B, H, Lq, Lk) = ", shape_string(full), ", got ",
                 shape_string(mask));
}

inline void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                            double scale) {
  constexpr const char* op = "attention";
  check_dtype(op, "q", q);
  IMAGEGEN_CHECK(q.dim() == 4, op, ": q must have shape (B, H, Lq, D), got ", shape_string(q));
  const int64_t head_dim = q.size(3);
  IMAGEGEN_CHECK(1 <= head_dim && head_dim <= kAttentionMaxHeadDim, op,
                 ": q must have a head dimension D of 1 to 512, got ", head_dim);
  check_same_device(op, "k", k, q, "q");
  check_same_dtype(op, "k", k, q, "q");
  check_same_device(op, "v", v, q, "q");
  check_same_dtype(op, "v", v, q, "q");
  IMAGEGEN_CHECK(k.dim() == 4 && k.size(0) == q.size(0) && k.size(3) == head_dim, op, ": k must have shape (",
                 q.size(0), ", Hk, Lk, ", head_dim, ") to match q ", shape_string(q), ", got ", shape_string(k));
  IMAGEGEN_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, op, ": k must have a number of heads that divides q's ",
                 q.size(1), ", got ", k.size(1));
  IMAGEGEN_CHECK(shape_of(v) == shape_of(k), op, ": v must have k's shape ", shape_string(k), ", got ",
                 shape_string(v));
  if (mask) check_attention_mask(*mask, q, k.size(2));
  char number[32];
  std::snprintf(number, sizeof(number), "%g", scale);
  IMAGEGEN_CHECK(0 < scale && scale < INFINITY, op, ": scale must be positive and finite, got ", number);
}

inline ScalarType attention_lse_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_attention_backward(const Tensor& grad, const Tensor& q, const std::optional<Tensor>& mask,
                                     const Tensor& out, const Tensor& lse, bool mask_needs_grad) {
  constexpr const char* op = "attention";
  const std::pair<const char*, const Tensor&> like_q[] = {{"grad", grad}, {"out", out}};
  for (const auto& [argument, t] : like_q) {
    check_same_device(op, argument, t, q, "q");
    check_same_dtype(op, argument, t, q, "q");
    IMAGEGEN_CHECK(shape_of(t) == shape_of(q), op, ": ", argument, " must have q's shape ", shape_string(q), ", got ",
                   shape_string(t));
  }
  check_same_device(op, "lse", lse, q, "q");
  const std::vector<int64_t> rows{q.size(0), q.size(1), q.size(2)};
  IMAGEGEN_CHECK(shape_of(lse) == rows && lse.scalar_type() == attention_lse_dtype(q) && lse.is_contiguous(), op,
                 ": lse must be contiguous of shape ", shape_string(rows), " and dtype ",
                 dtype_string(attention_lse_dtype(q)), ", got ", shape_string(lse), " of ",
                 dtype_string(lse.scalar_type()));
  IMAGEGEN_CHECK(!mask_needs_grad || (mask && mask->scalar_type() != ScalarType::Bool), op,
                 ": mask must be additive to have a gradient");
}

// An uninitialised tensor like x (B, H, L, D): the rule of empty_like_heads in imagegen/ops/_layout.py.
inline Tensor empty_like_heads(const Tensor& x) {
  const int64_t B = x.size(0), H = x.size(1), L = x.size(2), D = x.size(3);
  const bool joined = H > 1 && L > 1 && x.stride(1) < x.stride(2);
  const std::vector<int64_t> size = joined ? std::vector{B, L, H, D} : std::vector{B, H, L, D};
  const Tensor t = torch::stable::empty(size, x.scalar_type(), std::nullopt, x.device());
  return joined ? torch::stable::transpose(t, 1, 2) : t;
}

// t itself where its rows are without gaps, else a copy.
inline Tensor with_unit_rows(const Tensor& t) {
  return t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

inline AttentionInput attention_input(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline AttentionOutput attention_output(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline AttentionMask attention_mask(const std::optional<Tensor>& mask) {
  if (!mask) return {};
  const bool boolean = mask->scalar_type() == ScalarType::Bool;
  AttentionMask m{boolean ? AttentionMaskKind::boolean : AttentionMaskKind::additive,
                  mask->const_data_ptr(),
                  boolean ? Dtype::f32 : check_dtype("attention", "mask", *mask),
                  0,
                  0,
                  0,
                  0};
  int64_t* const strides[] = {&m.k_stride, &m.q_stride, &m.head_stride, &m.batch_stride};
  for (int64_t d = 0; d < mask->dim(); ++d)
    if (mask->size(d) > 1) *strides[mask->dim() - 1 - d] = mask->stride(d);
  return m;
}

// What the forward and the backward share; q, k and v have unit rows.
inline AttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const std::optional<Tensor>& mask, const Tensor& out, const Tensor& lse,
                                        bool causal, double scale) {
  AttentionParams p{};
  p.q = attention_input(q), p.k = attention_input(k), p.v = attention_input(v);
  p.mask = attention_mask(mask);
  p.out = attention_output(out);
  p.lse = lse.mutable_data_ptr();
  p.dtype = check_dtype("attention", "q", q);
  p.causal = causal, p.scale = scale;
  p.batch = q.size(0), p.heads = q.size(1), p.q_len = q.size(2), p.head_dim = q.size(3);
  p.kv_heads = k.size(1), p.k_len = k.size(2);
  return p;
}

}  // namespace imagegen
#endif
