#include "selective_scan_chain.cuh"

namespace mamba::scan {

template <typename T> int launch_chain(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream) {
  using L = Chain;
  const int count = chain_slots<T>(t);
  const int bytes = count * L::slot_bytes<T>(t.groups) + L::fixed_bytes(t.groups, t.warps);
  if (!allow_shared<chain_kernel<T>>(bytes)) return MAMBA_ERROR_TACTIC;
  const dim3 grid(args.ngroups * ceil_div(args.group_dim, t.groups * L::kWidth), batch);
  return launch_early(chain_kernel<T>, grid, 32 * (t.groups * t.warps + t.copiers), bytes, stream, args, t.groups, t.warps, count);
}

template int launch_chain(const Args<float>&, const Tactic&, int, cudaStream_t);
template int launch_chain(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_chain(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
