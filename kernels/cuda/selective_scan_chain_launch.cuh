// selective_scan, tactic "chain": the launch.
#pragma once

#include "selective_scan_chain_lots.cuh"
#include "tensor_map.cuh"

namespace mamba::scan {

// Describes [batch, seqlen, dim] to the copy engine, in boxes of `tokens` x `channels`; if `several`, as
// [batch, dim / channels, seqlen, channels], in boxes of so many groups of channels (else one).
template <typename T>
bool describe(CUtensorMap* map, const T* at, const Strides& stride, const Args<T>& a, int batch, bool several, int groups, int channels,
              int tokens) {
  const int64_t token = a.seqlen == 1 ? a.dim : stride.token, row = batch == 1 ? token * a.seqlen : stride.batch;
  const cuuint64_t dim = a.dim, seqlen = a.seqlen, rows = batch, width = channels;
  const cuuint64_t token_bytes = token * sizeof(T), row_bytes = row * sizeof(T);
  const cuuint64_t plain[] = {dim, seqlen, rows}, plain_stride[] = {token_bytes, row_bytes};
  const cuuint64_t of_groups[] = {width, seqlen, dim / width, rows}, of_groups_stride[] = {token_bytes, width * sizeof(T), row_bytes};
  const cuuint32_t box[] = {cuuint32_t(channels), cuuint32_t(tokens), cuuint32_t(groups), 1};
  const auto type = sizeof(T) == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return describe_tensor(map, type, at, several ? 4 : 3, several ? of_groups : plain, several ? of_groups_stride : plain_stride, box,
                         CU_TENSOR_MAP_SWIZZLE_NONE);
}

template <typename T, int kLanes, int kN, int kLinked, bool kEarly>
int launch_chain_kernel(const Chain<T, kLanes, kN, kLinked, kEarly>& layout, const Args<T>& args, const Tactic& t, int batch,
                        cudaStream_t stream) {
  constexpr auto kernel = chain_kernel<T, kLanes, kN, kLinked, kEarly>;
  // No more slots than a row fills: copying warps go once round all of them before they are done.
  const int filled = ceil_div(args.seqlen, layout.kSpan * layout.kBlocks);
  const int lots = layout.kBlocks * args.ngroups * ceil_div(args.group_dim, t.groups * layout.kWidth) * batch;
  const bool several = layout.in_lots(t, lots, args.seqlen, args.seq_lens);
  const int count = several ? layout.slots(t) : std::min(layout.slots(t), std::max(filled, layout.least_slots(t)));
  const int bytes = count * layout.slot_bytes(t.groups) + layout.fixed_bytes(t.groups, t.warps);
  const dim3 grid(lots / batch / args.ngroups, batch, args.ngroups);
  const dim3 block(32 * (t.groups * t.warps + t.copiers));
  // Whole groups alone: out of others a warp writes y, and behind that there is no fence for the engine, which loads z over it. Nor
  // may a box of y reach into channels with other B and C.
  Boxes boxes{};
  const int groups = kLinked ? t.groups : 1;
  const bool fits = args.group_dim % layout.kWidth == 0 && (args.ngroups == 1 || args.group_dim % (groups * layout.kWidth) == 0);
  if (layout.kBoxes && compute_major() >= 9 && args.vec && !args.reverse && fits) {
    auto map = [&](CUtensorMap* to, const T* at, const Strides& stride) {
      return describe(to, at, stride, args, batch, kLinked > 0, groups, layout.kWidth, layout.kSpan);
    };
    const bool described = map(&boxes.u, args.u, args.u_stride) && map(&boxes.delta, args.delta, args.delta_stride) &&
                           map(&boxes.y, args.y, args.y_stride) && (!args.z || map(&boxes.z, args.z, args.z_stride));
    boxes.groups = described ? groups : 0;
  }
  if constexpr (Chain<T, kLanes, kN, kLinked, kEarly>::kLots) {
    constexpr auto of_lots = chain_lots_kernel<T, kLanes>;
    if (several) {
      if (!allow_shared<of_lots>(bytes)) return MAMBA_ERROR_TACTIC;
      return launch_early(of_lots, dim3(sm_count()), block, bytes, stream, args, boxes, t.groups, t.warps, count, lots);
    }
  }
  if (!allow_shared<kernel>(bytes)) return MAMBA_ERROR_TACTIC;
  return launch_early(kernel, grid, block, bytes, layout.kBlocks, stream, args, boxes, t.groups, t.warps, count);
}

// For a d_state other than 16: in a source file of its own, so that the two compile side by side.
template <typename T> int launch_chain_sizes(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream);

}  // namespace mamba::scan
