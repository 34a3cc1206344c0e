#include "selective_scan_channel.cuh"

#include <algorithm>

namespace mamba::scan {

template <typename T, bool kVec> static int launch_piece_states(const Args<T>& args, dim3 grid, cudaStream_t stream) {
  const int bytes = sizeof(PieceShared<T>);
  if (!allow_shared<piece_states_kernel<T, kVec>>(bytes)) return MAMBA_ERROR_TACTIC;
  grid.z--;  // of every piece but the last
  piece_states_kernel<T, kVec><<<grid, kWidth, bytes, stream>>>(args);
  return launch_status();
}

// Shared memory of a block that lets no more than `blocks` on a multiprocessor (0: as many as fit).
static int shared_for(int blocks, int bytes) {
  const int reserved = 1024, all = int(max_shared_bytes()) + reserved;  // of a block; of a multiprocessor
  return blocks == 0 ? bytes : std::max(bytes, all / (blocks + 1) - reserved + 16);
}

template <typename T, bool kVec> static int launch(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream) {
  const int bytes = shared_for(t.in_turn(), 2 * sizeof(ChannelShared<T>));
  const dim3 grid(args.ngroups * ceil_div(args.group_dim, kWidth), batch, args.pieces);
  if (!allow_shared<channel_kernel<T, kVec>>(bytes)) return MAMBA_ERROR_TACTIC;
  if (args.turns) {
    if (cudaMemsetAsync(args.turns, 0, (1 + size_t(grid.x) * batch) * sizeof(int), stream) != cudaSuccess) return launch_status();
  } else if (args.pieces > 1) {
    const int status = launch_piece_states<T, kVec>(args, grid, stream);
    if (status != MAMBA_OK) return status;
  }
  channel_kernel<T, kVec><<<grid, kWidth, bytes, stream>>>(args);
  return launch_status();
}

template <typename T> int launch_channel(const Args<T>& args, const Tactic& t, int batch, cudaStream_t stream) {
  return args.vec ? launch<T, true>(args, t, batch, stream) : launch<T, false>(args, t, batch, stream);
}

template int launch_channel(const Args<float>&, const Tactic&, int, cudaStream_t);
template int launch_channel(const Args<__half>&, const Tactic&, int, cudaStream_t);
template int launch_channel(const Args<__nv_bfloat16>&, const Tactic&, int, cudaStream_t);

}  // namespace mamba::scan
