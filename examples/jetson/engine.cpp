#include "engine.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace {

void check(cudaError_t code, char const* what) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

size_t bytesOf(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kINT64: return 8;
    case nvinfer1::DataType::kFLOAT:
    case nvinfer1::DataType::kINT32: return 4;
    case nvinfer1::DataType::kHALF:
    case nvinfer1::DataType::kBF16: return 2;
    case nvinfer1::DataType::kINT8: return 1;
    default: throw std::runtime_error("a tensor is of a type that no bundle has");
  }
}

// Bytes of a tensor of one row, whose first dimension is the batch.
size_t rowBytes(nvinfer1::ICudaEngine const& engine, char const* name) {
  nvinfer1::Dims const shape = engine.getTensorShape(name);
  size_t size = bytesOf(engine.getTensorDataType(name));
  for (int i = 1; i < shape.nbDims; ++i) size *= static_cast<size_t>(shape.d[i]);
  return size;
}

bool exists(std::string const& path) { return access(path.c_str(), R_OK) == 0; }

// A file mapped into memory, not read: on a Jetson a copy of the weights may not fit.
class Mapped {
 public:
  explicit Mapped(std::string const& path) {
    int const file = open(path.c_str(), O_RDONLY);
    struct stat facts {};
    if (file < 0 || fstat(file, &facts) != 0) throw std::runtime_error("cannot read " + path);
    size_ = static_cast<size_t>(facts.st_size);
    data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (data_ == MAP_FAILED) throw std::runtime_error("cannot map " + path);
  }
  ~Mapped() { munmap(data_, size_); }
  Mapped(Mapped const&) = delete;
  Mapped& operator=(Mapped const&) = delete;
  void const* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace

void Logger::log(Severity severity, char const* message) noexcept {
  if (severity > Severity::kWARNING) return;
  std::fprintf(stderr, "TensorRT: %s\n", message);
  if (severity != Severity::kWARNING) lastError = message;
}

DeviceMemory::DeviceMemory(size_t size) { check(cudaMalloc(&data_, size), "device memory"); }
HostMemory::HostMemory(size_t size) { check(cudaMallocHost(&data_, size), "page-locked memory"); }

Execution::Execution(nvinfer1::ICudaEngine& engine, int profile, cudaStream_t stream, std::string name)
    : engine_(engine), stream_(stream), name_(std::move(name)) {
  // Scratch memory for this profile alone, not for the largest.
  context_.reset(engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kON_PROFILE_CHANGE));
  if (context_ == nullptr || !context_->setOptimizationProfileAsync(profile, stream)) {
    throw std::runtime_error(name_ + ": no execution context; is the GPU's memory full?");
  }
  check(cudaStreamSynchronize(stream), "a new context");
  longest_ = engine.getProfileShape("input_ids", profile, nvinfer1::OptProfileSelector::kMAX).d[1];
}

bool Execution::has(char const* tensor) const {
  return engine_.getTensorIOMode(tensor) != nvinfer1::TensorIOMode::kNONE;
}

void Execution::setLength(int64_t tokens) {
  if (tokens == length_) return;
  for (int i = 0; i < engine_.getNbIOTensors(); ++i) {
    char const* tensor = engine_.getIOTensorName(i);
    if (engine_.getTensorIOMode(tensor) != nvinfer1::TensorIOMode::kINPUT) continue;
    nvinfer1::Dims shape = engine_.getTensorShape(tensor);
    shape.d[0] = 1;
    if (std::strcmp(tensor, "input_ids") == 0) shape.d[1] = tokens;
    if (!context_->setInputShape(tensor, shape)) {
      throw std::runtime_error(name_ + " was not built for one row of " + std::to_string(tokens) + " tokens");
    }
  }
  length_ = tokens;
}

void Execution::bind(std::string const& tensor, void* memory) {
  if (!context_->setTensorAddress(tensor.c_str(), memory)) throw std::runtime_error(name_ + " has no tensor " + tensor);
}

void Execution::enqueue() {
  if (!context_->enqueueV3(stream_)) throw std::runtime_error(name_ + " did not run");
}

Model::Model(std::string const& folder, std::string const& plugin, bool cudaGraphs) : wantGraphs_(cudaGraphs) {
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a CUDA stream");
  runtime_.reset(nvinfer1::createInferRuntime(logger_));
  if (runtime_ == nullptr) throw std::runtime_error("TensorRT does not start");
  if (!plugin.empty() && runtime_->getPluginRegistry().loadLibrary(plugin.c_str()) == nullptr) {
    throw std::runtime_error("TensorRT does not load the plugin library " + plugin);
  }
  std::string const one = folder + "/model.engine";
  if (exists(one)) {  // the weights are there once, for both
    engines_.push_back(load(one));
    if (engines_[0]->getNbOptimizationProfiles() < 2) throw std::runtime_error(one + " has no profile for steps");
    prefill_ = std::make_unique<Execution>(*engines_[0], 0, stream_, one);
    step_ = std::make_unique<Execution>(*engines_[0], 1, stream_, one);
  } else {
    engines_.push_back(load(folder + "/prefill.engine"));
    engines_.push_back(load(folder + "/step.engine"));
    prefill_ = std::make_unique<Execution>(*engines_[0], 0, stream_, "prefill.engine");
    step_ = std::make_unique<Execution>(*engines_[1], 0, stream_, "step.engine");
  }
  makeStates();
}

Model::~Model() {
  for (cudaGraphExec_t graph : graphs_) {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  prefill_.reset();
  step_.reset();
  engines_.clear();
  runtime_.reset();
  cudaStreamDestroy(stream_);
}

Model::Engine Model::load(std::string const& path) {
  Mapped const file(path);
  Engine engine(runtime_->deserializeCudaEngine(file.data(), file.size()));
  if (engine == nullptr) throw std::runtime_error("TensorRT does not load " + path + ": " + logger_.lastError);
  return engine;
}

void Model::makeStates() {
  nvinfer1::ICudaEngine const& engine = *engines_[0];
  for (int i = 0; i < engine.getNbIOTensors(); ++i) {
    std::string const name = engine.getIOTensorName(i);
    bool const input = engine.getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
    if (!input || name == "input_ids" || name == "seq_lens") continue;
    stateNames_.push_back(name);
    size_t const size = rowBytes(engine, name.c_str());
    for (auto& set : states_) set[name] = std::make_unique<DeviceMemory>(size);
    // A sequence begins with zeros.
    check(cudaMemsetAsync(states_[0][name]->data(), 0, size, stream_), "zero states");
  }
  if (stateNames_.empty()) throw std::runtime_error("the engine has no states: it is not of a bundle");

  nvinfer1::Dims const logits = engine.getTensorShape("logits");
  vocabulary_ = static_cast<size_t>(logits.d[2]);
  size_t const rows = logits.d[1] == 1 ? 1 : static_cast<size_t>(prefill_->longest());  // --logits all gives every row
  size_t const tokens = static_cast<size_t>(prefill_->longest());
  ids_ = std::make_unique<DeviceMemory>(tokens * sizeof(int64_t));
  hostIds_ = std::make_unique<HostMemory>(tokens * sizeof(int64_t));
  lengths_ = std::make_unique<DeviceMemory>(sizeof(int32_t));
  logits_ = std::make_unique<DeviceMemory>(rows * vocabulary_ * sizeof(float));
  hostLogits_ = std::make_unique<HostMemory>(vocabulary_ * sizeof(float));
}

void Model::bindStates(Execution& execution) {
  for (std::string const& name : stateNames_) {
    execution.bind(name, states_[turn_][name]->data());
    execution.bind("present_" + name, states_[1 - turn_][name]->data());
  }
  execution.bind("input_ids", ids_->data());
  execution.bind("logits", logits_->data());
  if (execution.has("seq_lens")) execution.bind("seq_lens", lengths_->data());
}

float const* Model::prefill(std::vector<int64_t> const& ids) {
  if (ids.empty()) throw std::runtime_error("the prompt is empty");
  size_t const longest = static_cast<size_t>(prefill_->longest());
  for (size_t from = 0; from < ids.size(); from += longest) {
    size_t const count = std::min(longest, ids.size() - from);
    int32_t const length = static_cast<int32_t>(count);
    std::memcpy(hostIds_->data(), ids.data() + from, count * sizeof(int64_t));
    check(cudaMemcpyAsync(ids_->data(), hostIds_->data(), count * sizeof(int64_t), cudaMemcpyHostToDevice, stream_), "ids");
    check(cudaMemcpyAsync(lengths_->data(), &length, sizeof length, cudaMemcpyHostToDevice, stream_), "lengths");
    prefill_->setLength(length);
    bindStates(*prefill_);
    prefill_->enqueue();
    size_t const last = static_cast<size_t>(prefill_->shape("logits").d[1]) - 1;
    float const* row = static_cast<float const*>(logits_->data()) + last * vocabulary_;
    check(cudaMemcpyAsync(hostLogits_->data(), row, vocabulary_ * sizeof(float), cudaMemcpyDeviceToHost, stream_), "logits");
    check(cudaStreamSynchronize(stream_), "prefill");
    turn_ = 1 - turn_;
  }
  int32_t const one = 1;  // what steps of a ragged engine want, from now on
  check(cudaMemcpyAsync(lengths_->data(), &one, sizeof one, cudaMemcpyHostToDevice, stream_), "lengths");
  check(cudaStreamSynchronize(stream_), "prefill");
  return static_cast<float const*>(hostLogits_->data());
}

float const* Model::step(int64_t id) {
  *static_cast<int64_t*>(hostIds_->data()) = id;
  if (wantGraphs_ && warm_ && graphs_[turn_] == nullptr) {
    graphs_[turn_] = captureStep();
    if (graphs_[turn_] == nullptr) wantGraphs_ = false;
  }
  if (graphs_[turn_] != nullptr) {
    check(cudaGraphLaunch(graphs_[turn_], stream_), "a step's graph");
  } else {
    step_->setLength(1);
    bindStates(*step_);
    runStep();
    warm_ = true;
  }
  check(cudaStreamSynchronize(stream_), "step");
  turn_ = 1 - turn_;
  return static_cast<float const*>(hostLogits_->data());
}

void Model::runStep() {
  check(cudaMemcpyAsync(ids_->data(), hostIds_->data(), sizeof(int64_t), cudaMemcpyHostToDevice, stream_), "ids");
  step_->enqueue();
  size_t const size = vocabulary_ * sizeof(float);
  check(cudaMemcpyAsync(hostLogits_->data(), logits_->data(), size, cudaMemcpyDeviceToHost, stream_), "logits");
}

// One step in the present direction as a graph; null where the engine can't be captured.
cudaGraphExec_t Model::captureStep() {
  bindStates(*step_);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
  bool captured = true;
  try {
    runStep();
  } catch (std::runtime_error const& error) {
    std::fprintf(stderr, "steps run without CUDA graphs: %s\n", error.what());
    captured = false;
  }
  captured = cudaStreamEndCapture(stream_, &graph) == cudaSuccess && captured;
  if (captured && cudaGraphInstantiateWithFlags(&executable, graph, 0) != cudaSuccess) executable = nullptr;
  if (graph != nullptr) cudaGraphDestroy(graph);
  cudaGetLastError();  // a failed capture is no error of what comes next
  return executable;
}
