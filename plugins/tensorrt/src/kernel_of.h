// Kernel for an op of the C ABI, given its params struct and its three functions.
#ifndef MAMBA_PLUGIN_KERNEL_OF_H_
#define MAMBA_PLUGIN_KERNEL_OF_H_

#include <type_traits>

#include "op.h"

namespace mamba_plugin {

template <typename Params, typename = void>
struct has_workspace : std::false_type {};
template <typename Params>
struct has_workspace<Params, std::void_t<decltype(std::declval<Params&>().workspace)>> : std::true_type {};

// The kernels plan by pointer alignment too. TensorRT aligns its buffers to 256 bytes, and so does this stand-in,
// which is never read.
inline void* aligned_stand_in() { return reinterpret_cast<void*>(static_cast<uintptr_t>(4096)); }

// Derived gives `int fill(sizes, inputs)`, which sets all of `p` but pointers, and `void bind(inputs, outputs)`,
// which sets the pointers.
template <typename Derived, typename Params, int (*Launch)(const Params*, mamba_stream),
          size_t (*Workspace)(const Params*), int (*Tactics)(const Params*, int32_t*, int)>
class KernelOf : public Kernel {
 public:
  explicit KernelOf(const Attributes& attributes) : attributes_(attributes) {}

  std::unique_ptr<Kernel> clone() const override { return std::make_unique<Derived>(self()); }

  int set_shapes(const Sizes& sizes, const std::vector<Tensor>& inputs) override {
    p = Params{};
    const int status = self().fill(sizes, inputs);
    const std::vector<const void*> in(inputs.size(), aligned_stand_in());
    const std::vector<void*> out(signature_of(attributes_).outputs.size(), aligned_stand_in());
    self().bind(in.data(), out.data());
    return status;
  }

  size_t workspace(int tactic) const override {
    Params query = p;
    query.tactic = tactic;
    return Workspace(&query);
  }

  std::vector<int32_t> tactics() const override {
    std::vector<int32_t> found(64);
    Params query = p;
    query.tactic = -1;
    const int count = Tactics(&query, found.data(), static_cast<int>(found.size()));
    found.resize(count > 0 ? static_cast<size_t>(count) : 0);
    return found;
  }

  int launch(const void* const* inputs, void* const* outputs, int tactic, void* workspace, size_t size,
             mamba_stream stream) override {
    self().bind(inputs, outputs);
    p.tactic = tactic;
    if constexpr (has_workspace<Params>::value) {
      p.workspace = workspace;
      p.workspace_size = size;
    }
    return Launch(&p, stream);
  }

 protected:
  Attributes attributes_;
  Params p{};

 private:
  Derived& self() { return static_cast<Derived&>(*this); }
  const Derived& self() const { return static_cast<const Derived&>(*this); }
};

}  // namespace mamba_plugin
#endif  // MAMBA_PLUGIN_KERNEL_OF_H_
