// The entry point: SessionOptions.register_custom_ops_library (Python), RegisterCustomOpsLibrary_V2 (C).
#include "custom_op.h"
#if defined(MAMBA_CUDA)
#include "stack.h"
#endif

#if defined(_WIN32)
#define MAMBA_EXPORT extern "C" __declspec(dllexport)
#else
#define MAMBA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

// One domain a process, never released: sessions hold pointers into it for as long as they live.
OrtCustomOpDomain* make_domain(const OrtApi& api) {
  OrtCustomOpDomain* domain = nullptr;
  mamba::ort::check(api, api.CreateCustomOpDomain("mamba", &domain));
  mamba::ort::add_ops(api, domain, nullptr, mamba::ort::compute_cpu);
#if defined(MAMBA_CUDA)
  mamba::ort::add_ops(api, domain, "CUDAExecutionProvider", mamba::ort::compute_cuda);
  mamba::ort::add_stack_op(api, domain, "CUDAExecutionProvider");
  mamba::ort::add_stack_op(api, domain, nullptr, false);
#endif
  return domain;
}

}  // namespace

MAMBA_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(mamba::ort::kApiVersion);
  if (api == nullptr) {
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "mamba's ops need ONNX Runtime 1.17 or later");
  }
  try {
    static OrtCustomOpDomain* const domain = make_domain(*api);
    return api->AddCustomOpDomain(options, domain);
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}

// For doctor and for tests: the instruction set in use, and whether the CUDA provider is served too.
MAMBA_EXPORT const char* mamba_ort_isa() { return mamba::kernels().name; }
MAMBA_EXPORT int mamba_ort_cuda() {
#if defined(MAMBA_CUDA)
  return 1;
#else
  return 0;
#endif
}
