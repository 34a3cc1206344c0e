// A custom-op library of MambaDecodeStack alone: on the CPU or, with STACK_ON_CUDA, as the library for GPUs registers it.
#include "stack.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                            const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(mamba::ort::kApiVersion);
  static OrtCustomOpDomain* const domain = [api] {
    OrtCustomOpDomain* made = nullptr;
    mamba::ort::check(*api, api->CreateCustomOpDomain("mamba", &made));
#if defined(STACK_ON_CUDA)
    mamba::ort::add_stack_op(*api, made, "CUDAExecutionProvider");
    mamba::ort::add_stack_op(*api, made, nullptr, false);
#else
    mamba::ort::add_stack_op(*api, made, nullptr);
#endif
    return made;
  }();
  return api->AddCustomOpDomain(options, domain);
}
extern "C" __attribute__((visibility("default"))) int mamba_ort_cuda() {
#if defined(STACK_ON_CUDA)
  return 1;
#else
  return 0;
#endif
}
