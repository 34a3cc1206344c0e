#include "selective_scan_chain_launch.cuh"

namespace mamba::scan {

template <typename T> int launch_chain(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream) {
  if (args.d_state != kState) return launch_chain_sizes(args, t, batch, stream);
  return with_lanes<T, kState>(t, [&](auto layout) { return launch_chain_kernel(layout, args, t, batch, stream); });
}

template int launch_chain(const Args<float>&, const Tactic&, int, cudaStream_t);
template int launch_chain(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_chain(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
