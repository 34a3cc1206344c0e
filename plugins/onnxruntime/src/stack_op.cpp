// MambaDecodeStack as ONNX Runtime sees it: two inputs and two outputs, the second of each any number of tensors.
#include <memory>
#include <vector>

#include "stack.h"

namespace mamba::ort {

namespace {

constexpr char kHint[] =
    "; hint: export without --fuse-step, or set MAMBA_ORT_LIBRARY= (empty), and the node's function body runs";

struct Registered : OrtCustomOp {
  const char* provider;
};

OrtStatus* ORT_API_CALL create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  try {
    *kernel = new Stack(*api, info);
    return nullptr;
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_NOT_IMPLEMENTED, (std::string(error.what()) + kHint).c_str());
  }
}

OrtStatus* ORT_API_CALL refuse(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo*, void**) {
  const std::string message = "MambaDecodeStack: this library computes it on CUDA alone";
  return api->CreateStatus(ORT_NOT_IMPLEMENTED, (message + kHint).c_str());
}

OrtStatus* ORT_API_CALL compute(void* kernel, OrtKernelContext* context) {
  const Stack& stack = *static_cast<const Stack*>(kernel);
  try {
    stack.compute(Context(stack.api(), context));
    return nullptr;
  } catch (const std::exception& error) {
    const std::string message = "MambaDecodeStack '" + stack.name() + "': " + error.what();
    return stack.api().CreateStatus(ORT_INVALID_ARGUMENT, message.c_str());
  }
}

void fill(Registered& r, const char* provider) {
  r.version = kApiVersion, r.provider = provider;
  r.GetName = [](const OrtCustomOp*) { return "MambaDecodeStack"; };
  r.GetExecutionProviderType = [](const OrtCustomOp* op) { return static_cast<const Registered*>(op)->provider; };
  r.GetInputTypeCount = r.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
  r.GetInputType = [](const OrtCustomOp*, size_t i) {
    return i == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  r.GetOutputType = [](const OrtCustomOp*, size_t i) {
    return i == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  r.GetInputCharacteristic = r.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
  };
  r.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  r.GetVariadicInputMinArity = r.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  r.GetVariadicInputHomogeneity = r.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  r.GetStartVersion = r.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  r.CreateKernelV2 = create;
  r.KernelComputeV2 = compute;
  r.KernelDestroy = [](void* kernel) { delete static_cast<Stack*>(kernel); };
}

}  // namespace

void add_stack_op(const OrtApi& api, OrtCustomOpDomain* domain, const char* provider, bool computed) {
  static std::vector<std::unique_ptr<Registered>> registered;  // the domain keeps pointers for the process's life
  auto r = std::make_unique<Registered>();
  fill(*r, provider);
  if (!computed) r->CreateKernelV2 = refuse;
  check(api, api.CustomOpDomain_Add(domain, r.get()));
  registered.push_back(std::move(r));
}

}  // namespace mamba::ort
