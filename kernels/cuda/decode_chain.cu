#include "decode_chain.cuh"

namespace mamba::decode {
namespace {

constexpr int kBlock = 256, kBlockWarps = kBlock / 32;

__device__ __forceinline__ void predecessor() {  // its results are visible from here on
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float warp_total(float v) {
#pragma unroll
  for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

template <typename T> __device__ __forceinline__ float dot_vec(const Vec<T, 8>& w, const float* x, float sum) {
#pragma unroll
  for (int i = 0; i < 8; i++) sum = fmaf(to_float(w.v[i]), x[i], sum);
  return sum;
}

// kRows rows of a matrix times x in shared memory by one warp, kAhead loads of each under way; the first precede ready().
template <typename T, int kRows, int kAhead, typename F>
__device__ __forceinline__ void warp_dots(const T* const (&rows)[kRows], const float* x, int width, bool vector,
                                          float (&sum)[kRows], F&& ready) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < kRows; r++) sum[r] = 0.0f;
  if (!vector) {
    ready();
    for (int i = lane; i < width; i += 32) {
#pragma unroll
      for (int r = 0; r < kRows; r++) sum[r] = fmaf(to_float(rows[r][i]), x[i], sum[r]);
    }
  } else {
    Vec<T, 8> w[kAhead][kRows];
    auto fetch = [&](int at) {
#pragma unroll
      for (int a = 0; a < kAhead; a++) {
        const int i = at + a * 256 + lane * 8;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          if (i < width) w[a][r] = load_vec<T, 8>(rows[r] + i);
        }
      }
    };
    fetch(0);
    ready();
    for (int at = 0; at < width; at += kAhead * 256) {
      if (at) fetch(at);
#pragma unroll
      for (int a = 0; a < kAhead; a++) {
        const int i = at + a * 256 + lane * 8;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          if (i < width) sum[r] = dot_vec(w[a][r], x + i, sum[r]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) sum[r] = warp_total(sum[r]);
}

struct Buffers {  // one batch row's scratch; strides are the vectors' own lengths
  float *hidden, *u, *z, *x, *y;
};

// hidden times the norm's weight into shared memory; returns the norm's scale.
template <typename T>
__device__ __forceinline__ float normed(const float* hidden, const void* weight, int width, float eps, float* x) {
  __shared__ float parts[kBlockWarps];
  float square = 0.0f;
  for (int i = threadIdx.x; i < width; i += kBlock) {
    const float v = hidden[i];
    square = fmaf(v, v, square);
    x[i] = v * to_float(static_cast<const T*>(weight)[i]);
  }
  square = warp_total(square);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = square;
  __syncthreads();
  square = 0.0f;
  for (int i = 0; i < kBlockWarps; i++) square += parts[i];
  return rsqrtf(square / width + eps);
}

template <typename T> __global__ void embed_kernel(const __grid_constant__ Params p, float* hidden) {
  predecessor();
  const int i = blockIdx.x * kBlock + threadIdx.x;
  const int64_t b = blockIdx.y, token = p.input_ids[b];
  if (i < p.d_model) hidden[b * p.d_model + i] = to_float(static_cast<const T*>(p.embedding)[token * p.d_model + i]);
}

// A warp has one channel: its rows of x and z, then its convolution.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    in_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s, bool vector) {
  extern __shared__ float x[];
  const int lane = threadIdx.x % 32, c = blockIdx.x * kBlockWarps + threadIdx.x / 32, k = p.d_conv;
  const int own = c < p.d_inner ? c : p.d_inner - 1;
  const int64_t b = blockIdx.y;
  const T* weight = static_cast<const T*>(l.in_proj) + int64_t(own) * p.d_model;
  const T* const rows[2] = {weight, weight + int64_t(p.d_inner) * p.d_model};
  float sum[2], scale = 0.0f;
  warp_dots<T, 2, 5>(rows, x, p.d_model, vector, sum, [&] {
    predecessor();
    scale = normed<T>(s.hidden + b * p.d_model, l.norm, p.d_model, p.norm_eps, x);
  });
  if (lane || c >= p.d_inner) return;
  const float in = to_float(from_float<T>(sum[0] * scale)), gate = to_float(from_float<T>(sum[1] * scale));
  const T* w = static_cast<const T*>(l.conv_weight) + int64_t(c) * k;
  const T* before = static_cast<const T*>(l.conv_state_in) + (b * p.d_inner + c) * (k - 1);
  T* after = static_cast<T*>(l.conv_state_out) + (b * p.d_inner + c) * (k - 1);
  float u = fmaf(to_float(w[k - 1]), in, to_float(static_cast<const T*>(l.conv_bias)[c]));
  for (int i = 0; i < k - 1; i++) {
    const T v = before[i];
    u = fmaf(to_float(w[i]), to_float(v), u);
    if (i) after[i - 1] = v;
  }
  after[k - 2] = from_float<T>(in);
  s.u[b * p.d_inner + c] = to_float(from_float<T>(silu(u)));
  s.z[b * p.d_inner + c] = silu(gate);
}

// Mamba-2: a warp has a channel's rows of x and z as above, or two rows of what follows them: B and C with their
// convolution, then dt.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    in2_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s, bool vector) {
  extern __shared__ float x[];
  const int lane = threadIdx.x % 32, item = blockIdx.x * kBlockWarps + threadIdx.x / 32, k = p.d_conv;
  const int bc = 2 * p.ngroups * p.d_state, extra = bc + p.nheads, conv_dim = p.d_inner + bc;
  const bool channel = item < p.d_inner;
  const int64_t b = blockIdx.y;
  int at[2] = {p.d_inner + item, item};  // rows of in_proj
  if (!channel) {
    at[0] = 2 * p.d_inner + 2 * (item - p.d_inner), at[1] = at[0] + 1;
#pragma unroll
    for (int r = 0; r < 2; r++) at[r] = min(at[r], 2 * p.d_inner + extra - 1);
  }
  const T* weight = static_cast<const T*>(l.in_proj);
  const T* const rows[2] = {weight + int64_t(at[0]) * p.d_model, weight + int64_t(at[1]) * p.d_model};
  float sum[2], scale = 0.0f;
  warp_dots<T, 2, 5>(rows, x, p.d_model, vector, sum, [&] {
    predecessor();
    scale = normed<T>(s.hidden + b * p.d_model, l.norm, p.d_model, p.norm_eps, x);
  });
  auto convolved = [&](float v, int c) {
    const float in = to_float(from_float<T>(v * scale));
    const T* w = static_cast<const T*>(l.conv_weight) + int64_t(c) * k;
    const T* before = static_cast<const T*>(l.conv_state_in) + (b * conv_dim + c) * (k - 1);
    T* after = static_cast<T*>(l.conv_state_out) + (b * conv_dim + c) * (k - 1);
    float u = fmaf(to_float(w[k - 1]), in, to_float(static_cast<const T*>(l.conv_bias)[c]));
    for (int i = 0; i < k - 1; i++) {
      const T h = before[i];
      u = fmaf(to_float(w[i]), to_float(h), u);
      if (i) after[i - 1] = h;
    }
    after[k - 2] = from_float<T>(in);
    return to_float(from_float<T>(silu(u)));
  };
  if (channel) {
    if (lane) return;
    s.u[b * p.d_inner + item] = convolved(sum[0], item);
    s.z[b * p.d_inner + item] = silu(to_float(from_float<T>(sum[1] * scale)));
  } else if (lane < 2) {
    const int r = 2 * (item - p.d_inner) + lane;
    const float v = lane ? sum[1] : sum[0];
    if (r < bc) s.x[b * extra + r] = convolved(v, p.d_inner + r);
    else if (r < extra) s.x[b * extra + r] = softplus<true>(v * scale + l.dt_bias[r - bc]);
  }
}

// A block has one row of x_proj, its warps share the width.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    x_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s, bool vector) {
  __shared__ float parts[kBlockWarps];
  constexpr int kAhead = 3;
  const int64_t b = blockIdx.y, row = blockIdx.x;
  const T* w = static_cast<const T*>(l.x_proj) + row * p.d_inner;
  const float* u = s.u + b * p.d_inner;
  float sum = 0.0f;
  if (vector) {
    Vec<T, 8> ahead[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int i = (a * kBlock + threadIdx.x) * 8;
      if (i < p.d_inner) ahead[a] = load_vec<T, 8>(w + i);
    }
    predecessor();
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int i = (a * kBlock + threadIdx.x) * 8;
      if (i < p.d_inner) sum = dot_vec(ahead[a], u + i, sum);
    }
    for (int i = (kAhead * kBlock + threadIdx.x) * 8; i < p.d_inner; i += kBlock * 8) sum = dot_vec(load_vec<T, 8>(w + i), u + i, sum);
  } else {
    predecessor();
    for (int i = threadIdx.x; i < p.d_inner; i += kBlock) sum = fmaf(to_float(w[i]), u[i], sum);
  }
  sum = warp_total(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < kBlockWarps; i++) sum += parts[i];
  s.x[b * gridDim.x + row] = sum;
}

// Eight lanes have one channel.
template <typename T, int kFamily>
__global__ void __launch_bounds__(kBlock)
    scan_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s, bool vector) {
  const int sub = threadIdx.x % 8, channel = blockIdx.x * (kBlock / 8) + threadIdx.x / 8, N = p.d_state, R = p.dt_rank;
  const int c = channel < p.d_inner ? channel : p.d_inner - 1;
  const int64_t b = blockIdx.y, at = b * p.d_inner + c;
  const int head = kFamily == 2 ? c / (p.d_inner / p.nheads) : c, bc = 2 * (kFamily == 2 ? p.ngroups : 1) * N;
  const float bias = l.dt_bias[head], D = l.D[head];
  const T* w = static_cast<const T*>(l.dt_proj) + int64_t(c) * R;
  constexpr int kAhead = 3;
  Vec<T, 8> ahead[kAhead];
  float A[2] = {0.0f, 0.0f};
  if (kFamily == 1) {
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int i = (a * 8 + sub) * 8;
      if (vector && i < R) ahead[a] = load_vec<T, 8>(w + i);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (sub + 8 * i < N) A[i] = l.A[int64_t(c) * N + sub + 8 * i];
    }
  }
  predecessor();
  const float* x = s.x + b * (kFamily == 2 ? bc + p.nheads : R + bc);
  const float *B = x + (kFamily == 2 ? head / (p.nheads / p.ngroups) * N : R), *C = B + bc / 2;
  float first[2] = {0.0f, 0.0f};  // states, under way while dt is computed
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (sub + 8 * i < N) first[i] = l.ssm_state_in[at * N + sub + 8 * i];
  }
  float dt = 0.0f, decay = 0.0f;
  if (kFamily == 2) {
    dt = x[bc + head];
    decay = ex2(dt * kLog2e * l.A[head]);
  } else {
    if (vector) {
#pragma unroll
      for (int a = 0; a < kAhead; a++) {
        const int i = (a * 8 + sub) * 8;
        if (i < R) dt = dot_vec(ahead[a], x + i, dt);
      }
      for (int i = (kAhead * 8 + sub) * 8; i < R; i += 64) dt = dot_vec(load_vec<T, 8>(w + i), x + i, dt);
    } else {
      for (int i = sub; i < R; i += 8) dt = fmaf(to_float(w[i]), x[i], dt);
    }
#pragma unroll
    for (int o = 4; o; o /= 2) dt += __shfl_xor_sync(~0u, dt, o);
    dt = softplus<true>(dt + bias);
  }
  const float u = s.u[at], du = dt * u;
  float y = 0.0f;
  auto update = [&](int i, float h, float a) {
    if (kFamily == 1) decay = ex2(dt * kLog2e * a);
    h = fmaf(decay, h, du * B[i]);
    if (channel < p.d_inner) l.ssm_state_out[at * N + i] = h;
    y = fmaf(C[i], h, y);
  };
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (sub + 8 * i < N) update(sub + 8 * i, first[i], A[i]);
  }
#pragma unroll 7
  for (int i = sub + 16; i < N; i += 8) update(i, l.ssm_state_in[at * N + i], kFamily == 1 ? l.A[int64_t(c) * N + i] : 0.0f);
#pragma unroll
  for (int o = 4; o; o /= 2) y += __shfl_xor_sync(~0u, y, o);
  if (sub == 0 && channel < p.d_inner) s.y[at] = to_float(from_float<T>(fmaf(D, u, y) * s.z[at]));
}

// A warp has one row of out_proj and adds it to the residual.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    out_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s, bool vector) {
  extern __shared__ float x[];
  const int row = blockIdx.x * kBlockWarps + threadIdx.x / 32, own = row < p.d_model ? row : p.d_model - 1;
  const int64_t b = blockIdx.y;
  const T* const rows[1] = {static_cast<const T*>(l.out_proj) + int64_t(own) * p.d_inner};
  float sum[1], scale = 1.0f;
  warp_dots<T, 1, 10>(rows, x, p.d_inner, vector, sum, [&] {
    predecessor();
    if (p.family == 2) {
      scale = normed<T>(s.y + b * p.d_inner, l.gated_norm, p.d_inner, p.gated_norm_eps, x);
      return;
    }
    for (int i = threadIdx.x; i < p.d_inner; i += kBlock) x[i] = s.y[b * p.d_inner + i];
    __syncthreads();
  });
  if (threadIdx.x % 32 || row >= p.d_model) return;
  float* hidden = s.hidden + b * p.d_model + row;
  const float v = *hidden + sum[0] * scale;
  *hidden = p.residual_fp32 ? v : to_float(from_float<T>(v));
}

// A warp takes two rows of the head at a time.
template <typename T>
__global__ void __launch_bounds__(kBlock) head_kernel(const __grid_constant__ Params p, const __grid_constant__ Buffers s, bool vector) {
  extern __shared__ float x[];
  const int stride = gridDim.x * kBlockWarps * 2, begin = (blockIdx.x * kBlockWarps + threadIdx.x / 32) * 2;
  const int64_t b = blockIdx.y;
  float scale = 0.0f;
  bool waiting = true;
  for (int row = begin; waiting || row < p.vocab_size; row += stride) {
    const T* w = static_cast<const T*>(p.lm_head);
    const T* const rows[2] = {w + int64_t(min(row, p.vocab_size - 1)) * p.d_model, w + int64_t(min(row + 1, p.vocab_size - 1)) * p.d_model};
    float sum[2];
    warp_dots<T, 2, 5>(rows, x, p.d_model, vector, sum, [&] {
      if (!waiting) return;
      predecessor();
      scale = normed<T>(s.hidden + b * p.d_model, p.norm_f, p.d_model, p.norm_eps, x);
      waiting = false;
    });
    const int lane = threadIdx.x % 32;
    if (lane < 2 && row + lane < p.vocab_size) p.logits[b * p.vocab_size + row + lane] = (lane ? sum[1] : sum[0]) * scale;
  }
}

int capability() {
  static const int major = [] {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, device);
    return value;
  }();
  return major;
}

template <typename... P, typename... A>
bool start(void (*kernel)(P...), dim3 grid, size_t shared, cudaStream_t stream, const A&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(kBlock), config.dynamicSmemBytes = shared, config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap, config.numAttrs = capability() >= 9;
  return cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess;
}

}  // namespace

static int x_rows_of(const Params& p) {
  return p.family == 1 ? p.dt_rank + 2 * p.d_state : 2 * p.ngroups * p.d_state + p.nheads;
}

size_t chain_workspace(const Params& p) {
  return size_t(p.batch) * (p.d_model + 3 * p.d_inner + x_rows_of(p)) * sizeof(float);
}

template <typename T> int launch_chain(const Params& p, cudaStream_t stream) {
  if (!p.logits) return MAMBA_ERROR_NULL_POINTER;
  const int x_rows = x_rows_of(p);
  Buffers s;
  s.hidden = static_cast<float*>(p.workspace);
  s.u = s.hidden + int64_t(p.batch) * p.d_model;
  s.z = s.u + int64_t(p.batch) * p.d_inner;
  s.y = s.z + int64_t(p.batch) * p.d_inner;
  s.x = s.y + int64_t(p.batch) * p.d_inner;
  auto grid = [&](int items, int each) { return dim3(ceil_div(items, each), p.batch); };
  auto vector = [](const void* w, int width) { return width % 8 == 0 && aligned(w, 16); };
  const size_t model_bytes = size_t(p.d_model) * 4, inner_bytes = size_t(p.d_inner) * 4;
  bool ok = true;
  for (auto kernel : {reinterpret_cast<const void*>(in_kernel<T>), reinterpret_cast<const void*>(in2_kernel<T>),
                      reinterpret_cast<const void*>(out_kernel<T>),
                      reinterpret_cast<const void*>(head_kernel<T>)}) {
    const size_t bytes = inner_bytes > model_bytes ? inner_bytes : model_bytes;
    if (bytes > 48 << 10) ok &= cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)) == cudaSuccess;
  }
  ok &= start(embed_kernel<T>, grid(p.d_model, kBlock), 0, stream, p, s.hidden);
  for (int i = 0; i < p.n_layer; i++) {
    const Layer& l = p.layers[i];
    const bool wide = vector(l.in_proj, p.d_model);
    if (p.family == 1) {
      ok &= start(in_kernel<T>, grid(p.d_inner, kBlockWarps), model_bytes, stream, p, l, s, wide);
      ok &= start(x_kernel<T>, grid(x_rows, 1), 0, stream, p, l, s, vector(l.x_proj, p.d_inner));
      ok &= start(scan_kernel<T, 1>, grid(p.d_inner, kBlock / 8), 0, stream, p, l, s, p.family == 1 && vector(l.dt_proj, p.dt_rank));
    } else {
      ok &= start(in2_kernel<T>, grid(p.d_inner + ceil_div(x_rows, 2), kBlockWarps), model_bytes, stream, p, l, s, wide);
      ok &= start(scan_kernel<T, 2>, grid(p.d_inner, kBlock / 8), 0, stream, p, l, s, p.family == 1 && vector(l.dt_proj, p.dt_rank));
    }
    ok &= start(out_kernel<T>, grid(p.d_model, kBlockWarps), inner_bytes, stream, p, l, s, vector(l.out_proj, p.d_inner));
  }
  const int head_blocks = ceil_div(p.vocab_size, 2 * kBlockWarps), most = 3 * sm_count();
  ok &= start(head_kernel<T>, dim3(head_blocks < most ? head_blocks : most, p.batch), model_bytes, stream, p, s, vector(p.lm_head, p.d_model));
  return ok ? launch_status() : MAMBA_ERROR_CUDA;
}

template int launch_chain<float>(const Params&, cudaStream_t);
template int launch_chain<__half>(const Params&, cudaStream_t);
template int launch_chain<__nv_bfloat16>(const Params&, cudaStream_t);

}  // namespace mamba::decode
