// The convolution of one token.
#pragma once

#include "decode_block.cuh"

namespace mamba::decode {

// What a thread needs for one item's convolution, loaded a layer ahead.
template <typename T> struct Convolution {
  T weight[kMaxConv], state[kMaxConv - 1], bias;  // as they lie there: a conversion would wait for the load
  float sum, last;
  T* newest;  // where the new input goes

  template <int kFamily>
  __device__ __forceinline__ void load(const Worker<T, kFamily>& w, int layer, int step, int item) {
    if (!w.convolves(item)) return;
    const Layer& l = w.layers[layer];
    const int c = w.conv_channel(item), taps = w.p.d_conv;
    const T* from = static_cast<const T*>(l.conv_weight) + int64_t(c) * taps;
    const T* s = static_cast<const T*>(step == 0 ? l.conv_state_in : l.conv_state_out) + int64_t(c) * (taps - 1);
    bias = static_cast<const T*>(l.conv_bias)[c];
#pragma unroll
    for (int i = 0; i < kMaxConv; i++) {
      if (i < taps) weight[i] = from[i];
    }
#pragma unroll
    for (int i = 0; i < kMaxConv - 1; i++) {
      if (i < taps - 1) state[i] = s[i];
    }
  }

  // The part that does not depend on the new input: the oldest goes out, the others move up.
  template <int kFamily> __device__ __forceinline__ void begin(const Worker<T, kFamily>& w, const Layer& l, int item) {
    if (!w.convolves(item)) return;
    const int taps = w.p.d_conv;
    T* s = static_cast<T*>(l.conv_state_out) + int64_t(w.conv_channel(item)) * (taps - 1);
    sum = to_float(bias), last = 0.0f, newest = s + taps - 2;
#pragma unroll
    for (int i = 0; i < kMaxConv; i++) {
      if (i == taps - 1) last = to_float(weight[i]);
      if (i < taps - 1 && i < kMaxConv - 1) {
        sum = fmaf(to_float(weight[i]), to_float(state[i]), sum);
        if (i > 0) s[i - 1] = state[i];
      }
    }
  }

  __device__ __forceinline__ float finish(float x) const {
    *newest = from_float<T>(x);
    return fmaf(last, x, sum);
  }
};

}  // namespace mamba::decode
