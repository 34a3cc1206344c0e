// Chooses tokens: the likeliest, or by chance.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

class Sampler {
 public:
  // Temperature 0 is greedy; `topK` 0 keeps all tokens.
  Sampler(double temperature, size_t topK, uint64_t seed) : temperature_(temperature), topK_(topK), random_(seed) {}

  int64_t choose(float const* logits, size_t count);

 private:
  double temperature_;
  size_t topK_;
  std::mt19937_64 random_;
  std::vector<int64_t> order_;
  std::vector<double> weights_;
};
