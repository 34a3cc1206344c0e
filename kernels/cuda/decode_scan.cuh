// One token of the scan, with dt before it and the gate behind: eight lanes to a channel, two neighbouring states a lane.
#pragma once

#include "decode_columns.cuh"

namespace mamba::decode {

// What makes a channel's dt and its states' decays. load() takes what does not depend on other blocks, before the wait
// for them, of the k-th channel of a slot.
template <typename T, int kFamily> struct Discretization;

// Mamba-1: dt from the channel's row of dt_proj, A of its own for every state; both come through the ring.
template <typename T> struct Discretization<T, 1> {
  using W = Worker<T, 1>;
  static constexpr int kAhead = 3;
  const T* dt_rows = nullptr;  // of the slot's channels
  const float* A = nullptr;
  float bias = 0.0f;
  int b_at;  // where the channel's B lies among the words of dt, B and C
  pair_t<T> row[kAhead] = {};
  float2 a = make_float2(0.0f, 0.0f);

  __device__ __forceinline__ explicit Discretization(const W& w) : b_at(w.dt_words) {}

  __device__ __forceinline__ void open_slot(const W& w, const Cursor& cursor, int count) {
    dt_rows = reinterpret_cast<const T*>(w.ring.at(cursor.slot));
    A = reinterpret_cast<const float*>(dt_rows + count * w.dt_words);
    w.ring.wait(cursor);
  }
  __device__ __forceinline__ static int head_of(const W&, int channel) { return channel; }
  __device__ __forceinline__ void load(const W& w, const Layer& l, int head, int k, int sub) {
    bias = l.dt_bias[head];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int j = 2 * sub + 16 * i;
      if (j < w.dt_words) row[i] = *reinterpret_cast<const pair_t<T>*>(dt_rows + k * w.dt_words + j);
    }
  }
  __device__ __forceinline__ void load_a(const W& w, int k, int j) {
    a = *reinterpret_cast<const float2*>(A + k * w.d_state + j);
  }
  __device__ __forceinline__ float dt(const W& w, int k, int sub) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (2 * sub + 16 * i < w.dt_words) {
        const float2 v = *reinterpret_cast<const float2*>(w.xdb + 2 * sub + 16 * i), f = to_float2(row[i]);
        sum = fmaf(f.x, v.x, fmaf(f.y, v.y, sum));
      }
    }
#pragma unroll 2
    for (int j = 2 * sub + 16 * kAhead; j < w.dt_words; j += 16) {
      const float2 f = to_float2(*reinterpret_cast<const pair_t<T>*>(dt_rows + k * w.dt_words + j));
      sum = fmaf(f.x, w.xdb[j], fmaf(f.y, w.xdb[j + 1], sum));
    }
#pragma unroll
    for (int o = 4; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    return softplus<true>(sum + bias);
  }
  __device__ __forceinline__ float2 decay(float dt2) const { return make_float2(ex2(dt2 * a.x), ex2(dt2 * a.y)); }
};

// Mamba-2: dt comes with B and C, and a head has one decay.
template <typename T> struct Discretization<T, 2> {
  using W = Worker<T, 2>;
  float a = 0.0f, factor;
  int dt_at = 0, b_at = 0;

  __device__ __forceinline__ explicit Discretization(const W&) {}

  __device__ __forceinline__ void open_slot(const W&, const Cursor&, int) {}
  __device__ __forceinline__ static int head_of(const W& w, int channel) { return channel / w.head_dim; }
  __device__ __forceinline__ void load(const W& w, const Layer& l, int head, int, int) {
    a = l.A[head], dt_at = w.bc + head, b_at = head / w.heads_in_group * w.d_state;
  }
  __device__ __forceinline__ void load_a(const W&, int, int) {}
  __device__ __forceinline__ float dt(const W& w, int, int) {  // and the decay that follows from it
    const float dt = w.xdb[dt_at];
    factor = ex2(dt * kLog2e * a);
    return dt;
  }
  __device__ __forceinline__ float2 decay(float) const { return make_float2(factor, factor); }
};

template <typename T, int kFamily> struct ScanChannel {
  using W = Worker<T, kFamily>;
  Discretization<T, kFamily> steps;
  float D = 0.0f, u = 0.0f, z = 0.0f;
  float2 h = make_float2(0.0f, 0.0f);  // the lane's first two states
  float* out = nullptr;                // where the channel's states go

  __device__ __forceinline__ explicit ScanChannel(const W& w) : steps(w) {}

  // Opens the slot with the channels from `first` on: how many they are.
  __device__ __forceinline__ int open_slot(const W& w, const Layer& l, const Cursor& cursor, int first) {
    const int count = min(w.plan.slot_channels, w.channels.count - first);
    steps.open_slot(w, cursor, count);
    if (w.warp * 4 < count) load(w, l, first, min(w.warp * 4 + w.lane / 8, count - 1));
    return count;
  }

  // Of channel first + k, the slot's k-th: what does not depend on other blocks.
  __device__ __forceinline__ void load(const W& w, const Layer& l, int first, int k) {
    const int c = first + k, sub = w.lane % 8, head = steps.head_of(w, w.channels.first + c);
    D = l.D[head], out = l.ssm_state_out + int64_t(w.channels.first + c) * w.d_state;
    if (kFamily == 1) u = w.u[c], z = w.z[c];  // in Mamba-2 a block barrier lies ahead
    steps.load(w, l, head, k, sub);
    if (2 * sub < w.d_state) {
      steps.load_a(w, k, 2 * sub);
      h = *reinterpret_cast<const float2*>(w.state + c * w.d_state + 2 * sub);
    }
  }

  // The new states, and y behind the gate. All lanes call; of an inactive one nothing is kept.
  __device__ __forceinline__ float update(const W& w, int c, int k, bool active) {
    const int sub = w.lane % 8, N = w.d_state;
    const float *B = w.xdb + steps.b_at, *C = B + w.bc / 2;
    float2 b = make_float2(0.0f, 0.0f), d = b;
    if (kFamily == 1 && 2 * sub < N) {  // ahead of dt
      b = *reinterpret_cast<const float2*>(B + 2 * sub), d = *reinterpret_cast<const float2*>(C + 2 * sub);
    }
    const float dt = steps.dt(w, k, sub);
    if (kFamily == 2) u = w.u[c], z = w.z[c];
    const float du = dt * u, dt2 = dt * kLog2e;
    float y = 0.0f;
#pragma unroll(kFamily == 2 ? 4 : 1)
    for (int j = 2 * sub; j < N; j += 16) {
      if (j >= 16) {
        h = *reinterpret_cast<const float2*>(w.state + c * N + j);
        steps.load_a(w, k, j);
      }
      if (kFamily == 2 || j >= 16) {
        b = *reinterpret_cast<const float2*>(B + j), d = *reinterpret_cast<const float2*>(C + j);
      }
      const float2 f = steps.decay(dt2);
      h = make_float2(fmaf(f.x, h.x, du * b.x), fmaf(f.y, h.y, du * b.y));
      if (active) *reinterpret_cast<float2*>(out + j) = h;
      y = fmaf(d.x, h.x, fmaf(d.y, h.y, y));
    }
#pragma unroll
    for (int o = 4; o; o /= 2) y += __shfl_xor_sync(~0u, y, o);
    return fmaf(D, u, y) * z;
  }
};

// Takes y of the block's channels to the other blocks.
template <typename T, int kFamily>
__device__ __forceinline__ void scan(const Worker<T, kFamily>& w, const Layer& l, uint32_t epoch, int turn, Cursor& cursor) {
  ScanChannel<T, kFamily> channel(w);
  int count = channel.open_slot(w, l, cursor, 0);
  if constexpr (kFamily == 1) {
    take_sums(w, turn);
    block_sync();
  } else {
    receive<kThreads>(w.sent_x, w.plan.words_x, epoch, w.tid, [&](int i, uint32_t a, uint32_t b) {
      *reinterpret_cast<float2*>(w.xdb + i) = make_float2(__uint_as_float(a), __uint_as_float(b));
    });
    cp_async_wait<0>();  // the gated norm's weights
    block_sync();
  }
#pragma unroll 1
  for (int first = 0;;) {
#pragma unroll 1
    for (int base = w.warp * 4; base < count; base += 4 * kWarps) {
      const bool active = base + w.lane / 8 < count;
      const int k = min(base + w.lane / 8, count - 1), c = first + k;
      const float y = channel.update(w, c, k, active);
      w.send_channel(w.sent_y, c, y, 8, active && w.lane % 8 == 0, epoch);
      if (base + 4 * kWarps < count) channel.load(w, l, first, min(base + 4 * kWarps + w.lane / 8, count - 1));
    }
    if (kFamily == 1) {
      __syncwarp();
      if (w.lane == 0) w.ring.release(cursor.slot);
      cursor.advance(w.ring.slots);
    }
    first += w.plan.slot_channels;
    if (first >= w.channels.count) break;
    count = channel.open_slot(w, l, cursor, first);
  }
}

}  // namespace mamba::decode
