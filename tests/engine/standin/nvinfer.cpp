// A stand-in for TensorRT's library: just enough to run the C++ program of examples/jetson where there is no TensorRT.
// An "engine" is a text that lists tensors and profiles; running it sends the inputs through a pipe to a test, which
// computes them in ONNX Runtime and sends the outputs back. pure.inc, which the test makes of TensorRT's headers, gives
// every interface a class whose methods abort.
#include <NvInferRuntime.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "pure.inc"

extern "C" int stub_capturing();
extern "C" int stub_record(void (*work)(long), long argument);
extern "C" int stub_owns(void const* memory, size_t size);

namespace {

using namespace nvinfer1;

[[noreturn]] void die(std::string const& why) {
  std::fprintf(stderr, "stand-in: %s\n", why.c_str());
  std::_Exit(70);
}

int pipeOf(char const* name) { return std::atoi(std::getenv(name)); }

void send(void const* data, size_t size) {
  for (size_t done = 0; done < size;) {
    ssize_t const n = write(pipeOf("STANDIN_TO"), static_cast<char const*>(data) + done, size - done);
    if (n <= 0) die("the test does not listen");
    done += static_cast<size_t>(n);
  }
}

void receive(void* data, size_t size) {
  for (size_t done = 0; done < size;) {
    ssize_t const n = read(pipeOf("STANDIN_FROM"), static_cast<char*>(data) + done, size - done);
    if (n <= 0) die("the test does not answer");
    done += static_cast<size_t>(n);
  }
}

struct Tensor {
  std::string name;
  TensorIOMode mode;
  DataType type;
  Dims shape{};
  std::vector<std::array<Dims, 3>> profiles;
};

size_t bytesOf(DataType type) {
  return type == DataType::kINT64 ? 8 : type == DataType::kINT8 ? 1 : type == DataType::kHALF || type == DataType::kBF16 ? 2 : 4;
}

bool loadedPlugin = false;

struct Registry : RegistryStub {
  PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept override {
    loadedPlugin = access(path, R_OK) == 0;
    return loadedPlugin ? this : nullptr;
  }
} registry;

struct Context;

struct Engine final : ICudaEngine {
  struct Impl : EngineStub {
    int64_t id = 0;
    std::vector<Tensor> tensors;

    Tensor const* find(char const* name) const {
      for (Tensor const& tensor : tensors) {
        if (tensor.name == name) return &tensor;
      }
      return nullptr;
    }
    int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(tensors.size()); }
    char const* getIOTensorName(int32_t index) const noexcept override {
      return tensors[static_cast<size_t>(index)].name.c_str();
    }
    TensorIOMode getTensorIOMode(char const* name) const noexcept override {
      return find(name) != nullptr ? find(name)->mode : TensorIOMode::kNONE;
    }
    DataType getTensorDataType(char const* name) const noexcept override { return find(name)->type; }
    Dims getTensorShape(char const* name) const noexcept override { return find(name)->shape; }
    Dims getProfileShape(char const* name, int32_t profile, OptProfileSelector select) const noexcept override {
      return find(name)->profiles[static_cast<size_t>(profile)][static_cast<size_t>(select)];
    }
    int32_t getNbOptimizationProfiles() const noexcept override {
      return static_cast<int32_t>(tensors[0].profiles.size());
    }
    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override;
  } impl;

  explicit Engine(std::string const& text) {
    mImpl = &impl;
    std::istringstream lines(text);
    std::string word;
    while (lines >> word) {
      if (word == "id") lines >> impl.id;
      if (word == "tensor") {
        Tensor tensor;
        int input = 0, type = 0;
        lines >> tensor.name >> input >> type >> tensor.shape.nbDims;
        tensor.mode = input != 0 ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
        tensor.type = static_cast<DataType>(type);
        for (int i = 0; i < tensor.shape.nbDims; ++i) lines >> tensor.shape.d[i];
        impl.tensors.push_back(tensor);
      }
      if (word == "profile") {  // of the tensor before: min, opt and max
        std::array<Dims, 3> ranges{};
        for (Dims& range : ranges) {
          range.nbDims = impl.tensors.back().shape.nbDims;
          for (int i = 0; i < range.nbDims; ++i) lines >> range.d[i];
        }
        impl.tensors.back().profiles.push_back(ranges);
      }
    }
  }
};

struct Context final : IExecutionContext {
  struct Impl : ContextStub {
    Engine::Impl* engine = nullptr;
    size_t profile = 99;
    std::map<std::string, Dims> shapes;
    std::map<std::string, void*> addresses;

    bool setOptimizationProfileAsync(int32_t index, cudaStream_t) noexcept override {
      profile = static_cast<size_t>(index);
      return profile < engine->tensors[0].profiles.size();
    }
    bool setInputShape(char const* name, Dims const& dims) noexcept override {
      auto const& [least, most] = std::pair(engine->find(name)->profiles[profile][0], engine->find(name)->profiles[profile][2]);
      for (int i = 0; i < dims.nbDims; ++i) {
        if (dims.d[i] < least.d[i] || dims.d[i] > most.d[i]) return false;
      }
      shapes[name] = dims;
      return true;
    }
    Dims getTensorShape(char const* name) const noexcept override {
      auto const known = shapes.find(name);
      if (known != shapes.end()) return known->second;
      Dims shape = engine->find(name)->shape;
      shape.d[0] = shapes.at("input_ids").d[0];
      if (shape.nbDims > 1 && shape.d[1] < 0) shape.d[1] = shapes.at("input_ids").d[1];
      return shape;
    }
    bool setTensorAddress(char const* name, void* memory) noexcept override {
      if (reinterpret_cast<uintptr_t>(memory) % 256 != 0) die(std::string(name) + " is not aligned");
      addresses[name] = memory;
      return engine->find(name) != nullptr;
    }
    bool enqueueV3(cudaStream_t) noexcept override {
      auto* work = new Impl(*this);  // addresses as they are now
      if (stub_capturing() != 0) return stub_record([](long self) { reinterpret_cast<Impl*>(self)->run(); }, reinterpret_cast<long>(work)) == 0;
      work->run();
      delete work;
      return true;
    }

    void run() {
      send(&engine->id, sizeof engine->id);
      for (Tensor const& tensor : engine->tensors) {
        if (tensor.mode == TensorIOMode::kINPUT) sendTensor(tensor);
      }
      for (Tensor const& tensor : engine->tensors) {
        if (tensor.mode != TensorIOMode::kOUTPUT) continue;
        for (Tensor const& other : engine->tensors) {
          bool const input = other.mode == TensorIOMode::kINPUT;
          if (input && addresses[other.name] == addresses[tensor.name]) die(tensor.name + " lies on " + other.name);
        }
        receive(memory(tensor), size(tensor));
      }
    }
    void sendTensor(Tensor const& tensor) {
      Dims const shape = getTensorShape(tensor.name.c_str());
      int64_t dims[9] = {shape.nbDims};
      for (int i = 0; i < shape.nbDims; ++i) dims[i + 1] = shape.d[i];
      send(dims, sizeof(int64_t) * static_cast<size_t>(shape.nbDims + 1));
      send(memory(tensor), size(tensor));
    }
    size_t size(Tensor const& tensor) const {
      Dims const shape = getTensorShape(tensor.name.c_str());
      size_t bytes = bytesOf(tensor.type);
      for (int i = 0; i < shape.nbDims; ++i) bytes *= static_cast<size_t>(shape.d[i]);
      return bytes;
    }
    void* memory(Tensor const& tensor) {
      void* const address = addresses[tensor.name];
      if (stub_owns(address, size(tensor)) == 0) die(tensor.name + " lies outside of device memory");
      return address;
    }
  } impl;

  explicit Context(Engine::Impl* engine) {
    mImpl = &impl;
    impl.engine = engine;
  }
};

IExecutionContext* Engine::Impl::createExecutionContext(ExecutionContextAllocationStrategy) noexcept {
  return new Context(this);
}

struct Runtime final : IRuntime {
  struct Impl : RuntimeStub {
    ILogger* logger = nullptr;
    ICudaEngine* deserializeCudaEngine(void const* data, size_t size) noexcept override {
      std::string const text(static_cast<char const*>(data), size);
      if (text.rfind("standin", 0) != 0) {
        logger->log(ILogger::Severity::kERROR, "the engine is of another version");
        return nullptr;
      }
      if (text.find("plugin") != std::string::npos && !loadedPlugin) {
        logger->log(ILogger::Severity::kERROR, "no creator for MambaSelectiveScan");
        return nullptr;
      }
      return new Engine(text);
    }
    IPluginRegistry& getPluginRegistry() noexcept override { return registry; }
  } impl;

  explicit Runtime(ILogger* logger) {
    mImpl = &impl;
    impl.logger = logger;
  }
};

}  // namespace

extern "C" void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
  if (version != NV_TENSORRT_VERSION) die("built against other headers");
  return new Runtime(static_cast<nvinfer1::ILogger*>(logger));
}
