// The five ops in double, written from their definitions: what every enqueue is compared with.
#ifndef MAMBA_PLUGIN_TESTS_REFERENCE_H_
#define MAMBA_PLUGIN_TESTS_REFERENCE_H_

#include <cstdint>
#include <vector>

namespace plugin_tests {

enum class Op { kConv, kScan, kScanStep, kSsd, kSsdStep };

inline bool is_step(Op op) { return op == Op::kScanStep || op == Op::kSsdStep; }
inline bool is_ssd(Op op) { return op == Op::kSsd || op == Op::kSsdStep; }

// `width`: channels, or heads of `headdim` channels; `state`: d_state, or the taps of a convolution.
struct Sizes {
  int64_t batch, length, width, headdim, groups, state;
};

struct Options {
  bool gate = false, ragged = false, reverse = false, skip_per_channel = false, activation = true, softplus = true;
  double dt_min = 0.0, dt_max = 3.4028234663852886e38;
};

// Inputs of a node by role, row-major, and what it computes from them.
struct Operands {
  std::vector<double> x, dt, A, B, C, D, bias, state, z;  // of a convolution: x, weight in A, bias, state
  std::vector<int32_t> lens;                               // one a row; the whole length without `ragged`
};
struct Results {
  std::vector<double> y, state;
};

Results reference(Op op, const Sizes& sizes, const Options& options, const Operands& operands);

}  // namespace plugin_tests
#endif  // MAMBA_PLUGIN_TESTS_REFERENCE_H_
