#include "selective_scan_channel.cuh"

namespace mamba::scan {

template <typename T, bool kVec, int kFma> static int launch(const Args<T>& args, int batch, cudaStream_t stream) {
  auto kernel = channel_kernel<T, kVec, kFma>;
  const size_t bytes = 2 * sizeof(ChannelShared<T>);
  if (bytes > 48 * 1024 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)) != cudaSuccess) {
    cudaGetLastError();
    return MAMBA_ERROR_TACTIC;
  }
  const dim3 grid(args.ngroups * ceil_div(args.group_dim, kWidth), batch);
  kernel<<<grid, kWidth, bytes, stream>>>(args);
  return launch_status();
}

template <typename T> int launch_channel(const Args<T>& args, const Tactic& tactic, int batch, cudaStream_t stream) {
  if (!args.vec) return launch<T, false, 0>(args, batch, stream);
  switch (tactic.groups) {  // decays computed on the FMA pipe
    case 1: return launch<T, true, 1>(args, batch, stream);
    case 2: return launch<T, true, 2>(args, batch, stream);
    default: return launch<T, true, 0>(args, batch, stream);
  }
}

template int launch_channel(const Args<float>&, const Tactic&, int, cudaStream_t);
template int launch_channel(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_channel(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
