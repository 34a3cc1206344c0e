#include "stack_node.h"

#include <array>
#include <cmath>
#include <cstring>
#include <random>

#include "stack_reference.h"

namespace plugin_tests {
namespace {

// `model`: the model's own type.
DataType type_of(stack::Kind kind, DataType model) {
  if (kind == stack::Kind::kPacked) return DataType::kINT32;
  return kind == stack::Kind::kIds ? DataType::kINT64 : kind == stack::Kind::kModel ? model : DataType::kFLOAT;
}

int64_t volume(const Dims& dims) {
  int64_t size = 1;
  for (int32_t i = 0; i < dims.nbDims; i++) size *= dims.d[i];
  return size;
}

}  // namespace

std::string Node::text() const {
  return std::string("MambaDecodeStack ") + name_of(type) + " " + m.name + " x" + std::to_string(batch);
}

mamba_decode_stack_params Node::params() const {
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  mamba_decode_stack_params p{};
  p.dtype = dtype(), p.weight_bits = m.bits, p.group_size = m.group, p.embedding_packed = packed_embedding();
  p.family = mamba1() ? 1 : 2, p.batch = narrow(batch), p.n_layer = narrow(m.layers);
  p.d_model = narrow(m.d_model), p.d_inner = narrow(m.d_inner), p.d_state = narrow(m.d_state), p.d_conv = narrow(m.d_conv);
  p.dt_rank = narrow(m.dt_rank), p.vocab_size = narrow(m.vocab), p.nheads = narrow(m.heads), p.ngroups = narrow(m.groups);
  p.residual_fp32 = m.wide_residual, p.norm_eps = p.gated_norm_eps = 1e-5F;
  return p;
}

int64_t Node::size(char letter) const {
  const int64_t bc = 2 * m.groups * m.d_state;
  switch (letter) {
    case 'B': return batch;
    case 'M': return m.d_model;
    case 'I': return m.d_inner;
    case 'N': return m.d_state;
    case 'K': return m.d_conv;
    case 'k': return m.d_conv - 1;
    case 'T': return m.dt_rank;
    case 'R': return m.dt_rank + bc;
    case 'H': return m.heads;
    case 'P': return m.d_inner / m.heads;
    case 'X': return mamba1() ? m.d_inner : m.d_inner + bc;
    case 'J': return 2 * m.d_inner + (mamba1() ? 0 : bc + m.heads);
    case '1': return 1;
    default: return m.rows;
  }
}

int Node::bits(const stack::Operand& operand) const {
  const bool wide = operand.name == "lm_head" || operand.name == "embedding" || operand.name.find("layers.1.") == 0;
  return m.mixed && wide ? 8 : m.bits;
}

int64_t Node::words(const stack::Operand& operand) const {
  return mamba_decode_row_bytes(bits(operand), columns(operand), scales(operand)) / 4;
}

std::vector<char> Node::random_rows(const stack::Operand& operand, unsigned seed) const {
  return random_packed(bits(operand), size(operand.shape[0]), columns(operand), scales(operand), dtype(), seed);
}

std::vector<PluginTensorDesc> Node::descs() const {
  std::vector<PluginTensorDesc> all;
  for (const stack::Operand& operand : operands()) {
    std::vector<int64_t> dims;
    for (const char* letter = operand.shape; *letter; letter++)
      dims.push_back(*letter == '*' ? words(operand) : size(*letter));
    PluginTensorDesc desc{};
    desc.type = type_of(operand.kind, type), desc.format = TensorFormat::kLINEAR, desc.dims = dims_of(dims);
    all.push_back(desc);
  }
  PluginTensorDesc logits{};
  logits.type = DataType::kFLOAT, logits.format = TensorFormat::kLINEAR, logits.dims = dims_of({batch, 1, m.vocab});
  all.push_back(logits);
  for (size_t i = 1; i <= states(); i++) all.push_back(all[i]);
  return all;
}

std::unique_ptr<IPluginV3> Node::make_plugin(const Library& library) const {
  const char* names[] = {"family",     "n_layer",          "dt_rank",     "nheads",    "ngroups",
                         "vocab_size", "residual_in_fp32", "weight_bits", "group_size", "packed_embedding"};
  const int64_t wide[] = {mamba1() ? 1 : 2, m.layers,        m.dt_rank, mamba1() ? 0 : m.heads, m.groups,
                          m.vocab,          m.wide_residual, m.bits,    m.group,                packed_embedding()};
  std::array<int32_t, 10> values;
  std::vector<PluginField> fields;
  for (size_t i = 0; i < values.size(); i++) {
    values[i] = static_cast<int32_t>(wide[i]);
    fields.emplace_back(names[i], &values[i], PluginFieldType::kINT32, 1);
  }
  return make(library.find("MambaDecodeStack"), fields);
}

size_t bytes_of(const PluginTensorDesc& desc) {
  return static_cast<size_t>(volume(desc.dims)) * (desc.type == DataType::kINT64 ? 8 : size_of(desc.type));
}

std::vector<char> random_input(const std::string& name, const PluginTensorDesc& desc, int64_t vocab, unsigned seed) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal;
  if (desc.type == DataType::kINT64) {
    std::vector<char> bytes(bytes_of(desc));
    for (size_t i = 0; i < bytes.size() / 8; i++) {
      const auto id = static_cast<int64_t>(engine() % static_cast<uint64_t>(vocab));
      std::memcpy(&bytes[8 * i], &id, 8);
    }
    return bytes;
  }
  const std::string last = name.substr(name.rfind('.') + 1);
  const bool norm = last == "norm" || last == "norm_f" || last == "gated_norm";
  const bool matrix = last.find("proj") != std::string::npos || last == "embedding" || last == "lm_head";
  const double width = static_cast<double>(desc.dims.d[desc.dims.nbDims - 1]);
  std::vector<double> values(static_cast<size_t>(volume(desc.dims)));
  constexpr size_t kRepeat = 4099 * 257;
  for (size_t i = 0; i < values.size(); i++) {
    double& value = values[i];
    if (i >= kRepeat) {
      value = values[i - kRepeat];
      continue;
    }
    value = normal(engine);
    if (norm) value = 1.0 + 0.1 * value;
    if (matrix) value /= std::sqrt(width);
    if (last == "A") value = -std::exp(0.5 * value);
    if (last == "dt_bias") value -= 2.0;
  }
  return encode(values, desc.type);
}

}  // namespace plugin_tests
