#include "log.h"

#include <atomic>
#include <cstdio>

namespace mamba_plugin {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> g_finder{nullptr};

void write(nvinfer1::ILogger::Severity severity, const std::string& text) noexcept {
  nvinfer1::ILoggerFinder* finder = g_finder.load();
  nvinfer1::ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger)
    logger->log(severity, text.c_str());
  else
    std::fprintf(stderr, "%s\n", text.c_str());
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) { g_finder = finder; }
void log_error(const std::string& text) noexcept { write(nvinfer1::ILogger::Severity::kERROR, text); }
void log_warning(const std::string& text) noexcept { write(nvinfer1::ILogger::Severity::kWARNING, text); }

}  // namespace mamba_plugin
