// The ops as this library knows them: inputs, attributes and a kernel call, without any TensorRT type.
//
// An op is one OpSpec in one file under ops/. Its table of inputs says name, shape and type, and all checks follow
// from it. A Kernel is one op with its attributes and, after set_shapes, its shapes: ready to launch.
#ifndef MAMBA_PLUGIN_OP_H_
#define MAMBA_PLUGIN_OP_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mamba/common.h"

namespace mamba_plugin {

// What a tensor may hold. kActivation: float32, float16 or bfloat16, the same for all activations of a node.
enum class Kind { kActivation, kFloat32, kState, kInt32, kInt64 };
enum class Type { kFloat32, kFloat16, kBFloat16, kInt32, kInt64, kInt8, kBool, kFloat8, kOther };

struct Tensor {
  Type type = Type::kOther;
  std::vector<int64_t> shape;  // -1: not known yet
};

// `shape` names one dimension by one letter: the same letter is the same size all over the node, '1' is one, and a
// small letter is one less than the capital (the K - 1 columns of a convolution's state). '*' is any size, which the op's
// relations() look at. "H|HP" allows two ranks.
struct InputSpec {
  std::string name;
  const char* shape;
  Kind kind;
};

// Shape and type of an input; with `columns`, of float32 and with a last dimension of that size more.
struct OutputSpec {
  size_t like;
  int64_t columns;
};

struct AttributeSpec {
  const char* name;
  bool is_float;
  double fallback, low, high;
};

struct OpSpec;

// Attribute values of one node, in the order of the op's table.
class Attributes {
 public:
  explicit Attributes(const OpSpec& op);
  const OpSpec& op() const { return *op_; }
  double get(const std::string& name) const;
  int flag(const std::string& name) const { return static_cast<int>(get(name)); }
  // Empty, or what is wrong with the value.
  std::string set(size_t index, double value);
  const std::vector<double>& values() const { return values_; }

 private:
  const OpSpec* op_;
  std::vector<double> values_;
};

// The size each letter of the shapes stands for; -1 where it is not known.
class Sizes {
 public:
  int64_t operator[](char letter) const { return size_[letter - 'A']; }
  int at(char letter) const { return static_cast<int>(size_[letter - 'A']); }
  void set(char letter, int64_t size) { size_[letter - 'A'] = size; }
  Sizes();

 private:
  int64_t size_[26];
};

class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual std::unique_ptr<Kernel> clone() const = 0;
  // All sizes and types known: prepares a launch. Returns a mamba_status.
  virtual int set_shapes(const Sizes& sizes, const std::vector<Tensor>& inputs) = 0;
  virtual size_t workspace(int tactic) const = 0;
  // Where there is no GPU to plan for: as much as any will take, at the sizes given.
  virtual size_t workspace_without_gpu(const Sizes&, const std::vector<Tensor>&) const { return 0; }
  virtual std::vector<int32_t> tactics() const = 0;
  virtual int launch(const void* const* inputs, void* const* outputs, int tactic, void* workspace, size_t size,
                     mamba_stream stream) = 0;
};

// The inputs and outputs that a node has, given its attributes.
struct Signature {
  std::vector<InputSpec> inputs;
  std::vector<OutputSpec> outputs;
  size_t activation = 0;  // the input whose type all activations have
  size_t first = 0;       // the input whose shape is read first, which those of others have to fit
};

struct OpSpec {
  const char* name;
  std::vector<InputSpec> inputs;          // always there
  const char* gate_shape;                 // of z, present with has_z; nullptr: no such input
  std::vector<AttributeSpec> attributes;  // "has_z" and "ragged" decide on trailing inputs
  size_t state_input;                     // output 1 has its shape and type; output 0 those of input 0
  bool narrow_state;                      // the state may be 16-bit
  std::unique_ptr<Kernel> (*make)(const Attributes& attributes);
  // Of ops whose inputs the attributes count: all of them, in place of the above, and what else sizes must satisfy.
  Signature (*signature)(const Attributes& attributes);
  std::string (*relations)(const Attributes& attributes, const Sizes& sizes, const std::vector<Tensor>& inputs);
};

const std::vector<const OpSpec*>& all_ops();

Signature signature_of(const Attributes& attributes);

// Matches shapes and types of a node with its signature.
class Matcher {
 public:
  explicit Matcher(const Attributes& attributes) : attributes_(attributes), signature_(signature_of(attributes)) {}
  const Signature& signature() const { return signature_; }
  // Whether input `index` may have `type`, given the type of the activations.
  bool type_allowed(size_t index, Type type, Type activation) const;
  // Empty and `sizes` filled, or the first thing wrong, naming the input.
  std::string match(const std::vector<Tensor>& inputs, Sizes* sizes) const;

 private:
  std::string expected_types(size_t index, Type activation) const;
  Attributes attributes_;
  Signature signature_;
};

int dtype_code(Type type);
const char* type_name(Type type);

}  // namespace mamba_plugin
#endif  // MAMBA_PLUGIN_OP_H_
