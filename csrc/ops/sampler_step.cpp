#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(imagegen, m) {
  // x', then what is stored where store is set, then the next model input where copies is not 0. Where shared is set,
  // x' is the first copy of the next model input and not returned by itself. A slot of no elements is one that nothing
  // was stored in.
  m.def(
      "sampler_step(Tensor x, Tensor[] slots, Tensor model_output, Tensor? uncond_output, Tensor? noise, Tensor? mask, "
      "Tensor? known, Tensor? known_noise, Tensor row, Tensor? index, Tensor? guidance, float scale, float rescale, "
      "float? clip, float? threshold, int? seed, int step, int first, bool store, int copies, bool "
      "shared, ScalarType model_input_dtype) -> Tensor[]");
  // The next model input; of no elements where copies is 0.
  m.def(
      "sampler_step_(Tensor(a!) state, Tensor model_output, Tensor? uncond_output, Tensor? noise, Tensor? mask, "
      "Tensor? "
      "known, Tensor? known_noise, Tensor row, Tensor? index, Tensor? guidance, float scale, float rescale, float? "
      "clip, float? threshold, int? seed, int step, int first, int copies, ScalarType model_input_dtype) -> Tensor");
}
