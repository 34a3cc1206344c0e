// selective_scan, tactic "lanes": what lies in shared memory, and the warps that fill it and finish y.
#pragma once

#include <algorithm>

#include "selective_scan.cuh"

namespace mamba::scan {

constexpr int kLanesWarps = 21;  // of a block, at most

// Shared memory of a block: `slots` slots, then rings of activations as they came (thread-private to the feeding warps), then
// barriers. The pads keep the lanes of an access in different banks.
struct Lanes {
  static constexpr int kQuad = 4;      // channels of a quad
  static constexpr int kSpan = 32;     // tokens of a slot
  static constexpr int kOctet = 8;     // tokens whose sums one accumulator holds
  static constexpr int kMostSlots = 8, kMostQuads = 10;
  static constexpr int kPrefetch = 2;  // spans of a feeding group on their way from memory
  // A slot, in floats. Steps [quad][pair of tokens][channel][token][dt, dt u]; B and C [pair of tokens][state][token][B, C];
  // y [token][quad][pair of channels][part][channel], a sum of `parts` parts.
  static constexpr int kStepPair = 4 * kQuad + 4, kStepQuad = kSpan / 2 * kStepPair + 4, kStatePair = 4 * kState + 4;
  // Groups of feeding warps take the spans in turn; a thread has `passes` tokens of a quad in a span.
  int quads, parts, groups, passes;
  __host__ __device__ int group_warps() const { return quads / passes; }
  __host__ __device__ int states_at() const { return quads * kStepQuad; }
  __host__ __device__ int y_at() const { return states_at() + kSpan / 2 * kStatePair; }
  __host__ __device__ int y_quad() const { return kQuad * parts + 4; }
  __host__ __device__ int y_token() const { return quads * y_quad() + 4 * (1 - quads & 3); }
  __host__ __device__ int slot_floats() const { return y_at() + kSpan * y_token(); }
  template <typename T> __host__ __device__ int raw_bytes() const { return int(3 * kSpan * kQuad * sizeof(T)) * quads; }
  // Places of a group's ring: spans on their way, the one that is fed, those that are not finished.
  __host__ __device__ int ring(int slots) const { return slots / groups + kPrefetch + 1; }
  template <typename T> __host__ __device__ int bytes(int slots) const {
    return slots * int(sizeof(float)) * slot_floats() + groups * ring(slots) * raw_bytes<T>() + 2 * kMostSlots * int(sizeof(uint64_t));
  }
  // A group finishes the spans that it fed: their number is a multiple of the groups.
  template <typename T> int slots() const {
    int n = kMostSlots / groups * groups;
    while (n > 0 && bytes<T>(n) > int(max_shared_bytes())) n -= groups;
    return n;
  }
};

// The layout of a tactic: quads in groups, feeding warps in warps, states of a lane in copiers.
inline Lanes lanes_layout(const Tactic& t) {
  const int passes = 1;
  return {t.groups, 8 / t.copiers, t.warps * passes / t.groups, passes};
}

// Four neighbouring channels as they lie in memory.
template <typename T> struct Four {
  static constexpr int kWords = sizeof(T), kBytes = 4 * sizeof(T);
  Vec<uint32_t, kWords> word;
  __device__ __forceinline__ explicit Four(const void* p) : word(load_vec<uint32_t, kWords>(static_cast<const uint32_t*>(p))) {}
  __device__ __forceinline__ void floats(float (&f)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float2 two = to_float2(reinterpret_cast<const pair_t<T>*>(word.v)[i]);
      f[2 * i] = two.x, f[2 * i + 1] = two.y;
    }
  }
};

// One thread of a feeding group: a quad of channels, kPasses tokens of every span of the group.
template <typename T, int kPasses> struct LanesFeeder {
  using L = Lanes;
  static constexpr int kRows = L::kSpan / kPasses, kBytes = Four<T>::kBytes;  // tokens from pass to pass
  // Where this thread's first token of the next span lies; elements to the same token of the next one, of the next pass.
  struct Column {
    const T* p;
    int64_t span, pass;
  };

  L layout;
  int n, quad, first, span_tokens;
  char* raw;
  bool softplus, gate;
  Column u, delta, z, y;
  float bias[4], D[4];

  __device__ __forceinline__ LanesFeeder(const Args<T>& p, const L& layout, char* ring, int b, int c0, int channels, int n, int group, int thread)
      : layout(layout), quad(thread % layout.quads), first(thread / layout.quads), span_tokens(L::kSpan * layout.groups),
        softplus(p.softplus), gate(p.z) {
    const int c = c0 + quad * L::kQuad;
    const bool in = quad * L::kQuad < channels;
    this->n = in ? n : 0;  // no such channel: steps of 0, nothing read or written
    raw = ring + (first * layout.quads + quad) * kBytes;
    auto column = [&](const T* base, const Strides& s) {
      const int64_t token = p.reverse ? -s.token : s.token;
      const int64_t at = (p.reverse ? n - 1 : 0) * s.token + (group * L::kSpan + first) * token;
      return Column{base + b * s.batch + at + c, span_tokens * token, kRows * token};
    };
    u = column(p.u, p.u_stride), delta = column(p.delta, p.delta_stride), y = column(p.y, p.y_stride);
    z = p.z ? column(p.z, p.z_stride) : u;
#pragma unroll
    for (int i = 0; i < 4; i++) bias[i] = in && p.bias ? p.bias[c + i] : 0.0f, D[i] = in && p.D ? p.D[c + i] : 0.0f;
  }
  __device__ __forceinline__ char* raw_at(int place, int pass, int tensor) const {
    return raw + place * layout.raw_bytes<T>() + (tensor * L::kSpan + pass * kRows) * layout.quads * kBytes;
  }

  // Starts the copies of a span into a place of the ring; to be called for every span of the group in order.
  __device__ __forceinline__ void fetch(int place, int t0) {
#pragma unroll
    for (int i = 0; i < kPasses; i++) {
      if (t0 + first + i * kRows < n) {
        cp_async<kBytes>(raw_at(place, i, 0), u.p + i * u.pass);
        cp_async<kBytes>(raw_at(place, i, 1), delta.p + i * delta.pass);
        if (gate) cp_async<kBytes>(raw_at(place, i, 2), z.p + i * z.pass);
      }
    }
    cp_async_commit();
    u.p += u.span, delta.p += delta.span, z.p += z.span;
  }
  // Steps out of what was copied; past the end of the row the step is 0, which leaves a state as it is.
  __device__ __forceinline__ void steps(float* slot, int place, int t0) const {
    float d[kPasses][4], x[kPasses][4];
#pragma unroll
    for (int i = 0; i < kPasses; i++) {
      Four<T>(raw_at(place, i, 1)).floats(d[i]);
      Four<T>(raw_at(place, i, 0)).floats(x[i]);
    }
#pragma unroll
    for (int i = 0; i < kPasses; i++) {
      const bool inside = t0 + first + i * kRows < n;  // or what lies there is old
#pragma unroll
      for (int j = 0; j < 4; j++) {
        d[i][j] = inside ? time_step<T>(d[i][j] + bias[j], softplus) : 0.0f;
        x[i][j] = inside ? d[i][j] * x[i][j] : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kPasses; i++) {
      const int token = first + i * kRows;
      float* to = slot + quad * L::kStepQuad + token / 2 * L::kStepPair + token % 2 * 2;
#pragma unroll
      for (int j = 0; j < 4; j++) *reinterpret_cast<float2*>(to + 4 * j) = make_float2(d[i][j], x[i][j]);
    }
  }
  // y of a span that has been scanned; to be called for every span of the group in order.
  template <int kParts> __device__ __forceinline__ void finish(const float* slot, int place, int t0) {
    float v[kPasses][4], g[kPasses][4];
#pragma unroll
    for (int i = 0; i < kPasses; i++) {
      const float* sums = slot + layout.y_at() + (first + i * kRows) * layout.y_token() + quad * layout.y_quad();
      Four<T>(raw_at(place, i, 0)).floats(v[i]);
      Four<T>(raw_at(place, i, 2)).floats(g[i]);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        Vec<float, 4> two[kParts / 2];  // parts k and k + 1 of both channels
#pragma unroll
        for (int k = 0; k < kParts / 2; k++) two[k] = load_vec<float, 4>(sums + (j * kParts + 2 * k) * 2);
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float even = two[0].v[c], odd = two[0].v[2 + c];
#pragma unroll
          for (int k = 1; k < kParts / 2; k++) even += two[k].v[c], odd += two[k].v[2 + c];
          v[i][2 * j + c] = fmaf(D[2 * j + c], v[i][2 * j + c], even + odd);
        }
      }
    }
    if (gate) {
#pragma unroll
      for (int i = 0; i < kPasses; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) v[i][j] *= silu(g[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPasses; i++) {
      Vec<pair_t<T>, 2> out;
      out.v[0] = from_float2<T>(v[i][0], v[i][1]), out.v[1] = from_float2<T>(v[i][2], v[i][3]);
      if (t0 + first + i * kRows < n) store_vec(reinterpret_cast<pair_t<T>*>(const_cast<T*>(y.p + i * y.pass)), out);
    }
    y.p += y.span;
  }
};

// One lane of the warp that brings B and C: a token of a span.
template <typename T> struct LanesStates {
  using L = Lanes;
  const T *B, *C;
  int64_t B_token, C_token;
  int n, lane;
  Run<T> raw[2][4];  // of the next two spans, in turn: B, C of the states' lower half, then of the upper

  __device__ __forceinline__ LanesStates(const Args<T>& p, int b, int group, int n) : n(n), lane(threadIdx.x % 32) {
    B_token = p.reverse ? -p.B_stride.token : p.B_stride.token, C_token = p.reverse ? -p.C_stride.token : p.C_stride.token;
    B = p.B + b * p.B_stride.batch + (p.reverse ? n - 1 : 0) * p.B_stride.token + group * kState;
    C = p.C + b * p.C_stride.batch + (p.reverse ? n - 1 : 0) * p.C_stride.token + group * kState;
  }
  template <int kTurn> __device__ __forceinline__ void load(int t0) {
    const int t = t0 + lane;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      raw[kTurn][i] = Run<T>{};
      if (t < n) load_run8<T, true>(raw[kTurn][i], (i % 2 ? C + t * C_token : B + t * B_token) + i / 2 * 8);
    }
  }
  template <int kTurn> __device__ __forceinline__ void store(float* states) const {
    float* to = states + lane / 2 * L::kStatePair + lane % 2 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float b[8], c[8];
      to_floats(b, raw[kTurn][2 * half]);
      to_floats(c, raw[kTurn][2 * half + 1]);
#pragma unroll
      for (int j = 0; j < 8; j++) *reinterpret_cast<float2*>(to + (half * 8 + j) * 4) = make_float2(b[j], c[j]);
    }
  }
};

}  // namespace mamba::scan
