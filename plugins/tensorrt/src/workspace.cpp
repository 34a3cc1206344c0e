#include "workspace.h"

#include <cuda_runtime_api.h>

#include <algorithm>

namespace mamba_plugin {
namespace {

int64_t power_of_two_from(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

// Without a GPU the kernels can't plan. 16 pieces of 256 tokens, each with a state: what they use at most shapes.
size_t bound_without_gpu(const Sizes& sizes, const std::vector<Tensor>& inputs, int64_t batch, int64_t seqlen) {
  size_t state = 4;
  for (const int64_t size : inputs[7].shape) state *= static_cast<size_t>(size);
  state = state / static_cast<size_t>(sizes['B']) * static_cast<size_t>(batch);
  const auto pieces = static_cast<size_t>(std::min<int64_t>(16, seqlen / 256));
  return pieces < 2 ? 0 : pieces * (state + state / 8);
}

}  // namespace

bool gpu_present() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

size_t workspace_bound(const Kernel& kernel, const Sizes& sizes, const std::vector<Tensor>& inputs, bool for_gpu,
                       size_t need) {
  if (sizes['L'] < 0) return 0;  // the ops without a sequence need none
  const int64_t last_batch = power_of_two_from(sizes['B']), last_seqlen = power_of_two_from(sizes['L']);
  if (!for_gpu) return inputs.size() > 7 ? bound_without_gpu(sizes, inputs, last_batch, last_seqlen) : 0;
  size_t largest = 0;
  const std::unique_ptr<Kernel> probe = kernel.clone();
  for (int64_t batch = last_batch; batch >= 1; batch /= 2) {
    for (int64_t seqlen = last_seqlen; seqlen >= 1; seqlen /= 2) {
      Sizes at = sizes;
      at.set('B', batch), at.set('L', seqlen);
      probe->set_shapes(at, inputs);
      largest = std::max(largest, probe->workspace(-1));
      if (need > 0 && largest >= need) return largest;
    }
  }
  return largest;
}

}  // namespace mamba_plugin
