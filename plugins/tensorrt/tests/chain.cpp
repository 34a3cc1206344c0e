// A C interface to nodes of the plugin library, for benchmarks/plugin_chain.py: each is created from fields, serialized,
// restored and attached as in an engine, given its shapes once, and enqueued into a stream of the caller's.
#include <cuda_runtime_api.h>

#include <cstring>

#include "library.h"

using namespace plugin_tests;

namespace {

struct Node {
  std::unique_ptr<IPluginV3> plugin;
  std::vector<PluginTensorDesc> descs;
  int32_t inputs = 0;
  int32_t enqueue(const void* const* in, void* const* out, void* workspace, cudaStream_t stream) const {
    return runtime_of(plugin.get())->enqueue(descs.data(), descs.data() + inputs, in, out, workspace, stream);
  }
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void* chain_open(const char* library) { return new Library(library); }

// `types` (nvinfer1::DataType) and `shapes` (rank, then sizes) of all inputs, then of both outputs. nullptr: refused.
void* chain_node(void* library, const char* op, int32_t gate, int32_t inputs, const int32_t* types, const int64_t* shapes) {
  auto node = std::make_unique<Node>();
  node->inputs = inputs;
  for (int32_t i = 0; i < inputs + 2; i++) {
    PluginTensorDesc desc{};
    desc.type = static_cast<DataType>(types[i]), desc.format = TensorFormat::kLINEAR;
    desc.dims.nbDims = static_cast<int32_t>(*shapes++);
    for (int32_t k = 0; k < desc.dims.nbDims; k++) desc.dims.d[k] = *shapes++;
    node->descs.push_back(desc);
  }
  IPluginCreatorV3One* creator = static_cast<Library*>(library)->find(op);
  std::vector<PluginField> fields;
  if (gate) fields.emplace_back("has_z", &gate, PluginFieldType::kINT32, 1);
  const std::unique_ptr<IPluginV3> built = creator ? make(creator, fields) : nullptr;
  if (!built) return nullptr;
  const std::unique_ptr<IPluginV3> loaded(
      creator->createPlugin(op, runtime_of(built.get())->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
  node->plugin.reset(runtime_of(loaded.get())->attachToContext(nullptr));
  const bool fits = runtime_of(node->plugin.get())->onShapeChange(node->descs.data(), inputs, node->descs.data() + inputs, 2) == 0;
  if (!fits) {
    for (const std::string& line : g_log) std::fprintf(stderr, "%s\n", line.c_str());
    return nullptr;
  }
  return node.release();
}

int32_t chain_enqueue(void* node, const void* const* in, void* const* out, void* stream) {
  return static_cast<const Node*>(node)->enqueue(in, out, nullptr, static_cast<cudaStream_t>(stream));
}

}  // extern "C"
#pragma GCC visibility pop
