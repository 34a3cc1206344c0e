// One IPluginV3 for all ops: what differs between them is in their OpSpec.
#ifndef MAMBA_PLUGIN_PLUGIN_H_
#define MAMBA_PLUGIN_PLUGIN_H_

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

#include "op.h"

namespace mamba_plugin {

constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "";
// Names of the fields a serialized plugin has besides its attributes. The first two may also come from a node.
constexpr char kVersionField[] = "plugin_version", kNamespaceField[] = "plugin_namespace";
constexpr char kTunedField[] = "tuned_shape";   // int32 [batch, seqlen] at which the builder timed tactics
constexpr char kDeviceField[] = "sized_for_gpu";  // int32: the workspace was planned for a GPU that was there

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  // `node` is for messages. `tuned` and `sized_for_gpu` come back from a serialized plugin.
  Plugin(const Attributes& attributes, std::string node);
  Plugin(const Plugin& other);
  Plugin& operator=(const Plugin&) = delete;
  void restore(int32_t tuned_batch, int32_t tuned_seqlen, bool sized_for_gpu);

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

  // IPluginV3OneBuild
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t nb_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t nb_outputs) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t nb_outputs,
                             const nvinfer1::DataType* input_types, int32_t nb_inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nb_inputs,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t nb_shape_inputs,
                          nvinfer1::DimsExprs* outputs, int32_t nb_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* in_out, int32_t nb_inputs,
                                 int32_t nb_outputs) noexcept override;
  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(matcher_->signature().outputs.size()); }
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t nb_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t nb_outputs) const noexcept override;
  int32_t getValidTactics(int32_t* tactics, int32_t nb_tactics) noexcept override;
  int32_t getNbTactics() noexcept override;
  const char* getTimingCacheID() noexcept override;

  // IPluginV3OneRuntime
  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t nb_inputs,
                        const nvinfer1::PluginTensorDesc* out, int32_t nb_outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  int32_t fail(const std::string& text) const noexcept;
  std::vector<int32_t> tactics_at_optimum();
  int choose_tactic(const Sizes& sizes);

  const std::vector<InputSpec>& input_specs() const { return matcher_->signature().inputs; }

  Attributes attributes_;
  std::shared_ptr<const Matcher> matcher_;  // clones share it
  std::string node_;
  std::unique_ptr<Kernel> kernel_;
  std::vector<Tensor> inputs_;          // as configured (at the optimum of the profile) or as enqueued
  int32_t tuned_[2] = {0, 0};           // batch and seqlen of that optimum
  bool sized_for_gpu_;
  int32_t field_device_ = 0;
  int32_t tactic_ = -1;                 // of the kernel; -1: its own choice by shape
  int launch_tactic_ = -1;              // after onShapeChange: the one this shape gets
  size_t launch_workspace_ = 0;
  bool ready_ = false;
  std::vector<nvinfer1::PluginField> fields_;
  std::vector<int32_t> field_ints_;
  std::vector<float> field_floats_;
  nvinfer1::PluginFieldCollection collection_{};
  std::string cache_id_;
};

}  // namespace mamba_plugin
#endif  // MAMBA_PLUGIN_PLUGIN_H_
