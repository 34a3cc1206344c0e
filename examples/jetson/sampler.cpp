#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

int64_t Sampler::choose(float const* logits, size_t count) {
  auto const likeliest = std::max_element(logits, logits + count) - logits;
  if (temperature_ <= 0) return likeliest;

  order_.resize(count);
  std::iota(order_.begin(), order_.end(), 0);
  size_t const kept = topK_ == 0 ? count : std::min(topK_, count);
  if (kept < count) {
    std::nth_element(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(kept) - 1, order_.end(),
                     [logits](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  }
  weights_.resize(kept);
  double total = 0;
  for (size_t i = 0; i < kept; ++i) {
    weights_[i] = std::exp((static_cast<double>(logits[order_[i]]) - static_cast<double>(logits[likeliest])) / temperature_);
    total += weights_[i];
  }
  double left = std::uniform_real_distribution<double>(0, total)(random_);
  for (size_t i = 0; i < kept; ++i) {
    left -= weights_[i];
    if (left < 0) return order_[i];
  }
  return likeliest;  // rounding
}
