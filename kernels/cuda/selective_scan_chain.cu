#include "selective_scan_chain.cuh"

namespace mamba::scan {

template <typename T, int kLanes>
int launch(const Chain<T, kLanes>& layout, const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream) {
  const int count = layout.slots(t), bytes = count * layout.slot_bytes(t.groups) + layout.fixed_bytes(t.groups, t.warps);
  if (!allow_shared<chain_kernel<T, kLanes>>(bytes)) return MAMBA_ERROR_TACTIC;
  const dim3 grid(args.ngroups * ceil_div(args.group_dim, t.groups * layout.kWidth), batch);
  const dim3 block(32 * (t.groups * t.warps + t.copiers));
  return launch_early(chain_kernel<T, kLanes>, grid, block, bytes, stream, args, t.groups, t.warps, count);
}

template <typename T> int launch_chain(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream) {
  return with_chain<T>(t, [&](auto layout) { return launch(layout, args, t, batch, stream); });
}

template int launch_chain(const Args<float>&, const Tactic&, int, cudaStream_t);
template int launch_chain(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_chain(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
