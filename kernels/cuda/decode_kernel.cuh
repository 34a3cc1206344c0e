// Whole-stack decode: one block to a multiprocessor; blocks exchange a vector four times a layer (three for Mamba-2).
//
//   Mamba-1: hidden -> [in_proj, convolution] -> u -> [x_proj] -> dt, B, C -> [dt_proj, scan, gate] -> y -> [out_proj]
//   Mamba-2: hidden -> [in_proj, convolution] -> B, C, dt -> [scan, gate] -> y -> [norm, out_proj]
//
// A block owns channels (their rows of in_proj and dt_proj, their states), some rows of what gives dt, B and C, rows of
// out_proj with their part of the residual, and rows of the head. Every word it sends depends, through the exchanges
// before, on all blocks having read the word that was there: the buffers need no second copy.
#pragma once

#include "decode_product.cuh"

namespace mamba::decode {

// What a thread needs for one channel's convolution, loaded a layer ahead.
template <typename T> struct Conv {
  T weight[kMaxConv], state[kMaxConv - 1], bias;  // as they lie there: a conversion would wait for the load
  __device__ __forceinline__ void load(const Layer& l, const void* state_in, int c, int taps) {
    const T* w = static_cast<const T*>(l.conv_weight) + int64_t(c) * taps;
    const T* s = static_cast<const T*>(state_in) + int64_t(c) * (taps - 1);
    bias = static_cast<const T*>(l.conv_bias)[c];
#pragma unroll
    for (int i = 0; i < kMaxConv; i++) {
      if (i < taps) weight[i] = w[i];
    }
#pragma unroll
    for (int i = 0; i < kMaxConv - 1; i++) {
      if (i < taps - 1) state[i] = s[i];
    }
  }
  float sum, last;
  // The part that does not depend on the new input: the oldest goes out, the others move up.
  __device__ __forceinline__ void begin(void* state_out, int c, int taps) {
    T* s = static_cast<T*>(state_out) + int64_t(c) * (taps - 1);
    sum = to_float(bias), last = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxConv; i++) {
      if (i == taps - 1) last = to_float(weight[i]);
      if (i < taps - 1 && i < kMaxConv - 1) {
        sum = fmaf(to_float(weight[i]), to_float(state[i]), sum);
        if (i > 0) s[i - 1] = state[i];
      }
    }
  }
  __device__ __forceinline__ float finish(float x, void* state_out, int c, int taps) const {
    static_cast<T*>(state_out)[int64_t(c) * (taps - 1) + taps - 2] = from_float<T>(x);
    return fmaf(last, x, sum);
  }
};

template <typename T, int kFamily> struct Stack {
  const Params& p;
  const Layer* layers;
  const Plan& plan;
  unsigned char* smem;
  Ring ring;
  Word *sent_u, *sent_x, *sent_y, *sent_hidden, *sent_best;
  Share channels, x_rows, out_rows, head_rows;
  static constexpr int kPack = sizeof(T) == 2 ? 2 : 1;  // values in a word of u and y
  static constexpr bool kTensor = sizeof(T) == 2;
  // float16's range is short: the residual is scaled down on its way into the tensor cores.
  static constexpr float kShrink = std::is_same_v<T, __half> ? 1.0f / 16 : 1.0f;

  __device__ Stack(const Params& params, const Layer* l, const Plan& pl, unsigned char* shared)
      : p(params), layers(l), plan(pl), smem(shared) {
    const Carve c = carve<T>(p, plan);
    uint64_t* bars = reinterpret_cast<uint64_t*>(smem + c.barriers);
    ring = Ring{smem + c.ring, bars, bars + plan.slots, plan.slots, plan.slot_bytes};
    Word* words = static_cast<Word*>(p.workspace);
    sent_u = words, sent_x = sent_u + plan.words_u, sent_y = sent_x + plan.words_x;
    sent_hidden = sent_y + plan.words_y, sent_best = sent_hidden + plan.words_hidden;
    const int b = blockIdx.x;
    channels = share(p.d_inner / plan.unit, plan.blocks, b, 0);
    channels.first *= plan.unit, channels.count *= plan.unit;
    x_rows = share(plan.x_rows, plan.blocks, b, plan.x_offset);
    out_rows = share(p.d_model, plan.blocks, b, plan.out_offset);
    head_rows = share(p.vocab_size, plan.blocks, b, plan.out_offset);
  }

  __device__ bool has_head(int step) const { return step >= p.n_forced - 1; }
  // in_proj's rows of this block: of x, of z and, in Mamba-2, of B, C and dt.
  __device__ int in_rows() const { return 2 * channels.count + (kFamily == 2 ? x_rows.count : 0); }

  __device__ void produce() const;
  __device__ void consume() const;
};

template <typename T, int kFamily> __device__ void Stack<T, kFamily>::produce() const {
  Producer out(ring, plan.flight);
  const int n = channels.count, row = p.d_model * int(sizeof(T));
  const int dt_row = p.dt_rank * int(sizeof(T)), a_row = p.d_state * 4;
  // Rows [at, at + count) of a slot that lie in the stretch of `size` rows which begins at row `begin` of the list.
  auto part = [&](const void* weight, int64_t first, int begin, int size, int at, int count) {
    const int from = max(at, begin), to = min(at + count, begin + size);
    return Piece{static_cast<const char*>(weight) + (first + from - begin) * row, max(0, to - from) * row};
  };
  auto rows = [&](const void* weight, Share s, int width, int shift) {
    const int slot_rows = 1 << shift;
#pragma unroll 1
    for (int r = 0; r < s.count; r += slot_rows) {
      const char* from = static_cast<const char*>(weight) + int64_t(s.first + r) * width * sizeof(T);
      out.push({from, int(min(slot_rows, s.count - r) * width * sizeof(T))});
    }
  };
  for (int step = 0; step < p.n_steps; step++) {
    for (int i = 0; i < p.n_layer; i++) {
      const Layer& l = layers[i];
      const int total = in_rows(), x_first = channels.first + (kFamily == 2 ? p.d_inner : 0);
      const int z_first = channels.first + (kFamily == 2 ? 0 : p.d_inner);
#pragma unroll 1
      for (int r = 0; r < total; r += 1 << plan.shift_model) {
        const int count = min(1 << plan.shift_model, total - r);
        out.push(part(l.in_proj, x_first, 0, n, r, count), part(l.in_proj, z_first, n, n, r, count),
                 kFamily == 2 ? part(l.in_proj, 2 * p.d_inner + x_rows.first, 2 * n, x_rows.count, r, count) : Piece{});
      }
      if (kFamily == 1) {
        rows(l.x_proj, x_rows, p.d_inner, plan.shift_inner);
        for (int c = 0; c < n; c += plan.slot_channels) {
          const int count = min(plan.slot_channels, n - c);
          const int64_t first = channels.first + c;
          out.push({static_cast<const char*>(l.dt_proj) + first * dt_row, count * dt_row},
                   {reinterpret_cast<const char*>(l.A) + first * a_row, count * a_row});
        }
      }
      rows(l.out_proj, out_rows, p.d_inner, plan.shift_inner);
    }
    if (has_head(step)) rows(p.lm_head, head_rows, p.d_model, plan.shift_model);
  }
}

template <typename T, int kFamily> __device__ void Stack<T, kFamily>::consume() const {
  enum Stage { kIn, kX, kOut };
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, n = channels.count, N = p.d_state;
  const int R = kFamily == 1 ? p.dt_rank : 0;  // words of dt before B and C; Mamba-2 has its dt behind them
  const int conv_items = n + (kFamily == 2 ? x_rows.count : 0), head_dim = kFamily == 2 ? p.d_inner / p.nheads : 1;
  const int heads_in_group = kFamily == 2 ? p.nheads / p.ngroups : 1;
  const int bc = kFamily == 2 ? 2 * p.ngroups * N : 2 * N;
  const float model_part = 1.0f / p.d_model, inner_part = 1.0f / p.d_inner;
  const Carve at = carve<T>(p, plan);
  float* x = reinterpret_cast<float*>(smem + at.x);
  float* xdb = reinterpret_cast<float*>(smem + at.xdb);
  float* partial = reinterpret_cast<float*>(smem + at.partial);
  float* squares = reinterpret_cast<float*>(smem + at.squares);
  float* shared_scale = squares + kThreads;
  float* residual = reinterpret_cast<float*>(smem + at.residual);
  float* us = reinterpret_cast<float*>(smem + at.u);
  float* zs = reinterpret_cast<float*>(smem + at.z);
  float* state = reinterpret_cast<float*>(smem + at.state);
  T* norm = reinterpret_cast<T*>(smem + at.norm);
  T* gated = reinterpret_cast<T*>(smem + at.gated);

  Cursor cursor;
  // Two neighbours of a vector into its place: two planes of float32, or a high and a low part.
  const int low = (kTensor ? 2 : 0) * (p.d_inner > p.d_model ? p.d_inner : p.d_model) + 64;
  auto place = [&](int i, int width, float a, float b) {
    if constexpr (kTensor) {
      auto clamped = [](float v) { return std::is_same_v<T, __half> ? fminf(fmaxf(v, -65504.0f), 65504.0f) : v; };
      a = clamped(a * kShrink), b = clamped(b * kShrink);
      const pair_t<T> high = from_float2<T>(a, b);
      const float2 h = to_float2(high);
      unsigned char* to = smem + at.x + i * 2;
      *reinterpret_cast<pair_t<T>*>(to) = high;
      *reinterpret_cast<pair_t<T>*>(to + low) = from_float2<T>(a - h.x, b - h.y);
    } else {
      float* to = x + (i % 8 / 4) * (width / 2) + i / 8 * 4 + i % 4;
      *reinterpret_cast<float2*>(to) = make_float2(a, b);
    }
  };
  auto fetch = [&](void* to, const void* from, int bytes) {
#pragma unroll 1
    for (int i = tid * 16; i < bytes; i += kThreads * 16) {
      cp_async<16>(static_cast<char*>(to) + i, static_cast<const char*>(from) + i);
    }
  };
  auto load_state = [&](int layer, int step) {
    const float* from = step == 0 ? layers[layer].ssm_state_in : layers[layer].ssm_state_out;
    fetch(state, from + int64_t(channels.first) * N, n * N * 4);
  };
  // Item i of the convolution: the block's channels, then (Mamba-2) its rows of B and C.
  auto conv_channel = [&](int i) { return i < n ? channels.first + i : p.d_inner + x_rows.first + i - n; };
  auto convolves = [&](int i) { return i < n || (i < conv_items && x_rows.first + i - n < bc); };
  auto load_conv = [&](Conv<T>& conv, int layer, int step, int i) {
    const Layer& l = layers[layer];
    if (convolves(i)) conv.load(l, step == 0 ? l.conv_state_in : l.conv_state_out, conv_channel(i), p.d_conv);
  };
  // Channel c's value v of u or y; the lane `next` lanes on holds channel c + 1. All lanes call.
  auto send_packed = [&](Word* to, int c, float v, int next, bool active, uint32_t epoch) {
    if constexpr (kPack == 2) {
      const float w = __shfl_down_sync(~0u, v, next);
      if (active && c % 2 == 0) {
        const pair_t<T> pair = from_float2<T>(v, w);
        send(to + (channels.first + c) / 2, *reinterpret_cast<const uint32_t*>(&pair), epoch);
      }
    } else if (active) {
      send(to + channels.first + c, v, epoch);
    }
  };

  Shape* shapes = reinterpret_cast<Shape*>(smem + at.shapes);  // of the stages, the last of the head
  if (tid == 0) {
    shapes[kIn] = shape_of<T>(in_rows(), p.d_model, plan.shift_model, false);
    shapes[kX] = shape_of<T>(x_rows.count, p.d_inner, plan.shift_inner, false);
    shapes[kOut] = shape_of<T>(out_rows.count, p.d_inner, plan.shift_inner, false);
    shapes[3] = shape_of<T>(head_rows.count, p.d_model, plan.shift_model, true);
  }
  Conv<T> conv;
  load_conv(conv, 0, 0, tid / 4);
  fetch(norm, layers[0].norm, p.d_model * sizeof(T));
  load_state(0, 0);
  cp_async_commit();
  cp_async_wait<0>();
  block_sync();

  uint32_t epoch = 0;
  int64_t token = p.input_ids[0];
  for (int step = 0; step < p.n_steps; step++) {
    if (step > 0 && step < p.n_forced) token = p.input_ids[step];
    const int passes = p.n_layer + has_head(step);
    for (int layer = 0; layer < passes; layer++) {
      const bool head = layer == p.n_layer, more = layer + 1 < p.n_layer;
      const Layer& l = layers[head ? 0 : layer];
      const int next = more ? layer + 1 : 0, next_step = more ? step : step + 1;
      float best = -INFINITY;
      int best_row = 0x7fffffff;
#pragma unroll 1
      for (int stage = kIn; stage <= (head ? kIn : kOut); stage++) {
        if (stage == kX && (kFamily == 2 || x_rows.count == 0)) continue;
        float square = 0.0f;

        if (stage == kOut) {  // first dt_proj, the scan's update and the gate: eight lanes to a channel
          constexpr int kAhead = 3;
          const int sub = lane % 8;
          const unsigned eight = 0xffu << (lane & 24);
          const T* dt_rows = nullptr;
          const float* A = nullptr;
          // What does not depend on the other blocks, of channel first + k: loaded before the wait for them.
          float bias = 0.0f, D = 0.0f;
          int dt_at = 0, b_at = R;
          pair_t<T> w[kAhead];
          float2 a = make_float2(0.0f, 0.0f), h = a;
          auto load = [&](int first, int k) {
            const int c = first + k, head_of = kFamily == 2 ? (channels.first + c) / head_dim : channels.first + c;
            D = l.D[head_of];
            if (kFamily == 1) {
              bias = l.dt_bias[head_of];
#pragma unroll
              for (int i = 0; i < kAhead; i++) {
                if (2 * sub + 16 * i < R) w[i] = *reinterpret_cast<const pair_t<T>*>(dt_rows + k * R + 2 * sub + 16 * i);
              }
              if (2 * sub < N) a = *reinterpret_cast<const float2*>(A + k * N + 2 * sub);
            } else {
              a.x = l.A[head_of], dt_at = bc + head_of, b_at = head_of / heads_in_group * N;
            }
            if (2 * sub < N) h = *reinterpret_cast<const float2*>(state + c * N + 2 * sub);
          };
          auto open_slot = [&](int first) {
            const int count = min(plan.slot_channels, n - first);
            if (kFamily == 1) {
              dt_rows = reinterpret_cast<const T*>(ring.at(cursor.slot));
              A = reinterpret_cast<const float*>(dt_rows + count * R);
              ring.wait(cursor);
            }
            if (warp * 4 + lane / 8 < count) load(first, warp * 4 + lane / 8);
            return count;
          };
          int count = open_slot(0);
          receive<kThreads>(sent_x, plan.words_x, epoch, tid, [&](int i, uint32_t a, uint32_t b) {
            *reinterpret_cast<float2*>(xdb + i) = make_float2(__uint_as_float(a), __uint_as_float(b));
          });
          cp_async_wait<0>();
          block_sync();
#pragma unroll 1
          for (int first = 0;;) {
#pragma unroll 1
            for (int base = warp * 4; base < count; base += 4 * kWarps) {
              const int k = base + lane / 8, c = first + k;
              const bool active = k < count;
              float y = 0.0f;
              if (active) {
                const float *B = xdb + b_at, *C = B + bc / 2;
                float dt = 0.0f, decay = 0.0f;
                if (kFamily == 1) {
#pragma unroll
                  for (int i = 0; i < kAhead; i++) {
                    if (2 * sub + 16 * i < R) {
                      const float2 v = *reinterpret_cast<const float2*>(xdb + 2 * sub + 16 * i), f = to_float2(w[i]);
                      dt = fmaf(f.x, v.x, fmaf(f.y, v.y, dt));
                    }
                  }
#pragma unroll 2
                  for (int j = 2 * sub + 16 * kAhead; j < R; j += 16) {
                    const float2 f = to_float2(*reinterpret_cast<const pair_t<T>*>(dt_rows + k * R + j));
                    dt = fmaf(f.x, xdb[j], fmaf(f.y, xdb[j + 1], dt));
                  }
#pragma unroll
                  for (int o = 4; o; o /= 2) dt += __shfl_xor_sync(eight, dt, o);
                  dt = softplus<true>(dt + bias);
                } else {
                  dt = xdb[dt_at];
                  decay = ex2(dt * kLog2e * a.x);
                }
                const float u = us[c], du = dt * u, dt2 = dt * kLog2e;
                float* out = l.ssm_state_out + int64_t(channels.first + c) * N;
#pragma unroll(kFamily == 2 ? 4 : 1)
                for (int j = 2 * sub; j < N; j += 16) {
                  if (j >= 16) {
                    h = *reinterpret_cast<const float2*>(state + c * N + j);
                    if (kFamily == 1) a = *reinterpret_cast<const float2*>(A + k * N + j);
                  }
                  const float2 b = *reinterpret_cast<const float2*>(B + j), d = *reinterpret_cast<const float2*>(C + j);
                  const float2 f = kFamily == 1 ? make_float2(ex2(dt2 * a.x), ex2(dt2 * a.y)) : make_float2(decay, decay);
                  h = make_float2(fmaf(f.x, h.x, du * b.x), fmaf(f.y, h.y, du * b.y));
                  *reinterpret_cast<float2*>(out + j) = h;
                  y = fmaf(d.x, h.x, fmaf(d.y, h.y, y));
                }
#pragma unroll
                for (int o = 4; o; o /= 2) y += __shfl_xor_sync(eight, y, o);
                y = fmaf(D, u, y) * zs[c];
              }
              send_packed(sent_y, c, y, 8, active && sub == 0, epoch);
              if (k + 4 * kWarps < count) load(first, k + 4 * kWarps);
            }
            first += plan.slot_channels;
            if (first >= n) break;  // the last slot is given back below, behind a block barrier
            block_sync();
            if (warp < kProductWarps && lane == 0 && kFamily == 1) ring.release(cursor.slot);
            if (kFamily == 1) cursor.advance(ring.slots);
            count = open_slot(first);
          }
        }

        // What the product can know before its vector arrives.
        const Shape shape = shapes[head ? 3 : stage];
        const bool normed = stage == kIn || (kFamily == 2 && stage == kOut);
        const TensorProduct<T> product(shape, smem + at.x, low, normed);
        const int quad = tid / 4, quads = kThreads / 4;
        if (stage == kIn && !head && lane % 4 == 0 && convolves(quad)) {
          conv.begin(l.conv_state_out, conv_channel(quad), p.d_conv);
        }

        // The vector that the stage multiplies, into shared memory.
        auto take_hidden = [&](int i, float a, float b) {  // its mean of squares goes along in pieces
          square = fmaf(a, a, fmaf(b, b, square));
          const float2 w = to_float2(*reinterpret_cast<const pair_t<T>*>(norm + i));
          place(i, p.d_model, a * w.x, b * w.y);
        };
        if (stage != kIn) {
          receive<kThreads>(stage == kX ? sent_u : sent_y, p.d_inner / kPack, epoch, tid, [&](int i, uint32_t a, uint32_t b) {
            if constexpr (kTensor) {
              if (kFamily == 1) {
                *reinterpret_cast<uint2*>(smem + at.x + i * 4) = make_uint2(a, b);
                return;
              }
              const float2 v = to_float2(*reinterpret_cast<pair_t<T>*>(&a)), w = to_float2(*reinterpret_cast<pair_t<T>*>(&b));
              square = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(w.x, w.x, fmaf(w.y, w.y, square))));
              const float2 f = to_float2(reinterpret_cast<const pair_t<T>*>(gated)[i]);
              const float2 g = to_float2(reinterpret_cast<const pair_t<T>*>(gated)[i + 1]);
              place(2 * i, p.d_inner, v.x * f.x, v.y * f.y);
              place(2 * i + 2, p.d_inner, w.x * g.x, w.y * g.y);
            } else {
              float2 v = make_float2(__uint_as_float(a), __uint_as_float(b));
              if (kFamily == 2) {
                square = fmaf(v.x, v.x, fmaf(v.y, v.y, square));
                const float2 f = to_float2(*reinterpret_cast<const pair_t<T>*>(gated + i));
                v.x *= f.x, v.y *= f.y;
              }
              place(i, p.d_inner, v.x, v.y);
            }
          });
        } else if (layer == 0) {
          const T* row = static_cast<const T*>(p.embedding) + token * p.d_model;
#pragma unroll 1
          for (int i = 2 * tid; i < p.d_model; i += 2 * kThreads) {
            const float2 v = to_float2(*reinterpret_cast<const pair_t<T>*>(row + i));
            take_hidden(i, v.x, v.y);
          }
#pragma unroll 1
          for (int i = quad; i < out_rows.count; i += quads) {  // by the lanes that add to it
            if (lane % 4 == 0) residual[i] = to_float(row[out_rows.first + i]);
          }
          epoch++;
        } else {
          receive<kThreads>(sent_hidden, p.d_model, epoch, tid, [&](int i, uint32_t a, uint32_t b) {
            take_hidden(i, __uint_as_float(a), __uint_as_float(b));
          });
          epoch++;
        }
        squares[tid] = square;
        block_sync();
        if (stage == kOut) {
          if (kFamily == 1) {
            if (warp < kProductWarps && lane == 0) ring.release(cursor.slot);  // the scan's
            cursor.advance(ring.slots);
          }
          if (more || next_step < p.n_steps) load_state(next, next_step);
          cp_async_commit();
        }
        float scale = 1.0f;
        auto find_scale = [&] {
          float total = 0.0f;
#pragma unroll
          for (int i = 0; i < kWarps; i++) total += squares[lane + 32 * i];
          const bool last = stage == kOut;
          total = warp_sum(total) * (last ? inner_part : model_part) + (last ? p.gated_norm_eps : p.norm_eps);
          scale = rsqrtf(total) / kShrink;
        };
        if (head) find_scale();
        const bool wants_logits = head && step == p.n_steps - 1 && p.logits;
        auto store = [&](int row, int term, float v) {
          if (!head) {
            partial[row * shape.terms + term] = v;
            return;
          }
          v *= scale;
          row += head_rows.first;
          if (wants_logits) p.logits[row] = v;
          if (v > best || best_row == 0x7fffffff) best = v, best_row = row;
        };
        if (warp < kProductWarps) {
          if constexpr (kTensor) product.run(ring, cursor, store);
          else Product{ring, cursor, reinterpret_cast<const float4*>(x), warp, lane}.run(shape, store);
        } else {
          cursor.advance(ring.slots, shape.slots);
          if (warp == kProductWarps && normed && !head) {
            find_scale();
            if (lane == 0) *shared_scale = scale;
          }
        }
        if (head) break;
        if (stage == kOut) cp_async_wait<1>();  // the norms; the state may take longer
        if (stage == kIn) cp_async_wait<0>();   // the state
        block_sync();
        if (normed) scale = *shared_scale;
        // A row's terms, by four lanes.
        auto sum_of = [&](int row) {
          float v = 0.0f;
          if constexpr (kTensor) {
            const float2* from = reinterpret_cast<const float2*>(partial + row * shape.terms) + lane % 4 * shape.segments;
            if (shape.whole) {
              v = lane % 4 == 0 ? partial[row] : 0.0f;
            } else {
#pragma unroll
              for (int i = 0; i < 4; i++) {
                if (i < shape.segments) v += from[i].x + from[i].y;
              }
            }
          } else if (lane % 4 < shape.terms) {
            v = partial[row * shape.terms + lane % 4];
          }
          v += __shfl_xor_sync(~0u, v, 1);
          v += __shfl_xor_sync(~0u, v, 2);
          return v * scale;
        };
        const bool speaks = lane % 4 == 0;
        if (stage == kIn) {
          fetch(norm, more ? layers[layer + 1].norm : has_head(step) ? p.norm_f : layers[0].norm, p.d_model * sizeof(T));
          if (kFamily == 2) fetch(gated, l.gated_norm, p.d_inner * sizeof(T));
          cp_async_commit();
#pragma unroll 1
          for (int base = warp * 8; base < conv_items; base += quads) {
            const int i = base + lane / 4, item = min(i, conv_items - 1);
            float u = sum_of(item < n ? item : item + n), z = sum_of(item < n ? n + item : 0);
            if (i < conv_items && speaks) {
              if (convolves(i)) {
                u = rounded<T>(u);
                u = rounded<T>(silu(conv.finish(u, l.conv_state_out, conv_channel(i), p.d_conv)));
              } else {  // Mamba-2: a head's dt
                u = softplus<true>(u + l.dt_bias[x_rows.first + i - n - bc]);
              }
              if (i < n) us[i] = u, zs[i] = silu(rounded<T>(z));
              if (kFamily == 2 && i >= n) send(sent_x + x_rows.first + i - n, u, epoch);
            }
            if (kFamily == 1) send_packed(sent_u, i, u, 4, speaks && i < n, epoch);
            const bool again = base + quads < conv_items;
            if (speaks && (again || more || next_step < p.n_steps)) {
              load_conv(conv, again ? layer : next, again ? step : next_step, again ? i + quads : quad);
              if (again && convolves(i + quads)) conv.begin(l.conv_state_out, conv_channel(i + quads), p.d_conv);
            }
          }
        } else {
#pragma unroll 1
          for (int base = warp * 8; base < shape.rows; base += quads) {
            const int r = base + lane / 4, row = min(r, shape.rows - 1);
            float v = sum_of(row);
            if (r >= shape.rows || !speaks) continue;
            if (stage == kX) {
              send(sent_x + x_rows.first + r, v, epoch);
            } else {
              v += residual[r];
              if (!p.residual_fp32) v = rounded<T>(v);
              residual[r] = v;
              send(sent_hidden + out_rows.first + r, v, epoch);
            }
          }
        }
      }
      if (!head || !p.output_ids) continue;

      // The next token: the best of the block, then of all blocks.
      auto best_of_block = [&] {
        best_of(best, best_row);
        if (lane == 0) partial[warp] = best, partial[kWarps + warp] = __int_as_float(best_row);
        block_sync();
        best = partial[lane % kWarps], best_row = __float_as_int(partial[kWarps + lane % kWarps]);
        best_of(best, best_row);
        block_sync();
      };
      best_of_block();
      if (tid < 2) send(sent_best + 2 * blockIdx.x + tid, tid ? uint32_t(best_row) : __float_as_uint(best), step + 1);
      best = -INFINITY, best_row = 0x7fffffff;
      receive<kThreads>(sent_best, 2 * plan.blocks, step + 1, tid, [&](int, uint32_t a, uint32_t b) {
        const float v = __uint_as_float(a);
        if (v > best || (v == best && int(b) < best_row)) best = v, best_row = int(b);
      });
      best_of_block();
      token = best_row;
      if (blockIdx.x == 0 && tid == 0) p.output_ids[step - p.n_forced + 1] = token;
      fetch(norm, layers[0].norm, p.d_model * sizeof(T));  // the last norm was in use until here
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
  const Stack<T, kFamily> stack(p, layers.layer, plan, smem);
  if (threadIdx.x == 0) stack.ring.init(kProductWarps);
  __syncthreads();
  if (threadIdx.x >= kThreads) stack.produce();
  else stack.consume();
}

}  // namespace mamba::decode
