// A node with random inputs: its fields, its buffers on the GPU, and what it must compute.
#ifndef MAMBA_PLUGIN_TESTS_PROBLEM_H_
#define MAMBA_PLUGIN_TESTS_PROBLEM_H_

#include <cuda_runtime_api.h>

#include "library.h"
#include "reference.h"

namespace plugin_tests {

void check_cuda(cudaError_t error, const char* what);
#define CUDA(call) ::plugin_tests::check_cuda((call), #call)

// Memory of exactly so many bytes: a memory checker sees the first byte past the end.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return static_cast<char*>(data_); }
  size_t bytes() const { return bytes_; }
  void upload(const void* from);
  std::vector<char> download() const;
  void poison();  // every float in it is a NaN

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

size_t size_of(DataType type);
const char* name_of(DataType type);
// Doubles ↔ the bytes of a type; rounding goes to the nearest.
std::vector<char> encode(const std::vector<double>& values, DataType type);
std::vector<double> decode(const std::vector<char>& bytes, DataType type);

struct Value {
  DataType type;
  std::vector<int64_t> dims;
  std::vector<double> values;
  bool over_time;  // dims[1] is the length
};

struct Case {
  Op op;
  Sizes sizes;
  Options options;
  DataType type;
  DataType state_type = DataType::kFLOAT;
  std::vector<int32_t> lens = {};  // with options.ragged
};

struct Problem {
  Case c;
  std::string op_name;
  size_t state_input;
  std::vector<Value> inputs;  // rounded to their types; padding holds NaN
  Results expected;

  std::vector<PluginField> fields() const;
  // Inputs and outputs as TensorRT describes them, for some of the tokens (all when length is 0).
  std::vector<PluginTensorDesc> descs(int64_t length = 0) const;
  int32_t inputs_count() const { return static_cast<int32_t>(inputs.size()); }

 private:
  mutable std::vector<int32_t> flags_;
  mutable std::vector<float> limits_;
};

Problem make_problem(const Case& c, unsigned seed);
std::string describe(const Case& c);

// Relative to the norm of what is expected; infinite when there is a NaN.
double error(const std::vector<double>& got, const std::vector<double>& expected);
double tolerance(const Case& c, bool of_state);

}  // namespace plugin_tests
#endif  // MAMBA_PLUGIN_TESTS_PROBLEM_H_
