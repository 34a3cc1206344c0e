// selective_scan, tactic "chain": the launch.
#pragma once

#include "selective_scan_chain.cuh"
#include "tensor_map.cuh"

namespace mamba::scan {

// Describes [batch, seqlen, dim] to the copy engine, in boxes of `tokens` x `channels`.
template <typename T>
bool describe(CUtensorMap* map, const T* at, const Strides& stride, const Args<T>& a, int batch, int channels, int tokens) {
  const int64_t token = a.seqlen == 1 ? a.dim : stride.token, row = batch == 1 ? token * a.seqlen : stride.batch;
  const cuuint64_t size[] = {cuuint64_t(a.dim), cuuint64_t(a.seqlen), cuuint64_t(batch)};
  const cuuint64_t bytes[] = {token * sizeof(T), row * sizeof(T)};
  const cuuint32_t box[] = {cuuint32_t(channels), cuuint32_t(tokens), 1};
  const auto type = sizeof(T) == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return describe_tensor(map, type, at, 3, size, bytes, box, CU_TENSOR_MAP_SWIZZLE_NONE);
}

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
  // Whole groups alone: out of others a warp writes y, and behind that there is no fence for the engine, which loads z over it.
  Boxes boxes{};
  if (layout.kBoxes && compute_major() >= 9 && args.vec && !args.reverse && args.group_dim % layout.kWidth == 0) {
    auto map = [&](CUtensorMap* to, const T* at, const Strides& stride) {
      return describe(to, at, stride, args, batch, layout.kWidth, layout.kSpan);
    };
    boxes.there = map(&boxes.u, args.u, args.u_stride) && map(&boxes.delta, args.delta, args.delta_stride) &&
                  map(&boxes.y, args.y, args.y_stride) && (!args.z || map(&boxes.z, args.z, args.z_stride));
  }
  return launch_early(kernel, grid, block, bytes, layout.kBlocks, stream, args, boxes, t.groups, t.warps, count);
}

// For a d_state other than 16: in a source file of its own, so that the two compile side by side.
template <typename T> int launch_chain_sizes(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream);

}  // namespace mamba::scan
