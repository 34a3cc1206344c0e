// How the first pass of the SSD scan for Hopper is shared out among blocks.
//
// A row is a head (or a part of its d_state) of a row of the batch. A block has `run` chunks: of one row, or of the end of one
// and the beginning of the next. It makes the beginning first and hands its state over; the end it starts from zero, and
// adds what was handed to it when that is there. A block only ever waits for the one before it.
#pragma once

#include "ssd_two_pass.cuh"

namespace mamba {
namespace ssd {

// What a block works on.
struct StatesItem {
  int batch, head, part;  // part: of d_state, when several blocks share a head
  int token0, limit;      // of the first chunk; of the row
  int chunks;             // with valid tokens
  int first;              // chunks of the block before these
  bool begins, ends;      // the row, in this launch
  int64_t image;          // of the first chunk
};

// Part `index` of what this block works on; false behind the last.
template <typename L>
__device__ __forceinline__ bool states_item(const TwoPassArgs& args, int index, StatesItem& at) {
  const int from = blockIdx.x * args.run, to = min(from + args.run, args.rows * args.scan.nheads * L::kSplit * args.chunks);
  const int row = (to - 1) / args.chunks - index;  // the last one first: others wait for it
  if ((row + 1) * args.chunks <= from) return false;
  const int begin = max(from - row * args.chunks, 0), end = min(to - row * args.chunks, args.chunks);
  const int head = row / L::kSplit;  // of all rows of the batch
  at.first = index == 0 ? 0 : at.first + at.chunks;
  at.part = row % L::kSplit, at.head = head % args.scan.nheads, at.batch = args.batch0 + head / args.scan.nheads;
  at.token0 = (args.chunk0 + begin) * kTileRows, at.limit = valid_tokens(args.scan, at.batch);
  at.chunks = max(0, min(end - begin, (at.limit - at.token0 + kTileRows - 1) / kTileRows));
  at.begins = begin == 0, at.ends = end == args.chunks;
  at.image = static_cast<int64_t>(head) * args.chunks + begin;
  return true;
}

// What a block hands to the next one: its consumers' accumulators, thread for thread, and a flag for each of their warps.
template <typename L>
struct Handoff {
  using State = float[L::kAccumulators][4];
  float4* place;
  unsigned long long *flag, ticket;
  int lane;

  // From block `block`, warp `warp` of its consumers.
  __device__ Handoff(const TwoPassArgs& args, int block, int warp) {
    lane = threadIdx.x & 31, ticket = args.scan.ticket, flag = args.handed + block * 8 + warp;
    place = reinterpret_cast<float4*>(args.handoff) + static_cast<int64_t>(block) * L::kAccumulators * L::kConsumers + warp * 32 + lane;
  }
  __device__ __forceinline__ void give(const State& h) const {
#pragma unroll
    for (int n = 0; n < L::kAccumulators; n++) __stcg(place + n * L::kConsumers, make_float4(h[n][0], h[n][1], h[n][2], h[n][3]));
    __syncwarp();
    if (lane == 0) raise_flag(flag, ticket);
  }
  __device__ __forceinline__ void take(State& h) const {
    if (lane == 0) take_flag(flag, ticket);
    __syncwarp();
#pragma unroll
    for (int n = 0; n < L::kAccumulators; n++) {
      const float4 v = __ldcg(place + n * L::kConsumers);
      h[n][0] = v.x, h[n][1] = v.y, h[n][2] = v.z, h[n][3] = v.w;
    }
  }
};

// Adds to this warp's part of copies what is left in them of the state `before` all of them; decays: of the chunks.
template <typename L>
__device__ __forceinline__ void mend_copies(uint8_t* image, int chunks, const float* decays, const float (&before)[L::kAccumulators][4]) {
  using E = typename L::E;
  const int lane = threadIdx.x & 31, row = lane >> 2;
  image += row * 128 + (lane & 3) * 4;
  float decay = 1.f;
#pragma unroll 2
  for (int c = 0; c < chunks && decay > 0.f; c++, image += L::kImage) {
    uint32_t v[L::kParts][L::kAccumulators][2];
    const auto word = [&](int part, int n, int half) {  // swizzled as Tile<64>: rows eight apart alike
      return reinterpret_cast<uint32_t*>(image + (part * L::kHeadTiles + n / 8) * L::kStateTile + half * 1024 + ((n % 8) ^ row) * 16);
    };
#pragma unroll
    for (int part = 0; part < L::kParts; part++)
#pragma unroll
      for (int n = 0; n < L::kAccumulators; n++) v[part][n][0] = __ldcg(word(part, n, 0)), v[part][n][1] = __ldcg(word(part, n, 1));
#pragma unroll
    for (int n = 0; n < L::kAccumulators; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float2 f = Traits<E>::unpack(v[0][n][half]);
        if constexpr (L::kParts == 2) {
          const float2 low = Traits<E>::unpack(v[1][n][half]);
          f.x += low.x, f.y += low.y;
        }
        uint32_t high, low;
        split<E>(fmaf(decay, before[n][2 * half], f.x), fmaf(decay, before[n][2 * half + 1], f.y), high, low);
        __stcg(word(0, n, half), high);
        if (L::kParts == 2) __stcg(word(1, n, half), low);
      }
    decay *= decays[c];
  }
}

}  // namespace ssd
}  // namespace mamba
