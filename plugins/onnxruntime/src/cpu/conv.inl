// The depthwise causal convolution. Lanes are channels; a task takes some channels of kChunk tokens.
#pragma once

#include "scan.inl"

namespace mamba::MAMBA_ISA {
namespace {

constexpr int64_t kElementsPerTask = 8192;

MAMBA_INLINE int64_t chunks_of(const Conv& c) { return ceil_div(c.length, kChunk); }

// Channels of a task, a multiple of kLanes.
MAMBA_INLINE int64_t channels_per_task(const Conv& c) {
  return ceil_div(ceil_div(kElementsPerTask, min64(c.length, kChunk)), kLanes) * kLanes;
}

// Input column `index` of the lanes: the carried state where it is negative.
template <class T>
MAMBA_INLINE V column(const Conv& c, int64_t batch, int64_t channel, int64_t index, int lanes) {
  const int64_t carried = c.kernel - 1;
  if (index >= 0) {
    return load(static_cast<const T*>(c.x) + (batch * c.length + index) * c.channels + channel, lanes);
  }
  return gather(static_cast<const T*>(c.state) + (batch * c.channels + channel) * carried + carried + index, carried, lanes);
}

template <class T>
MAMBA_INLINE void conv_present(const Conv& c, int64_t batch, int64_t channel, int64_t valid, int lanes) {
  const int64_t carried = c.kernel - 1;
  for (int64_t j = 0; j < carried; ++j) {
    const V v = column<T>(c, batch, channel, valid - carried + j, lanes);
    T kept[kLanes];
    store(kept, v, kLanes);
    T* to = static_cast<T*>(c.present) + (batch * c.channels + channel) * carried + j;
    for (int i = 0; i < lanes; ++i) to[i * carried] = kept[i];
  }
}

// Taps 4 is the usual kernel, unrolled; 0 takes any.
template <class T, int Taps>
MAMBA_INLINE void conv_block(const Conv& c, int64_t batch, int64_t channel, int64_t first, int64_t tokens, int lanes,
                             V* scratch) {
  const int64_t taps = Taps ? Taps : c.kernel;
  V* weight = scratch;
  V* window = scratch + taps;
  for (int64_t j = 0; j < taps; ++j) weight[j] = gather(static_cast<const T*>(c.weight) + channel * taps + j, taps, lanes);
  for (int64_t i = 0; i < tokens + taps - 1; ++i) window[i] = column<T>(c, batch, channel, first - (taps - 1) + i, lanes);
  const V bias = load(static_cast<const T*>(c.bias) + channel, lanes);
  T* y = static_cast<T*>(c.y) + (batch * c.length + first) * c.channels + channel;
  for (int64_t t = 0; t < tokens; ++t, y += c.channels) {
    V v = bias;
    for (int64_t j = 0; j < taps; ++j) v = window[t + j] * weight[j] + v;
    store(y, c.silu ? silu(v) : v, lanes);
  }
}

template <class T>
MAMBA_INLINE void conv_typed(const Conv& c, int64_t task, float* scratch) {
  const int64_t chunks = chunks_of(c), each = channels_per_task(c), blocks = ceil_div(c.channels, each);
  const int64_t first = task % chunks * kChunk, block = task / chunks % blocks, batch = task / (chunks * blocks);
  const int64_t valid = valid_length(c.seq_lens, batch, c.length);
  const int64_t past = min64(c.length, first + kChunk), stop = valid < past ? valid : past;
  const int64_t last_channel = min64(c.channels, (block + 1) * each);
  for (int64_t channel = block * each; channel < last_channel; channel += kLanes) {
    const int lanes = static_cast<int>(min64(kLanes, last_channel - channel));
    if (first == 0) conv_present<T>(c, batch, channel, valid, lanes);
    V* memory = reinterpret_cast<V*>(scratch);
    if (stop > first) {
      if (c.kernel == 4) {
        conv_block<T, 4>(c, batch, channel, first, stop - first, lanes, memory);
      } else {
        conv_block<T, 0>(c, batch, channel, first, stop - first, lanes, memory);
      }
    }
    for (int64_t t = stop > first ? stop : first; t < past; ++t) {
      store(static_cast<T*>(c.y) + (batch * c.length + t) * c.channels + channel, V{}, lanes);
    }
  }
}

static int64_t conv_tasks(const Conv& c) {
  return c.batch * ceil_div(c.channels, channels_per_task(c)) * chunks_of(c);
}

static size_t conv_scratch(const Conv& c) { return static_cast<size_t>((2 * c.kernel + kChunk) * kLanes); }

static void conv_run(const Conv& c, int64_t task, float* scratch) {
  switch (c.type) {
    case Type::f32: return conv_typed<float>(c, task, scratch);
    case Type::f16: return conv_typed<Half>(c, task, scratch);
    case Type::bf16: return conv_typed<Brain>(c, task, scratch);
  }
}

}  // namespace
}  // namespace mamba::MAMBA_ISA
