#include "ops.h"

#include <cstring>

namespace mamba::ort {

namespace {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kAny = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;

// Indices of the scans' inputs; the optional ones follow.
enum { kX, kDt, kA, kB, kC, kD, kBias, kState, kScanInputs };

std::string text(const Dims& dims) {
  std::string s = "[";
  for (std::size_t i = 0; i < dims.size(); ++i) s += (i ? ", " : "") + std::to_string(dims[i]);
  return s + "]";
}

void expect(const char* what, const Tensor& tensor, const Dims& dims) {
  if (tensor.dims != dims) throw Error(std::string(what) + " has shape " + text(tensor.dims) + ", expected " + text(dims));
}

Type type_of(const Tensor& tensor) {
  switch (tensor.type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return Type::f32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return Type::f16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return Type::bf16;
    default: throw Error("unsupported element type");
  }
}

const int32_t* lengths(const Tensor& tensor, int64_t batch) {
  expect("seq_lens", tensor, {batch});
  if (tensor.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32) throw Error("seq_lens is not int32");
  return tensor.as<int32_t>();
}

bool flag(const OrtApi& api, const OrtKernelInfo* info, const char* name, bool otherwise) {
  int64_t value = otherwise;
  if (OrtStatus* status = api.KernelInfoGetAttribute_int64(info, name, &value)) api.ReleaseStatus(status);
  return value != 0;
}

float number(const OrtApi& api, const OrtKernelInfo* info, const char* name, float otherwise) {
  float value = otherwise;
  if (OrtStatus* status = api.KernelInfoGetAttribute_float(info, name, &value)) api.ReleaseStatus(status);
  return value;
}

}  // namespace

const char* name_of(Op op) {
  switch (op) {
    case Op::conv: return "MambaCausalConv1d";
    case Op::selective_scan: return "MambaSelectiveScan";
    case Op::selective_update: return "MambaSelectiveStateUpdate";
    case Op::ssd_scan: return "MambaSsdScan";
    case Op::ssd_update: return "MambaSsdStateUpdate";
  }
  return "";
}

std::size_t required_inputs(Op op) { return op == Op::conv ? 4 : kScanInputs; }

std::size_t inputs_of(Op op) { return required_inputs(op) + (op == Op::conv || is_update(op) ? 1 : 2); }

ONNXTensorElementDataType input_type(Op op, std::size_t index, ONNXTensorElementDataType T) {
  if (index >= required_inputs(op)) return kAny;
  if (op == Op::conv) return T;
  const bool single = index == kA || index == kD || index == kBias || index == kState;
  return single ? kFloat : T;
}

ONNXTensorElementDataType output_type(Op op, std::size_t index, ONNXTensorElementDataType T) {
  return op == Op::conv || index == 0 ? T : kFloat;
}

Attributes read_attributes(Op op, const OrtApi& api, const OrtKernelInfo* info) {
  Attributes a;
  a.activation = flag(api, info, "activation", true);
  a.softplus = flag(api, info, is_ssd(op) ? "dt_softplus" : "delta_softplus", true);
  a.has_z = flag(api, info, "has_z", false);
  a.reverse = flag(api, info, "reverse", false);
  a.ragged = flag(api, info, "ragged", false);
  a.dt_min = number(api, info, "dt_min", a.dt_min);
  a.dt_max = number(api, info, "dt_max", a.dt_max);
  return a;
}

Scan scan_arguments(Op op, const Attributes& attributes, const Context& context) {
  Scan s{};
  const bool ssd = is_ssd(op);
  const std::size_t count = kScanInputs + attributes.has_z + attributes.ragged;
  if (context.inputs() < count) throw Error("an optional input that the attributes announce is missing");
  const Tensor x = context.input(kX), dt = context.input(kDt), A = context.input(kA), B = context.input(kB),
               C = context.input(kC), D = context.input(kD), bias = context.input(kBias), state = context.input(kState);
  if (x.dims.size() != (ssd ? 4u : 3u)) throw Error("x has shape " + text(x.dims));
  if (B.dims.size() != 4) throw Error("B has shape " + text(B.dims));
  s.batch = x.dims[0], s.length = x.dims[1], s.groups = B.dims[2], s.d_state = B.dims[3];
  if (is_update(op) && s.length != 1) throw Error("x has " + std::to_string(s.length) + " tokens, expected 1");
  const int64_t spread = x.dims[2];  // heads, or channels
  if (s.groups < 1 || spread % s.groups != 0) throw Error("B has " + std::to_string(s.groups) + " groups");
  s.per_segment = ssd;
  s.segments = ssd ? spread : s.groups;
  s.rows = ssd ? x.dims[3] : spread / s.groups;
  s.D_per_segment = ssd && D.dims.size() == 1;
  expect("B", B, {s.batch, s.length, s.groups, s.d_state});
  expect("C", C, B.dims);
  expect("delta", dt, {s.batch, s.length, spread});
  expect("A", A, ssd ? Dims{spread} : Dims{spread, s.d_state});
  expect("D", D, ssd && D.dims.size() == 2 ? Dims{spread, s.rows} : Dims{spread});
  expect("delta's bias", bias, {spread});
  expect("state", state, ssd ? Dims{s.batch, spread, s.rows, s.d_state} : Dims{s.batch, spread, s.d_state});
  s.type = type_of(x);
  s.x = x.data, s.dt = dt.data, s.B = B.data, s.C = C.data;
  s.A = A.as<float>(), s.D = D.as<float>(), s.dt_bias = bias.as<float>(), s.state = state.as<float>();
  if (attributes.has_z) {
    const Tensor z = context.input(kScanInputs);
    expect("z", z, x.dims);
    if (z.type != x.type) throw Error("z and x differ in type");
    s.z = z.data;
  }
  if (attributes.ragged) s.seq_lens = lengths(context.input(count - 1), s.batch);
  s.softplus = attributes.softplus, s.reverse = attributes.reverse;
  s.dt_min = attributes.dt_min, s.dt_max = attributes.dt_max;
  s.y = context.output(0, x.dims);
  s.present = static_cast<float*>(context.output(1, state.dims));
  return s;
}

Conv conv_arguments(const Attributes& attributes, const Context& context) {
  Conv c{};
  if (context.inputs() < 4u + attributes.ragged) throw Error("an input that the attributes announce is missing");
  const Tensor x = context.input(0), weight = context.input(1), bias = context.input(2), state = context.input(3);
  if (x.dims.size() != 3) throw Error("x has shape " + text(x.dims));
  if (weight.dims.size() != 2 || weight.dims[1] < 1) throw Error("weight has shape " + text(weight.dims));
  c.batch = x.dims[0], c.length = x.dims[1], c.channels = x.dims[2], c.kernel = weight.dims[1];
  expect("weight", weight, {c.channels, c.kernel});
  expect("bias", bias, {c.channels});
  expect("state", state, {c.batch, c.channels, c.kernel - 1});
  c.type = type_of(x), c.silu = attributes.activation;
  c.x = x.data, c.weight = weight.data, c.bias = bias.data, c.state = state.data;
  if (attributes.ragged) c.seq_lens = lengths(context.input(4), c.batch);
  c.y = context.output(0, x.dims);
  c.present = context.output(1, state.dims);
  return c;
}

}  // namespace mamba::ort
