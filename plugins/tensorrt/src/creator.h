#ifndef MAMBA_PLUGIN_CREATOR_H_
#define MAMBA_PLUGIN_CREATOR_H_

#include <NvInferRuntime.h>

#include <vector>

#include "op.h"

namespace mamba_plugin {

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(const OpSpec& op);
  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

 private:
  const OpSpec& op_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// One creator an op; they live as long as the library.
const std::vector<Creator*>& creators();

}  // namespace mamba_plugin
#endif  // MAMBA_PLUGIN_CREATOR_H_
