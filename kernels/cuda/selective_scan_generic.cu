#include "selective_scan_generic.cuh"

namespace mamba::scan {

template <typename T, int kLanes> static int launch(const Args<T>& args, int batch, cudaStream_t stream) {
  constexpr int kChannels = kGenericThreads / kLanes;
  const size_t bytes = sizeof(float) * kGenericTile * (16 * kLanes + 4 * kChannels);
  const dim3 grid(args.ngroups * ceil_div(args.group_dim, kChannels), batch, args.pieces);
  if (args.pieces > 1) {
    if (!allow_shared<generic_kernel<T, kLanes, true>>(int(bytes))) return MAMBA_ERROR_TACTIC;
    generic_kernel<T, kLanes, true><<<grid, kGenericThreads, bytes, stream>>>(args);
  }
  if (!allow_shared<generic_kernel<T, kLanes, false>>(int(bytes))) return MAMBA_ERROR_TACTIC;
  generic_kernel<T, kLanes, false><<<grid, kGenericThreads, bytes, stream>>>(args);
  return launch_status();
}

template <typename T> int launch_generic(const Args<T>& args, const Tactic&, int batch, cudaStream_t stream) {
  switch (generic_lanes(args.d_state)) {
    case 1: return launch<T, 1>(args, batch, stream);
    case 2: return launch<T, 2>(args, batch, stream);
    case 4: return launch<T, 4>(args, batch, stream);
    case 8: return launch<T, 8>(args, batch, stream);
    case 16: return launch<T, 16>(args, batch, stream);
    default: return launch<T, 32>(args, batch, stream);
  }
}

template int launch_generic(const Args<float>&, const Tactic&, int, cudaStream_t);
template int launch_generic(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_generic(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
