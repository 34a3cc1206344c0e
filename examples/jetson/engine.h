// A bundle's engines in TensorRT: prompts and single tokens in, logits out, states kept in device memory.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

// Prints TensorRT's warnings and errors, and keeps the last error for our own.
class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, char const* message) noexcept override;
  std::string lastError;
};

// Device memory that frees itself.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t size);
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(DeviceMemory const&) = delete;
  DeviceMemory& operator=(DeviceMemory const&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Page-locked memory of the host.
class HostMemory {
 public:
  explicit HostMemory(size_t size);
  ~HostMemory() { cudaFreeHost(data_); }
  HostMemory(HostMemory const&) = delete;
  HostMemory& operator=(HostMemory const&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// One execution context on one profile of an engine.
class Execution {
 public:
  Execution(nvinfer1::ICudaEngine& engine, int profile, cudaStream_t stream, std::string name);

  // Longest run of tokens it takes.
  int64_t longest() const { return longest_; }
  bool has(char const* tensor) const;

  void setLength(int64_t tokens);
  void bind(std::string const& tensor, void* memory);
  void enqueue();
  nvinfer1::Dims shape(char const* tensor) const { return context_->getTensorShape(tensor); }

 private:
  nvinfer1::ICudaEngine& engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  cudaStream_t stream_;
  std::string name_;
  int64_t longest_ = 0;
  int64_t length_ = 0;
};

// A sequence that is being continued, one row.
class Model {
 public:
  // `folder` holds model.engine (profile 0: prefill, profile 1: step), or prefill.engine and step.engine.
  // `plugin` is libmamba_plugins.so; empty where the engines need none.
  Model(std::string const& folder, std::string const& plugin, bool cudaGraphs = true);
  ~Model();
  Model(Model const&) = delete;
  Model& operator=(Model const&) = delete;

  size_t vocabulary() const { return vocabulary_; }
  // Whether steps are replayed as CUDA graphs.
  bool graphed() const { return graphs_[0] != nullptr || graphs_[1] != nullptr; }

  // Both return the logits after the last token, which the next call overwrites.
  float const* prefill(std::vector<int64_t> const& ids);
  float const* step(int64_t id);

 private:
  using Engine = std::unique_ptr<nvinfer1::ICudaEngine>;

  Engine load(std::string const& path);
  void makeStates();
  void bindStates(Execution& execution);
  void runStep();
  cudaGraphExec_t captureStep();

  Logger logger_;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::vector<Engine> engines_;
  std::unique_ptr<Execution> prefill_, step_;

  // Two sets of states: a run reads one and writes the other, never the same. `turn_` is the one that holds the truth.
  std::vector<std::string> stateNames_;
  std::array<std::map<std::string, std::unique_ptr<DeviceMemory>>, 2> states_;
  size_t turn_ = 0;

  std::unique_ptr<DeviceMemory> ids_, lengths_, logits_;
  std::unique_ptr<HostMemory> hostIds_, hostLogits_;
  size_t vocabulary_ = 0;

  bool wantGraphs_;
  bool warm_ = false;  // one plain step has run, as TensorRT wants before a capture
  std::array<cudaGraphExec_t, 2> graphs_{};
};
