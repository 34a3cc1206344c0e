#include "custom_op.h"

#include <memory>
#include <vector>

namespace mamba::ort {

namespace {

struct Registered : OrtCustomOp {
  Op op;
  ONNXTensorElementDataType T;
  const char* provider;
  Compute compute;
};

// What KernelComputeV2 gets: it is not told which op it belongs to.
struct Instance {
  Node node;
  Compute compute;
};

const Registered& self(const OrtCustomOp* op) { return *static_cast<const Registered*>(op); }

OrtStatus* ORT_API_CALL create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  try {
    const Op kind = self(op).op;
    *kernel = new Instance{{kind, api, read_attributes(kind, *api, info)}, self(op).compute};
    return nullptr;
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}

OrtStatus* ORT_API_CALL compute(void* kernel, OrtKernelContext* context) {
  const Instance& instance = *static_cast<const Instance*>(kernel);
  try {
    instance.compute(instance.node, Context(*instance.node.api, context));
    return nullptr;
  } catch (const std::exception& error) {
    const std::string message = std::string(name_of(instance.node.op)) + ": " + error.what();
    return instance.node.api->CreateStatus(ORT_INVALID_ARGUMENT, message.c_str());
  }
}

// Fields that are left null belong to variadic inputs, to the first form of the interface, or to features not used.
void fill(Registered& r) {
  r.version = kApiVersion;
  r.GetName = [](const OrtCustomOp* op) { return name_of(self(op).op); };
  r.GetExecutionProviderType = [](const OrtCustomOp* op) { return self(op).provider; };
  r.GetInputTypeCount = [](const OrtCustomOp* op) { return inputs_of(self(op).op); };
  r.GetInputType = [](const OrtCustomOp* op, size_t i) { return input_type(self(op).op, i, self(op).T); };
  r.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
  r.GetOutputType = [](const OrtCustomOp* op, size_t i) { return output_type(self(op).op, i, self(op).T); };
  r.GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) {
    return i < required_inputs(self(op).op) ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  r.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  r.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  r.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  r.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  r.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  r.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  r.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  r.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  r.CreateKernelV2 = create;
  r.KernelComputeV2 = compute;
  r.KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
}

}  // namespace

void add_ops(const OrtApi& api, OrtCustomOpDomain* domain, const char* provider, Compute compute) {
  static std::vector<std::unique_ptr<Registered>> registered;  // the domain keeps pointers for the process's life
  for (Op op : {Op::conv, Op::selective_scan, Op::selective_update, Op::ssd_scan, Op::ssd_update}) {
    for (auto T : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                   ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
      auto r = std::make_unique<Registered>();
      r->op = op, r->T = T, r->provider = provider, r->compute = compute;
      fill(*r);
      check(api, api.CustomOpDomain_Add(domain, r.get()));
      registered.push_back(std::move(r));
    }
  }
}

}  // namespace mamba::ort
