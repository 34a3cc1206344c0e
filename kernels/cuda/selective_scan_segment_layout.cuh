// selective_scan, tactic "segment": how its spans lie in shared memory.
#pragma once

#include "selective_scan_chain_copy.cuh"

namespace mamba::scan {

// How a span lies in shared memory: as a slot of the chain does, with a lane's segment in the place of a tile.
template <typename T, int kSegmentTokens, int kTimeLanes, int kScanWarps> struct Segment {
  static constexpr int kWarps = kScanWarps, kCopiers = 4;
  static constexpr int kLanes = kTimeLanes, kTokens = kSegmentTokens, kSpan = kLanes * kTokens;
  static constexpr int kPairs = 32 / kLanes, kWidth = 2 * kPairs;  // pairs of channels, channels of a unit
  // u, delta, z: [segment][token][kWidth] of a unit, a token of padding a segment, so that lanes read different banks. Behind
  // them B and C in float32, [2 * kState][token / 4 of a segment][segment][4].
  static constexpr int kActivation = kLanes * (kTokens + 1) * kWidth;
  static constexpr int kRow = kSpan, kStep = kLanes * 4, kToC = kState * kRow;
  // What a unit has of a state, in float32: A in log2 units, the initial state, the state it leaves, each of kWidth channels;
  // a barrier: that one is left. Behind those of all states bias and D.
  static constexpr int kInitial = kWidth, kLeft = 2 * kWidth, kReady = 3 * kWidth, kRecord = 4 * kWidth;
  static constexpr int kBias = kState * kRecord, kSkip = kBias + kWidth, kRecords = kSkip + kWidth;
  static __host__ __device__ int stage_bytes(int Q) {
    return int(2 * kState * kSpan * sizeof(float) + Q * (kRecords * sizeof(float) + 3 * kActivation * sizeof(T)));
  }
  static __host__ __device__ int shared_bytes(int Q, int N) { return N * (stage_bytes(Q) + 2 * int(sizeof(uint64_t))); }
  static int stages(int Q) {  // that fit, at most 8
    int n = 8;
    while (n > 0 && shared_bytes(Q, n) > int(max_shared_bytes())) n--;
    return n;
  }
};

// Calls f with the layout of a tactic.
template <typename T, typename F> auto with_segment(const Tactic& t, F&& f) {
  switch (t.kernel) {
    case Tactic::kSegment16: return f(Segment<T, 12, 16, 8>{});
    case Tactic::kSegment8: return f(Segment<T, 8, 16, 12>{});
    default: return f(Segment<T, 8, 16, 8>{});
  }
}

}  // namespace mamba::scan
