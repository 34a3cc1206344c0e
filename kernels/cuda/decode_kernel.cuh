// Whole-stack decode: one block to a multiprocessor; blocks exchange a vector four times a layer (three for Mamba-2).
//
//   Mamba-1: hidden -> [in_proj, convolution] -> u -> [x_proj] -> dt, B, C -> [dt_proj, scan, gate] -> y -> [out_proj]
//   Mamba-2: hidden -> [in_proj, convolution] -> B, C, dt -> [scan, gate] -> y -> [norm, out_proj]
//
// A block owns channels (their rows of in_proj and dt_proj, their states), some rows of what gives dt, B and C, rows of
// out_proj with their part of the residual, and rows of the head. Every word it sends depends, through the exchanges
// before, on all blocks having read the word that was there: the buffers need no second copy.
#pragma once

#include "decode_epilogue.cuh"
#include "decode_feed.cuh"
#include "decode_head.cuh"
#include "decode_scan.cuh"
#include "decode_vector.cuh"

namespace mamba::decode {

// How far a thread is.
struct Progress {
  Cursor cursor;       // in the ring
  uint32_t epoch = 0;  // of the words of this pass
  int64_t token;
};

// The product itself: terms into shared memory or, of the head, logits to their place and the best of them to `best`.
template <typename T, int kFamily>
__device__ __forceinline__ void multiply(const Worker<T, kFamily>& w, const Pass& pass, const Shape& shape,
                                         const TensorProduct<T>& product, float scale, Cursor& cursor, Best& best) {
  const bool wants_logits = pass.head && pass.step == w.p.n_steps - 1 && w.p.logits;
  auto store = [&](int row, int term, float v) {
    if (!pass.head) {
      w.partial[row * shape.terms + term] = v;
      return;
    }
    v *= scale;
    row += w.head_rows.first;
    if (wants_logits) w.p.logits[row] = v;
    best.next(v, row);
  };
  if constexpr (Vector<T>::kTensor) product.run(w.ring, cursor, store);
  else Product{w.ring, cursor, reinterpret_cast<const float4*>(w.x.at), w.warp, w.lane}.run(shape, store);
}

// The vector that the stage multiplies, into shared memory, and this thread's squares of it.
template <typename T, int kFamily>
__device__ __forceinline__ void take_vector(const Worker<T, kFamily>& w, int stage, const Pass& pass, Progress& at) {
  float square = 0.0f;
  if (stage != kIn) {
    take_inner(w, stage == kX ? w.sent_u : w.sent_y, at.epoch, square);
  } else if (pass.layer == 0) {
    take_embedding(w, at.token, square);
    at.epoch++;
  } else {
    take_hidden(w, at.epoch, square);
    at.epoch++;
  }
  w.squares[w.tid] = square;
}

// A product with what lies before and behind it. All stages run this one piece of code: fewer instructions were faster
// (NOTES-decode.md).
template <typename T, int kFamily>
__device__ __forceinline__ void run_stage(const Worker<T, kFamily>& w, int stage, const Pass& pass, const Layer& l,
                                          Progress& at, Convolution<T>& conv, Best& best) {
  if (stage == kOut) scan(w, l, at.epoch, at.cursor);

  // What the product can know before its vector arrives.
  const Shape shape = w.shapes[pass.head ? kHead : stage];
  const bool normed = stage == kIn || (kFamily == 2 && stage == kOut);
  const TensorProduct<T> product(shape, w.x, normed);
  if (stage == kIn && !pass.head && w.lane % 4 == 0) conv.begin(w, l, w.tid / 4);

  take_vector(w, stage, pass, at);
  block_sync();
  if (stage == kOut) {
    if (kFamily == 1) {
      if (w.warp < kProductWarps && w.lane == 0) w.ring.release(at.cursor.slot);  // the scan's
      at.cursor.advance(w.ring.slots);
    }
    if (pass.more || pass.next_step < w.p.n_steps) w.fetch_state(pass.next, pass.next_step);
    cp_async_commit();
  }

  float scale = 1.0f;
  if (pass.head) scale = norm_scale(w, stage == kOut);
  if (w.warp < kProductWarps) {
    multiply(w, pass, shape, product, scale, at.cursor, best);
  } else {
    at.cursor.advance(w.ring.slots, shape.slots);
    if (w.warp == kProductWarps && normed && !pass.head) {
      scale = norm_scale(w, stage == kOut);
      if (w.lane == 0) *w.scale = scale;
    }
  }
  if (pass.head) return;

  if (stage == kOut) cp_async_wait<1>();  // the norms; the state may take longer
  if (stage == kIn) cp_async_wait<0>();   // the state
  block_sync();
  if (normed) scale = *w.scale;
  if (stage == kIn) finish_in(w, pass, l, shape, scale, conv, at.epoch);
  else finish_rows(w, stage, shape, scale, at.epoch);
}

// What the first product needs.
template <typename T, int kFamily>
__device__ __forceinline__ void begin(const Worker<T, kFamily>& w, Convolution<T>& conv) {
  if (w.tid == 0) {
    w.shapes[kIn] = shape_of<T>(w.in_rows(), w.p.d_model, w.plan.shift_model, false);
    w.shapes[kX] = shape_of<T>(w.x_rows.count, w.p.d_inner, w.plan.shift_inner, false);
    w.shapes[kOut] = shape_of<T>(w.out_rows.count, w.p.d_inner, w.plan.shift_inner, false);
    w.shapes[kHead] = shape_of<T>(w.head_rows.count, w.p.d_model, w.plan.shift_model, true);
  }
  conv.load(w, 0, 0, w.tid / 4);
  w.fetch_norm(w.layers[0].norm);
  w.fetch_state(0, 0);
  cp_async_commit();
  cp_async_wait<0>();
  block_sync();
}

// What the warps that compute do, token by token.
template <typename T, int kFamily> __device__ void compute(const Block<T, kFamily>& block) {
  const Worker<T, kFamily> w(block);
  Progress at;
  Convolution<T> conv;
  begin(w, conv);
  at.token = w.p.input_ids[0];
  for (int step = 0; step < w.p.n_steps; step++) {
    if (step > 0 && step < w.p.n_forced) at.token = w.p.input_ids[step];
    const int passes = w.p.n_layer + w.has_head(step);
    for (int layer = 0; layer < passes; layer++) {
      const bool head = layer == w.p.n_layer, more = layer + 1 < w.p.n_layer;
      const Pass pass{step, layer, head, more, more ? layer + 1 : 0, more ? step : step + 1};
      const Layer& l = w.layers[head ? 0 : layer];
      Best best;
#pragma unroll 1
      for (int stage = kIn; stage <= (head ? kIn : kOut); stage++) {
        if (stage == kX && (kFamily == 2 || w.x_rows.count == 0)) continue;
        run_stage(w, stage, pass, l, at, conv, best);
      }
      if (!head || !w.p.output_ids) continue;
      at.token = next_token(w, best, step);
      w.fetch_norm(w.layers[0].norm);  // the last norm was in use until here
      cp_async_commit();
      cp_async_wait<0>();
      block_sync();
    }
  }
}

template <typename T, int kFamily>
__global__ void __launch_bounds__(kThreads + 32, 1) stack_kernel(const __grid_constant__ Params p,
                                                                 const __grid_constant__ Layers layers,
                                                                 const __grid_constant__ Plan plan) {
  extern __shared__ __align__(128) unsigned char smem[];
  const Block<T, kFamily> block(p, layers.layer, plan, smem);
  if (threadIdx.x == 0) block.ring.init(kProductWarps);
  __syncthreads();
  if (threadIdx.x >= kThreads) feed(block);
  else compute(block);
}

}  // namespace mamba::decode
