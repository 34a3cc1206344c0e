// selective_scan, tactic "lanes": a channel's 16 states lie in 8 or 16 lanes, time in order; sums over states on tensor cores.
//
// A scanning warp has four channels (two states a lane) or two (one state a lane) for a whole row. Per token a lane makes its
// decays, its steps of the recurrence and its part of y; a product with a matrix of ones and zeros adds the parts of lanes
// (tf32, each part as two numbers of 11 and 13 bits: what is lost is 2^-22). Nothing is computed twice and no warp waits
// for another's state.
//
// Lane bit 0 is bit 0 of the channel, bit 1 is of the state. In the left operand of the product a lane is row lane / 4, in its
// upper half for even tokens and in its lower half for odd ones, and column k = lane % 4. The right operand sums over bit 1 of
// k and puts tokens 2 i and 2 i + 1 of channels with bit 0 clear into column 2 i, of the others into column 2 i + 1. So one
// accumulator takes eight tokens. Its rows that belong to the same channel are parts of a sum for who finishes y.
#pragma once

#include <type_traits>

#include "selective_scan_lanes_feed.cuh"

namespace mamba::scan {

// d += a b for one 16 x 8 tile of a and one 8 x 8 tile of b, as float32 whose lower 13 bits are not looked at.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// What a scanning lane keeps: kChains states of a channel, their rates in log2 units, columns of the products' right operands.
template <int kChains> struct LanesScan {
  using L = Lanes;
  // Two tokens, as a lane reads them: dt, dt u of each; B, C of each, for every state.
  struct Two {
    Vec<float, 4> step, states[kChains];
  };
  float A[kChains], h[kChains], column[L::kOctet / 2][2];

  __device__ __forceinline__ static Two load(const float* step, const float* states, int pair) {
    Two two;
    two.step = load_vec<float, 4>(step + pair * L::kStepPair);
#pragma unroll
    for (int i = 0; i < kChains; i++) two.states[i] = load_vec<float, 4>(states + pair * L::kStatePair + 32 * i);
    return two;
  }
  __device__ __forceinline__ void decays(float (&a)[2 * kChains], const Two& in) const {
#pragma unroll
    for (int i = 0; i < 2 * kChains; i++) a[i] = ex2(in.step.v[i / kChains * 2] * A[i % kChains]);
  }
  __device__ __forceinline__ void two_tokens(float (&sums)[4], const Two& in, const float (&a)[2 * kChains], int pair) {
    float parts[4];
#pragma unroll
    for (int t = 0; t < 2; t++) {
#pragma unroll
      for (int i = 0; i < kChains; i++) {
        h[i] = fmaf(a[t * kChains + i], h[i], in.step.v[2 * t + 1] * in.states[i].v[2 * t]);
        parts[t] = i == 0 ? in.states[0].v[2 * t + 1] * h[0] : fmaf(in.states[i].v[2 * t + 1], h[i], parts[t]);
      }
      parts[2 + t] = parts[t] - __uint_as_float(__float_as_uint(parts[t]) & 0xffffe000u);
    }
    mma_tf32(sums, parts, column[pair][0], column[pair][1]);
  }
};

template <typename T, int kChains>
__device__ __forceinline__ void lanes_scan(const Args<T>& p, const Lanes& layout, float* shared, int slots, uint64_t* filled,
                                           uint64_t* done, int warp, int b, int c0, int channels, int n) {
  using L = Lanes;
  using Scan = LanesScan<kChains>;
  constexpr int kPerQuad = 2 / kChains;  // warps
  const int lane = threadIdx.x % 32, quad = warp / kPerQuad, pair = kChains == 2 ? lane / 16 : warp % 2;  // pair: of channels
  const int channel = pair * 2 + (lane & 1), state = kChains == 2 ? lane >> 1 & 7 : lane >> 1;  // and state + 8
  const int c = c0 + quad * L::kQuad + channel;
  const bool in = quad * L::kQuad < channels;
  Scan s;
#pragma unroll
  for (int i = 0; i < L::kOctet / 2; i++) {
    s.column[i][0] = lane / 4 == 2 * i + (lane & 1) ? 1.0f : 0.0f;
    s.column[i][1] = p.dim > 0 ? s.column[i][0] : 0.0f;  // the same; a pair of registers that need no copies before a product
  }
  const int64_t at = (int64_t(b) * p.dim + c) * kState + state;
#pragma unroll
  for (int i = 0; i < kChains; i++) {
    s.A[i] = in ? p.A[int64_t(c) * kState + state + 8 * i] * kLog2e : 0.0f;
    s.h[i] = in && p.h0 ? p.h0[at + 8 * i] : 0.0f;
  }
  const int slot_floats = layout.slot_floats(), spans = ceil_div(n, L::kSpan);
  const int to_step = quad * L::kStepQuad + channel * 4, to_states = layout.states_at() + state * 4;
  // An accumulator's lane has two tokens of two channels.
  const int y_token = layout.y_token(), part = lane / 4 % layout.parts;
  const int to_y = layout.y_at() + lane % 4 * 2 * y_token + quad * layout.y_quad() + (pair * layout.parts + part) * 2;
  constexpr int kPairs = L::kSpan / 2, kOctetPairs = L::kOctet / 2, kLoadAhead = 2, kDecayAhead = 1;  // in pairs of tokens
  constexpr int kStoreAt = 2;
  float *base = shared, *y = base + to_y;
  int slot = 0, parity = 0, before = -1;
  typename Scan::Two two[4];
  float decay[4][2 * kChains];
  float sums[4] = {}, ready[4] = {};  // of this octet and of the one before, which are stored late: loads wait for stores
  if (spans > 0) {
    mbarrier_wait(&filled[0], 0);
#pragma unroll
    for (int i = 0; i < kLoadAhead; i++) two[i] = Scan::load(base + to_step, base + to_states, i);
#pragma unroll
    for (int i = 0; i < kDecayAhead; i++) s.decays(decay[i], two[i]);
  }
  auto store = [&] {
    *reinterpret_cast<float2*>(y) = make_float2(ready[0], ready[1]);
    *reinterpret_cast<float2*>(y + y_token) = make_float2(ready[2], ready[3]);
  };
#pragma unroll 1
  for (int span = 0; span < spans; span++) {
    const int next = slot + 1 == slots ? 0 : slot + 1;
    float* next_base = shared + next * slot_floats;
    parity ^= next == 0;
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const int load = i + kLoadAhead;
      if (load == kPairs && span + 1 < spans) mbarrier_wait(&filled[next], parity);
      float* from = load < kPairs ? base : next_base;
      two[load % 4] = Scan::load(from + to_step, from + to_states, load % kPairs);
      s.decays(decay[(i + kDecayAhead) % 4], two[(i + kDecayAhead) % 4]);
      s.two_tokens(sums, two[i % 4], decay[i % 4], i % kOctetPairs);
      if (i % kOctetPairs == kStoreAt) {
        store();
        y = base + to_y + i / kOctetPairs * L::kOctet * y_token;
        if (i == kStoreAt && before >= 0) mbarrier_arrive(&done[before]);
      }
      if (i % kOctetPairs == kOctetPairs - 1) {
#pragma unroll
        for (int j = 0; j < 4; j++) ready[j] = sums[j], sums[j] = 0.0f;
      }
#ifdef MAMBA_PACE
      if (i % MAMBA_PACE == MAMBA_PACE - 1) __syncwarp();
#endif
    }
    before = slot, slot = next, base = next_base;
  }
  if (spans > 0) {
    store();
    mbarrier_arrive(&done[before]);
  }
#pragma unroll
  for (int i = 0; i < kChains; i++) {
    if (in && p.hT) p.hT[at + 8 * i] = s.h[i];
  }
}

// The spans of one group of feeding warps.
template <typename T, int kChains, int kPasses>
__device__ __forceinline__ void lanes_feed(LanesFeeder<T, kPasses>& feeder, const Lanes& layout, float* shared, int slots,
                                           uint64_t* filled, uint64_t* done, int group, int spans) {
  using L = Lanes;
  const int places = layout.ring(slots), step = layout.groups, slot_floats = layout.slot_floats();
  for (int i = 0; i < L::kPrefetch; i++) feeder.fetch(i, (group + i * step) * L::kSpan);
  // Places of the ring: to fetch into, of the span that is fed, of the span that is finished.
  int into = L::kPrefetch, fed = 0, finished = 0, slot = group, lap = 0;
  for (int span = group; span < spans + slots; span += step) {
    feeder.fetch(into, (span + L::kPrefetch * step) * L::kSpan);
    if (++into == places) into = 0;
    cp_async_wait<L::kPrefetch>();
    float* at = shared + slot * slot_floats;
    if (span >= slots) {
      mbarrier_wait(&done[slot], lap + 1 & 1);
      feeder.template finish<8 / kChains>(at, finished, (span - slots) * L::kSpan);
      if (++finished == places) finished = 0;
    }
    if (span < spans) {
      feeder.steps(at, fed, span * L::kSpan);
      mbarrier_arrive(&filled[slot]);
      if (++fed == places) fed = 0;
    }
    slot += step;
    if (slot >= slots) slot -= slots, lap++;
  }
}

// Warps of a block: scanning ones, groups of feeding ones, one that brings B and C.
template <typename T, int kChains, int kPasses>
__global__ void __launch_bounds__(32 * kLanesWarps, 1) lanes_kernel(const __grid_constant__ Args<T> p, Lanes layout, int slots) {
  using L = Lanes;
  const int b = blockIdx.y, width = layout.quads * L::kQuad;
  const int blocks_per_group = ceil_div(p.group_dim, width);
  const int group = blockIdx.x / blocks_per_group;
  const int c0 = group * p.group_dim + (blockIdx.x % blocks_per_group) * width;
  const int channels = min(width, (group + 1) * p.group_dim - c0);

  extern __shared__ __align__(16) float lanes_shared[];
  char* rings = reinterpret_cast<char*>(lanes_shared + slots * layout.slot_floats());
  const int ring_bytes = layout.ring(slots) * layout.raw_bytes<T>(), scanners = layout.quads * 2 / kChains;
  uint64_t *filled = reinterpret_cast<uint64_t*>(rings + layout.groups * ring_bytes), *done = filled + L::kMostSlots;
  if (int(threadIdx.x) < slots) {
    mbarrier_init(&filled[threadIdx.x], 32 * (layout.group_warps() + 1));
    mbarrier_init(&done[threadIdx.x], 32 * scanners);
  }
  __syncthreads();
  const int n = row_length(p, b), spans = ceil_div(n, L::kSpan), warp = threadIdx.x / 32, feed = warp - scanners;

  if (feed < 0) {
    lanes_scan<T, kChains>(p, layout, lanes_shared, slots, filled, done, warp, b, c0, channels, n);
  } else if (feed < layout.groups * layout.group_warps()) {
    const int turn = feed / layout.group_warps(), thread = feed % layout.group_warps() * 32 + threadIdx.x % 32;
    LanesFeeder<T, kPasses> feeder(p, layout, rings + turn * ring_bytes, b, c0, channels, n, turn, thread);
    lanes_feed<T, kChains>(feeder, layout, lanes_shared, slots, filled, done, turn, spans);
  } else {
    LanesStates<T> states(p, b, group, n);
    states.template load<0>(0), states.template load<1>(L::kSpan);
    int slot = 0, lap = 0;
    auto turn = [&](int span, auto which) {
      constexpr int kTurn = decltype(which)::value;
      if (span >= spans) return;
      if (span >= slots) mbarrier_wait(&done[slot], lap + 1 & 1);
      states.template store<kTurn>(lanes_shared + slot * layout.slot_floats() + layout.states_at());
      mbarrier_arrive(&filled[slot]);
      states.template load<kTurn>((span + 2) * L::kSpan);
      if (++slot == slots) slot = 0, lap++;
    };
    for (int span = 0; span < spans; span += 2) {
      turn(span, std::integral_constant<int, 0>{});
      turn(span + 1, std::integral_constant<int, 1>{});
    }
  }
  zero_padding(p, b, n, c0, c0 + channels);
}

}  // namespace mamba::scan
