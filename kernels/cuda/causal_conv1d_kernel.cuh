// Device code of causal_conv1d, memory-bound: a thread slides over `tokens` tokens of V neighbouring channels with the
// window in registers. The warps of a block take consecutive pieces of a row, so that the width - 1 tokens read twice,
// and the weights, come from the L1 cache.
#pragma once

#include "common.cuh"
#include "early_launch.cuh"

namespace mamba::conv {

struct Args {
  const void *x, *weight, *bias, *state_in;
  void *y, *state_out;
  const int32_t* seq_lens;
  int64_t x_batch, x_token, y_batch, y_token;
  int seqlen, channels, tokens, activation, wide_weights, vector_weights, vector_state;
};

constexpr int kWarps = 4;  // of a block, one after the other in time
constexpr int kStepThreads = 64;

// V elements of up to 16 bytes: as loaded, and as numbers.
template <int kBytes> struct WordOf;
template <> struct WordOf<2> { using type = uint16_t; };
template <> struct WordOf<4> { using type = uint32_t; };
template <> struct WordOf<8> { using type = uint2; };
template <> struct WordOf<16> { using type = uint4; };
template <typename T, int V> struct Raw {
  typename WordOf<V * sizeof(T)>::type word;
};
template <typename T, int V> __device__ __forceinline__ Raw<T, V> fetch(const T* p) {
  Raw<T, V> r;
  r.word = *reinterpret_cast<const decltype(r.word)*>(p);
  return r;
}
template <typename T, int V> __device__ __forceinline__ void unpack(float (&f)[V], const Raw<T, V>& r) {
  if constexpr (V == 1) {
    f[0] = to_float(*reinterpret_cast<const T*>(&r.word));
  } else {
    const pair_t<T>* pairs = reinterpret_cast<const pair_t<T>*>(&r.word);
#pragma unroll
    for (int i = 0; i < V / 2; i++) {
      const float2 v = to_float2(pairs[i]);
      f[2 * i] = v.x, f[2 * i + 1] = v.y;
    }
  }
}
template <typename T, int V> __device__ __forceinline__ void load(float (&f)[V], const T* p) {
  unpack<T, V>(f, fetch<T, V>(p));
}
template <typename T, int V> __device__ __forceinline__ void store(T* p, const float (&f)[V]) {
  Raw<T, V> r;
  if constexpr (V == 1) {
    *reinterpret_cast<T*>(&r.word) = from_float<T>(f[0]);
  } else {
    pair_t<T>* pairs = reinterpret_cast<pair_t<T>*>(&r.word);
#pragma unroll
    for (int i = 0; i < V / 2; i++) pairs[i] = from_float2<T>(f[2 * i], f[2 * i + 1]);
  }
  if constexpr (V * sizeof(T) == 16) {
    store_16(p, r.word);
  } else if constexpr (V * sizeof(T) == 8) {
    store_8(p, r.word);
  } else {
    *reinterpret_cast<decltype(r.word)*>(p) = r.word;
  }
}

// The states of V channels lie together, K - 1 values each, oldest first: K - 1 words of V values.
template <typename T, int K, int V>
__device__ __forceinline__ void load_state(float (&columns)[K - 1][V], const T* p, bool vector) {
  Raw<T, V> raw[K - 1];
  if (vector) {
#pragma unroll
    for (int i = 0; i < K - 1; i++) raw[i] = fetch<T, V>(p + i * V);
#pragma unroll
    for (int i = 0; i < K - 1; i++) {
      float word[V];
      unpack<T, V>(word, raw[i]);
#pragma unroll
      for (int e = 0; e < V; e++) columns[(i * V + e) % (K - 1)][(i * V + e) / (K - 1)] = word[e];
    }
  } else {
#pragma unroll
    for (int i = 0; i < V * (K - 1); i++) columns[i % (K - 1)][i / (K - 1)] = to_float(p[i]);
  }
}
template <typename T, int K, int V>
__device__ __forceinline__ void store_state(T* p, const float (&columns)[K - 1][V], bool vector) {
#pragma unroll
  for (int i = 0; i < K - 1; i++) {
    float word[V];
#pragma unroll
    for (int e = 0; e < V; e++) word[e] = columns[(i * V + e) % (K - 1)][(i * V + e) / (K - 1)];
    if (vector) {
      store<T, V>(p + i * V, word);
    } else {
#pragma unroll
      for (int e = 0; e < V; e++) p[i * V + e] = from_float<T>(word[e]);
    }
  }
}

// The taps and bias of V channels, in words as wide as they allow.
template <typename W, int K, int V>
__device__ __forceinline__ void load_weights(float (&weight)[K][V], float (&bias)[V], const Args& p, int c) {
  const W* w = static_cast<const W*>(p.weight) + int64_t(c) * K;
  const W* b = static_cast<const W*>(p.bias) + c;
  constexpr int kWide = V * sizeof(W) > 16 ? 16 / sizeof(W) : V;
  constexpr int kTaps = V * K * sizeof(W) % 16 == 0 ? 16 / sizeof(W) : kWide;  // a thread's taps lie together
  if (p.vector_weights) {
#pragma unroll
    for (int i = 0; i < V * K; i += kTaps) {
      float word[kTaps];
      load<W, kTaps>(word, w + i);
#pragma unroll
      for (int e = 0; e < kTaps; e++) weight[(i + e) % K][(i + e) / K] = word[e];
    }
#pragma unroll
    for (int i = 0; i < V; i += kWide) {
      float word[kWide] = {};
      if (p.bias) load<W, kWide>(word, b + i);
#pragma unroll
      for (int e = 0; e < kWide; e++) bias[i + e] = word[e];
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
      for (int j = 0; j < K; j++) weight[j][v] = to_float(w[v * K + j]);
      bias[v] = p.bias ? to_float(b[v]) : 0.0f;
    }
  }
}
template <typename T, int K, int V>
__device__ __forceinline__ void load_weights_of(float (&weight)[K][V], float (&bias)[V], const Args& p, int c) {
  if (p.wide_weights) {
    load_weights<float, K, V>(weight, bias, p, c);
  } else {
    load_weights<T, K, V>(weight, bias, p, c);
  }
}

// One output of V channels from the K - 1 inputs before and the present one.
template <int K, int V>
__device__ __forceinline__ void convolve(float (&out)[V], const float (&window)[K - 1][V], const float (&in)[V],
                                         const float (&weight)[K][V], const float (&bias)[V], bool activation) {
#pragma unroll
  for (int v = 0; v < V; v++) {
    float s = fmaf(weight[K - 1][v], in[v], bias[v]);
#pragma unroll
    for (int j = 0; j < K - 1; j++) s = fmaf(weight[j][v], window[j][v], s);
    out[v] = activation ? silu(s) : s;
  }
}

template <int K, int V> __device__ __forceinline__ void shift(float (&window)[K - 1][V], const float (&in)[V]) {
#pragma unroll
  for (int v = 0; v < V; v++) {
#pragma unroll
    for (int j = 0; j < K - 2; j++) window[j][v] = window[j + 1][v];
    window[K - 2][v] = in[v];
  }
}

// The window before a row's first token, and the state after its last. One thread does both, so that the new state
// may take the place of the old.
template <typename T, int K, int V>
__device__ __forceinline__ void start_row(float (&window)[K - 1][V], const Args& p, const T* x, int len, int64_t at) {
  const T* old = p.state_in ? static_cast<const T*>(p.state_in) + at : nullptr;
  T* out = static_cast<T*>(p.state_out) + at;
  if (old) load_state<T, K, V>(window, old, p.vector_state);
  if (!p.state_out) return;
  if (len >= K - 1) {
    float columns[K - 1][V];
#pragma unroll
    for (int j = 0; j < K - 1; j++) load<T, V>(columns[j], x + (len - (K - 1) + j) * p.x_token);
    store_state<T, K, V>(out, columns, p.vector_state);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < V * (K - 1); i++) {  // a short row keeps the newest columns of the old state, read ahead of writes
    const int v = i / (K - 1), t = len - (K - 1) + i % (K - 1);
    out[i] = t >= 0 ? x[t * p.x_token + v] : old ? old[i + len] : from_float<T>(0.0f);
  }
}

// What a thread takes: V channels from c on, tokens t0 to t1 - 1 of row b. Made before the wait for the kernel before: the warp's
// lines go into the L2 cache, a lane fetches one.
template <typename T, int V> struct Piece {
  const int c0, c, b, t0, t1;
  const T* row;  // channel 0 of token 0

  __device__ __forceinline__ Piece(const Args& p, int tokens)
      : c0(blockIdx.x * 32 * V), c(c0 + threadIdx.x * V), b(blockIdx.z), t0((blockIdx.y * kWarps + threadIdx.y) * tokens),
        t1(min(t0 + tokens, p.seqlen)), row(static_cast<const T*>(p.x) + b * p.x_batch) {
    constexpr int kLine = 128 / sizeof(T), kLines = 32 * V < kLine ? 1 : 32 * V / kLine;  // of a token
    const int line_t = t0 + threadIdx.x / kLines, line_c = c0 + threadIdx.x % kLines * kLine;
    if (line_t < t1 && line_c < p.channels) prefetch_line(row + line_t * p.x_token + line_c);
  }
  __device__ __forceinline__ bool none(const Args& p) const { return c >= p.channels || t0 >= p.seqlen; }
  // Valid tokens of the row.
  __device__ __forceinline__ int row_length(const Args& p) const {
    return p.seq_lens ? max(0, min(p.seq_lens[b], p.seqlen)) : p.seqlen;
  }
};

// Outputs behind a row's last token.
template <typename T, int V> __device__ __forceinline__ void store_zeros(const Args& p, T* y, int from, int to) {
  const float zeros[V] = {};
#pragma unroll 1
  for (int t = from; t < to; t++) store<T, V>(y + t * p.y_token, zeros);
}

// kAhead tokens are loaded before the first of them is used, and the next kAhead meanwhile. p.tokens >= K - 1.
template <typename T, int K, int V, int kAhead>
__global__ void __launch_bounds__(32 * kWarps) conv_kernel(const __grid_constant__ Args p) {
  let_next_start();
  const Piece<T, V> own(p, p.tokens);
  if (own.none(p)) return;
  const int c = own.c, b = own.b, t0 = own.t0, t1 = own.t1;
  const T* x = own.row + c;
  wait_for_previous();
  const int len = own.row_length(p), valid = min(t1, len);

  Raw<T, V> next[kAhead] = {};
  const T* x_next = x + t0 * p.x_token;
  auto prefetch = [&](int t) {
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (t + i < valid) next[i] = fetch<T, V>(x_next);
      x_next += p.x_token;
    }
  };
  prefetch(t0);
  float window[K - 1][V] = {}, weight[K][V], bias[V];
  load_weights_of<T, K, V>(weight, bias, p, c);
  if (t0 == 0) {
    start_row<T, K, V>(window, p, x, len, (int64_t(b) * p.channels + c) * (K - 1));
  } else if (t0 < valid) {
#pragma unroll
    for (int j = 0; j < K - 1; j++) load<T, V>(window[j], x + (t0 - (K - 1) + j) * p.x_token);
  }

  T* y = static_cast<T*>(p.y) + b * p.y_batch + t0 * p.y_token + c;
#pragma unroll 1
  for (int t = t0; t < valid; t += kAhead) {
    Raw<T, V> now[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) now[i] = next[i];
    prefetch(t + kAhead);
#pragma unroll
    for (int i = 0; i < kAhead; i++) {  // tokens past the end are computed, of whatever is there, and not stored
      float in[V], out[V];
      unpack<T, V>(in, now[i]);
      convolve<K, V>(out, window, in, weight, bias, p.activation);
      shift<K, V>(window, in);
      if (t + i < valid) store<T, V>(y, out);
      y += p.y_token;
    }
  }
  store_zeros<T, V>(p, static_cast<T*>(p.y) + b * p.y_batch + c, max(t0, valid), t1);
}

// The same with kTokens >= K - 1 a thread and no loop: they and the window are in flight before the first is used.
// Seven blocks are to fit on a multiprocessor: 72 registers.
template <typename T, int K, int V, int kTokens>
__global__ void __launch_bounds__(32 * kWarps, 7) piece_kernel(const __grid_constant__ Args p) {
  static_assert(kTokens >= K - 1);
  let_next_start();
  const Piece<T, V> own(p, kTokens);
  if (own.none(p)) return;
  const int c = own.c, b = own.b, t0 = own.t0, t1 = own.t1;
  const T* x = own.row + c;
  wait_for_previous();
  const int len = own.row_length(p), valid = min(t1, len);

  Raw<T, V> before[K - 1] = {}, tokens[kTokens] = {};
  const T* x_next = x + t0 * p.x_token;
#pragma unroll
  for (int i = 0; i < kTokens; i++) {
    if (t0 + i < valid) tokens[i] = fetch<T, V>(x_next);
    x_next += p.x_token;
  }
  if (t0 > 0 && t0 < valid) {
#pragma unroll
    for (int j = 0; j < K - 1; j++) before[j] = fetch<T, V>(x + (t0 - (K - 1) + j) * p.x_token);
  }
  float window[K - 1][V], weight[K][V], bias[V];
  load_weights_of<T, K, V>(weight, bias, p, c);
#pragma unroll
  for (int j = 0; j < K - 1; j++) unpack<T, V>(window[j], before[j]);
  if (t0 == 0) start_row<T, K, V>(window, p, x, len, (int64_t(b) * p.channels + c) * (K - 1));

  T* y = static_cast<T*>(p.y) + b * p.y_batch + c;
  T* y_next = y + t0 * p.y_token;
#pragma unroll
  for (int i = 0; i < kTokens; i++) {
    float in[V], out[V];
    unpack<T, V>(in, tokens[i]);
    convolve<K, V>(out, window, in, weight, bias, p.activation);
    shift<K, V>(window, in);
    if (t0 + i < valid) store<T, V>(y_next, out);
    y_next += p.y_token;
  }
  store_zeros<T, V>(p, y, max(t0, valid), t1);
}

// One token: a thread has V channels of one row, and all it needs is in flight at once.
template <typename T, int K, int V>
__global__ void __launch_bounds__(kStepThreads) step_kernel(const __grid_constant__ Args p) {
  let_next_start();
  const int c = (blockIdx.x * kStepThreads + threadIdx.x) * V, b = blockIdx.y;
  if (c >= p.channels) return;
  const int64_t state_at = (int64_t(b) * p.channels + c) * (K - 1);
  const T* x = static_cast<const T*>(p.x) + b * p.x_batch + c;
  const T* state_in = p.state_in ? static_cast<const T*>(p.state_in) + state_at : nullptr;
  prefetch_line(x);
  if (state_in) prefetch_line(state_in);
  wait_for_previous();
  const Raw<T, V> raw = fetch<T, V>(x);
  float in[V], weight[K][V], bias[V], window[K - 1][V] = {}, out[V] = {};
  if (state_in) load_state<T, K, V>(window, state_in, p.vector_state);
  load_weights_of<T, K, V>(weight, bias, p, c);
  const bool valid = !p.seq_lens || p.seq_lens[b] > 0;
  unpack<T, V>(in, raw);
  if (valid) {
    convolve<K, V>(out, window, in, weight, bias, p.activation);
    shift<K, V>(window, in);
  }
  store<T, V>(static_cast<T*>(p.y) + b * p.y_batch + c, out);
  if (p.state_out) store_state<T, K, V>(static_cast<T*>(p.state_out) + state_at, window, p.vector_state);
}

}  // namespace mamba::conv
