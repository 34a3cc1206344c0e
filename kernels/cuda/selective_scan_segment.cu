#include "selective_scan_segment.cuh"

namespace mamba::scan {

template <typename T, int kTau, int kPhases, bool kStateOnly>
static int launch(const Args<T>& args, int pairs, int batch, int pieces, cudaStream_t stream) {
  auto kernel = segment_kernel<T, kTau, kPhases, kStateOnly>;
  const size_t bytes = Segment<T, kTau, kPhases>::shared_bytes(pairs);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)) != cudaSuccess) {
    cudaGetLastError();
    return MAMBA_ERROR_TACTIC;  // more shared memory than this device has
  }
  const dim3 grid(args.ngroups * ceil_div(args.group_dim, 2 * pairs), batch, pieces);
  kernel<<<grid, 32 * pairs * kPhases, bytes, stream>>>(args, pairs);
  return launch_status();
}

template <typename T, int kTau, int kPhases>
static int launch_pieces(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream) {
  if (t.pieces > 1) {
    // State at the end of every piece but the last, each from zero; the second pass chains them.
    const int status = launch<T, kTau, kPhases, true>(args, t.groups, batch, t.pieces - 1, stream);
    if (status != MAMBA_OK) return status;
  }
  return launch<T, kTau, kPhases, false>(args, t.groups, batch, t.pieces, stream);
}

template <typename T> int launch_segment(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream) {
  const int phases = t.warps;
  if (t.groups < 2 || t.groups % 2 != 0 || t.groups * phases > 12) return MAMBA_ERROR_TACTIC;
  if (t.kernel == Tactic::kSegment16) {
    return phases == 1 ? launch_pieces<T, 16, 1>(args, t, batch, stream) : launch_pieces<T, 16, 2>(args, t, batch, stream);
  }
  if (t.kernel == Tactic::kSegment4) {
    return phases == 2 ? launch_pieces<T, 4, 2>(args, t, batch, stream) : int(MAMBA_ERROR_TACTIC);
  }
  return phases == 1 ? launch_pieces<T, 8, 1>(args, t, batch, stream) : launch_pieces<T, 8, 2>(args, t, batch, stream);
}

template int launch_segment(const Args<float>&, const Tactic&, int, cudaStream_t);
template int launch_segment(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_segment(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
