// What TensorRT calls in the library after loading it (IPluginRegistry::loadLibrary, trtexec --dynamicPlugins).
#include "creator.h"
#include "log.h"

#define MAMBA_EXPORT extern "C" __attribute__((visibility("default")))

MAMBA_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static const std::vector<nvinfer1::IPluginCreatorInterface*> all(mamba_plugin::creators().begin(),
                                                                   mamba_plugin::creators().end());
  count = static_cast<int32_t>(all.size());
  return all.data();
}

MAMBA_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { mamba_plugin::set_logger_finder(finder); }

// The TensorRT the headers came from, as 10000 * major + 100 * minor, and what the library was built from.
MAMBA_EXPORT int32_t mambaPluginTensorRTVersion() { return NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100; }
MAMBA_EXPORT const char* mambaPluginBuildId() { return MAMBA_PLUGIN_ID; }
