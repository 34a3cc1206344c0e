#include "selective_scan_ring.cuh"

namespace mamba::scan {

template <typename T> int launch_ring(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream) {
  const int bytes = ring_bytes<T>(t), blocks = t.blocks();
  if (!allow_shared<ring_kernel<T>>(bytes)) return MAMBA_ERROR_TACTIC;
  const int clusters = args.ngroups * ceil_div(args.group_dim, t.groups * Ring<T>::kWidth);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * blocks, batch), config.blockDim = dim3(32 * t.groups * t.warps);
  config.dynamicSmemBytes = bytes, config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster, config.numAttrs = blocks > 1;
  return cudaLaunchKernelEx(&config, ring_kernel<T>, args, t.groups, t.warps) == cudaSuccess ? MAMBA_OK : MAMBA_ERROR_CUDA;
}

template int launch_ring(const Args<float>&, const Tactic&, int, cudaStream_t);
template int launch_ring(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_ring(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
