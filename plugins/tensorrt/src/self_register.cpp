// Registers every creator when the library is loaded: for programs that load plugins with a plain dlopen (Polygraphy
// --plugins, trtexec --staticPlugins, ONNX Runtime's TensorRT provider).
//
// Nothing is linked against TensorRT. Its registry is found in the process, which has TensorRT loaded already.
#include <dlfcn.h>

#include <string>

#include "creator.h"
#include "log.h"
#include "plugin.h"

namespace mamba_plugin {
namespace {

using GetRegistry = nvinfer1::IPluginRegistry* (*)();
using GetVersion = int32_t (*)();

// TensorRT as it is loaded in this process.
struct Runtime {
  GetRegistry registry = nullptr;
  int32_t version = 0;  // 10000 * major + 100 * minor, TensorRT-RTX with a major of 1; 0 if unknown

  // `library`: where to look, RTLD_DEFAULT for what everyone sees.
  bool found_in(void* library) {
    registry = reinterpret_cast<GetRegistry>(dlsym(library, "getPluginRegistry"));
    const auto get_version = reinterpret_cast<GetVersion>(dlsym(library, "getInferLibVersion"));
    version = get_version ? get_version() : 0;
    return registry;
  }
  // Version 11, and TensorRT-RTX with 1.7, changed the registry itself: calls through other headers end anywhere.
  bool has_our_interface() const {
    const int major = version / 10000;
    return version == 0 || (major == 1 ? version < 10700 || NV_TENSORRT_MAJOR >= 11 : major == NV_TENSORRT_MAJOR);
  }
};

Runtime find_runtime() {
  Runtime runtime;
  if (runtime.found_in(RTLD_DEFAULT)) return runtime;
  // Loaded, but not for everyone to see (Python loads it that way).
  const std::string major = std::to_string(NV_TENSORRT_MAJOR);
  const std::string names[] = {"libnvinfer.so." + major, "libnvinfer.so", "libtensorrt_rtx.so.1", "libtensorrt_rtx.so"};
  for (const std::string& name : names) {
    void* library = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library && runtime.found_in(library)) return runtime;
  }
  return {};
}

std::string text_of(int major, int minor) { return std::to_string(major) + "." + std::to_string(minor); }

struct SelfRegistration {
  SelfRegistration() {
    const Runtime runtime = find_runtime();
    if (!runtime.has_our_interface()) {
      log_warning("mamba plugins: built against the headers of TensorRT " + text_of(NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR) +
                  ", and this process has " + text_of(runtime.version / 10000, runtime.version / 100 % 100) +
                  ", whose registry is another; nothing was registered");
      return;
    }
    nvinfer1::IPluginRegistry* registry = runtime.registry ? runtime.registry() : nullptr;
    if (!registry) {
      log_warning("mamba plugins: TensorRT is not loaded in this process, nothing was registered");
      return;
    }
    for (Creator* creator : creators()) {
      if (!registry->registerCreator(*creator, kNamespace))
        log_warning(std::string("mamba plugins: TensorRT refused ") + creator->getPluginName());
    }
  }
} g_self_registration;

}  // namespace
}  // namespace mamba_plugin
