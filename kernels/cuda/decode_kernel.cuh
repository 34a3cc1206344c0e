// Whole-stack decode: one block to a multiprocessor; blocks exchange a vector three times a layer.
//
//   Mamba-1: hidden -> [in_proj, convolution, x_proj] -> dt, B, C -> [dt_proj, scan, gate] -> y -> [out_proj]
//   Mamba-2: hidden -> [in_proj, convolution] -> B, C, dt -> [scan, gate] -> y -> [norm, out_proj]
//
// A block owns channels (their rows of in_proj and dt_proj, their columns of x_proj, their states), in Mamba-2 some rows of
// what gives dt, B and C, rows of out_proj with their part of the residual, and rows of the head. Every word it sends
// depends, through the exchanges before, on all blocks having read the word that was there: the buffers need no second copy.
#pragma once

#include "decode_epilogue.cuh"
#include "decode_feed.cuh"
#include "decode_head.cuh"
#include "decode_packed.cuh"
#include "decode_scan.cuh"
#include "decode_vector.cuh"

namespace mamba::decode {

// How far a thread is.
struct Progress {
  Cursor cursor;       // in the ring
  uint32_t epoch = 0;  // of the words of this pass
  int turn = 0;        // of the words that sum up dt, B and C
  int64_t token;
};

// The vector that the stage multiplies, into shared memory: this thread's squares of it.
template <int kStage, Taking kTaking, int kBits, typename T, int kFamily>
__device__ __forceinline__ float take_vector(const Worker<T, kFamily>& w, const Shape& shape, const Pass& pass, Progress& at) {
  float square = 0.0f;
  if constexpr (kStage == kOut) {
    take_inner<kTaking>(w, shape, at.epoch, square);
  } else {
    if (kStage == kIn && pass.layer == 0) take_embedding<kTaking, kBits>(w, shape, at.token, square);
    else take_hidden<kTaking>(w, shape, at.epoch, square);
    at.epoch++;
  }
  __syncwarp();
  return square;
}

// Before in_proj's end the state and x_proj's columns must be there, before out_proj's the next norm.
__device__ __forceinline__ void end_product() {
  cp_async_wait<0>();
  block_sync();
}
template <int kStage, bool kHeld, typename T, int kFamily>
__device__ __forceinline__ void finish(const Worker<T, kFamily>& w, const Shape& shape, const Pass& pass, const Layer& l,
                                       Convolution<T>& conv, int first_row, uint32_t epoch) {
  if constexpr (kStage == kIn) finish_in<kHeld>(w, shape, pass, l, conv, first_row, epoch);
  else if constexpr (kStage == kOut) finish_out<kHeld>(w, shape, pass, epoch);
}

// A product with its vector's arrival before it and what follows from it. kBits: 16 for weights of type T.
template <int kStage, bool kHeld, int kBits, typename T, int kFamily>
__device__ __forceinline__ void run_product(const Worker<T, kFamily>& w, const Shape& shape, const Pass& pass, const Layer& l,
                                            Progress& at, Convolution<T>& conv, Best& best) {
  constexpr bool kTensor = Vector<T>::kTensor, kNormed = kStage != kOut || kFamily == 2;
  const int rows = w.rows(kStage);
  float* partial = w.partial(kStage);
  const int first_row = kStage == kIn ? keep(in_row(w, w.tid / 8)) : 0;
  if (kStage == kIn && w.lane % 8 == 0) conv.begin(w, l, w.tid / 8);
  if constexpr (kHeld) {
    constexpr int kChunks = kStage == kOut ? 2 : 1;
    using Held = std::conditional_t<kBits == 16, HeldProduct<T, kChunks>, PackedHeld<T, kChunks, kBits>>;
    Held product(w.x, shape.width, rows, w.lane, w.warp);
    if constexpr (kBits == 16) product.hold(w.ring, at.cursor, shape.shift);
    else product.hold(w.ring, at.cursor, shape);
    float square = take_vector<kStage, kHeldTiles, kBits>(w, shape, pass, at);
    product.run(w.x, kNormed, partial);
    if (kNormed) {  // as one more row
#pragma unroll
      for (int o = 16; o > 2; o /= 2) square += __shfl_xor_sync(~0u, square, o);
      if (w.lane < 4) partial[kHeldRows * kHeldTerms + 4 * w.warp + w.lane] = square;
    }
    end_product();
    finish<kStage, true>(w, shape, pass, l, conv, first_row, at.epoch);
    product.release(w.ring, at.cursor, shape.shift);
  } else {
    using Tiled = std::conditional_t<kBits == 16, TensorProduct<T>, PackedProduct<T, kBits>>;
    const Tiled product(shape, rows, w.x, kNormed);  // what it can know before its vector arrives
    float square = take_vector<kStage, kBits == 4 ? kTiled4 : kTiled, kBits>(w, shape, pass, at);
    if (kNormed) {
      square = warp_sum(square);
      if (w.lane == 0) w.square(kStage)[w.warp] = square;
    }
    if (!kTensor || shape.whole) block_sync();  // a warp multiplies what other warps took
    // Terms into shared memory or, of the head, logits to their place and the best of them to `best`.
    const float scale = kStage == kHead ? norm_scale(w, kHead) : 1.0f;
    float* logits = kStage == kHead && pass.step == w.p.n_steps - 1 ? w.p.logits : nullptr;
    auto store = [&](int row, int term, float v) {
      if constexpr (kStage != kHead) {
        partial[row * shape.terms + term] = v;
      } else {
        v *= scale;
        row += w.head_rows.first;
        if (logits) logits[row] = v;
        best.next(v, row);
      }
    };
    if constexpr (kTensor) product.run(w.ring, at.cursor, store);
    else Product{w.ring, at.cursor, reinterpret_cast<const float4*>(w.x.at), w.warp, w.lane}.run(shape, rows, store);
    if (kStage == kHead) return;
    end_product();
    finish<kStage, false>(w, shape, pass, l, conv, first_row, at.epoch);
  }
}

// A product, behind out_proj's scan. kBits: kMixed where the matrix says which integers it has.
template <int kStage, bool kHeld, int kBits, typename T, int kFamily>
__device__ __forceinline__ void run_stage(const Worker<T, kFamily>& w, const Pass& pass, const Layer& l, Progress& at,
                                          Convolution<T>& conv, Best& best) {
  if constexpr (kStage == kOut) {
    scan(w, l, at.epoch, at.turn, at.cursor);
    at.turn ^= 1;
  }
  if constexpr (kBits == kMixed) {
    const int own = kStage == kIn ? l.in_proj_bits : kStage == kOut ? l.out_proj_bits : w.p.head_bits;
    if (own == 8) run_product<kStage, kHeld, 8>(w, w.plan.wide[kStage], pass, l, at, conv, best);
    else run_product<kStage, kHeld, 4>(w, w.plan.shapes[kStage], pass, l, at, conv, best);
  } else {
    run_product<kStage, kHeld, kBits>(w, w.plan.shapes[kStage], pass, l, at, conv, best);
  }
}

// What the first product needs.
template <typename T, int kFamily>
__device__ __forceinline__ void begin(const Worker<T, kFamily>& w, Convolution<T>& conv) {
  if (w.lane % 8 == 0) conv.load(w, 0, 0, w.tid / 8);
  if (kFamily == 1) {
    for (int i = w.tid; i < 2 * w.plan.x_rows; i += kThreads) w.sums[i] = 0;
    w.fetch_x(0);
  }
  w.fetch_norm(w.layers[0].norm);
  w.fetch_state(0, 0);
  cp_async_commit();
  cp_async_wait<0>();
  block_sync();
}

// What the warps that compute do, token by token.
template <bool kHeld, int kBits, typename T, int kFamily> __device__ void compute(const Block<T, kFamily>& block) {
  const Worker<T, kFamily> w(block);
  Progress at;
  Convolution<T> conv;
  Best best;
  begin(w, conv);
  at.token = w.p.input_ids[0];
  for (int step = 0; step < w.p.n_steps; step++) {
    if (step > 0 && step < w.p.n_forced) at.token = w.p.input_ids[step];
    const int passes = w.p.n_layer + w.has_head(step);
    for (int layer = 0; layer < passes; layer++) {
      const bool head = layer == w.p.n_layer, more = layer + 1 < w.p.n_layer;
      const Pass pass{step, layer, head, more, more ? layer + 1 : 0, more ? step : step + 1};
      const Layer& l = w.layers[head ? 0 : layer];
      if (!head) {
        run_stage<kIn, kHeld, kBits>(w, pass, l, at, conv, best);
        run_stage<kOut, kHeld, kBits>(w, pass, l, at, conv, best);
        continue;
      }
      run_stage<kHead, false, kBits>(w, pass, l, at, conv, best);
      if (!w.p.output_ids) continue;
      at.token = next_token(w, best, step);
      best = Best{};
      w.fetch_norm(w.layers[0].norm);  // the last norm was in use until here
      cp_async_commit();
      cp_async_wait<0>();
      block_sync();
    }
  }
}

template <typename T, int kFamily, bool kHeld, int kBits>
__global__ void __launch_bounds__(kThreads + 32, 1) stack_kernel(const __grid_constant__ Params p,
                                                                 const __grid_constant__ Layers layers,
                                                                 const __grid_constant__ Plan plan) {
  extern __shared__ __align__(128) unsigned char smem[];
  const Block<T, kFamily> block(p, layers.layer, plan, smem);
  if (threadIdx.x == 0) block.ring.init(kWarps);
  __syncthreads();
  if (threadIdx.x >= kThreads) feed<kBits>(block);
  else compute<kHeld, kBits>(block);
}

}  // namespace mamba::decode
