#include "selective_scan_chain.cuh"

namespace mamba::scan {

template <typename T, int G, bool kStateOnly>
static int launch(const Args<T>& args, const Tactic& tactic, int batch, int pieces, cudaStream_t stream) {
  auto kernel = chain_kernel<T, G, kStateOnly>;
  size_t bytes = Chain<G>::shared_bytes(tactic.groups, tactic.warps, sizeof(T));
  if (bytes > 48 * 1024 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)) != cudaSuccess) {
    cudaGetLastError();
    return MAMBA_ERROR_TACTIC;
  }
  dim3 grid(args.ngroups * ceil_div(args.group_dim, tactic.groups * G), batch, pieces);
  kernel<<<grid, 32 * tactic.warps, bytes, stream>>>(args, tactic.groups);
  return launch_status();
}

template <typename T, int G>
static int launch_pieces(const Args<T>& args, const Tactic& tactic, int batch, cudaStream_t stream) {
  if (tactic.pieces > 1) {
    // State at the end of every piece but the last, each from zero; the second pass chains them.
    int status = launch<T, G, true>(args, tactic, batch, tactic.pieces - 1, stream);
    if (status != MAMBA_OK) return status;
  }
  return launch<T, G, false>(args, tactic, batch, tactic.pieces, stream);
}

template <typename T> int launch_chain(const Args<T>& args, const Tactic& tactic, int batch, cudaStream_t stream) {
  if (tactic.warps < 2 || tactic.warps > 12 || tactic.groups < 1 || tactic.groups > 6) return MAMBA_ERROR_TACTIC;
  return tactic.kernel == Tactic::kChain4 ? launch_pieces<T, 4>(args, tactic, batch, stream)
                                          : launch_pieces<T, 8>(args, tactic, batch, stream);
}

template int launch_chain(const Args<float>&, const Tactic&, int, cudaStream_t);
template int launch_chain(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_chain(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
