#include "stack.h"

#include <cctype>
#include <cstdlib>

#include "workspace.h"

namespace mamba::ort {

namespace {

using ElementType = ONNXTensorElementDataType;
constexpr char kOp[] = "MambaDecodeStack";
// The kernels plan by alignment too; this stands for a buffer of the provider's and is never read.
void* const kStandIn = reinterpret_cast<void*>(uintptr_t{4096});

std::string text(const Dims& dims) {
  std::string s = "[";
  for (std::size_t i = 0; i < dims.size(); ++i) {
    s += (i ? ", " : "") + (dims[i] < 0 ? std::string("any") : std::to_string(dims[i]));
  }
  return s + "]";
}

const char* type_name(ElementType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return "bfloat16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return "int64";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return "int32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return "int8";
    default: return "another type";
  }
}

int32_t dtype_of(ElementType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return MAMBA_F32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return MAMBA_F16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return MAMBA_BF16;
    default: return -1;
  }
}

bool fits(ElementType type, stack::Kind kind, int32_t model) {
  switch (kind) {
    case stack::Kind::kIds: return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case stack::Kind::kFloat32: return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case stack::Kind::kPacked: return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case stack::Kind::kModel: return dtype_of(type) >= 0 && (model < 0 || dtype_of(type) == model);
  }
  return false;
}

const char* expected_type(stack::Kind kind, int32_t model) {
  if (kind == stack::Kind::kIds) return "int64";
  if (kind == stack::Kind::kPacked) return "int32";
  if (kind == stack::Kind::kFloat32 || model == MAMBA_F32) return "float32";
  return model == MAMBA_F16 ? "float16" : model == MAMBA_BF16 ? "bfloat16" : "float32, float16 or bfloat16";
}

std::string node_name(const OrtApi& api, const OrtKernelInfo* info) {
  std::size_t size = 0;
  check(api, api.KernelInfo_GetNodeName(info, nullptr, &size));
  std::string name(size, '\0');
  check(api, api.KernelInfo_GetNodeName(info, name.data(), &size));
  return name.substr(0, name.find('\0'));
}

// The tensor type of an input as the graph declares it.
Tensor declared(const OrtApi& api, const OrtKernelInfo* info, std::size_t index) {
  Tensor tensor;
  OrtTypeInfo* type = nullptr;
  check(api, api.KernelInfo_GetInputTypeInfo(info, index, &type));
  const OrtTensorTypeAndShapeInfo* shape = nullptr;
  std::size_t rank = 0;
  OrtStatus* status = api.CastTypeInfoToTensorInfo(type, &shape);
  if (status == nullptr && shape != nullptr) {
    status = api.GetTensorElementType(shape, &tensor.type);
    if (status == nullptr) status = api.GetDimensionsCount(shape, &rank);
    tensor.dims.resize(rank);
    if (status == nullptr) status = api.GetDimensions(shape, tensor.dims.data(), rank);
  }
  api.ReleaseTypeInfo(type);
  check(api, status);
  return tensor;
}

std::string integers_of(const mamba_decode_stack_params& p) {
  if (p.weight_bits == 0) return "";
  const std::string by = p.group_size ? "groups of " + std::to_string(p.group_size) : "rows";
  return " of int" + std::to_string(p.weight_bits) + " by " + by + (p.dtype == MAMBA_F32 ? " in float32" : "");
}

// MAMBA_ORT_DECODE=chain or fused: that kernel alone, as MAMBA_ORT_ISA chooses on the CPU.
int32_t wanted_tactic() {
  const char* said = std::getenv("MAMBA_ORT_DECODE");
  const std::string word = said != nullptr ? said : "";
  if (word.empty()) return -1;
  if (word == "chain") return 0;
  if (word == "fused") return 1;
  throw Error("MAMBA_ORT_DECODE is '" + word + "', not chain or fused");
}

}  // namespace

int64_t Stack::Sizes::of(char letter) const {
  if (letter == '1') return 1;
  if (letter == '*') return -1;
  return letter == 'k' ? (*this)['K'] - 1 : (*this)[letter];
}

bool Stack::Sizes::take(char letter, int64_t size) {
  if (letter == '1') return size == 1 || size < 0;
  if (letter == '*') return true;
  const bool one_less = std::islower(static_cast<unsigned char>(letter)) != 0;
  int64_t& known = size_[static_cast<std::size_t>(std::toupper(static_cast<unsigned char>(letter)) - 'A')];
  if (size < 0) return true;
  if (known < 0) known = size + one_less;
  return known == size + one_less;
}

Stack::Stack(const OrtApi& api, const OrtKernelInfo* info) : api_(api), name_(node_name(api, info)) {
  try {
    read_attributes(info);
    read_inputs(info);
  } catch (const Error& error) {
    throw Error(std::string(kOp) + " '" + name_ + "': " + error.what());
  }
}

void Stack::read_attributes(const OrtKernelInfo* info) {
  std::vector<double> values;
  for (const stack::Attribute& a : stack::attributes()) {
    auto whole = static_cast<int64_t>(a.fallback);
    auto real = static_cast<float>(a.fallback);
    OrtStatus* status = a.is_float ? api_.KernelInfoGetAttribute_float(info, a.name, &real)
                                   : api_.KernelInfoGetAttribute_int64(info, a.name, &whole);
    if (status != nullptr) api_.ReleaseStatus(status);  // not there: the default
    values.push_back(a.is_float ? static_cast<double>(real) : static_cast<double>(whole));
    if (!(values.back() >= a.low && values.back() <= a.high)) {
      throw Error(std::string("attribute ") + a.name + " = " + std::to_string(values.back()) + " is out of range");
    }
  }
  params_ = stack::from_attributes([&](const std::string& name) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (name == stack::attributes()[i].name) return values[i];
    }
    return 0.0;
  });
  params_.dtype = -1, params_.tactic = wanted_tactic();
  operands_ = stack::inputs(params_);
}

// The weights come first: they say what the states have to be.
void Stack::read_inputs(const OrtKernelInfo* info) {
  std::size_t inputs = 0, outputs = 0;
  const std::size_t weights = stack::first_weight(params_.n_layer);
  check(api_, api_.KernelInfo_GetInputCount(info, &inputs));
  check(api_, api_.KernelInfo_GetOutputCount(info, &outputs));
  if (inputs != operands_.size() || outputs != weights) {
    throw Error("the node has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
                " outputs, its attributes (family, n_layer) ask for " + std::to_string(operands_.size()) + " and " +
                std::to_string(weights));
  }
  Sizes sizes;
  for (std::size_t i = 0; i < inputs; ++i) read_input(info, (i + weights) % inputs, &sizes);
  const auto words = [&](std::size_t i) { return declared(api_, info, i).dims.back(); };
  std::string wrong = stack::relations(params_, sizes);
  layers_.resize(static_cast<std::size_t>(params_.n_layer));
  if (wrong.empty()) wrong = stack::set_bits(&params_, layers_.data(), sizes, words);
  if (!wrong.empty()) throw Error(wrong);
  for (std::size_t i = 1; i < weights; ++i) {
    Dims dims;
    for (const char* letter = operands_[i].shape + 1; *letter != '\0'; ++letter) dims.push_back(sizes.of(*letter));
    states_.push_back(dims);
  }
  find_kernel(sizes);
}

void Stack::read_input(const OrtKernelInfo* info, std::size_t index, Sizes* sizes) {
  const stack::Operand& operand = operands_[index];
  const Tensor tensor = declared(api_, info, index);
  if (!fits(tensor.type, operand.kind, params_.dtype)) {
    throw Error("input " + operand.name + " is " + type_name(tensor.type) + ", expected " +
                expected_type(operand.kind, params_.dtype));
  }
  if (operand.kind == stack::Kind::kModel) params_.dtype = dtype_of(tensor.type);
  const std::string letters = operand.shape;
  const bool weight = index >= stack::first_weight(params_.n_layer);
  bool good = tensor.dims.size() == letters.size();
  for (std::size_t i = 0; good && i < letters.size(); ++i) {
    good = sizes->take(letters[i], tensor.dims[i]) && (tensor.dims[i] > 0 || !weight);  // a weight's shape is known
  }
  if (good) return;
  Dims wanted;
  for (const char letter : letters) wanted.push_back(sizes->of(letter));
  throw Error("input " + operand.name + " has shape " + text(tensor.dims) + ", expected " + text(wanted));
}

// One row stands for all: a kernel that covers it is there for more rows too.
void Stack::find_kernel(const Sizes& sizes) {
  stack::set_sizes(&params_, sizes);
  mamba_decode_stack_params one = params_;
  one.batch = 1;
  std::vector<mamba_decode_layer> layers = layers_;
  const std::vector<const void*> in(operands_.size(), kStandIn);
  const std::vector<void*> out(stack::first_weight(one.n_layer), kStandIn);
  stack::bind(&one, layers.data(), in.data(), out.data());
  int32_t found[2] = {-1, -1};
  const int count = mamba_decode_stack_tactics(&one, found, 2);
  for (int i = 0; i < count; ++i) {
    if (one.tactic < 0 || one.tactic == found[i]) return;
  }
  throw Error("no kernel covers d_model " + std::to_string(one.d_model) + ", d_inner " + std::to_string(one.d_inner) +
              ", d_state " + std::to_string(one.d_state) + ", d_conv " + std::to_string(one.d_conv) + ", dt_rank " +
              std::to_string(one.dt_rank) + ", " + std::to_string(one.n_layer) + " layers" + integers_of(one) +
              (one.tactic < 0 ? "" : " by the kernel that MAMBA_ORT_DECODE names"));
}

Dims Stack::state_dims(const Context& context, std::size_t index, int64_t batch) const {
  Dims wanted = states_[index - 1];
  wanted.insert(wanted.begin(), batch);
  const Dims found = context.input(index).dims;
  if (found != wanted) {
    throw Error("input " + operands_[index].name + " has shape " + text(found) + ", expected " + text(wanted));
  }
  return wanted;
}

void Stack::compute(const Context& context) const {
  mamba_decode_stack_params p = params_;
  const Tensor ids = context.input(0);
  if (ids.dims.size() != 2 || ids.dims[1] != 1 || ids.dims[0] < 1 || ids.dims[0] > 65535) {
    throw Error("input input_ids has shape " + text(ids.dims) + ", expected [1 to 65535, 1]");
  }
  const int64_t batch = ids.dims[0];
  if (batch > 1 && p.tactic == 1) {
    throw Error("the fused kernel takes one row, input_ids has " + std::to_string(batch));
  }
  p.batch = static_cast<int32_t>(batch);
  std::vector<const void*> in = {ids.data};
  std::vector<void*> out = {context.output(0, {batch, 1, p.vocab_size})};
  for (std::size_t i = 1; i < operands_.size(); ++i) {
    if (i <= states_.size()) out.push_back(context.output(i, state_dims(context, i, batch)));
    in.push_back(context.data(i));
  }
  std::vector<mamba_decode_layer> layers = layers_;
  stack::bind(&p, layers.data(), in.data(), out.data());
  p.workspace_size = mamba_decode_stack_workspace(&p);
  const Workspace memory(context, p.workspace_size);
  p.workspace = memory.get();
  const int status = mamba_decode_stack(&p, context.stream());
  if (status != MAMBA_OK) throw Error(mamba_status_string(status));
}

}  // namespace mamba::ort
