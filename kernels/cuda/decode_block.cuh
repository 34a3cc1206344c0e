// What a block of the whole-stack decode kernel has: its rows of the weights, its words of the exchange, its shared memory.
#pragma once

#include "decode_product.cuh"

namespace mamba::decode {

// What the warp that feeds the ring and those that compute both need.
template <typename T, int kFamily> struct Block {
  const Params& p;
  const Layer* layers;
  const Plan& plan;
  unsigned char* smem;
  Ring ring;
  Word *sent_x, *sent_y, *sent_hidden, *sent_best;
  Share channels, out_rows, head_rows;
  Share x_rows;  // Mamba-2: rows of in_proj; of x_proj, Mamba-1, every block has its channels' columns

  __device__ Block(const Params& params, const Layer* l, const Plan& pl, unsigned char* shared)
      : p(params), layers(l), plan(pl), smem(shared) {
    const Carve& c = plan.at;
    uint64_t* bars = reinterpret_cast<uint64_t*>(smem + c.barriers);
    ring = Ring{smem + c.ring, bars, bars + plan.slots, plan.slots, plan.slot_bytes};
    Word* words = static_cast<Word*>(p.workspace);
    sent_x = words, sent_y = sent_x + plan.words_x;
    sent_hidden = sent_y + plan.words_y, sent_best = sent_hidden + plan.words_hidden;
    const int block = blockIdx.x;
    channels = share(p.d_inner / plan.unit, plan.blocks, block, 0);
    channels.first *= plan.unit, channels.count *= plan.unit;
    x_rows = share(plan.x_rows, plan.blocks, block, plan.x_offset);
    out_rows = share(p.d_model, plan.blocks, block, plan.out_offset);
    head_rows = share(p.vocab_size, plan.blocks, block, plan.out_offset);
  }

  __device__ bool has_head(int step) const { return step >= p.n_forced - 1; }
  // in_proj's rows of this block: of x, of z and, in Mamba-2, of B, C and dt.
  __device__ int in_rows() const { return 2 * channels.count + (kFamily == 2 ? x_rows.count : 0); }
  __device__ int rows(int stage) const { return stage == kIn ? in_rows() : stage == kOut ? out_rows.count : head_rows.count; }
};

// A layer of a token or, behind the last layer, the head.
struct Pass {
  int step, layer;
  bool head, more;      // more: a layer of the same token follows
  int next, next_step;  // the layer behind this one, and its token
};

// What a thread that computes has besides: sizes, of which some cost a division, and where things lie in shared memory.
template <typename T, int kFamily> struct Worker : Block<T, kFamily> {
  using Base = Block<T, kFamily>;
  static constexpr int kPack = sizeof(T) == 2 ? 2 : 1;  // values in a word of y
  int tid, warp, lane;
  int d_state;
  int dt_words;    // words of dt before B and C; Mamba-2 has its dt behind them
  int bc;          // words of B and C
  int conv_items;  // the block's channels, then (Mamba-2) its rows of B, C and dt
  int head_dim, heads_in_group;
  float model_part, inner_part;
  Vector<T> x;     // what a product multiplies
  float* xdb;      // dt, B and C of all channels
  Word* sums;      // Mamba-1: the words of dt, B and C as they were a layer ago, and room for those to come
  unsigned char* x_columns;  // Mamba-1: the channels' columns of x_proj
  float *partials, *squares;  // a product's results, in terms, and every warp's part of a norm's sum of squares; twice
  float *residual, *u, *z, *state;
  T *norm, *gated;  // weights of the norm to come and of Mamba-2's gated one

  __device__ __forceinline__ explicit Worker(const Base& block) : Base(block) {
    const Params& p = block.p;
    tid = threadIdx.x, warp = tid / 32, lane = tid % 32, d_state = p.d_state;
    dt_words = kFamily == 1 ? p.dt_rank : 0;
    conv_items = block.channels.count + (kFamily == 2 ? block.x_rows.count : 0);
    head_dim = kFamily == 2 ? p.d_inner / p.nheads : 1;
    heads_in_group = kFamily == 2 ? p.nheads / p.ngroups : 1;
    bc = kFamily == 2 ? 2 * p.ngroups * d_state : 2 * d_state;
    model_part = 1.0f / p.d_model, inner_part = 1.0f / p.d_inner;
    unsigned char* smem = block.smem;
    const Carve& at = block.plan.at;
    x = Vector<T>{smem + at.x, p.d_inner > p.d_model ? p.d_inner : p.d_model};
    xdb = reinterpret_cast<float*>(smem + at.xdb);
    sums = reinterpret_cast<Word*>(smem + at.sums);
    x_columns = smem + at.x_columns;
    partials = reinterpret_cast<float*>(smem + at.partial);
    squares = reinterpret_cast<float*>(smem + at.squares);
    residual = reinterpret_cast<float*>(smem + at.residual);
    u = reinterpret_cast<float*>(smem + at.u);
    z = reinterpret_cast<float*>(smem + at.z);
    state = reinterpret_cast<float*>(smem + at.state);
    norm = reinterpret_cast<T*>(smem + at.norm);
    gated = reinterpret_cast<T*>(smem + at.gated);
  }

  // Between two uses of one of these is a block barrier, since every product has one behind it.
  __device__ __forceinline__ float* partial(int stage) const { return partials + (stage == kOut ? this->plan.partials : 0); }
  __device__ __forceinline__ float* square(int stage) const { return squares + (stage == kOut ? kWarps : 0); }

  // Whether an item has a convolution (dt has none), and its channel there.
  __device__ __forceinline__ bool convolves(int item) const {
    const int n = this->channels.count;
    return item < n || (item < conv_items && this->x_rows.first + item - n < bc);
  }
  __device__ __forceinline__ int conv_channel(int item) const {
    const int n = this->channels.count;
    return item < n ? this->channels.first + item : this->p.d_inner + this->x_rows.first + item - n;
  }

  // Into shared memory by all threads, 16 bytes each; cp_async_commit is the caller's.
  __device__ __forceinline__ void fetch(void* to, const void* from, int bytes) const {
#pragma unroll 1
    for (int i = tid * 16; i < bytes; i += kThreads * 16) {
      cp_async<16>(static_cast<char*>(to) + i, static_cast<const char*>(from) + i);
    }
  }
  __device__ __forceinline__ void fetch_state(int layer, int step) const {
    const float* from = step == 0 ? this->layers[layer].ssm_state_in : this->layers[layer].ssm_state_out;
    fetch(state, from + int64_t(this->channels.first) * d_state, this->channels.count * d_state * 4);
  }
  // The block's columns of x_proj: eight threads to a row.
  __device__ __forceinline__ void fetch_x(int layer) const {
    constexpr int kBytes = int(sizeof(T));
    const char* from = static_cast<const char*>(this->layers[layer].x_proj) + this->channels.first * kBytes;
    const int words = this->channels.count * kBytes / 4;
#pragma unroll 1
    for (int r = tid / 8; r < this->plan.x_rows; r += kThreads / 8) {
#pragma unroll 1
      for (int k = tid % 8; k < words; k += 8) {
        cp_async<4>(x_columns + (r * this->plan.x_stride + k) * 4, from + int64_t(r) * this->p.d_inner * kBytes + k * 4);
      }
    }
  }
  __device__ __forceinline__ void fetch_norm(const void* weight) const { fetch(norm, weight, this->p.d_model * sizeof(T)); }

  // Value v of the block's channel c; the lane `next` lanes on has channel c + 1. All lanes call.
  __device__ __forceinline__ void send_channel(Word* to, int c, float v, int next, bool active, uint32_t epoch) const {
    if constexpr (kPack == 2) {
      const float w = __shfl_down_sync(~0u, v, next);
      if (active && c % 2 == 0) {
        const pair_t<T> pair = from_float2<T>(v, w);
        send(to + (this->channels.first + c) / 2, *reinterpret_cast<const uint32_t*>(&pair), epoch);
      }
    } else if (active) {
      send(to + this->channels.first + c, v, epoch);
    }
  }
};

}  // namespace mamba::decode
