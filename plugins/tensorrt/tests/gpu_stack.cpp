#include "gpu_stack.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "stack_node.h"
#include "stack_reference.h"

extern std::atomic<long> g_news;  // count_news.cpp

namespace plugin_tests {
namespace {

constexpr size_t kGuard = 4096;

// A node with its buffers, on the host for the reference and on the GPU.
class Run {
 public:
  explicit Run(const Node& node) : node_(node), descs_(node.descs()) {
    const std::vector<stack::Operand> operands = node.operands();
    for (size_t i = 0; i < operands.size(); i++) {
      const bool tied = node.m.tied && operands[i].name == "lm_head";
      const char* name = tied ? "embedding" : operands[i].name.c_str();
      const unsigned seed = static_cast<unsigned>(tied ? i - 2 : i) + 1;
      const bool packed = operands[i].kind == stack::Kind::kPacked;
      host_.push_back(packed ? node.random_rows(operands[i], seed) : random_input(name, descs_[i], node.m.vocab, seed));
      inputs_.emplace_back(host_.back().size());
      inputs_.back().upload(host_.back().data());
      in_.push_back(tied ? in_[i - 2] : inputs_.back().data());
    }
    for (size_t i = operands.size(); i < descs_.size(); i++) {
      outputs_.emplace_back(bytes_of(descs_[i]));
      out_.push_back(outputs_.back().data());
    }
    CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~Run() { cudaStreamDestroy(stream_); }

  void configure(IPluginV3* plugin) {
    std::vector<DynamicPluginTensorDesc> profile;
    for (const PluginTensorDesc& desc : descs_) {
      DynamicPluginTensorDesc fixed{};
      fixed.desc = desc, fixed.min = fixed.opt = fixed.max = desc.dims;
      profile.push_back(fixed);
    }
    const auto n = static_cast<int32_t>(in_.size()), m = static_cast<int32_t>(out_.size());
    check(build_of(plugin)->configurePlugin(profile.data(), n, profile.data() + n, m) == 0, node_.text() + " configure");
    bytes_ = build_of(plugin)->getWorkspaceSize(profile.data(), n, profile.data() + n, m);
    workspace_ = std::make_unique<Buffer>(bytes_ + kGuard);
    CUDA(cudaMemset(workspace_->data(), 0xa5, workspace_->bytes()));
  }
  bool guard_intact() const {
    const std::vector<char> bytes = workspace_->download();
    return std::all_of(bytes.begin() + static_cast<std::ptrdiff_t>(bytes_), bytes.end(),
                       [](char c) { return static_cast<unsigned char>(c) == 0xa5; });
  }

  bool shape(IPluginV3* plugin) {
    const auto n = static_cast<int32_t>(in_.size()), m = static_cast<int32_t>(out_.size());
    return runtime_of(plugin)->onShapeChange(descs_.data(), n, descs_.data() + n, m) == 0;
  }
  bool enqueue(IPluginV3* plugin, const std::vector<const void*>& in, void* workspace) {
    const PluginTensorDesc* results = descs_.data() + in.size();
    return runtime_of(plugin)->enqueue(descs_.data(), results, in.data(), out_.data(), workspace, stream_) == 0;
  }
  bool once(IPluginV3* plugin) {
    for (Buffer& output : outputs_) output.poison();
    CUDA(cudaDeviceSynchronize());  // the stream does not wait for the default one
    const bool done = shape(plugin) && enqueue(plugin, in_, workspace_->data());
    CUDA(cudaStreamSynchronize(stream_));
    return done;
  }
  // The inputs with the present states in place of the states.
  std::vector<const void*> in_place() const {
    std::vector<const void*> in = in_;
    for (size_t i = 1; i <= node_.states(); i++) in[i] = out_[i];
    return in;
  }
  void reset_presents() {
    for (size_t i = 1; i <= node_.states(); i++)
      CUDA(cudaMemcpyAsync(out_[i], in_[i], outputs_[i].bytes(), cudaMemcpyDeviceToDevice, stream_));
  }

  std::vector<std::vector<char>> bytes() const {
    std::vector<std::vector<char>> all;
    for (const Buffer& output : outputs_) all.push_back(output.download());
    return all;
  }

  // Logits and states after so many times the same token, as the outputs hold them.
  std::vector<std::vector<char>> expected(int steps) const {
    std::vector<std::vector<char>> out;
    for (size_t i = 0; i < out_.size(); i++) out.emplace_back(outputs_[i].bytes());
    for (size_t i = 1; i < out.size(); i++) out[i] = host_[i];
    std::vector<const void*> in;
    std::vector<void*> to;
    for (const std::vector<char>& bytes : host_) in.push_back(bytes.data());
    for (std::vector<char>& bytes : out) to.push_back(bytes.data());
    for (size_t i = 1; i <= node_.states(); i++) in[i] = to[i];
    mamba_decode_stack_params p = node_.params();
    std::vector<mamba_decode_layer> layers(static_cast<size_t>(node_.m.layers));
    const std::vector<stack::Operand> operands = node_.operands();
    stack::set_bits(&p, layers.data(), *this, [&](size_t i) { return node_.words(operands[i]); });
    stack::bind(&p, layers.data(), in.data(), to.data());
    for (int step = 0; step < steps; step++) reference_stack(p);
    return out;
  }

  void compare(const std::vector<std::vector<char>>& wanted, const std::string& what) {
    for (size_t i = 0; i < out_.size(); i++) {
      const DataType type = descs_[in_.size() + i].type;
      const double off = error(decode(outputs_[i].download(), type), decode(wanted[i], type));
      (i ? worst_state : worst_y) = std::max(i ? worst_state : worst_y, off);
      const double allowed = node_.type == DataType::kFLOAT ? 2e-5 : node_.type == DataType::kHALF ? 5e-3 : 4e-2;
      const std::string output = i ? " state " + std::to_string(i - 1) : " logits";
      check(off < allowed, what + output + " off by " + std::to_string(off));
    }
  }

  int64_t operator[](char letter) const { return node_.size(letter); }  // for set_bits
  const std::vector<const void*>& in() const { return in_; }
  void* workspace() const { return workspace_->data(); }
  cudaStream_t stream() const { return stream_; }
  double worst_y = 0.0, worst_state = 0.0;

 private:
  Node node_;
  std::vector<PluginTensorDesc> descs_;
  std::vector<std::vector<char>> host_;
  std::vector<Buffer> inputs_, outputs_;
  std::vector<const void*> in_;
  std::vector<void*> out_;
  std::unique_ptr<Buffer> workspace_;
  size_t bytes_ = 0;
  cudaStream_t stream_ = nullptr;
};

std::vector<int32_t> tactics_of(IPluginV3* plugin) {
  const int32_t count = build_of(plugin)->getNbTactics();
  std::vector<int32_t> tactics(static_cast<size_t>(count));
  if (count) check(build_of(plugin)->getValidTactics(tactics.data(), count) == 0, "tactics");
  tactics.insert(tactics.begin(), 0);
  return tactics;
}

cudaGraphExec_t instantiate(cudaStream_t stream) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphInstantiate(&executable, graph, 0));
  cudaGraphDestroy(graph);
  return executable;
}

using Outputs = std::vector<std::vector<char>>;
constexpr int kSteps = 6;

// Tokens that go on from each other in place, captured and replayed; an enqueue must allocate nothing.
void walk_in_place(Run* run, IPluginV3* plugin, const Outputs& wanted, const std::string& what) {
  const std::vector<const void*> in = run->in_place();
  bool good = run->shape(plugin);
  CUDA(cudaStreamBeginCapture(run->stream(), cudaStreamCaptureModeGlobal));
  run->reset_presents();
  const long before = g_news;
  for (int i = 0; i < kSteps; i++) good = run->enqueue(plugin, in, run->workspace()) && good;
  const long allocated = g_news - before;
  const cudaGraphExec_t executable = instantiate(run->stream());
  check(good, what + " is captured");
  check(allocated == 0, what + ": enqueue allocated " + std::to_string(allocated) + " times");
  for (int replay = 0; replay < 3; replay++) {
    CUDA(cudaGraphLaunch(executable, run->stream()));
    CUDA(cudaStreamSynchronize(run->stream()));
    run->compare(wanted, what + " in place, replay " + std::to_string(replay));
  }
  cudaGraphExecDestroy(executable);
}

void walk_node(const Library& library, const Node& node) {
  Run run(node);
  std::unique_ptr<IPluginV3> plugin = node.make_plugin(library);
  if (!check(plugin != nullptr, node.text() + " create")) return;
  run.configure(plugin.get());
  const std::vector<int32_t> tactics = tactics_of(plugin.get());
  const bool fused = std::find(tactics.begin(), tactics.end(), 3) != tactics.end();
  check(fused == (node.m.fused && node.batch == 1), node.text() + (fused ? " offers" : " lacks") + " the fused kernel");
  const Outputs wanted = run.expected(1), after = run.expected(kSteps);
  for (const int32_t tactic : tactics) {
    const std::string what = node.text() + " tactic " + std::to_string(tactic);
    check(runtime_of(plugin.get())->setTactic(tactic) == 0 && run.once(plugin.get()), what + " runs");
    run.compare(wanted, what);
    const Outputs bytes = run.bytes();
    std::unique_ptr<IPluginV3> clone(plugin->clone());
    const PluginFieldCollection* fields = runtime_of(plugin.get())->getFieldsToSerialize();
    IPluginCreatorV3One* creator = library.find("MambaDecodeStack");
    std::unique_ptr<IPluginV3> loaded(creator->createPlugin("layer.7", fields, TensorRTPhase::kRUNTIME));
    std::unique_ptr<IPluginV3> restored(runtime_of(loaded.get())->attachToContext(nullptr));
    runtime_of(restored.get())->setTactic(tactic);
    check(run.once(plugin.get()) && bytes == run.bytes(), what + " gives the same bits again");
    check(run.once(clone.get()) && bytes == run.bytes(), what + " cloned");
    check(run.once(restored.get()) && bytes == run.bytes(), what + " restored");
    walk_in_place(&run, restored.get(), after, what);
  }
  check(run.guard_intact(), node.text() + " writes past its workspace");
  g_log.clear();
  check(!run.enqueue(plugin.get(), run.in(), nullptr), node.text() + " runs without a workspace");
  check_message({"MambaDecodeStack", "layer.7", "workspace", "null"}, node.text() + " null workspace");
  std::vector<const void*> in = run.in();
  in[in.size() - 1] = nullptr;
  check(!run.enqueue(plugin.get(), in, run.workspace()), node.text() + " runs without its last input");
  check_message({"MambaDecodeStack", "layer.7", "out_proj", "buffer"}, node.text() + " null input");
  std::printf("  %-60s %2zu tactics, y %.1e, state %.1e\n", node.text().c_str(), tactics.size(), run.worst_y,
              run.worst_state);
}

}  // namespace

void walk_stacks(const Library& library, bool quick) {
  std::vector<Model> models = {
      {"64", 2, 64, 192, 64, 4, 10, 1, 1, 297, 300, true, true, true},
      {"narrow residual", 3, 128, 256, 16, 3, 8, 1, 1, 300, 300, true, false, false},
      {"odd", 2, 36, 52, 5, 5, 3, 1, 1, 61, 64, false, true, true},  // the chain alone
      {"mamba2 groups", 2, 256, 512, 64, 4, 0, 16, 4, 300, 300, true, true, false},
      {"mamba2 odd", 2, 36, 52, 20, 5, 0, 4, 1, 61, 64, false, true, true},
      {"int8", 2, 128, 256, 16, 4, 8, 1, 1, 300, 300, true, true, false, 8},
      {"int4 in 64", 2, 256, 512, 16, 4, 16, 1, 1, 300, 300, true, true, true, 4, 64},
      {"mamba2 int4 in 128, int8", 3, 256, 512, 64, 4, 0, 16, 4, 300, 300, true, true, true, 4, 128, true}};
  if (!quick) {
    models.push_back({"768", 2, 768, 1536, 16, 4, 48, 1, 1, 997, 1000, true, true, true});
    models.push_back({"mamba2 384", 3, 384, 768, 128, 4, 0, 12, 1, 300, 300, true, true, true});
  }
  for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    for (const Model& model : models) {
      if (model.bits && type == DataType::kFLOAT) continue;  // there are none
      walk_node(library, {model, type, 1});
      if (model.d_model < 300) walk_node(library, {model, type, 3});
    }
  }
}

void time_stack(const Library& library) {
  const Model model = {"768x24", 24, 768, 1536, 16, 4, 48, 1, 1, 50280, 50280, true, true, true};
  const Node node{model, DataType::kHALF, 1};
  Run run(node);
  std::unique_ptr<IPluginV3> plugin = node.make_plugin(library);
  run.configure(plugin.get());
  const std::vector<const void*> in = run.in_place();
  for (const int32_t tactic : tactics_of(plugin.get())) {
    constexpr int kReplays = 200;
    runtime_of(plugin.get())->setTactic(tactic);
    check(run.once(plugin.get()), node.text());
    CUDA(cudaStreamBeginCapture(run.stream(), cudaStreamCaptureModeGlobal));
    run.enqueue(plugin.get(), in, run.workspace());
    const cudaGraphExec_t executable = instantiate(run.stream());
    cudaEvent_t from, to;
    CUDA(cudaEventCreate(&from));
    CUDA(cudaEventCreate(&to));
    float best = HUGE_VALF;
    for (int round = 0; round < 5; round++) {
      float elapsed = 0.0F;
      CUDA(cudaEventRecord(from, run.stream()));
      for (int i = 0; i < kReplays; i++) CUDA(cudaGraphLaunch(executable, run.stream()));
      CUDA(cudaEventRecord(to, run.stream()));
      CUDA(cudaEventSynchronize(to));
      CUDA(cudaEventElapsedTime(&elapsed, from, to));
      best = std::min(best, elapsed / kReplays);
    }
    const std::string text = node.text();
    std::printf("  time of %s, tactic %d, as a graph: %.3f ms a token\n", text.c_str(), tactic, static_cast<double>(best));
    cudaEventDestroy(from), cudaEventDestroy(to), cudaGraphExecDestroy(executable);
  }
}

}  // namespace plugin_tests
