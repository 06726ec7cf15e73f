// randn: unit normals that depend on the seed and the image, or the bits they are made of.
#pragma once
#include <cstdint>

#include "common/scalar.h"

namespace imagegen {

struct RandnParams {
  void* out;  // [samples, size], contiguous
  Dtype dtype;
  bool bits;  // out is int32 and takes the bits
  int64_t samples, size;
  uint64_t seed;
  uint32_t step, stream, first;
};

}  // namespace imagegen

#ifdef TORCH_STABLE_ONLY  // the host's half: kernel files see no torch
#include "common/check.h"

namespace imagegen {

inline void check_counter(const char* op, int64_t step, int64_t first, int64_t samples) {
  IMAGEGEN_CHECK(0 <= step && step < int64_t{1} << 32, op, ": step must be from 0 to 2^32 - 1, got ", step);
  IMAGEGEN_CHECK(0 <= first && first <= (int64_t{1} << 32) - samples, op, ": first must be from 0 to 2^32 - ", samples,
                 " for ", samples, " images, got ", first);
}

inline RandnParams randn_params(const Tensor& out, int64_t seed, int64_t step, int64_t stream, int64_t first) {
  RandnParams p{};
  p.bits = out.scalar_type() == ScalarType::Int;
  p.dtype = p.bits ? Dtype::f32 : check_dtype("randn", "out", out);
  IMAGEGEN_CHECK(out.dim() > 0, "randn: shape must have an axis of images, got ()");
  IMAGEGEN_CHECK(out.is_contiguous(), "randn: out must be contiguous");
  check_counter("randn", step, first, out.size(0));
  IMAGEGEN_CHECK(0 <= stream && stream < 1 << 16, "randn: stream must be from 0 to 2^16 - 1, got ", stream);
  p.out = out.mutable_data_ptr();
  p.samples = out.size(0);
  p.size = p.samples ? out.numel() / p.samples : 0;
  p.seed = static_cast<uint64_t>(seed);
  p.step = static_cast<uint32_t>(step), p.stream = static_cast<uint32_t>(stream);
  p.first = static_cast<uint32_t>(first);
  return p;
}

}  // namespace imagegen
#endif
