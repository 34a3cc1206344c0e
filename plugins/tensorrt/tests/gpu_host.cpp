// Runs every op of the plugin library on a GPU as TensorRT would, with real buffers, against a reference in double:
// all types, tactics, ragged rows with poisoned padding, pieces of a sequence, changing shapes within a profile,
// clones and engines restored from their fields, 1,000 enqueues in a CUDA graph, and what must be refused.
//
//   plugin_gpu_host libmamba_plugins.so [--quick] [--stack]
//                        --quick: small shapes alone, for compute-sanitizer; --stack: MambaDecodeStack alone
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "gpu_stack.h"
#include "problem.h"

extern std::atomic<long> g_news;  // count_news.cpp

using namespace plugin_tests;

namespace {

constexpr size_t kGuard = 4096;

// The device side of a problem: inputs uploaded, outputs poisoned, and a workspace with a guard behind it.
class Run {
 public:
  explicit Run(const Problem& problem) : problem_(problem) {
    for (const Value& value : problem.inputs) {
      const std::vector<char> bytes = encode(value.values, value.type);
      inputs_.emplace_back(bytes.size());
      inputs_.back().upload(bytes.data());
    }
    outputs_.emplace_back(inputs_[0].bytes());
    outputs_.emplace_back(inputs_[problem.state_input].bytes());
    CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~Run() { cudaStreamDestroy(stream_); }

  // The workspace TensorRT would set aside for the profile; bytes behind it must stay as they are.
  void set_workspace(size_t bytes) {
    workspace_ = std::make_unique<Buffer>(bytes + kGuard);
    CUDA(cudaMemset(workspace_->data(), 0xa5, workspace_->bytes()));
    workspace_bytes_ = bytes;
  }
  bool guard_intact() const {
    const std::vector<char> bytes = workspace_->download();
    for (size_t i = workspace_bytes_; i < bytes.size(); i++)
      if (static_cast<unsigned char>(bytes[i]) != 0xa5) return false;
    return true;
  }

  // Enqueues `length` tokens from token `from` (rows must be one, or length whole).
  int32_t enqueue(IPluginV3* plugin, int64_t from, int64_t length, const void* state_in, void* state_out) {
    const auto descs = problem_.descs(length);
    const auto count = problem_.inputs_count();
    const void* in[12];
    for (int32_t i = 0; i < count; i++) {
      const Value& value = problem_.inputs[static_cast<size_t>(i)];
      const size_t token = value.over_time ? inputs_[static_cast<size_t>(i)].bytes() / static_cast<size_t>(problem_.c.sizes.batch * problem_.c.sizes.length) : 0;
      in[i] = inputs_[static_cast<size_t>(i)].data() + token * static_cast<size_t>(from);
    }
    in[problem_.state_input] = state_in;
    const size_t token = outputs_[0].bytes() / static_cast<size_t>(problem_.c.sizes.batch * problem_.c.sizes.length);
    void* out[2] = {outputs_[0].data() + token * static_cast<size_t>(from), state_out};
    void* workspace = workspace_ ? workspace_->data() : nullptr;
    return runtime_of(plugin)->enqueue(descs.data(), descs.data() + count, in, out, workspace, stream_);
  }
  bool shape(IPluginV3* plugin, int64_t length) {
    const auto descs = problem_.descs(length);
    const auto count = problem_.inputs_count();
    return runtime_of(plugin)->onShapeChange(descs.data(), count, descs.data() + count, 2) == 0;
  }

  bool whole(IPluginV3* plugin) {
    outputs_[0].poison(), outputs_[1].poison();
    const int64_t length = problem_.c.sizes.length;
    CUDA(cudaDeviceSynchronize());  // the stream does not wait for the default one
    const bool done = shape(plugin, length) && enqueue(plugin, 0, length, state_in(), state_out()) == 0;
    CUDA(cudaStreamSynchronize(stream_));
    return done;
  }

  const void* state_in() const { return inputs_[problem_.state_input].data(); }
  void* state_out() const { return outputs_[1].data(); }
  size_t state_bytes() const { return outputs_[1].bytes(); }
  cudaStream_t stream() const { return stream_; }
  std::vector<char> bytes(size_t output) const { return outputs_[output].download(); }
  Buffer& input(size_t index) { return inputs_[index]; }
  Buffer& output(size_t index) { return outputs_[index]; }

  void compare(const std::string& what) {
    const Case& c = problem_.c;
    const double y = error(decode(bytes(0), c.type), problem_.expected.y);
    const double h = error(decode(bytes(1), problem_.inputs[problem_.state_input].type), problem_.expected.state);
    worst_y = std::max(worst_y, y), worst_state = std::max(worst_state, h);
    check(y < tolerance(c, false), what + " y is off by " + std::to_string(y));
    check(h < tolerance(c, true), what + " state is off by " + std::to_string(h));
  }
  double worst_y = 0.0, worst_state = 0.0;

 private:
  const Problem& problem_;
  std::vector<Buffer> inputs_, outputs_;
  std::unique_ptr<Buffer> workspace_;
  size_t workspace_bytes_ = 0;
  cudaStream_t stream_ = nullptr;
};

// A plugin as the builder has it at the end: configured for lengths from 1 to the problem's.
std::unique_ptr<IPluginV3> build(const Library& library, const Problem& problem, Run* run) {
  std::unique_ptr<IPluginV3> plugin = make(library.find(problem.op_name), problem.fields());
  if (!check(plugin != nullptr, describe(problem.c) + " create")) return nullptr;
  std::vector<DynamicPluginTensorDesc> profile;
  const auto most = problem.descs(), least = problem.descs(1);
  for (size_t i = 0; i < most.size(); i++) {
    DynamicPluginTensorDesc desc{};
    desc.desc = most[i], desc.min = least[i].dims, desc.opt = desc.max = most[i].dims;
    if (std::memcmp(&desc.min, &desc.max, sizeof(Dims)) != 0) desc.desc.dims.d[1] = -1;
    profile.push_back(desc);
  }
  const auto count = problem.inputs_count();
  IPluginV3OneBuild* half = build_of(plugin.get());
  check(half->configurePlugin(profile.data(), count, profile.data() + count, 2) == 0, describe(problem.c) + " configure");
  run->set_workspace(half->getWorkspaceSize(profile.data(), count, profile.data() + count, 2));
  return plugin;
}

// Serialized and restored, as in an engine that another process loads.
std::unique_ptr<IPluginV3> restored(const Library& library, const Problem& problem, IPluginV3* plugin) {
  const PluginFieldCollection* fields = runtime_of(plugin)->getFieldsToSerialize();
  std::unique_ptr<IPluginV3> loaded(library.find(problem.op_name)->createPlugin("layer.7", fields, TensorRTPhase::kRUNTIME));
  return loaded ? std::unique_ptr<IPluginV3>(runtime_of(loaded.get())->attachToContext(nullptr)) : nullptr;
}

std::vector<int32_t> tactics_of(IPluginV3* plugin) {
  IPluginV3OneBuild* half = build_of(plugin);
  std::vector<int32_t> tactics(static_cast<size_t>(half->getNbTactics()));
  if (!tactics.empty()) check(half->getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size())) == 0, "tactics");
  tactics.insert(tactics.begin(), 0);
  return tactics;
}

void walk_whole(const Library& library, const Problem& problem) {
  const std::string name = describe(problem.c);
  Run run(problem);
  std::unique_ptr<IPluginV3> plugin = build(library, problem, &run);
  if (!plugin) return;
  const std::vector<int32_t> tactics = tactics_of(plugin.get());
  for (const int32_t tactic : tactics) {
    const std::string what = name + " tactic " + std::to_string(tactic);
    check(runtime_of(plugin.get())->setTactic(tactic) == 0 && run.whole(plugin.get()), what + " runs");
    run.compare(what);
    const std::vector<char> y = run.bytes(0), state = run.bytes(1);
    check(run.whole(plugin.get()) && y == run.bytes(0) && state == run.bytes(1), what + " gives the same bits again");
    std::unique_ptr<IPluginV3> clone(plugin->clone()), loaded = restored(library, problem, plugin.get());
    runtime_of(loaded.get())->setTactic(tactic);
    check(run.whole(clone.get()) && y == run.bytes(0) && state == run.bytes(1), what + " cloned");
    check(run.whole(loaded.get()) && y == run.bytes(0) && state == run.bytes(1), what + " restored");
  }
  check(run.guard_intact(), name + " writes past its workspace");
  std::printf("  %-60s %2zu tactics, y %.1e, state %.1e\n", name.c_str(), tactics.size(), run.worst_y, run.worst_state);
}

// One row in pieces, each at a shape of its own within the profile, the state read and written in one buffer.
void walk_pieces(const Library& library, const Problem& problem) {
  const std::string name = describe(problem.c) + " in pieces";
  Run run(problem);
  std::unique_ptr<IPluginV3> builder = build(library, problem, &run);
  std::unique_ptr<IPluginV3> plugin = restored(library, problem, builder.get());
  run.output(0).poison();
  CUDA(cudaMemcpy(run.state_out(), run.state_in(), run.state_bytes(), cudaMemcpyDeviceToDevice));
  CUDA(cudaDeviceSynchronize());
  const int64_t length = problem.c.sizes.length;
  int64_t from = 0;
  for (const int64_t piece : {int64_t{1}, length / 2, int64_t{17}, int64_t{2}, length}) {
    const int64_t take = std::min(piece, length - from);
    if (take <= 0) continue;
    check(run.shape(plugin.get(), take) && run.enqueue(plugin.get(), from, take, run.state_out(), run.state_out()) == 0,
          name + " of " + std::to_string(take));
    from += take;
  }
  CUDA(cudaStreamSynchronize(run.stream()));
  run.compare(name);
  check(run.guard_intact(), name + " writes past its workspace");
}

// 1,000 enqueues, each going on from the one before, captured and replayed. Capture refuses what allocates or waits.
void walk_graph(const Library& library, Case c, int64_t tokens) {
  constexpr int kEnqueues = 1000;
  c.sizes.batch = 1, c.sizes.length = kEnqueues * tokens;
  const Case whole_case = c;
  Case scan = c;  // the steps' reference is their scan's
  if (is_step(c.op)) scan.op = is_ssd(c.op) ? Op::kSsd : Op::kScan;
  Problem problem = make_problem(scan, 99);
  problem.c.op = c.op;
  Problem node = problem;
  if (is_step(c.op)) node.op_name = is_ssd(c.op) ? "MambaSsdStateUpdate" : "MambaSelectiveStateUpdate";
  const std::string name = describe(whole_case) + ": 1,000 enqueues of " + std::to_string(tokens) + " in a graph";
  Run run(node);
  std::unique_ptr<IPluginV3> plugin = make(library.find(node.op_name), node.fields());
  std::vector<DynamicPluginTensorDesc> profile;
  for (const PluginTensorDesc& desc : node.descs(tokens)) {
    DynamicPluginTensorDesc fixed{};
    fixed.desc = desc, fixed.min = fixed.opt = fixed.max = desc.dims;
    profile.push_back(fixed);
  }
  const auto count = node.inputs_count();
  check(build_of(plugin.get())->configurePlugin(profile.data(), count, profile.data() + count, 2) == 0, name + " configure");
  run.set_workspace(build_of(plugin.get())->getWorkspaceSize(profile.data(), count, profile.data() + count, 2));
  check(run.shape(plugin.get(), tokens), name + " shape");
  check(run.enqueue(plugin.get(), 0, tokens, run.state_in(), run.state_out()) == 0, name + " warm-up");
  CUDA(cudaStreamSynchronize(run.stream()));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CUDA(cudaStreamBeginCapture(run.stream(), cudaStreamCaptureModeGlobal));
  CUDA(cudaMemcpyAsync(run.state_out(), run.state_in(), run.state_bytes(), cudaMemcpyDeviceToDevice, run.stream()));
  bool good = true;
  const auto descs = node.descs(tokens);
  const long before = g_news;
  long described = 0;
  for (int i = 0; i < kEnqueues; i++) {
    const long at = g_news;
    (void)node.descs(tokens);  // what this test itself allocates for a call
    described += g_news - at;
    good = run.enqueue(plugin.get(), i * tokens, tokens, run.state_out(), run.state_out()) == 0 && good;
  }
  const long allocated = g_news - before - 2 * described;
  CUDA(cudaStreamEndCapture(run.stream(), &graph));
  check(good, name + " enqueues");
  check(allocated == 0, name + ": enqueue allocated " + std::to_string(allocated) + " times");
  CUDA(cudaGraphInstantiate(&executable, graph, 0));
  for (int replay = 0; replay < 3; replay++) {
    run.output(0).poison(), run.output(1).poison();
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaGraphLaunch(executable, run.stream()));
    CUDA(cudaStreamSynchronize(run.stream()));
    run.compare(name);
  }
  check(run.guard_intact(), name + " writes past its workspace");
  cudaGraphExecDestroy(executable), cudaGraphDestroy(graph);
  std::printf("  %-60s y %.1e, state %.1e\n", name.c_str(), run.worst_y, run.worst_state);
}

// A graph of one enqueue replayed over other inputs: nothing of an earlier replay may be left in the workspace.
void walk_replays(const Library& library, const Problem& first, const Problem& second) {
  const std::string name = describe(first.c) + " replayed over other inputs";
  Run run(first);
  std::unique_ptr<IPluginV3> plugin = build(library, first, &run);
  std::vector<std::vector<char>> encoded[2];
  for (size_t i = 0; i < first.inputs.size(); i++) {
    encoded[0].push_back(encode(first.inputs[i].values, first.inputs[i].type));
    encoded[1].push_back(encode(second.inputs[i].values, first.inputs[i].type));
  }
  for (const int32_t tactic : tactics_of(plugin.get())) {
    runtime_of(plugin.get())->setTactic(tactic);
    std::vector<char> expected[2];
    const auto upload = [&](int which) {
      for (size_t i = 0; i < first.inputs.size(); i++) run.input(i).upload(encoded[which][i].data());
    };
    for (int which = 0; which < 2; which++) upload(which), run.whole(plugin.get()), expected[which] = run.bytes(0);
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CUDA(cudaStreamBeginCapture(run.stream(), cudaStreamCaptureModeGlobal));
    check(run.enqueue(plugin.get(), 0, first.c.sizes.length, run.state_in(), run.state_out()) == 0, name);
    CUDA(cudaStreamEndCapture(run.stream(), &graph));
    CUDA(cudaGraphInstantiate(&executable, graph, 0));
    int wrong = 0;
    for (int replay = 0; replay < 10; replay++) {
      upload(replay % 2);
      run.output(0).poison();
      CUDA(cudaDeviceSynchronize());
      CUDA(cudaGraphLaunch(executable, run.stream()));
      CUDA(cudaStreamSynchronize(run.stream()));
      wrong += run.bytes(0) != expected[replay % 2];
    }
    check(wrong == 0, name + " tactic " + std::to_string(tactic) + ": " + std::to_string(wrong) + " of 10 differ");
    cudaGraphExecDestroy(executable), cudaGraphDestroy(graph);
  }
}

// A shape whose kernels need scratch memory, without any; an input without a buffer.
void walk_refusals(const Library& library, const Problem& problem, bool needs_workspace) {
  const std::string name = describe(problem.c);
  Run run(problem);
  std::unique_ptr<IPluginV3> plugin = build(library, problem, &run);
  const auto descs = problem.descs();
  const auto count = problem.inputs_count();
  check(run.shape(plugin.get(), 0), name + " shape");
  std::vector<const void*> in;
  for (size_t i = 0; i < problem.inputs.size(); i++) in.push_back(run.input(i).data());
  void* out[2] = {run.output(0).data(), run.output(1).data()};
  IPluginV3OneRuntime* runtime = runtime_of(plugin.get());
  g_log.clear();
  const bool refused = runtime->enqueue(descs.data(), descs.data() + count, in.data(), out, nullptr, run.stream()) != 0;
  check(refused || !needs_workspace, name + " runs without a workspace");
  if (refused) check_message({problem.op_name, "layer.7", "workspace", "null"}, name + " null workspace");
  in[0] = nullptr;
  Buffer workspace(64 << 20);
  check(runtime->enqueue(descs.data(), descs.data() + count, in.data(), out, workspace.data(), run.stream()) != 0,
        name + " runs without its first input");
  check_message({problem.op_name, "layer.7", "input", "buffer"}, name + " null input");
  CUDA(cudaStreamSynchronize(run.stream()));
}

constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};

Options with(bool gate, bool reverse = false, bool per_channel = false) {
  Options options;
  options.gate = gate, options.reverse = reverse, options.skip_per_channel = per_channel;
  return options;
}

Case ragged(Case c) {
  const auto length = static_cast<int32_t>(c.sizes.length);
  c.sizes.batch = 5, c.options.ragged = true;
  c.lens = {length, 1, length / 2, 0, length - 1};
  return c;
}

void walk_type(const Library& library, DataType type, bool quick) {
  std::vector<Case> prefills = {
      {Op::kConv, {2, 45, 40, 1, 1, 4}, with(false), type},
      {Op::kScan, {2, 45, 40, 1, 2, 16}, with(true), type},
      {Op::kScan, {1, 33, 24, 1, 1, 21}, with(false, true), type},
      {Op::kSsd, {2, 45, 4, 16, 2, 32}, with(true, false, true), type},
      {Op::kSsd, {1, 130, 3, 64, 1, 128}, with(false), type},
  };
  prefills[4].options.dt_min = 0.001, prefills[4].options.dt_max = 0.1;
  std::vector<Case> large = {
      {Op::kConv, {2, 1025, 1536, 1, 1, 4}, with(false), type},
      {Op::kScan, {1, 2048, 1536, 1, 1, 16}, with(true), type},
      {Op::kScan, {8, 515, 256, 1, 4, 16}, with(true), type},
      {Op::kSsd, {1, 2048, 8, 64, 1, 128}, with(true), type},
      {Op::kSsd, {9, 130, 64, 64, 2, 128}, with(false), type},
  };
  std::vector<Case> steps;
  for (const DataType state : kTypes) {
    steps.push_back({Op::kScanStep, {3, 1, 40, 1, 2, 16}, with(true), type, state});
    steps.push_back({Op::kSsdStep, {3, 1, 4, 16, 2, 32}, with(false, false, true), type, state});
    steps.push_back({Op::kSsdStep, {1, 1, 24, 64, 1, 128}, with(true), type, state});
    if (!quick) steps.push_back({Op::kScanStep, {65, 1, 1536, 1, 1, 16}, with(false), type, state});
  }
  std::vector<Case> whole = prefills;
  whole.insert(whole.end(), steps.begin(), steps.end());
  if (!quick) whole.insert(whole.end(), large.begin(), large.end());
  for (Case& c : whole)
    if (c.op == Op::kConv) c.state_type = type;
  for (const Case& c : whole) walk_whole(library, make_problem(c, 1));
  std::vector<Case> sequences = prefills;
  if (!quick) sequences.insert(sequences.end(), large.begin(), large.end());
  for (Case c : sequences) {
    walk_whole(library, make_problem(ragged(c), 2));
    c.sizes.batch = 1;
    if (!c.options.reverse) walk_pieces(library, make_problem(c, 3));
    if (!quick && c.sizes.length > 100) walk_replays(library, make_problem(c, 4), make_problem(c, 5));
  }
  if (!quick) walk_replays(library, make_problem(large[4], 4), make_problem(large[4], 5));
  const Options gated = with(true);
  walk_graph(library, {Op::kConv, {1, 1, 256, 1, 1, 4}, with(false), type}, 1);
  walk_graph(library, {Op::kScanStep, {1, 1, 64, 1, 1, 16}, gated, type}, 1);
  walk_graph(library, {Op::kSsdStep, {1, 1, 2, 64, 1, 64}, gated, type}, 1);
  if (!quick) {
    walk_graph(library, {Op::kConv, {1, 1, 256, 1, 1, 4}, with(false), type}, 37);
    walk_graph(library, {Op::kScan, {1, 1, 64, 1, 1, 16}, gated, type}, 37);
    walk_graph(library, {Op::kSsd, {1, 1, 2, 64, 1, 64}, gated, type}, 70);
  }
}

bool has(int argc, char** argv, const char* option) {
  return std::any_of(argv + 2, argv + argc, [&](const char* given) { return std::string(given) == option; });
}

void walk_operators(const Library& library, bool quick) {
  for (const DataType type : kTypes) walk_type(library, type, quick);
  walk_refusals(library, make_problem({Op::kSsd, {1, 2048, 8, 64, 1, 128}, with(true), DataType::kHALF}, 6), true);
  walk_refusals(library, make_problem({Op::kScan, {1, 8192, 64, 1, 1, 16}, with(true), DataType::kHALF}, 7), false);
  walk_refusals(library, make_problem({Op::kConv, {1, 64, 64, 1, 1, 4}, with(false), DataType::kHALF}, 8), false);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: plugin_gpu_host libmamba_plugins.so [--quick] [--stack]\n"), 2;
  const bool quick = has(argc, argv, "--quick");
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) return std::fprintf(stderr, "there is no NVIDIA GPU here\n"), 2;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const Library library(argv[1]);
  if (!has(argc, argv, "--stack")) walk_operators(library, quick);
  walk_stacks(library, quick);
  if (!quick) time_stack(library);
  std::printf("%s, TensorRT %d.%d headers: ", device.name, NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR);
  return report();
}
