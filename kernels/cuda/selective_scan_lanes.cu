#include "selective_scan_lanes.cuh"

namespace mamba::scan {

template <typename T, int kChains, int kPasses>
int launch_lanes(const Args<T>& args, const Lanes& layout, int batch, cudaStream_t stream) {
  const int slots = layout.slots<T>(), bytes = layout.bytes<T>(slots);
  if (!allow_shared<lanes_kernel<T, kChains, kPasses>>(bytes)) return MAMBA_ERROR_TACTIC;
  const dim3 grid(args.ngroups * ceil_div(args.group_dim, layout.quads * Lanes::kQuad), batch);
  const int warps = layout.quads * 2 / kChains + layout.groups * layout.group_warps() + 1;
  lanes_kernel<T, kChains, kPasses><<<grid, 32 * warps, bytes, stream>>>(args, layout, slots);
  return launch_status();
}

template <typename T> int launch_lanes(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream) {
  const Lanes layout = lanes_layout(t);
  if (t.copiers == 1) return launch_lanes<T, 1, 1>(args, layout, batch, stream);
  return layout.passes == 1 ? launch_lanes<T, 2, 1>(args, layout, batch, stream) : launch_lanes<T, 2, 2>(args, layout, batch, stream);
}

template int launch_lanes(const Args<float>&, const Tactic&, int, cudaStream_t);
template int launch_lanes(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_lanes(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
