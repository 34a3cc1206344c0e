// What an enqueue costs over the bare kernel call with the same buffers: processor time of the call, and time on the
// GPU of calls back to back, in a stream and in a CUDA graph. One line of JSON an op.
//
//   plugin_gpu_overhead libmamba_plugins.so
#include <algorithm>
#include <chrono>
#include <functional>

#include "mamba/causal_conv1d.h"
#include "mamba/selective_scan.h"
#include "mamba/selective_state_update.h"
#include "mamba/ssd_scan.h"
#include "mamba/ssd_state_update.h"
#include "problem.h"

using namespace plugin_tests;

namespace {

constexpr int kCalls = 200, kRounds = 101;  // a burst fits the queue of a stream: no call waits for the GPU

struct Timing {
  double call_us, stream_us, graph_us;
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

Timing measure(cudaStream_t stream, const std::function<bool()>& call) {
  cudaEvent_t start, stop;
  CUDA(cudaEventCreate(&start));
  CUDA(cudaEventCreate(&stop));
  std::vector<double> called, ran, replayed;
  const auto elapsed = [&](std::vector<double>* into) {
    float ms = 0.0F;
    CUDA(cudaEventRecord(stop, stream));
    CUDA(cudaEventSynchronize(stop));
    CUDA(cudaEventElapsedTime(&ms, start, stop));
    into->push_back(1e3 * ms / kCalls);
  };
  for (int round = 0; round < kRounds; round++) {
    CUDA(cudaEventRecord(start, stream));
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; i++)
      if (!call()) std::exit(3);
    called.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count() / kCalls);
    elapsed(&ran);
  }
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < kCalls; i++)
    if (!call()) std::exit(3);
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphInstantiate(&executable, graph, 0));
  for (int round = 0; round < kRounds; round++) {
    CUDA(cudaEventRecord(start, stream));
    CUDA(cudaGraphLaunch(executable, stream));
    elapsed(&replayed);
  }
  CUDA(cudaGraphExecDestroy(executable));
  CUDA(cudaGraphDestroy(graph));
  return {median(called), median(ran), median(replayed)};
}

using Buffers = std::vector<const void*>;
using Bare = std::function<int(const Buffers& in, void* y, void* state, void* workspace, size_t size, cudaStream_t)>;

const float* floats(const void* data) { return static_cast<const float*>(data); }

template <typename Params>
void bind(Params* p, const Buffers& in, void* y) {
  p->A = floats(in[2]), p->B = in[3], p->C = in[4], p->D = floats(in[5]), p->z = in[8], p->y = y, p->tactic = -1;
}

// The calls a program without plugins would make, all shapes known.
Bare bare_call(const Case& c) {
  const Sizes& s = c.sizes;
  const int32_t dtype = c.type == DataType::kFLOAT ? MAMBA_F32 : c.type == DataType::kHALF ? MAMBA_F16 : MAMBA_BF16;
  const auto batch = static_cast<int32_t>(s.batch), length = static_cast<int32_t>(s.length);
  const auto width = static_cast<int32_t>(s.width), headdim = static_cast<int32_t>(s.headdim);
  const auto groups = static_cast<int32_t>(s.groups), state = static_cast<int32_t>(s.state);
  const int64_t inner = s.width * s.headdim, bc = s.groups * s.state;
  switch (c.op) {
    case Op::kConv: {
      mamba_causal_conv1d_params p{};
      p.dtype = p.weight_dtype = dtype, p.batch = batch, p.seqlen = length, p.channels = width, p.width = state;
      p.activation = 1, p.tactic = -1, p.x_token_stride = p.y_token_stride = inner;
      p.x_batch_stride = p.y_batch_stride = s.length * inner;
      return [=](const Buffers& in, void* y, void* next, void*, size_t, cudaStream_t stream) mutable {
        p.x = in[0], p.weight = in[1], p.bias = in[2], p.state_in = in[3], p.y = y, p.state_out = next;
        return mamba_causal_conv1d(&p, stream);
      };
    }
    case Op::kScan: {
      mamba_selective_scan_params p{};
      p.dtype = dtype, p.batch = batch, p.seqlen = length, p.dim = width, p.ngroups = groups, p.d_state = state;
      p.delta_softplus = 1;
      p.u_token_stride = p.delta_token_stride = p.z_token_stride = p.y_token_stride = inner;
      p.u_batch_stride = p.delta_batch_stride = p.z_batch_stride = p.y_batch_stride = s.length * inner;
      p.B_token_stride = p.C_token_stride = bc, p.B_batch_stride = p.C_batch_stride = s.length * bc;
      return [=](const Buffers& in, void* y, void* next, void* workspace, size_t size, cudaStream_t stream) mutable {
        bind(&p, in, y);
        p.u = in[0], p.delta = in[1], p.delta_bias = floats(in[6]), p.initial_state = floats(in[7]);
        p.final_state = static_cast<float*>(next), p.workspace = workspace, p.workspace_size = size;
        return mamba_selective_scan(&p, stream);
      };
    }
    case Op::kScanStep: {
      mamba_selective_state_update_params p{};
      p.dtype = dtype, p.state_dtype = MAMBA_F32, p.batch = batch, p.dim = width, p.ngroups = groups, p.d_state = state;
      p.delta_softplus = 1, p.u_batch_stride = p.delta_batch_stride = p.z_batch_stride = p.y_batch_stride = inner;
      p.B_batch_stride = p.C_batch_stride = bc;
      return [=](const Buffers& in, void* y, void* next, void*, size_t, cudaStream_t stream) mutable {
        bind(&p, in, y);
        p.u = in[0], p.delta = in[1], p.delta_bias = floats(in[6]), p.state_in = in[7], p.state_out = next;
        return mamba_selective_state_update(&p, stream);
      };
    }
    case Op::kSsd: {
      mamba_ssd_scan_params p{};
      p.dtype = dtype, p.batch = batch, p.seqlen = length, p.nheads = width, p.headdim = headdim, p.ngroups = groups;
      p.d_state = state, p.dt_softplus = 1, p.dt_max = 3.4e38F;
      p.x_token_stride = p.z_token_stride = p.y_token_stride = inner, p.dt_token_stride = s.width;
      p.x_batch_stride = p.z_batch_stride = p.y_batch_stride = s.length * inner, p.dt_batch_stride = s.length * s.width;
      p.B_token_stride = p.C_token_stride = bc, p.B_batch_stride = p.C_batch_stride = s.length * bc;
      return [=](const Buffers& in, void* y, void* next, void* workspace, size_t size, cudaStream_t stream) mutable {
        bind(&p, in, y);
        p.x = in[0], p.dt = in[1], p.dt_bias = floats(in[6]), p.initial_state = floats(in[7]);
        p.final_state = static_cast<float*>(next), p.workspace = workspace, p.workspace_size = size;
        return mamba_ssd_scan(&p, stream);
      };
    }
    default: {
      mamba_ssd_state_update_params p{};
      p.dtype = dtype, p.state_dtype = MAMBA_F32, p.batch = batch, p.nheads = width, p.headdim = headdim;
      p.ngroups = groups, p.d_state = state, p.dt_softplus = 1, p.dt_max = 3.4e38F;
      p.x_batch_stride = p.z_batch_stride = p.y_batch_stride = inner, p.dt_batch_stride = s.width;
      p.B_batch_stride = p.C_batch_stride = bc;
      return [=](const Buffers& in, void* y, void* next, void*, size_t, cudaStream_t stream) mutable {
        bind(&p, in, y);
        p.x = in[0], p.dt = in[1], p.dt_bias = floats(in[6]), p.state_in = in[7], p.state_out = next;
        return mamba_ssd_state_update(&p, stream);
      };
    }
  }
}

void compare(const Library& library, const Case& c) {
  const Problem problem = make_problem(c, 1);
  std::vector<Buffer> buffers;
  Buffers in;
  for (const Value& value : problem.inputs) {
    const std::vector<char> bytes = encode(value.values, value.type);
    buffers.emplace_back(bytes.size());
    buffers.back().upload(bytes.data());
    in.push_back(buffers.back().data());
  }
  Buffer y(buffers[0].bytes()), state(buffers[problem.state_input].bytes()), workspace(256 << 20);
  void* out[2] = {y.data(), state.data()};
  cudaStream_t stream;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  std::unique_ptr<IPluginV3> plugin = make(library.find(problem.op_name), problem.fields());
  const auto descs = problem.descs();
  const auto count = problem.inputs_count();
  IPluginV3OneRuntime* runtime = runtime_of(plugin.get());
  if (!check(runtime->onShapeChange(descs.data(), count, descs.data() + count, 2) == 0, describe(c) + " shape")) return;
  const Bare bare = bare_call(c);
  const auto plugin_call = [&] {
    return runtime->enqueue(descs.data(), descs.data() + count, in.data(), out, workspace.data(), stream) == 0;
  };
  const auto bare_kernel = [&] { return bare(in, y.data(), state.data(), workspace.data(), workspace.bytes(), stream) == MAMBA_OK; };
  measure(stream, bare_kernel);  // warms the GPU up
  const Timing kernel = measure(stream, bare_kernel), enqueue = measure(stream, plugin_call);
  const Timing again = measure(stream, bare_kernel);
  std::printf("{\"case\": \"%s\", \"bare\": [%.3f, %.3f, %.3f], \"enqueue\": [%.3f, %.3f, %.3f], \"bare_again\": [%.3f, %.3f, %.3f]}\n",
              describe(c).c_str(), kernel.call_us, kernel.stream_us, kernel.graph_us, enqueue.call_us, enqueue.stream_us,
              enqueue.graph_us, again.call_us, again.stream_us, again.graph_us);
  CUDA(cudaStreamDestroy(stream));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: plugin_gpu_overhead libmamba_plugins.so\n"), 2;
  const Library library(argv[1]);
  Options gate;
  gate.gate = true;
  constexpr DataType kType = DataType::kBF16;
  compare(library, {Op::kConv, {1, 1, 1536, 1, 1, 4}, Options{}, kType});
  compare(library, {Op::kScanStep, {1, 1, 1536, 1, 1, 16}, gate, kType});
  compare(library, {Op::kSsdStep, {1, 1, 24, 64, 1, 128}, gate, kType});
  compare(library, {Op::kConv, {1, 2048, 1536, 1, 1, 4}, Options{}, kType});
  compare(library, {Op::kScan, {1, 2048, 1536, 1, 1, 16}, gate, kType});
  compare(library, {Op::kSsd, {1, 2048, 24, 64, 1, 128}, gate, kType});
  return g_failures ? 1 : 0;
}
