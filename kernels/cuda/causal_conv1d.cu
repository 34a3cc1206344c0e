// causal_conv1d: memory-bound. A thread slides over `tokens` tokens of V neighbouring channels (16 bytes) with the
// window in registers, so each input is read once but for the width - 1 tokens where a thread starts.
#include <algorithm>
#include <type_traits>

#include "common.cuh"
#include "mamba/causal_conv1d.h"

namespace mamba::conv {
namespace {

struct Args {
  const void *x, *weight, *bias, *state_in;
  void *y, *state_out;
  const int32_t* seq_lens;
  int64_t x_batch, x_token, y_batch, y_token;
  int seqlen, channels, tokens, activation, vector_weights, vector_state;
};

constexpr int kThreads = 64;
constexpr int kAhead = 4;  // tokens loaded before the first is used

// V channels of one token as loaded, and as numbers.
template <typename T, int V> struct Raw {
  std::conditional_t<V == 1, T, uint4> word;
};
template <typename T, int V> __device__ __forceinline__ void fetch(Raw<T, V>& r, const T* p) {
  static_assert(V == 1 || V * sizeof(T) == 16, "one 16-byte access");
  r.word = *reinterpret_cast<const decltype(r.word)*>(p);
}
template <typename T, int V> __device__ __forceinline__ void unpack(float (&f)[V], const Raw<T, V>& r) {
  if constexpr (V == 1) {
    f[0] = to_float(r.word);
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
  Raw<T, V> r;
  fetch<T, V>(r, p);
  unpack<T, V>(f, r);
}
template <typename T, int V> __device__ __forceinline__ void store(T* p, const float (&r)[V]) {
  if constexpr (V == 1) {
    *p = from_float<T>(r[0]);
  } else {
    uint4 word;
    pair_t<T>* pairs = reinterpret_cast<pair_t<T>*>(&word);
#pragma unroll
    for (int i = 0; i < V / 2; i++) pairs[i] = from_float2<T>(r[2 * i], r[2 * i + 1]);
    *reinterpret_cast<uint4*>(p) = word;
  }
}

// The states of V channels lie together, K - 1 values each, oldest first.
template <typename T, int K, int V>
__device__ __forceinline__ void load_state(float (&s)[K - 1][V], const T* p, bool vec) {
  if constexpr (V > 1) {
    if (vec) {
#pragma unroll
      for (int i = 0; i < K - 1; i++) {
        float r[V];
        load<T, V>(r, p + i * V);
#pragma unroll
        for (int e = 0; e < V; e++) s[(i * V + e) % (K - 1)][(i * V + e) / (K - 1)] = r[e];
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < V * (K - 1); i++) s[i % (K - 1)][i / (K - 1)] = to_float(p[i]);
}
template <typename T, int K, int V>
__device__ __forceinline__ void store_state(T* p, const float (&s)[K - 1][V], bool vec) {
  if constexpr (V > 1) {
    if (vec) {
#pragma unroll
      for (int i = 0; i < K - 1; i++) {
        float r[V];
#pragma unroll
        for (int e = 0; e < V; e++) r[e] = s[(i * V + e) % (K - 1)][(i * V + e) / (K - 1)];
        store<T, V>(p + i * V, r);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < V * (K - 1); i++) p[i] = from_float<T>(s[i % (K - 1)][i / (K - 1)]);
}

// The taps and bias of V channels; V * K weights lie together, in 16-byte words if V channels are vectors.
template <typename W, int K, int V>
__device__ __forceinline__ void load_weights(float (&weight)[K][V], float (&bias)[V], const Args& p, int c) {
  const W* w = static_cast<const W*>(p.weight) + int64_t(c) * K;
  const W* pb = static_cast<const W*>(p.bias) + c;
  constexpr int kEach = V == 1 ? 1 : 16 / sizeof(W);
  if constexpr (V > 1) {
    if (p.vector_weights) {
#pragma unroll
      for (int i = 0; i < V * K; i += kEach) {
        float r[kEach];
        load<W, kEach>(r, w + i);
#pragma unroll
        for (int e = 0; e < kEach; e++) weight[(i + e) % K][(i + e) / K] = r[e];
      }
#pragma unroll
      for (int i = 0; i < V; i += kEach) {
        float r[kEach] = {};
        if (p.bias) load<W, kEach>(r, pb + i);
#pragma unroll
        for (int e = 0; e < kEach && i + e < V; e++) bias[i + e] = r[e];
      }
      return;
    }
  }
#pragma unroll
  for (int v = 0; v < V; v++) {
#pragma unroll
    for (int j = 0; j < K; j++) weight[j][v] = to_float(w[v * K + j]);
    bias[v] = p.bias ? to_float(pb[v]) : 0.0f;
  }
}

// V channels of the T x W problem; K taps.
template <typename T, typename W, int K, int V>
__global__ void __launch_bounds__(kThreads) conv_kernel(const __grid_constant__ Args p) {
  const int c = (blockIdx.x * kThreads + threadIdx.x) * V, b = blockIdx.z;
  if (c >= p.channels) return;
  const int len = p.seq_lens ? max(0, min(p.seq_lens[b], p.seqlen)) : p.seqlen;
  const int t0 = blockIdx.y * p.tokens, t1 = min(t0 + p.tokens, p.seqlen), valid = min(t1, len);
  const T* x = static_cast<const T*>(p.x) + b * p.x_batch + c;
  T* y = static_cast<T*>(p.y) + b * p.y_batch + c;
  const T* state_in = p.state_in ? static_cast<const T*>(p.state_in) + (int64_t(b) * p.channels + c) * (K - 1) : nullptr;

  // The state of V channels is K - 1 words of 16 bytes; a thread that starts the row needs all of it.
  float before[K - 1][V] = {};
  const bool starts = t0 == 0 && state_in;
  if (starts) load_state<T, K, V>(before, state_in, p.vector_state);

  // Input at time t, which may lie before the row (the state, or zeros).
  auto input = [&](float(&r)[V], int t) {
    if (t >= 0) {
      load<T, V>(r, x + t * p.x_token);
    } else {
#pragma unroll
      for (int v = 0; v < V; v++) r[v] = state_in ? to_float(state_in[v * (K - 1) + K - 1 + t]) : 0.0f;
    }
  };
  Raw<T, V> next[kAhead];
  auto prefetch = [&](int t) {
    if (t + kAhead > valid) return;
#pragma unroll
    for (int i = 0; i < kAhead; i++) fetch<T, V>(next[i], x + (t + i) * p.x_token);
  };
  prefetch(t0);
  float window[K - 1][V], weight[K][V], bias[V];
#pragma unroll
  for (int j = 0; j < K - 1; j++) {
    if (t0 == 0) {
#pragma unroll
      for (int v = 0; v < V; v++) window[j][v] = before[j][v];
    } else if (t0 < valid) {
      input(window[j], t0 - (K - 1) + j);
    }
  }
  if (t0 == 0 && p.state_out) {
    // This thread alone reads the state of its channels, so the new one may take its place.
    T* out = static_cast<T*>(p.state_out) + (int64_t(b) * p.channels + c) * (K - 1);
    float last[K - 1][V] = {};
#pragma unroll
    for (int j = 0; j < K - 1; j++) {
      const int t = len - (K - 1) + j;
      if (t >= 0) {
        load<T, V>(last[j], x + t * p.x_token);
      } else {
#pragma unroll
        for (int i = 0; i < K - 1; i++) {  // t is -(K - 1) + i for one i
#pragma unroll
          for (int v = 0; v < V; v++) last[j][v] = i == t + K - 1 ? before[i][v] : last[j][v];
        }
      }
    }
    store_state<T, K, V>(out, last, p.vector_state);
  }
  load_weights<W, K, V>(weight, bias, p, c);

  auto token = [&](int t, const float(&in)[V]) {
    float out[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
      float s = fmaf(weight[K - 1][v], in[v], bias[v]);
#pragma unroll
      for (int j = 0; j < K - 1; j++) s = fmaf(weight[j][v], window[j][v], s);
      out[v] = p.activation ? silu(s) : s;
#pragma unroll
      for (int j = 0; j < K - 2; j++) window[j][v] = window[j + 1][v];
      window[K - 2][v] = in[v];
    }
    store<T, V>(y + t * p.y_token, out);
  };
  int t = t0;
#pragma unroll 1
  for (; t + kAhead <= valid; t += kAhead) {
    Raw<T, V> now[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) now[i] = next[i];
    prefetch(t + kAhead);
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      float in[V];
      unpack<T, V>(in, now[i]);
      token(t + i, in);
    }
  }
#pragma unroll 1
  for (; t < valid; t++) {
    float in[V];
    load<T, V>(in, x + t * p.x_token);
    token(t, in);
  }
  const float zeros[V] = {};
#pragma unroll 1
  for (; t < t1; t++) store<T, V>(y + t * p.y_token, zeros);
}

using Params = mamba_causal_conv1d_params;

size_t dtype_size(int dtype) { return dtype == MAMBA_F32 ? 4 : 2; }

bool vectors(const Params& p) {
  const int64_t e = int64_t(dtype_size(p.dtype));
  return aligned(p.x, 16) && aligned(p.y, 16) && p.channels * e % 16 == 0 && p.x_batch_stride * e % 16 == 0 &&
         p.x_token_stride * e % 16 == 0 && p.y_batch_stride * e % 16 == 0 && p.y_token_stride * e % 16 == 0;
}

// Tokens a thread takes: long enough that re-reading width - 1 of them is cheap, short enough to fill the device.
int select(const Params& p) {
  const int v = vectors(p) ? int(16 / dtype_size(p.dtype)) : 1;
  const double columns = double(p.batch) * ceil_div(p.channels, v * kThreads) * kThreads;
  int tokens = 32;
  while (tokens > 4 && columns * ceil_div(p.seqlen, tokens) < 1024.0 * sm_count()) tokens /= 2;
  return std::max(tokens, ceil_div(p.seqlen, 65535));
}

template <typename T, typename W, int K> int launch(const Params& p, cudaStream_t stream) {
  const int tokens = p.tactic > 0 ? p.tactic : select(p);
  const Args args{p.x, p.weight, p.bias, p.state_in, p.y, p.state_out, p.seq_lens, p.x_batch_stride, p.x_token_stride,
                  p.y_batch_stride, p.y_token_stride, p.seqlen, p.channels, tokens, p.activation,
                  aligned(p.weight, 16) && aligned(p.bias, 16), aligned(p.state_in, 16) && aligned(p.state_out, 16)};
  constexpr int V = 16 / sizeof(T);
  const bool vec = vectors(p);
  const dim3 grid(ceil_div(p.channels, kThreads * (vec ? V : 1)), ceil_div(p.seqlen, tokens), p.batch);
  if (vec) {
    conv_kernel<T, W, K, V><<<grid, kThreads, 0, stream>>>(args);
  } else {
    conv_kernel<T, W, K, 1><<<grid, kThreads, 0, stream>>>(args);
  }
  return launch_status();
}

template <typename T, typename W> int launch_width(const Params& p, cudaStream_t stream) {
  switch (p.width) {
    case 2: return launch<T, W, 2>(p, stream);
    case 3: return launch<T, W, 3>(p, stream);
    case 4: return launch<T, W, 4>(p, stream);
    case 5: return launch<T, W, 5>(p, stream);
    case 6: return launch<T, W, 6>(p, stream);
    case 7: return launch<T, W, 7>(p, stream);
    case 8: return launch<T, W, 8>(p, stream);
    default: return MAMBA_ERROR_SHAPE;
  }
}

int check(const Params& p) {
  if (!p.x || !p.weight || !p.y) return MAMBA_ERROR_NULL_POINTER;
  if (p.weight_dtype != p.dtype && p.weight_dtype != MAMBA_F32) return MAMBA_ERROR_DTYPE;
  if (p.batch < 1 || p.batch > 65535 || p.seqlen < 1 || p.channels < 1 || p.width < 2 || p.width > 8) {
    return MAMBA_ERROR_SHAPE;
  }
  if (p.tactic == 0 || (p.tactic > 0 && ceil_div(p.seqlen, p.tactic) > 65535)) return MAMBA_ERROR_TACTIC;
  return MAMBA_OK;
}

}  // namespace
}  // namespace mamba::conv

extern "C" int mamba_causal_conv1d(const mamba_causal_conv1d_params* params, mamba_stream stream) {
  using namespace mamba;
  if (!params) return MAMBA_ERROR_NULL_POINTER;
  const int status = conv::check(*params);
  if (status != MAMBA_OK) return status;
  return dispatch(params->dtype, [&](auto t) {
    using T = decltype(t);
    const auto s = static_cast<cudaStream_t>(stream);
    if (params->weight_dtype == params->dtype) return conv::launch_width<T, T>(*params, s);
    if constexpr (!std::is_same_v<T, float>) return conv::launch_width<T, float>(*params, s);
    return int(MAMBA_ERROR_DTYPE);
  });
}

extern "C" size_t mamba_causal_conv1d_workspace(const mamba_causal_conv1d_params*) { return 0; }

extern "C" int mamba_causal_conv1d_tactics(const mamba_causal_conv1d_params* params, int32_t* out, int max) {
  if (!params || max < 1 || mamba::conv::check(*params) != MAMBA_OK) return 0;
  out[0] = mamba::conv::select(*params);
  int count = 1;
  for (int tokens : {4, 8, 16, 32, 64}) {
    if (count < max && tokens != out[0] && mamba::ceil_div(params->seqlen, tokens) <= 65535) out[count++] = tokens;
  }
  return count;
}
