#include "mamba/decode_stack_operands.h"

#include <algorithm>

#include "ops/specs.h"

namespace mamba_plugin {
namespace {

namespace stack = mamba::stack;

mamba_decode_stack_params params_of(const Attributes& attributes) {
  return stack::from_attributes([&](const char* name) { return attributes.get(name); });
}

class DecodeStack final
    : public KernelOf<DecodeStack, mamba_decode_stack_params, mamba_decode_stack, mamba_decode_stack_workspace,
                      mamba_decode_stack_tactics> {
 public:
  explicit DecodeStack(const Attributes& attributes)
      : KernelOf(attributes), layers_(static_cast<size_t>(attributes.get("n_layer"))) {}
  DecodeStack(const DecodeStack& other) : KernelOf(other), layers_(other.layers_) { p.layers = layers_.data(); }
  DecodeStack& operator=(const DecodeStack&) = delete;

  int fill(const Sizes& s, const std::vector<Tensor>& inputs) {
    p = params_of(attributes_);
    p.dtype = dtype_code(inputs[1].type);
    stack::set_sizes(&p, s);
    const std::string wrong = stack::set_bits(&p, layers_.data(), s, [&](size_t i) { return inputs[i].shape.back(); });
    return wrong.empty() ? MAMBA_OK : MAMBA_ERROR_SHAPE;
  }

  void bind(const void* const* in, void* const* out) { stack::bind(&p, layers_.data(), in, out); }

  // The kernels keep vectors of the model's widths there, in at most 16 bytes a value, and words of the blocks.
  size_t workspace_without_gpu(const Sizes& s, const std::vector<Tensor>&) const override {
    const int64_t values = s['M'] + 4 * s['I'] + s['J'] + 4 * std::max<int64_t>(0, s['R']);
    return static_cast<size_t>(s['B'] * values) * 16 + (64 << 10);
  }

 private:
  std::vector<mamba_decode_layer> layers_;
};

Kind kind_of(stack::Kind kind) {
  switch (kind) {
    case stack::Kind::kIds: return Kind::kInt64;
    case stack::Kind::kModel: return Kind::kActivation;
    case stack::Kind::kPacked: return Kind::kInt32;
    case stack::Kind::kFloat32: break;
  }
  return Kind::kFloat32;
}

Signature signature(const Attributes& attributes) {
  Signature made;
  const int layers = attributes.flag("n_layer");
  for (const stack::Operand& operand : stack::inputs(params_of(attributes)))
    made.inputs.push_back({operand.name, operand.shape, kind_of(operand.kind)});
  made.outputs.push_back({0, static_cast<int64_t>(attributes.get("vocab_size"))});
  made.first = stack::first_weight(layers);
  for (size_t state = 1; state < made.first; state++) made.outputs.push_back({state, 0});
  made.activation = 1;  // the first convolution's state
  return made;
}

std::string relations(const Attributes& attributes, const Sizes& sizes, const std::vector<Tensor>& inputs) {
  mamba_decode_stack_params p = params_of(attributes);
  std::vector<mamba_decode_layer> layers(static_cast<size_t>(p.n_layer));
  const std::string wrong = stack::relations(p, sizes);
  if (!wrong.empty()) return wrong;
  return stack::set_bits(&p, layers.data(), sizes, [&](size_t i) { return inputs[i].shape.back(); });
}

std::vector<AttributeSpec> attribute_specs() {
  std::vector<AttributeSpec> specs;
  for (const stack::Attribute& a : stack::attributes())
    specs.push_back({a.name, a.is_float, a.fallback, a.low, a.high});
  return specs;
}

}  // namespace

const OpSpec& decode_stack_op() {
  static const OpSpec spec = {
      "MambaDecodeStack", {}, nullptr, attribute_specs(), 2, false, make_kernel<DecodeStack>, signature, relations,
  };
  return spec;
}

}  // namespace mamba_plugin
