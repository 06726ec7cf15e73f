// faulty_product.cu as a program, for the sanitizers: the argument is the bug.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/scalar.h"

extern "C" const char* product_bf16(const imagegen::bf16*, const imagegen::bf16*, float*, int, int);

int main(int, char** arguments) {
  constexpr int depth = 128;
  const std::vector<imagegen::bf16> a(32 * depth, {0x3F80}), b(64 * depth, {0x3F00});  // 1 and 0.5
  std::vector<float> c(32 * 64);
  const char* error = product_bf16(a.data(), b.data(), c.data(), depth, std::atoi(arguments[1]));
  std::printf("%s %g\n", error ? error : "ran", c[0]);
}
