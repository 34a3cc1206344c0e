// Runs the CPU kernels' tasks on ONNX Runtime's own threads.
#include <atomic>
#include <new>

#include "custom_op.h"

namespace mamba::ort {

namespace {

// A thread's scratch memory, which only grows: it is reused by every task of every op.
class Scratch {
 public:
  float* of(std::size_t floats) noexcept {
    if (floats > size_) {
      release();
      memory_ = static_cast<float*>(operator new(floats * sizeof(float), kAlignment, std::nothrow));
      size_ = memory_ != nullptr ? floats : 0;
    }
    return memory_;
  }
  ~Scratch() { release(); }

 private:
  static constexpr std::align_val_t kAlignment{64};

  void release() noexcept {
    operator delete(memory_, kAlignment);
    memory_ = nullptr, size_ = 0;
  }

  float* memory_ = nullptr;
  std::size_t size_ = 0;
};

template <class Arguments>
struct Job {
  const Arguments& arguments;
  const Kernel<Arguments>& kernel;
  std::size_t floats;
  std::atomic<bool> out_of_memory{false};

  void run(std::size_t task) noexcept {
    thread_local Scratch scratch;
    float* memory = scratch.of(floats);
    if (memory == nullptr && floats != 0) {
      out_of_memory = true;
    } else {
      kernel.run(arguments, static_cast<int64_t>(task), memory);
    }
  }
};

template <class Arguments>
void run(const Context& context, const Arguments& arguments, const Kernel<Arguments>& kernel) {
  const auto tasks = static_cast<std::size_t>(kernel.tasks(arguments));
  Job<Arguments> job{arguments, kernel, kernel.scratch(arguments)};
  if (tasks == 1) {
    job.run(0);
  } else if (tasks > 1) {
    const auto call = [](void* data, std::size_t task) { static_cast<Job<Arguments>*>(data)->run(task); };
    check(context.api(), context.api().KernelContext_ParallelFor(context.get(), call, tasks, 0, &job));
  }
  if (job.out_of_memory) throw Error("out of memory");
}

}  // namespace

void compute_cpu(const Node& node, const Context& context) {
  const Kernels& k = kernels();
  if (node.op == Op::conv) {
    run(context, conv_arguments(node.attributes, context), k.conv);
    return;
  }
  const Scan scan = scan_arguments(node.op, node.attributes, context);
  const bool one_token = scan.length == 1 && scan.seq_lens == nullptr;
  run(context, scan, one_token ? k.update : k.scan);
}

}  // namespace mamba::ort
