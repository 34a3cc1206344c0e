// What the ops need of ONNX Runtime's C API, which is the only one whose binary interface holds across releases.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace mamba::ort {

// KernelContext_ParallelFor appeared in 1.17 (API 17); a library that asks for this version runs in all later ones.
constexpr uint32_t kApiVersion = 17;

using Dims = std::vector<int64_t>;

// Thrown inside a callback, handed to ONNX Runtime as a status.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Error(message);
}

struct Tensor {
  const void* data = nullptr;
  Dims dims;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// The inputs and outputs of one call of an op.
class Context {
 public:
  Context(const OrtApi& api, OrtKernelContext* context) : api_(api), context_(context) {}

  std::size_t inputs() const {
    std::size_t count = 0;
    check(api_, api_.KernelContext_GetInputCount(context_, &count));
    return count;
  }

  Tensor input(std::size_t index) const {
    Tensor tensor;
    const OrtValue* value = nullptr;
    check(api_, api_.KernelContext_GetInput(context_, index, &value));
    if (value == nullptr) throw Error("input " + std::to_string(index) + " is missing");
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api_, api_.GetTensorTypeAndShape(value, &info));
    std::size_t rank = 0;
    OrtStatus* status = api_.GetTensorElementType(info, &tensor.type);
    if (status == nullptr) status = api_.GetDimensionsCount(info, &rank);
    tensor.dims.resize(rank);
    if (status == nullptr) status = api_.GetDimensions(info, tensor.dims.data(), rank);
    api_.ReleaseTensorTypeAndShapeInfo(info);
    check(api_, status);
    void* data = nullptr;
    check(api_, api_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    tensor.data = data;
    return tensor;
  }

  // The data of an input whose type and shape are known.
  const void* data(std::size_t index) const {
    const OrtValue* value = nullptr;
    check(api_, api_.KernelContext_GetInput(context_, index, &value));
    if (value == nullptr) throw Error("input " + std::to_string(index) + " is missing");
    void* data = nullptr;
    check(api_, api_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    return data;
  }

  void* output(std::size_t index, const Dims& dims) const {
    OrtValue* value = nullptr;
    check(api_, api_.KernelContext_GetOutput(context_, index, dims.data(), dims.size(), &value));
    if (value == nullptr) throw Error("output " + std::to_string(index) + " is missing");
    void* data = nullptr;
    check(api_, api_.GetTensorMutableData(value, &data));
    return data;
  }

  // The stream of the provider that runs this op: of CUDA, a cudaStream_t.
  void* stream() const {
    void* stream = nullptr;
    check(api_, api_.KernelContext_GetGPUComputeStream(context_, &stream));
    return stream;
  }

  // The memory that an input lies in, for an allocator of the same.
  const OrtMemoryInfo* memory_of(std::size_t index) const {
    const OrtValue* value = nullptr;
    const OrtMemoryInfo* info = nullptr;
    check(api_, api_.KernelContext_GetInput(context_, index, &value));
    check(api_, api_.GetTensorMemoryInfo(value, &info));
    return info;
  }

  const OrtApi& api() const { return api_; }
  OrtKernelContext* get() const { return context_; }

 private:
  const OrtApi& api_;
  OrtKernelContext* context_;
};

}  // namespace mamba::ort
