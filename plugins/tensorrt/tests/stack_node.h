// A MambaDecodeStack node of a model with random weights: its operands, its descriptions, its plugin.
#ifndef MAMBA_PLUGIN_TESTS_STACK_NODE_H_
#define MAMBA_PLUGIN_TESTS_STACK_NODE_H_

#include "mamba/decode_stack_operands.h"
#include "problem.h"

namespace plugin_tests {

namespace stack = mamba::stack;

// d_conv and the groups are Mamba-2's or of both; dt_rank makes it Mamba-1.
struct Model {
  const char* name;
  int64_t layers, d_model, d_inner, d_state, d_conv, dt_rank, heads, groups, vocab, rows;
  bool fused, wide_residual, tied;
  int bits = 0, group = 0;  // of packed integers
  bool mixed = false;       // of 4 bits: the head and layer 1 are int8
};

struct Node {
  Model m;
  DataType type;
  int64_t batch;

  bool mamba1() const { return m.dt_rank > 0; }
  bool packed_embedding() const { return m.bits && m.tied; }
  int32_t dtype() const { return type == DataType::kFLOAT ? MAMBA_F32 : type == DataType::kHALF ? MAMBA_F16 : MAMBA_BF16; }
  std::string text() const;
  // As the kernels take them, without layers and pointers.
  mamba_decode_stack_params params() const;
  int64_t size(char letter) const;  // of a dimension, by its letter in an operand's shape
  size_t states() const { return stack::first_weight(static_cast<int>(m.layers)) - 1; }

  std::vector<stack::Operand> operands() const { return stack::inputs(params()); }
  int bits(const stack::Operand& operand) const;
  int32_t columns(const stack::Operand& operand) const { return static_cast<int32_t>(size(operand.columns)); }
  int32_t scales(const stack::Operand& operand) const { return mamba_decode_scales(m.group, columns(operand)); }
  int64_t words(const stack::Operand& operand) const;  // of a packed row
  std::vector<char> random_rows(const stack::Operand& operand, unsigned seed) const;

  // Of the inputs, then of the outputs.
  std::vector<PluginTensorDesc> descs() const;
  std::unique_ptr<IPluginV3> make_plugin(const Library& library) const;
};

size_t bytes_of(const PluginTensorDesc& desc);
// Values that keep a model's activations of order one; those of large tensors repeat.
std::vector<char> random_input(const std::string& name, const PluginTensorDesc& desc, int64_t vocab, unsigned seed);

}  // namespace plugin_tests
#endif  // MAMBA_PLUGIN_TESTS_STACK_NODE_H_
