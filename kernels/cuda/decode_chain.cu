// The chain, the host's side: scratch and launches.
#include "decode_chain_in.cuh"
#include "decode_chain_out.cuh"
#include "decode_chain_scan.cuh"

namespace mamba::decode {
namespace {

using namespace chain;

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

int x_rows_of(const Params& p) {
  return p.family == 1 ? p.dt_rank + 2 * p.d_state : 2 * p.ngroups * p.d_state + p.nheads;
}

Buffers buffers_of(const Params& p) {
  Buffers s;
  s.hidden = static_cast<float*>(p.workspace);
  s.u = s.hidden + int64_t(p.batch) * p.d_model;
  s.z = s.u + int64_t(p.batch) * p.d_inner;
  s.y = s.z + int64_t(p.batch) * p.d_inner;
  s.x = s.y + int64_t(p.batch) * p.d_inner;
  return s;
}

// Whether rows may be read 16 bytes at a time.
bool vectorizes(const void* w, int width) { return width % 8 == 0 && aligned(w, 16); }

// Vectors of more than 48 KB need a permission.
template <typename T> bool allow_shared(size_t bytes) {
  bool ok = true;
  for (auto kernel : {reinterpret_cast<const void*>(in1_kernel<T>), reinterpret_cast<const void*>(in2_kernel<T>),
                      reinterpret_cast<const void*>(out_kernel<T>), reinterpret_cast<const void*>(head_kernel<T>)}) {
    if (bytes > 48 << 10) ok &= cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)) == cudaSuccess;
  }
  return ok;
}

}  // namespace

size_t chain_workspace(const Params& p) {
  return size_t(p.batch) * (p.d_model + 3 * p.d_inner + x_rows_of(p)) * sizeof(float);
}

template <typename T> int launch_chain(const Params& p, cudaStream_t stream) {
  if (!p.logits) return MAMBA_ERROR_NULL_POINTER;
  const int x_rows = x_rows_of(p);
  const Buffers s = buffers_of(p);
  auto grid = [&](int items, int each) { return dim3(ceil_div(items, each), p.batch); };
  const size_t model_bytes = size_t(p.d_model) * 4, inner_bytes = size_t(p.d_inner) * 4;
  bool ok = allow_shared<T>(inner_bytes > model_bytes ? inner_bytes : model_bytes);
  ok &= start(embed_kernel<T>, grid(p.d_model, kBlock), 0, stream, p, s.hidden);
  for (int i = 0; i < p.n_layer; i++) {
    const Layer& l = p.layers[i];
    const bool wide = vectorizes(l.in_proj, p.d_model);
    if (p.family == 1) {
      ok &= start(in1_kernel<T>, grid(p.d_inner, kBlockWarps), model_bytes, stream, p, l, s, wide);
      ok &= start(x_kernel<T>, grid(x_rows, 1), 0, stream, p, l, s, vectorizes(l.x_proj, p.d_inner));
      ok &= start(scan_kernel<T, 1>, grid(p.d_inner, kBlock / 8), 0, stream, p, l, s, vectorizes(l.dt_proj, p.dt_rank));
    } else {
      ok &= start(in2_kernel<T>, grid(p.d_inner + ceil_div(x_rows, 2), kBlockWarps), model_bytes, stream, p, l, s, wide);
      ok &= start(scan_kernel<T, 2>, grid(p.d_inner, kBlock / 8), 0, stream, p, l, s, false);
    }
    ok &= start(out_kernel<T>, grid(p.d_model, kBlockWarps), inner_bytes, stream, p, l, s, vectorizes(l.out_proj, p.d_inner));
  }
  const int head_blocks = ceil_div(p.vocab_size, 2 * kBlockWarps), most = 3 * sm_count();
  const dim3 head_grid(head_blocks < most ? head_blocks : most, p.batch);
  ok &= start(head_kernel<T>, head_grid, model_bytes, stream, p, s, vectorizes(p.lm_head, p.d_model));
  return ok ? launch_status() : MAMBA_ERROR_CUDA;
}

template int launch_chain<float>(const Params&, cudaStream_t);
template int launch_chain<__half>(const Params&, cudaStream_t);
template int launch_chain<__nv_bfloat16>(const Params&, cudaStream_t);

}  // namespace mamba::decode
