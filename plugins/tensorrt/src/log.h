// Messages go to TensorRT's logger when it gave us one, else to stderr.
#ifndef MAMBA_PLUGIN_LOG_H_
#define MAMBA_PLUGIN_LOG_H_

#include <NvInferRuntime.h>

#include <string>

namespace mamba_plugin {

void set_logger_finder(nvinfer1::ILoggerFinder* finder);
void log_error(const std::string& text) noexcept;
void log_warning(const std::string& text) noexcept;

}  // namespace mamba_plugin
#endif  // MAMBA_PLUGIN_LOG_H_
