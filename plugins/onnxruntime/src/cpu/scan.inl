// The selective scan over a sequence. Lanes are channels: a task owns kLanes of them and runs through time in chunks
// of kChunk tokens; inside a chunk a tile of states stays in registers from the first token to the last.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace mamba::MAMBA_ISA {
namespace {

constexpr int kChunk = 64;

MAMBA_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
MAMBA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

MAMBA_INLINE int64_t valid_length(const int32_t* seq_lens, int64_t row, int64_t length) {
  if (seq_lens == nullptr) return length;
  const int64_t n = seq_lens[row];
  return n < 0 ? 0 : min64(n, length);
}

// What the tiles of one chunk share. B and C are read with a stride, which is negative in reverse.
struct Chunk {
  int tokens;
  const float *B, *C;
  ptrdiff_t stride;
  V delta[kChunk], dtx[kChunk], y[kChunk];
  alignas(64) float decay[kChunk];
};

// States n to n + Count: h = decay h + (Δ x) B, y += h C.
template <int Count, bool PerSegment>
MAMBA_INLINE void scan_tile(Chunk& c, int n, const V* A, V* h_memory) {
  V h[Count];
#pragma GCC unroll 16
  for (int i = 0; i < Count; ++i) h[i] = h_memory[n + i];
  const float *b = c.B + n, *q = c.C + n;
  for (int t = 0; t < c.tokens; ++t, b += c.stride, q += c.stride) {
    const V dtx = c.dtx[t], delta = c.delta[t];
    V y = c.y[t], odd = {};
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) {
      if (PerSegment) {
        h[i] = h[i] * c.decay[t];
      } else {
        h[i] = h[i] * exp2(delta * A[n + i]);
      }
      h[i] = dtx * b[i] + h[i];
      if (i % 2) {
        odd = h[i] * q[i] + odd;
      } else {
        y = h[i] * q[i] + y;
      }
    }
    c.y[t] = y + odd;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Count; ++i) h_memory[n + i] = h[i];
}

template <bool PerSegment>
MAMBA_INLINE void scan_states(Chunk& c, int64_t d_state, const V* A, V* h) {
  int n = 0;
  const int states = static_cast<int>(d_state);
  for (; n + kTile <= states; n += kTile) scan_tile<kTile, PerSegment>(c, n, A, h);
  for (; n + 4 <= states; n += 4) scan_tile<4, PerSegment>(c, n, A, h);
  for (; n < states; ++n) scan_tile<1, PerSegment>(c, n, A, h);
}

// `lanes` rows of a [*, N] matrix as N vectors, and back.
MAMBA_INLINE void transpose_in(V* to, const float* from, int64_t d_state, int lanes) {
  for (int64_t n = 0; n < d_state; ++n) to[n] = gather(from + n, d_state, lanes);
}

MAMBA_INLINE void transpose_out(float* to, const V* from, int64_t d_state, int lanes) {
  const float* p = reinterpret_cast<const float*>(from);
  for (int i = 0; i < lanes; ++i) {
    for (int64_t n = 0; n < d_state; ++n) to[i * d_state + n] = p[n * kLanes + i];
  }
}

// Where a task stands: kLanes rows of one segment of one batch row.
struct Place {
  int64_t batch, segment, row, channel, group;
  int lanes;
};

MAMBA_INLINE int64_t blocks_of(const Scan& s) { return ceil_div(s.rows, kLanes); }

MAMBA_INLINE Place place_of(const Scan& s, int64_t task) {
  Place p;
  const int64_t blocks = blocks_of(s);
  p.row = task % blocks * kLanes;
  p.segment = task / blocks % s.segments;
  p.batch = task / (blocks * s.segments);
  p.channel = p.segment * s.rows + p.row;
  p.group = p.segment / (s.segments / s.groups);
  p.lanes = static_cast<int>(min64(kLanes, s.rows - p.row));
  return p;
}

MAMBA_INLINE V delta_of(const Scan& s, V delta) {
  if (s.softplus) delta = softplus(delta);
  return s.per_segment ? at_most(at_least(delta, splat(s.dt_min)), splat(s.dt_max)) : delta;
}

MAMBA_INLINE V skip_of(const Scan& s, const Place& p) {
  return s.D_per_segment ? splat(s.D[p.segment]) : load(s.D + p.channel, p.lanes);
}

// Element (token, channel) of a [b, L, width] tensor.
template <class T>
MAMBA_INLINE T* at(const void* base, const Scan& s, int64_t batch, int64_t token, int64_t width, int64_t channel) {
  return static_cast<T*>(const_cast<void*>(base)) + (batch * s.length + token) * width + channel;
}

// Δ, Δ x and the skip D x of the chunk's tokens; token i of the chunk is first + i step.
template <class T>
MAMBA_INLINE void prepare(const Scan& s, const Place& p, Chunk& c, int64_t first, int64_t step) {
  const int64_t channels = s.segments * s.rows;
  const V skip = skip_of(s, p);
  if (s.per_segment) {
    alignas(64) float delta[kChunk] = {};
    const float bias = s.dt_bias[p.segment], A = s.A[p.segment];
    for (int t = 0; t < c.tokens; ++t) {
      delta[t] = scalar(at<const T>(s.dt, s, p.batch, first + t * step, s.segments, p.segment)) + bias;
    }
    for (int t = 0; t < c.tokens; t += kLanes) {
      const V d = delta_of(s, load(delta + t, kLanes));
      store(delta + t, d, kLanes);
      store(c.decay + t, exp(d * A), kLanes);
    }
    for (int t = 0; t < c.tokens; ++t) {
      const V x = load(at<const T>(s.x, s, p.batch, first + t * step, channels, p.channel), p.lanes);
      c.dtx[t] = x * delta[t];
      c.y[t] = x * skip;
    }
    return;
  }
  const V bias = load(s.dt_bias + p.channel, p.lanes);
  for (int t = 0; t < c.tokens; ++t) {
    const V x = load(at<const T>(s.x, s, p.batch, first + t * step, channels, p.channel), p.lanes);
    const V raw = load(at<const T>(s.dt, s, p.batch, first + t * step, channels, p.channel), p.lanes);
    const V delta = delta_of(s, raw + bias);
    c.delta[t] = delta;
    c.dtx[t] = x * delta;
    c.y[t] = x * skip;
  }
}

template <class T>
MAMBA_INLINE void finish(const Scan& s, const Place& p, const Chunk& c, int64_t first, int64_t step) {
  const int64_t channels = s.segments * s.rows;
  for (int t = 0; t < c.tokens; ++t) {
    V y = c.y[t];
    if (s.z != nullptr) y = y * silu(load(at<const T>(s.z, s, p.batch, first + t * step, channels, p.channel), p.lanes));
    store(at<T>(s.y, s, p.batch, first + t * step, channels, p.channel), y, p.lanes);
  }
}

// B and C of the chunk as float32: in place where they are that, else copied to `scratch`.
MAMBA_INLINE void point_at_bc(const Scan& s, const Place& p, Chunk& c, int64_t first, int64_t step, float*, float) {
  const int64_t width = s.groups * s.d_state;
  c.B = at<const float>(s.B, s, p.batch, first, width, p.group * s.d_state);
  c.C = at<const float>(s.C, s, p.batch, first, width, p.group * s.d_state);
  c.stride = static_cast<ptrdiff_t>(step * width);
}

template <class T>
MAMBA_INLINE void point_at_bc(const Scan& s, const Place& p, Chunk& c, int64_t first, int64_t step, float* scratch, T) {
  const int64_t width = s.groups * s.d_state;
  float* copies[2] = {scratch, scratch + kChunk * s.d_state};
  const void* sources[2] = {s.B, s.C};
  for (int which = 0; which < 2; ++which) {
    for (int t = 0; t < c.tokens; ++t) {
      const T* from = at<const T>(sources[which], s, p.batch, first + t * step, width, p.group * s.d_state);
      float* to = copies[which] + t * s.d_state;
      for (int64_t n = 0; n < s.d_state; n += kLanes) {
        const int count = static_cast<int>(min64(kLanes, s.d_state - n));
        store(to + n, load(from + n, count), count);
      }
    }
  }
  c.B = copies[0], c.C = copies[1], c.stride = static_cast<ptrdiff_t>(s.d_state);
}

template <class T>
MAMBA_INLINE void scan_typed(const Scan& s, int64_t task, float* scratch) {
  const Place p = place_of(s, task);
  const int64_t channels = s.segments * s.rows, valid = valid_length(s.seq_lens, p.batch, s.length);
  V* h = reinterpret_cast<V*>(scratch);
  V* A = h + s.d_state;
  float* bc = reinterpret_cast<float*>(A + s.d_state);
  transpose_in(h, s.state + (p.batch * channels + p.channel) * s.d_state, s.d_state, p.lanes);
  if (!s.per_segment) {
    transpose_in(A, s.A + p.channel * s.d_state, s.d_state, p.lanes);
    for (int64_t n = 0; n < s.d_state; ++n) A[n] = A[n] * 1.44269504f;  // exp2 in the loop: log2(e) A
  }
  Chunk c;
  for (int64_t start = 0; start < valid; start += kChunk) {
    c.tokens = static_cast<int>(min64(kChunk, valid - start));
    const int64_t first = s.reverse ? valid - 1 - start : start, step = s.reverse ? -1 : 1;
    prepare<T>(s, p, c, first, step);
    point_at_bc(s, p, c, first, step, bc, T{});
    if (s.per_segment) {
      scan_states<true>(c, s.d_state, A, h);
    } else {
      scan_states<false>(c, s.d_state, A, h);
    }
    finish<T>(s, p, c, first, step);
  }
  for (int64_t t = valid; t < s.length; ++t) store(at<T>(s.y, s, p.batch, t, channels, p.channel), V{}, p.lanes);
  transpose_out(s.present + (p.batch * channels + p.channel) * s.d_state, h, s.d_state, p.lanes);
}

static int64_t scan_tasks(const Scan& s) { return s.batch * s.segments * blocks_of(s); }

static size_t scan_scratch(const Scan& s) {
  const int64_t bc = s.type == Type::f32 ? 0 : 2 * kChunk * s.d_state;
  return static_cast<size_t>(2 * s.d_state * kLanes + bc);
}

static void scan_run(const Scan& s, int64_t task, float* scratch) {
  switch (s.type) {
    case Type::f32: return scan_typed<float>(s, task, scratch);
    case Type::f16: return scan_typed<Half>(s, task, scratch);
    case Type::bf16: return scan_typed<Brain>(s, task, scratch);
  }
}

}  // namespace
}  // namespace mamba::MAMBA_ISA
