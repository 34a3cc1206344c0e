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

GetRegistry find_registry() {
  constexpr char kSymbol[] = "getPluginRegistry";
  if (void* symbol = dlsym(RTLD_DEFAULT, kSymbol)) return reinterpret_cast<GetRegistry>(symbol);
  // Loaded, but not for everyone to see (Python loads it that way).
  const std::string major = std::to_string(NV_TENSORRT_MAJOR);
  const std::string names[] = {"libnvinfer.so." + major, "libnvinfer.so", "libtensorrt_rtx.so.1", "libtensorrt_rtx.so"};
  for (const std::string& name : names) {
    void* library = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, kSymbol) : nullptr;
    if (symbol) return reinterpret_cast<GetRegistry>(symbol);
  }
  return nullptr;
}

struct SelfRegistration {
  SelfRegistration() {
    const GetRegistry get = find_registry();
    nvinfer1::IPluginRegistry* registry = get ? get() : nullptr;
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
