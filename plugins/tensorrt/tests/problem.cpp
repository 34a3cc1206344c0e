#include "problem.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

namespace plugin_tests {

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(3);
}

Buffer::Buffer(size_t bytes) : bytes_(bytes) { CUDA(cudaMalloc(&data_, bytes ? bytes : 1)); }
Buffer::~Buffer() {
  if (data_) cudaFree(data_);
}
void Buffer::upload(const void* from) { CUDA(cudaMemcpy(data_, from, bytes_, cudaMemcpyHostToDevice)); }
std::vector<char> Buffer::download() const {
  std::vector<char> bytes(bytes_);
  CUDA(cudaMemcpy(bytes.data(), data_, bytes_, cudaMemcpyDeviceToHost));
  return bytes;
}
void Buffer::poison() { CUDA(cudaMemset(data_, 0xff, bytes_)); }

size_t size_of(DataType type) { return type == DataType::kFLOAT || type == DataType::kINT32 ? 4 : 2; }
const char* name_of(DataType type) {
  return type == DataType::kFLOAT ? "float32" : type == DataType::kHALF ? "float16" : "bfloat16";
}

namespace {

template <typename T, typename To>
std::vector<char> encode_as(const std::vector<double>& values, To to) {
  std::vector<T> typed(values.size());
  for (size_t i = 0; i < values.size(); i++) typed[i] = to(values[i]);
  std::vector<char> bytes(typed.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), static_cast<const void*>(typed.data()), bytes.size());
  return bytes;
}

template <typename T, typename From>
std::vector<double> decode_as(const std::vector<char>& bytes, From from) {
  std::vector<T> typed(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(static_cast<void*>(typed.data()), bytes.data(), bytes.size());
  std::vector<double> values(typed.size());
  for (size_t i = 0; i < typed.size(); i++) values[i] = static_cast<double>(from(typed[i]));
  return values;
}

}  // namespace

std::vector<char> encode(const std::vector<double>& values, DataType type) {
  switch (type) {
    case DataType::kHALF: return encode_as<__half>(values, [](double v) { return __float2half_rn(static_cast<float>(v)); });
    case DataType::kBF16:
      return encode_as<__nv_bfloat16>(values, [](double v) { return __float2bfloat16_rn(static_cast<float>(v)); });
    case DataType::kINT32: return encode_as<int32_t>(values, [](double v) { return static_cast<int32_t>(v); });
    default: return encode_as<float>(values, [](double v) { return static_cast<float>(v); });
  }
}

std::vector<double> decode(const std::vector<char>& bytes, DataType type) {
  switch (type) {
    case DataType::kHALF: return decode_as<__half>(bytes, [](__half v) { return __half2float(v); });
    case DataType::kBF16: return decode_as<__nv_bfloat16>(bytes, [](__nv_bfloat16 v) { return __bfloat162float(v); });
    default: return decode_as<float>(bytes, [](float v) { return v; });
  }
}

namespace {

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  template <typename Shape>
  std::vector<double> operator()(size_t count, Shape shape) {
    std::vector<double> values(count);
    std::normal_distribution<double> normal;
    for (double& value : values) value = shape(normal(engine_));
    return values;
  }

 private:
  std::mt19937_64 engine_;
};

size_t product(const std::vector<int64_t>& dims) {
  size_t size = 1;
  for (const int64_t dim : dims) size *= static_cast<size_t>(dim);
  return size;
}

const char* op_name(Op op) {
  switch (op) {
    case Op::kConv: return "MambaCausalConv1d";
    case Op::kScan: return "MambaSelectiveScan";
    case Op::kScanStep: return "MambaSelectiveStateUpdate";
    case Op::kSsd: return "MambaSsdScan";
    default: return "MambaSsdStateUpdate";
  }
}

// Positions past a row's end become NaN, which must reach neither a state nor an output.
void poison_padding(Value* value, const std::vector<int32_t>& lens) {
  const size_t length = static_cast<size_t>(value->dims[1]), token = value->values.size() / lens.size() / length;
  for (size_t row = 0; row < lens.size(); row++)
    for (size_t i = static_cast<size_t>(lens[row]) * token; i < length * token; i++)
      value->values[row * length * token + i] = std::numeric_limits<double>::quiet_NaN();
}

}  // namespace

Problem make_problem(const Case& c, unsigned seed) {
  const Sizes& s = c.sizes;
  Random random(seed);
  Problem problem;
  problem.c = c, problem.op_name = op_name(c.op);
  const auto add = [&](DataType type, std::vector<int64_t> dims, bool over_time, auto shape) {
    const std::vector<double> values = random(product(dims), shape);
    problem.inputs.push_back({type, dims, decode(encode(values, type), type), over_time});
  };
  const auto normal = [](double v) { return v; };
  std::vector<int64_t> x = {s.batch, s.length, s.width}, state = {s.batch, s.width, s.state};
  if (is_ssd(c.op)) x.push_back(s.headdim), state.insert(state.begin() + 2, s.headdim);
  Operands operands;
  if (c.op == Op::kConv) {
    add(c.type, x, true, normal);
    add(c.type, {s.width, s.state}, false, [](double v) { return v / 2; });
    add(c.type, {s.width}, false, normal);
    add(c.type, {s.batch, s.width, s.state - 1}, false, normal);
    problem.state_input = 3;
  } else {
    std::vector<int64_t> groups = {s.batch, s.length, s.groups, s.state}, skip = {s.width};
    if (c.options.skip_per_channel) skip.push_back(s.headdim);
    add(c.type, x, true, normal);
    add(c.type, {s.batch, s.length, s.width}, true, normal);
    add(DataType::kFLOAT, is_ssd(c.op) ? std::vector<int64_t>{s.width} : std::vector<int64_t>{s.width, s.state}, false,
        [](double v) { return -std::exp(v + 0.5); });
    add(c.type, groups, true, normal);
    add(c.type, groups, true, normal);
    add(DataType::kFLOAT, skip, false, normal);
    add(DataType::kFLOAT, {s.width}, false, [](double v) { return v - 4.0; });
    add(c.state_type, state, false, normal);
    problem.state_input = 7;
    if (c.options.gate) add(c.type, x, true, normal);
  }
  operands.lens = c.options.ragged ? c.lens : std::vector<int32_t>(static_cast<size_t>(s.batch), static_cast<int32_t>(s.length));
  const bool conv = c.op == Op::kConv;
  const auto role = [&](size_t i) { return problem.inputs[i].values; };
  operands.x = role(0), operands.state = role(problem.state_input);
  if (conv) {
    operands.A = role(1), operands.bias = role(2);
  } else {
    operands.dt = role(1), operands.A = role(2), operands.B = role(3), operands.C = role(4), operands.D = role(5);
    operands.bias = role(6);
    if (c.options.gate) operands.z = role(8);
  }
  problem.expected = reference(c.op, s, c.options, operands);
  if (c.options.ragged) {
    for (Value& value : problem.inputs)
      if (value.over_time) poison_padding(&value, c.lens);
    problem.inputs.push_back({DataType::kINT32, {s.batch}, std::vector<double>(c.lens.begin(), c.lens.end()), false});
  }
  return problem;
}

std::vector<PluginField> Problem::fields() const {
  const Options& o = c.options;
  flags_ = {o.activation, o.ragged, o.softplus, o.gate, o.reverse};
  limits_ = {static_cast<float>(o.dt_min), static_cast<float>(o.dt_max)};
  std::vector<PluginField> fields;
  const auto flag = [&](const char* name, size_t i) { fields.emplace_back(name, &flags_[i], PluginFieldType::kINT32, 1); };
  if (c.op == Op::kConv) flag("activation", 0);
  if (!is_step(c.op)) flag("ragged", 1);
  if (c.op != Op::kConv) flag(is_ssd(c.op) ? "dt_softplus" : "delta_softplus", 2), flag("has_z", 3);
  if (c.op == Op::kScan) flag("reverse", 4);
  if (is_ssd(c.op)) {
    fields.emplace_back("dt_min", &limits_[0], PluginFieldType::kFLOAT32, 1);
    fields.emplace_back("dt_max", &limits_[1], PluginFieldType::kFLOAT32, 1);
  }
  return fields;
}

std::vector<PluginTensorDesc> Problem::descs(int64_t length) const {
  std::vector<PluginTensorDesc> descs;
  const auto add = [&](const Value& value) {
    PluginTensorDesc desc{};
    desc.type = value.type, desc.format = TensorFormat::kLINEAR, desc.dims = dims_of(value.dims);
    if (value.over_time && length > 0) desc.dims.d[1] = length;
    descs.push_back(desc);
  };
  for (const Value& value : inputs) add(value);
  add(inputs[0]);
  add(inputs[state_input]);
  return descs;
}

std::string describe(const Case& c) {
  const Sizes& s = c.sizes;
  std::string text = std::string(op_name(c.op)) + " " + name_of(c.type);
  if (c.state_type != DataType::kFLOAT && c.op != Op::kConv) text += std::string("/") + name_of(c.state_type);
  for (const int64_t size : {s.batch, s.length, s.width, s.headdim, s.groups, s.state}) text += " " + std::to_string(size);
  return text + (c.options.gate ? " z" : "") + (c.options.ragged ? " ragged" : "") + (c.options.reverse ? " reverse" : "");
}

double error(const std::vector<double>& got, const std::vector<double>& expected) {
  double difference = 0.0, norm = 0.0;
  if (got.size() != expected.size()) return HUGE_VAL;
  for (size_t i = 0; i < got.size(); i++) {
    difference += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  const double ratio = std::sqrt(difference / std::max(norm, 1e-60));
  return std::isnan(ratio) ? HUGE_VAL : ratio;
}

double tolerance(const Case& c, bool of_state) {
  const auto of = [](DataType type, double single) {
    return type == DataType::kFLOAT ? single : type == DataType::kHALF ? 6e-4 : 4.5e-3;
  };
  if (c.op == Op::kSsd) return of(c.type, 2e-5);  // products of 16-bit values, float32 as the sum of two
  if (!of_state || c.op == Op::kConv) return of(c.type, 4e-6);
  return of(c.state_type, 1e-5);
}

}  // namespace plugin_tests
