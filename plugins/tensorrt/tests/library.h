// What the test programs share: the plugin library opened as TensorRT would open it, its log, and counted checks.
#ifndef MAMBA_PLUGIN_TESTS_LIBRARY_H_
#define MAMBA_PLUGIN_TESTS_LIBRARY_H_

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace plugin_tests {

using namespace nvinfer1;

inline int g_checks = 0, g_failures = 0;
inline std::vector<std::string> g_log;

class Logger final : public ILogger {
 public:
  void log(Severity, const char* text) noexcept override { g_log.emplace_back(text); }
};

class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger_; }

 private:
  Logger logger_;
};

inline bool check(bool good, const std::string& what) {
  g_checks++;
  if (good) return true;
  g_failures++;
  std::printf("FAILED %s\n", what.c_str());
  for (const std::string& line : g_log) std::printf("  log: %s\n", line.c_str());
  return false;
}

// The last message names all of `words`.
inline void check_message(const std::vector<std::string>& words, const std::string& what) {
  const std::string last = g_log.empty() ? "" : g_log.back();
  for (const std::string& word : words)
    check(last.find(word) != std::string::npos, what + ": no '" + word + "' in '" + last + "'");
  g_log.clear();
}

class Library {
 public:
  explicit Library(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) fail(dlerror());
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    const auto get = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    const auto set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    const auto version = reinterpret_cast<int32_t (*)()>(dlsym(library, "mambaPluginTensorRTVersion"));
    if (!get || !set || !version) fail("an entry point is missing");
    check(version() == NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100, "built against other headers than this host");
    static Finder finder;
    set(&finder);
    int32_t count = 0;
    IPluginCreatorInterface* const* all = get(count);
    for (int32_t i = 0; i < count; i++) creators_.push_back(static_cast<IPluginCreatorV3One*>(all[i]));
  }

  // What TensorRT's registry does with a node's op type, plugin_version and plugin_namespace; nullptr: no such plugin.
  IPluginCreatorV3One* find(const std::string& op, const std::string& version = "1", const std::string& space = "") const {
    for (IPluginCreatorV3One* creator : creators_)
      if (op == creator->getPluginName() && version == creator->getPluginVersion() && space == creator->getPluginNamespace())
        return creator;
    return nullptr;
  }
  size_t size() const { return creators_.size(); }

 private:
  [[noreturn]] static void fail(const char* why) {
    std::fprintf(stderr, "%s\n", why);
    std::exit(2);
  }
  std::vector<IPluginCreatorV3One*> creators_;
};

inline Dims dims_of(const std::vector<int64_t>& sizes) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); i++) dims.d[i] = sizes[i];
  return dims;
}

inline IPluginV3OneBuild* build_of(IPluginV3* plugin) {
  return static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}
inline IPluginV3OneRuntime* runtime_of(IPluginV3* plugin) {
  return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

inline std::unique_ptr<IPluginV3> make(IPluginCreatorV3One* creator, const std::vector<PluginField>& fields) {
  const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  return std::unique_ptr<IPluginV3>(creator->createPlugin("layer.7", &collection, TensorRTPhase::kBUILD));
}

inline int report() {
  std::printf("%d checks, %d failed\n", g_checks, g_failures);
  return g_failures ? 1 : 0;
}

}  // namespace plugin_tests
#endif  // MAMBA_PLUGIN_TESTS_LIBRARY_H_
