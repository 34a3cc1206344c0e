// A scan that hands single tokens to the step's kernel: what a one-engine build runs for every generated token.
#ifndef MAMBA_PLUGIN_SCAN_OR_STEP_H_
#define MAMBA_PLUGIN_SCAN_OR_STEP_H_

#include <algorithm>
#include <utility>

#include "op.h"

namespace mamba_plugin {

class ScanOrStep final : public Kernel {
 public:
  // Both ops have the same inputs in the same order; the attributes the step knows are taken from the scan's.
  ScanOrStep(std::unique_ptr<Kernel> scan, const Attributes& attributes, const OpSpec& step) : scan_(std::move(scan)) {
    if (attributes.flag("ragged") || attributes.flag("reverse")) return;
    Attributes same(step);
    for (size_t i = 0; i < step.attributes.size(); i++) same.set(i, attributes.get(step.attributes[i].name));
    step_ = step.make(same);
  }

  std::unique_ptr<Kernel> clone() const override {
    auto copy = std::unique_ptr<ScanOrStep>(new ScanOrStep(scan_->clone(), step_ ? step_->clone() : nullptr));
    copy->one_token_ = one_token_;
    return copy;
  }
  int set_shapes(const Sizes& sizes, const std::vector<Tensor>& inputs) override {
    one_token_ = step_ && sizes['L'] == 1;
    return active().set_shapes(sizes, inputs);
  }
  size_t workspace(int tactic) const override { return active().workspace(tactic); }
  // 16 pieces of 256 tokens, each with a state: what the kernels use at most shapes.
  size_t workspace_without_gpu(const Sizes& sizes, const std::vector<Tensor>& inputs) const override {
    const std::vector<int64_t>& shape = inputs[7].shape;
    size_t state = 4 * static_cast<size_t>(sizes['B']);
    for (size_t i = 1; i < shape.size(); i++) state *= static_cast<size_t>(shape[i]);
    const auto pieces = static_cast<size_t>(std::min<int64_t>(16, sizes['L'] / 256));
    return pieces < 2 ? 0 : pieces * (state + state / 8);
  }
  std::vector<int32_t> tactics() const override { return active().tactics(); }
  int launch(const void* const* inputs, void* const* outputs, int tactic, void* workspace, size_t size,
             mamba_stream stream) override {
    return active().launch(inputs, outputs, tactic, workspace, size, stream);
  }

 private:
  ScanOrStep(std::unique_ptr<Kernel> scan, std::unique_ptr<Kernel> step)
      : scan_(std::move(scan)), step_(std::move(step)) {}
  Kernel& active() const { return one_token_ ? *step_ : *scan_; }

  std::unique_ptr<Kernel> scan_, step_;
  bool one_token_ = false;
};

// For OpSpec::make of a scan: Scan is its kernel, Step() the op of its step.
template <typename Scan, const OpSpec& (*Step)()>
std::unique_ptr<Kernel> make_scan_or_step(const Attributes& attributes) {
  return std::make_unique<ScanOrStep>(std::make_unique<Scan>(attributes), attributes, Step());
}

}  // namespace mamba_plugin
#endif  // MAMBA_PLUGIN_SCAN_OR_STEP_H_
