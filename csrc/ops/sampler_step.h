// sampler_step: one row of coefficients applied to the state of a diffusion sampler, with guidance, thresholding,
// noise, inpainting and the next model input; elementwise over tensors of any strides.
#pragma once
#include <cstdint>

#include "common/scalar.h"

namespace imagegen {

constexpr int kStepMaxDims = 8;  // the samples' axis included
constexpr int kStepMaxSlots = 8;

// The columns of a row before and after those of the slots c_h0 …; imagegen/ops/eager/sampler_step.py names them too.
enum StepColumnBefore : int { kTime, kScale, kAx, kAm, kCx, kC0, kCm, kCn, kStepColumnsBefore };
enum StepColumnAfter : int { kQx, kQ0, kQm, kSlot, kB0, kB1, kStepColumnsAfter };
constexpr int kStepColumns = int{kStepColumnsBefore} + int{kStepColumnsAfter};  // and one for each slot between them

// What a step reads and writes.
enum StepOperandName : int {
  kX,
  kModelOutput,
  kUncondOutput,
  kNoise,
  kSlots,                               // kStepMaxSlots of them
  kStepTerms = kSlots + kStepMaxSlots,  // x' and the stored tensor are sums of those above
  kMask = kStepTerms,
  kKnown,
  kKnownNoise,
  kNext,
  kStored,  // where one tensor takes what every sample stores; in place it is the sample's slot
  kModelInput,
  kStepOperands
};

// A tensor as [samples, size...] in the order in which a sample is walked through; neighbouring axes that can be one
// are.
struct StepOperand {
  void* data;  // null where there is none
  Dtype dtype;
  int dims;  // those of a sample, outermost first; at least 1
  int64_t sample_stride;
  int64_t size[kStepMaxDims - 1], stride[kStepMaxDims - 1];
};

struct SamplerStepParams {
  StepOperand operand[kStepOperands];
  int slots;
  int64_t samples, size;  // size: elements of a sample
  Dtype dtype;            // x's
  bool in_place;          // what a sample stores goes to its operand[kSlots + slot]

  const double* rows;                      // [samples or 1, columns]
  int64_t row_stride;                      // 0: one row for all
  const double* guidance;                  // [samples], or null: `scale` for all
  double scale, rescale, clip, threshold;  // clip: infinity for none; threshold: 0 for none

  bool seeded;
  uint64_t seed;
  uint32_t first, step;
  const int64_t* index;  // [samples or 1] steps, or null: `step` for all
  int64_t index_stride;

  int copies;
  bool streamed;  // outputs go past the caches

  // Of the passes before: deviations and magnitudes, written only where rescale or threshold asks for them.
  double* factor;    // [samples] on the guided output
  double* bound;     // [samples] s of the threshold
  double* partials;  // [samples, blocks, 4] mean and squared deviations of the conditional and the guided output
  void* magnitudes;  // [samples, size] |x_0|
};

// Where the rows are for the GPU, whose host does not read them: a launch never waits for the device.
struct StepRows {
  double value[kStepColumns + kStepMaxSlots];  // the one row, where the host has it
  const void* data;                            // else the rows, or the table, on the device
  bool is_double, by_sample;
  int64_t count, row_stride, column_stride;
  const int64_t* index;  // which row of the table; by_sample: one for each sample
  int64_t index_stride;
  uint32_t packed;  // bit i: operand i's elements lie side by side, four of them aligned
};

constexpr int64_t kStepBlock = 1024;  // elements at a time: a block of every term stays in L1

static constexpr int64_t step_blocks(int64_t size) {
  return (size + kStepBlock - 1) / kStepBlock;
}

}  // namespace imagegen
