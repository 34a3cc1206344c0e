#include "selective_scan_channel.cuh"

namespace mamba::scan {

template <typename T, bool kVec, int kFma, bool kStateOnly>
static int launch(const Args<T>& args, int batch, int pieces, cudaStream_t stream) {
  const int bytes = 2 * sizeof(ChannelShared<T>);
  if (!allow_shared<channel_kernel<T, kVec, kFma, kStateOnly>>(bytes)) return MAMBA_ERROR_TACTIC;
  const dim3 grid(args.ngroups * ceil_div(args.group_dim, kWidth), batch, pieces);
  channel_kernel<T, kVec, kFma, kStateOnly><<<grid, kWidth, bytes, stream>>>(args);
  return launch_status();
}

template <typename T, bool kVec, int kFma>
static int launch_pieces(const Args<T>& args, int batch, cudaStream_t stream) {
  if (args.pieces > 1) {
    // State at the end of every piece but the last, each from zero; the second pass chains them.
    const int status = launch<T, kVec, 0, true>(args, batch, args.pieces - 1, stream);
    if (status != MAMBA_OK) return status;
  }
  return launch<T, kVec, kFma, false>(args, batch, args.pieces, stream);
}

template <typename T> int launch_channel(const Args<T>& args, const Tactic& tactic, int batch, cudaStream_t stream) {
  if (!args.vec) return launch_pieces<T, false, 0>(args, batch, stream);
  // tactic.groups: decays computed on the FMA pipe.
  return tactic.groups == 1 ? launch_pieces<T, true, 1>(args, batch, stream) : launch_pieces<T, true, 0>(args, batch, stream);
}

template int launch_channel(const Args<float>&, const Tactic&, int, cudaStream_t);
template int launch_channel(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_channel(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
