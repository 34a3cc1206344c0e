#include "selective_scan_segment.cuh"

namespace mamba::scan {

template <typename T, typename L> int launch(const Args<T>& args, int Q, int batch, cudaStream_t stream) {
  const int N = L::stages(Q), items = batch * args.ngroups * ceil_div(args.group_dim, Q * L::kWidth);
  const int bytes = L::shared_bytes(Q, N);
  if (!allow_shared<segment_kernel<T, L>>(bytes)) return MAMBA_ERROR_TACTIC;
  const dim3 grid(std::min(items, sm_count())), block(32 * (L::kWarps + L::kCopiers));
  return launch_early(segment_kernel<T, L>, grid, block, bytes, stream, args, items, Q, N);
}

template <typename T> int launch_segment(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream) {
  return with_segment<T>(t, [&](auto layout) { return launch<T, decltype(layout)>(args, t.groups, batch, stream); });
}

template int launch_segment(const Args<float>&, const Tactic&, int, cudaStream_t);
template int launch_segment(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_segment(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
