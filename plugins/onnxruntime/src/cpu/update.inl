// One token of the scan. Lanes are states: a row of the state is contiguous, and each is read and written once.
#pragma once

#include "scan.inl"

namespace mamba::MAMBA_ISA {
namespace {

constexpr int64_t kStatesPerTask = 8192;

// Blocks of kLanes rows that a task takes.
MAMBA_INLINE int64_t blocks_per_task(const Scan& s) {
  const int64_t n = kStatesPerTask / (kLanes * s.d_state);
  return n < 1 ? 1 : n;
}

// The new state of one row, and C·h. The pointers are the row's; `decay` is used when A belongs to the segment.
template <bool PerSegment>
MAMBA_INLINE float update_row(const Scan& s, const float* A, const float* B, const float* C, const float* old,
                              float* h_new, float delta, float dtx, float decay) {
  V y = {};
  for (int64_t n = 0; n < s.d_state; n += kLanes) {
    const int count = static_cast<int>(min64(kLanes, s.d_state - n));
    V h = load(old + n, count);
    h = PerSegment ? h * decay : h * exp(load(A + n, count) * delta);
    h = load(B + n, count) * dtx + h;
    store(h_new + n, h, count);
    y = load(C + n, count) * h + y;
  }
  return sum(y);
}

template <class T, bool PerSegment>
MAMBA_INLINE void update_block(const Scan& s, const Place& p, const float* B, const float* C) {
  const int64_t channels = s.segments * s.rows, width = PerSegment ? s.segments : channels;
  const V x = load(at<const T>(s.x, s, p.batch, 0, channels, p.channel), p.lanes);
  V raw = PerSegment ? splat(scalar(at<const T>(s.dt, s, p.batch, 0, width, p.segment)) + s.dt_bias[p.segment])
                     : load(at<const T>(s.dt, s, p.batch, 0, width, p.channel), p.lanes) +
                           load(s.dt_bias + p.channel, p.lanes);
  const V delta = delta_of(s, raw), dtx = delta * x;
  const float decay = PerSegment ? exp(delta * s.A[p.segment])[0] : 0.0f;
  alignas(64) float deltas[kLanes], dtxs[kLanes], ys[kLanes] = {};
  store(deltas, delta, kLanes), store(dtxs, dtx, kLanes);
  for (int i = 0; i < p.lanes; ++i) {
    const int64_t row = p.channel + i, offset = (p.batch * channels + row) * s.d_state;
    const float* A = PerSegment ? nullptr : s.A + row * s.d_state;
    ys[i] = update_row<PerSegment>(s, A, B, C, s.state + offset, s.present + offset, deltas[i], dtxs[i], decay);
  }
  V y = x * skip_of(s, p) + load(ys, kLanes);
  if (s.z != nullptr) y = y * silu(load(at<const T>(s.z, s, p.batch, 0, channels, p.channel), p.lanes));
  store(at<T>(s.y, s, p.batch, 0, channels, p.channel), y, p.lanes);
}

template <class T>
MAMBA_INLINE void update_typed(const Scan& s, int64_t task, float* scratch) {
  const int64_t each = blocks_per_task(s), all = s.batch * s.segments * blocks_of(s);
  const int64_t stop = min64(all, (task + 1) * each);
  for (int64_t block = task * each; block < stop; ++block) {
    const Place p = place_of(s, block);
    Chunk c;
    c.tokens = 1;
    point_at_bc(s, p, c, 0, 1, scratch, T{});
    if (s.per_segment) {
      update_block<T, true>(s, p, c.B, c.C);
    } else {
      update_block<T, false>(s, p, c.B, c.C);
    }
  }
}

static int64_t update_tasks(const Scan& s) { return ceil_div(s.batch * s.segments * blocks_of(s), blocks_per_task(s)); }

static size_t update_scratch(const Scan& s) {
  return s.type == Type::f32 ? 0 : static_cast<size_t>(2 * kChunk * s.d_state);
}

static void update_run(const Scan& s, int64_t task, float* scratch) {
  switch (s.type) {
    case Type::f32: return update_typed<float>(s, task, scratch);
    case Type::f16: return update_typed<Half>(s, task, scratch);
    case Type::bf16: return update_typed<Brain>(s, task, scratch);
  }
}

}  // namespace
}  // namespace mamba::MAMBA_ISA
