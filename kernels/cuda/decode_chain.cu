// The chain, the host's side: scratch and launches.
#include "decode_chain_in.cuh"
#include "decode_chain_out.cuh"
#include "decode_chain_scan.cuh"

namespace mamba::decode {
namespace {

using namespace chain;

template <typename... P, typename... A>
bool start(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t stream, const A&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap, config.numAttrs = compute_major() >= 9;
  return cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess;
}

int x_rows_of(const Params& p) {
  return p.family == 1 ? p.dt_rank + 2 * p.d_state : 2 * p.ngroups * p.d_state + p.nheads;
}

// Every vector begins at 16 bytes; returns the floats of all.
int64_t place_buffers(const Params& p, Buffers& s) {
  int64_t at = 0;
  auto take = [&](float*& to, int width) {
    to = static_cast<float*>(p.workspace) + at;
    at += (int64_t(p.batch) * width + 3) / 4 * 4;
  };
  take(s.hidden, p.d_model), take(s.u, p.d_inner), take(s.z, p.d_inner), take(s.y, p.d_inner), take(s.x, x_rows_of(p));
  return at;
}

// Whether rows may be read 16 bytes at a time.
template <typename T> bool vectorizes(const void* w, int width) { return width * sizeof(T) % 16 == 0 && aligned(w, 16); }

constexpr int kXShared = kMiddleThreads / 32 * 2 * int(sizeof(float));  // of x_kernel

// A product's launch: a block to a multiprocessor, or more where one would have too many rows.
struct Launch {
  dim3 grid;
  size_t shared;
};
template <typename T, int kDepth, int kBits> Launch product_launch(int units, int width, int batch) {
  constexpr int kMostUnits = 1024;
  int blocks = sm_count();
  if (ceil_div(units, blocks) > kMostUnits) blocks = ceil_div(units, kMostUnits);
  if (blocks > units) blocks = units;
  return {dim3(blocks, batch), Product<T, kDepth, kBits>::bytes(width, ceil_div(units, blocks))};
}

// Kernels that run beside each other must agree on how a multiprocessor divides its memory: all of it for blocks.
template <typename F> bool allow_shared(F kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared) ==
             cudaSuccess &&
         cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)) == cudaSuccess;
}

// The products of matrices of kBits.
template <typename T, int kFamily, int kIn, int kOut, int kBits> struct Products {
  static constexpr int kBitsOf = kBits < 16 ? kBits : 16;
  Launch in, out, head;

  explicit Products(const Params& p) {
    const int further = kFamily == 1 ? 0 : ceil_div(x_rows_of(p), 2);
    in = product_launch<T, kIn, kBits>(p.d_inner + further, p.d_model, p.batch);
    out = product_launch<T, kOut, kBits>(ceil_div(p.d_model, 2), p.d_inner, p.batch);
    head = product_launch<T, kIn, kBits>(ceil_div(p.vocab_size, 2), p.d_model, p.batch);
  }
  bool fits() const {
    const size_t most = max_shared_bytes();
    return in.shared <= most && out.shared <= most && head.shared <= most;
  }
  bool allow() {
    // The rings of out_proj and of the in_proj beside it share a multiprocessor. Two blocks of the same out_proj must not:
    // another multiprocessor would be without one.
    const size_t half = max_shared_bytes() / 2 + 1024;
    if (out.shared < half && out.shared + in.shared < 2 * half - 8192) out.shared = half;
    return allow_shared(in_kernel<T, kFamily, kIn, kBits>, in.shared) && allow_shared(out_kernel<T, kOut, kBits>, out.shared) &&
           allow_shared(head_kernel<T, kIn, kBits>, head.shared);
  }
  bool start_in(const Params& p, const Layer& l, const Buffers& s, cudaStream_t stream) const {
    return start(in_kernel<T, kFamily, kIn, kBits>, in.grid, kProductThreads, in.shared, stream, p, l, s,
                 vectorizes<T>(l.in_proj, p.d_model));
  }
  bool start_out(const Params& p, const Layer& l, const Buffers& s, cudaStream_t stream) const {
    return start(out_kernel<T, kOut, kBits>, out.grid, kProductThreads, out.shared, stream, p, l, s,
                 vectorizes<T>(l.out_proj, p.d_inner));
  }
  bool start_head(const Params& p, const Buffers& s, cudaStream_t stream) const {
    return start(head_kernel<T, kIn, kBits>, head.grid, kProductThreads, head.shared, stream, p, s,
                 vectorizes<T>(p.lm_head, p.d_model));
  }
};

// What lies between in_proj and out_proj.
template <typename T, int kFamily>
bool start_scan(const Params& p, const Layer& l, const Buffers& s, cudaStream_t stream) {
  const int x_rows = x_rows_of(p), spread = ceil_div(ceil_div(p.d_inner, sm_count()), 4) * 4;
  const int channels = spread < kMiddleThreads / 8 ? spread : kMiddleThreads / 8;
  const dim3 grid(ceil_div(p.d_inner, channels), p.batch);
  bool ok = true, states = aligned(l.ssm_state_in, 16) && aligned(l.ssm_state_out, 16), wide_rows = false;
  if (kFamily == 1) {
    states = states && aligned(l.A, 16) && p.d_state % 2 == 0 && p.dt_rank % 2 == 0;
    wide_rows = p.dt_rank % 8 == 0 && vectorizes<T>(l.dt_proj, p.dt_rank);
    ok = start(x_kernel<T>, dim3(ceil_div(x_rows, 2), p.batch), kMiddleThreads, kXShared, stream, p, l, s,
               p.d_inner % 8 == 0 && vectorizes<T>(l.x_proj, p.d_inner));
  } else {
    states = states && p.d_state % 4 == 0;
  }
  return ok && start(scan_kernel<T, kFamily>, grid, channels * 8, x_rows * sizeof(float), stream, p, l, s, states, wide_rows);
}

// `wide`: of the matrices that are int8 in a model of int4.
template <typename T, int kFamily, typename Narrow, typename Wide>
int launch_all(const Params& p, Narrow products, Wide wide, cudaStream_t stream) {
  Buffers s;
  place_buffers(p, s);
  const bool mixed = model_bits(p) == kMixed;
  constexpr auto embed = embed_kernel<T, Narrow::kBitsOf>;
  bool ok = products.allow() && (!mixed || wide.allow()) && allow_shared(embed, 0) &&
            allow_shared(x_kernel<T>, kXShared) && allow_shared(scan_kernel<T, kFamily>, x_rows_of(p) * sizeof(float));
  ok = ok && start(embed, dim3(ceil_div(p.d_model, 256), p.batch), 256, 0, stream, p, s.hidden);
  for (int i = 0; ok && i < p.n_layer; i++) {
    const Layer& l = p.layers[i];
    ok = mixed && l.in_proj_bits == 8 ? wide.start_in(p, l, s, stream) : products.start_in(p, l, s, stream);
    ok = ok && start_scan<T, kFamily>(p, l, s, stream);
    ok = ok && (mixed && l.out_proj_bits == 8 ? wide.start_out(p, l, s, stream) : products.start_out(p, l, s, stream));
  }
  ok = ok && (mixed && p.head_bits == 8 ? wide.start_head(p, s, stream) : products.start_head(p, s, stream));
  const int status = launch_status();  // clears what failed
  return ok ? status : MAMBA_ERROR_CUDA;
}

template <typename T, int kFamily> int launch_family(const Params& p, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    const Products<T, kFamily, kPackedDepth, kPackedDepth, 8> bytes(p);
    if (p.weight_bits == 8) return launch_all<T, kFamily>(p, bytes, bytes, stream);
    const Products<T, kFamily, kPackedDepth, kPackedDepth, 4> nibbles(p);
    if (p.weight_bits == 4) return launch_all<T, kFamily>(p, nibbles, bytes, stream);
  }
  constexpr int kBits = 8 * sizeof(T);
  const Products<T, kFamily, kInDepth, kOutDepth, kBits> products(p);
  if (products.fits()) return launch_all<T, kFamily>(p, products, products, stream);
  const Products<T, kFamily, kSmallDepth, kSmallDepth, kBits> smaller(p);
  return launch_all<T, kFamily>(p, smaller, smaller, stream);
}

}  // namespace

size_t chain_workspace(const Params& p) {
  Buffers s;
  return size_t(place_buffers(p, s)) * sizeof(float);
}

template <typename T> int launch_chain(const Params& p, cudaStream_t stream) {
  if (!p.logits) return MAMBA_ERROR_NULL_POINTER;
  return p.family == 1 ? launch_family<T, 1>(p, stream) : launch_family<T, 2>(p, stream);
}

template int launch_chain<float>(const Params&, cudaStream_t);
template int launch_chain<__half>(const Params&, cudaStream_t);
template int launch_chain<__nv_bfloat16>(const Params&, cudaStream_t);

}  // namespace mamba::decode
