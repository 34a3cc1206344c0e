#include "selective_scan_matrix.cuh"

namespace mamba::scan {

template <typename T> int launch_matrix(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream) {
  using M = Matrix;
  const int slots = matrix_slots(t);
  const int bytes = slots * int(sizeof(float)) * M::slot_floats(t.groups) + M::fixed_bytes(t.groups, t.warps);
  const dim3 grid(args.ngroups * ceil_div(args.group_dim, t.groups * M::kWidth), batch);
  if (!allow_shared<matrix_kernel<T>>(bytes)) return MAMBA_ERROR_TACTIC;
  matrix_kernel<T><<<grid, 32 * (t.groups * t.warps + t.copiers), bytes, stream>>>(args, t.groups, t.warps, slots);
  return launch_status();
}

template int launch_matrix(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_matrix(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
