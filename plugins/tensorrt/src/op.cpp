#include "op.h"

#include <cctype>
#include <cmath>
#include <cstring>

namespace mamba_plugin {
namespace {

std::string number(double value) {
  const std::string text = std::to_string(value);
  const size_t last = text.find_last_not_of('0');
  return text.substr(0, last + (text[last] == '.' ? 0 : 1));
}

std::string describe(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// What a letter of a shape pattern asks for; -1: anything, and the letter takes the size found.
int64_t wanted(char letter, const Sizes& sizes) {
  if (letter == '1') return 1;
  if (letter == '*') return -1;
  if (!std::islower(static_cast<unsigned char>(letter))) return sizes[letter];
  const int64_t whole = sizes[static_cast<char>(std::toupper(letter))];
  return whole < 0 ? -1 : whole - 1;
}

std::string expected(const std::string& pattern, const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < pattern.size(); i++) {
    const int64_t size = wanted(pattern[i], sizes);
    text += (i ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
  }
  return text + "]";
}

std::string pick_pattern(const char* patterns, size_t rank) {
  const std::string all = patterns;
  size_t from = 0;
  for (;;) {
    const size_t bar = all.find('|', from);
    const std::string one = all.substr(from, bar == std::string::npos ? bar : bar - from);
    if (one.size() == rank) return one;
    if (bar == std::string::npos) return "";
    from = bar + 1;
  }
}

std::string match_shape(const InputSpec& spec, const std::vector<int64_t>& shape, Sizes* sizes) {
  const std::string pattern = pick_pattern(spec.shape, shape.size());
  if (pattern.empty()) {
    return "input " + spec.name + " has " + std::to_string(shape.size()) + " dimensions: " +
           describe(shape) + ", expected " + spec.shape;
  }
  for (size_t i = 0; i < shape.size(); i++) {
    const int64_t size = wanted(pattern[i], *sizes);
    if (shape[i] < 0 || pattern[i] == '*') continue;
    if (size >= 0 && size != shape[i]) {
      return "input " + spec.name + " has shape " + describe(shape) + ", expected " + expected(pattern, *sizes);
    }
    if (size >= 0) continue;
    const bool one_less = std::islower(static_cast<unsigned char>(pattern[i]));
    sizes->set(static_cast<char>(std::toupper(pattern[i])), shape[i] + one_less);
  }
  return "";
}

}  // namespace

Sizes::Sizes() {
  for (int64_t& size : size_) size = -1;
}

Attributes::Attributes(const OpSpec& op) : op_(&op) {
  for (const AttributeSpec& spec : op.attributes) values_.push_back(spec.fallback);
}

double Attributes::get(const std::string& name) const {
  for (size_t i = 0; i < values_.size(); i++)
    if (name == op_->attributes[i].name) return values_[i];
  return 0.0;
}

std::string Attributes::set(size_t index, double value) {
  const AttributeSpec& spec = op_->attributes[index];
  if (!(value >= spec.low && value <= spec.high)) {  // also refuses a NaN
    return std::string("attribute ") + spec.name + " = " + number(value) + " is not in " + number(spec.low) + ".." +
           number(spec.high);
  }
  values_[index] = value;
  return "";
}

Signature signature_of(const Attributes& attributes) {
  const OpSpec& op = attributes.op();
  if (op.signature) return op.signature(attributes);
  Signature signature;
  signature.inputs = op.inputs;
  if (attributes.flag("has_z")) signature.inputs.push_back({"z", op.gate_shape, Kind::kActivation});
  if (attributes.flag("ragged")) signature.inputs.push_back({"seq_lens", "B", Kind::kInt32});
  signature.outputs = {{0, 0}, {op.state_input, 0}};
  return signature;
}

bool Matcher::type_allowed(size_t index, Type type, Type activation) const {
  if (index >= signature_.inputs.size()) return false;
  const bool floating = type == Type::kFloat32 || type == Type::kFloat16 || type == Type::kBFloat16;
  switch (signature_.inputs[index].kind) {
    case Kind::kActivation: return floating && (index == signature_.activation || type == activation);
    case Kind::kFloat32: return type == Type::kFloat32;
    case Kind::kState: return type == Type::kFloat32 || (floating && attributes_.op().narrow_state);
    case Kind::kInt32: return type == Type::kInt32;
    case Kind::kInt64: return type == Type::kInt64;
  }
  return false;
}

// The types that input `index` may have, in words.
std::string Matcher::expected_types(size_t index, Type activation) const {
  std::string text;
  for (const Type type : {Type::kFloat32, Type::kFloat16, Type::kBFloat16, Type::kInt32, Type::kInt64})
    if (type_allowed(index, type, activation)) text += (text.empty() ? "" : " or ") + std::string(type_name(type));
  return text;
}

std::string Matcher::match(const std::vector<Tensor>& inputs, Sizes* sizes) const {
  const std::vector<InputSpec>& specs = signature_.inputs;
  if (inputs.size() != specs.size()) {
    return "the node has " + std::to_string(inputs.size()) + " inputs, its attributes ask for " +
           std::to_string(specs.size());
  }
  const Type activation = inputs[signature_.activation].type;
  for (size_t k = 0; k < specs.size(); k++) {
    const size_t i = (k + signature_.first) % specs.size();
    if (!type_allowed(i, inputs[i].type, activation)) {
      return "input " + specs[i].name + " has type " + type_name(inputs[i].type) + ", expected " +
             expected_types(i, activation);
    }
    const std::string wrong = match_shape(specs[i], inputs[i].shape, sizes);
    if (!wrong.empty()) return wrong;
  }
  const auto relations = attributes_.op().relations;
  return relations ? relations(attributes_, *sizes, inputs) : "";
}

int dtype_code(Type type) {
  switch (type) {
    case Type::kFloat16: return MAMBA_F16;
    case Type::kBFloat16: return MAMBA_BF16;
    default: return MAMBA_F32;
  }
}

const char* type_name(Type type) {
  switch (type) {
    case Type::kFloat32: return "float32";
    case Type::kFloat16: return "float16";
    case Type::kBFloat16: return "bfloat16";
    case Type::kInt32: return "int32";
    case Type::kInt64: return "int64";
    case Type::kInt8: return "int8";
    case Type::kBool: return "bool";
    case Type::kFloat8: return "float8";
    default: return "other";
  }
}

}  // namespace mamba_plugin
