// MambaDecodeStack: the whole step of a model as one node, for providers that have the decode_stack kernels.
#pragma once

#include <array>

#include "api.h"
#include "mamba/decode_stack_operands.h"

namespace mamba::ort {

// A node of a loaded graph, found good when the session was made.
class Stack {
 public:
  // Reads attributes, types and shapes; throws Error, naming node and field.
  Stack(const OrtApi& api, const OrtKernelInfo* info);
  void compute(const Context& context) const;
  const std::string& name() const { return name_; }
  const OrtApi& api() const { return api_; }

 private:
  class Sizes {
   public:
    Sizes() { size_.fill(-1); }
    int64_t operator[](char letter) const { return size_[static_cast<std::size_t>(letter - 'A')]; }
    int64_t of(char letter) const;  // 'k' and '1' too
    // Whether `size` is what `letter` stands for; the first one known decides.
    bool take(char letter, int64_t size);

   private:
    std::array<int64_t, 26> size_;
  };

  void read_attributes(const OrtKernelInfo* info);
  void read_inputs(const OrtKernelInfo* info);
  void read_input(const OrtKernelInfo* info, std::size_t index, Sizes* sizes);
  void find_kernel(const Sizes& sizes);
  Dims state_dims(const Context& context, std::size_t index, int64_t batch) const;

  const OrtApi& api_;
  std::string name_;
  mamba_decode_stack_params params_{};
  std::vector<mamba_decode_layer> layers_;  // without pointers
  std::vector<stack::Operand> operands_;
  std::vector<Dims> states_;  // without the batch
};

// Adds the op to `domain` on `provider` (null: the CPU). Where it is not `computed`, sessions are refused with a hint:
// ONNX Runtime looks at no function body of an op that any provider has.
void add_stack_op(const OrtApi& api, OrtCustomOpDomain* domain, const char* provider, bool computed = true);

}  // namespace mamba::ort
