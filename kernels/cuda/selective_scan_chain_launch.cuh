// selective_scan, tactic "chain": the launch.
#pragma once

#include "selective_scan_chain.cuh"

namespace mamba::scan {

template <typename T, int kLanes, int kN, int kLinked, bool kEarly>
int launch_chain_kernel(const Chain<T, kLanes, kN, kLinked, kEarly>& layout, const Args<T>& args, const Tactic& t, int batch,
                        cudaStream_t stream) {
  constexpr auto kernel = chain_kernel<T, kLanes, kN, kLinked, kEarly>;
  // No more slots than a row fills: copying warps go once round all of them before they are done.
  const int filled = ceil_div(args.seqlen, layout.kSpan * layout.kBlocks);
  const int count = std::min(layout.slots(t), std::max(filled, layout.least_slots(t)));
  const int bytes = count * layout.slot_bytes(t.groups) + layout.fixed_bytes(t.groups, t.warps);
  if (!allow_shared<kernel>(bytes)) return MAMBA_ERROR_TACTIC;
  const dim3 grid(layout.kBlocks * args.ngroups * ceil_div(args.group_dim, t.groups * layout.kWidth), batch);
  const dim3 block(32 * (t.groups * t.warps + t.copiers));
  return launch_early(kernel, grid, block, bytes, layout.kBlocks, stream, args, t.groups, t.warps, count);
}

// For a d_state other than 16: in a source file of its own, so that the two compile side by side.
template <typename T> int launch_chain_sizes(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream);

}  // namespace mamba::scan
