#include "stack_reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace plugin_tests {
namespace {

using Vector = std::vector<double>;
using Params = mamba_decode_stack_params;
using Layer = mamba_decode_layer;

double silu(double x) { return x / (1.0 + std::exp(-x)); }
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

// A 16-bit float of `mantissa` stored bits.
struct Half {
  int mantissa, bias;
  int top() const { return (1 << (15 - mantissa)) - 1; }

  double value(uint16_t bits) const {
    const int exponent = (bits & 0x7fff) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
    double magnitude = std::ldexp(fraction + (exponent ? 1 << mantissa : 0), std::max(exponent, 1) - bias - mantissa);
    if (exponent == top()) magnitude = fraction ? NAN : HUGE_VAL;
    return bits & 0x8000 ? -magnitude : magnitude;
  }
  uint16_t bits(double value) const {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return static_cast<uint16_t>(0x7fff);
    if (value == 0.0) return static_cast<uint16_t>(sign);
    const int exponent = std::max(std::min(std::ilogb(value), top()), 1 - bias);
    const double scaled = std::nearbyint(std::ldexp(std::fabs(value), mantissa - exponent));
    const double whole = std::ldexp(exponent + bias - 1, mantissa) + scaled;
    return static_cast<uint16_t>(sign | static_cast<int>(std::min(whole, std::ldexp(top(), mantissa))));
  }
};

const Half& half_of(int32_t dtype) {
  static const Half f16{10, 15}, bf16{7, 127};
  return dtype == MAMBA_F16 ? f16 : bf16;
}

Vector row_of(const void* memory, int32_t dtype, int64_t from, int64_t count) {
  Vector values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++) values[static_cast<size_t>(i)] = load(memory, dtype, from + i);
  return values;
}

// weight [rows, x.size()] times x.
Vector product(const void* weight, int32_t dtype, int64_t rows, const Vector& x) {
  Vector y(static_cast<size_t>(rows));
  const auto width = static_cast<int64_t>(x.size());
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < width; i++) y[static_cast<size_t>(r)] += load(weight, dtype, r * width + i) * x[static_cast<size_t>(i)];
  return y;
}

// A row of packed integers of `bits` as decode_stack.h describes it.
Vector packed_row(const Params& p, int bits, const unsigned char* row, int64_t width) {
  static const int places[2][8] = {{0, 2, 1, 3, 4, 6, 5, 7}, {0, 2, 4, 6, 1, 3, 5, 7}};
  const int64_t group = p.group_size ? p.group_size : width, integers = width * bits / 8;
  const int* place = places[bits == 4];
  Vector values(static_cast<size_t>(width));
  for (int64_t at = 0; at < integers; at++) {
    const int64_t unit = at / 64, lane = at % 64 / 16, i = at % 16;
    for (int64_t part = 0; part < 8 / bits; part++) {
      const bool bytes = bits == 8;
      const int64_t value = bytes ? unit * 64 + i / 8 * 32 + lane * 8 + place[i % 8]
                                  : unit * 128 + i / 4 * 32 + lane * 8 + place[i % 4 * 2 + part];
      const int q = bytes ? static_cast<signed char>(row[at]) : (row[at] >> 4 * part & 15) - 8;
      values[static_cast<size_t>(value)] = q * load(row + integers, p.dtype, value / group);
    }
  }
  return values;
}

// Rows of packed integers, one behind the other; `own`: their bits where those are not the model's.
struct PackedRows {
  const Params& p;
  int bits;
  int32_t width;
  const unsigned char* memory;

  PackedRows(const Params& p, int own, const void* memory, int64_t width)
      : p(p), bits(own ? own : p.weight_bits), width(static_cast<int32_t>(width)),
        memory(static_cast<const unsigned char*>(memory)) {}
  Vector operator[](int64_t row) const {
    return packed_row(p, bits, memory + row * mamba_decode_row_bytes(bits, width, mamba_decode_scales(p.group_size, width)), width);
  }
};

double rounded(int32_t dtype, double value) {
  uint32_t memory = 0;  // room for any type
  store(&memory, dtype, 0, value);
  return load(&memory, dtype, 0);
}

// The product of in_proj, out_proj or the head; `own`: its own bits.
Vector large_product(const Params& p, int own, const void* weight, int64_t rows, const Vector& x) {
  if (p.weight_bits == 0) return product(weight, p.dtype, rows, x);
  const PackedRows matrix(p, own, weight, static_cast<int64_t>(x.size()));
  Vector y(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; r++) {
    const Vector row = matrix[r];
    for (size_t i = 0; i < x.size(); i++) y[static_cast<size_t>(r)] += row[i] * x[i];
  }
  return y;
}

// A row of packed integers stands for values of the model's type.
Vector embedding_row(const Params& p, int64_t token) {
  if (!p.embedding_packed) return row_of(p.embedding, p.dtype, token * p.d_model, p.d_model);
  Vector x = PackedRows(p, p.head_bits, p.embedding, p.d_model)[token];
  for (double& value : x) value = rounded(p.dtype, value);
  return x;
}

Vector rms_norm(const Vector& x, const void* weight, int32_t dtype, double eps) {
  double squares = 0.0;
  for (const double v : x) squares += v * v;
  const double scale = 1.0 / std::sqrt(squares / static_cast<double>(x.size()) + eps);
  Vector y(x.size());
  for (size_t i = 0; i < x.size(); i++) y[i] = x[i] * scale * load(weight, dtype, static_cast<int64_t>(i));
  return y;
}

// The convolution's newest column, after SiLU; moves the state on.
void convolve(const Params& p, const Layer& l, int64_t row, double* x, int64_t channels) {
  const int64_t taps = p.d_conv;
  for (int64_t c = 0; c < channels; c++) {
    const int64_t at = (row * channels + c) * (taps - 1);
    Vector window = row_of(l.conv_state_in, p.dtype, at, taps - 1);
    window.push_back(x[c]);
    double sum = load(l.conv_bias, p.dtype, c);
    for (int64_t k = 0; k < taps; k++) sum += load(l.conv_weight, p.dtype, c * taps + k) * window[static_cast<size_t>(k)];
    for (int64_t k = 0; k + 1 < taps; k++) store(l.conv_state_out, p.dtype, at + k, window[static_cast<size_t>(k + 1)]);
    x[c] = silu(sum);
  }
}

// One channel of the scan; returns y without the gate.
double scan(const Params& p, const Layer& l, int64_t row, int64_t channel, double u, double dt, const double* B, const double* C) {
  const int64_t N = p.d_state, at = (row * p.d_inner + channel) * N;
  const int64_t head = p.family == 1 ? channel : channel / (p.d_inner / p.nheads);
  double y = l.D[head] * u;
  for (int64_t n = 0; n < N; n++) {
    const double A = p.family == 1 ? l.A[channel * N + n] : l.A[head];
    const double h = std::exp(dt * A) * l.ssm_state_in[at + n] + dt * u * B[n];
    l.ssm_state_out[at + n] = static_cast<float>(h);
    y += h * C[n];
  }
  return y;
}

Vector mamba1(const Params& p, const Layer& l, int64_t row, const Vector& x) {
  const int64_t inner = p.d_inner, N = p.d_state, rank = p.dt_rank;
  Vector uz = large_product(p, l.in_proj_bits, l.in_proj, 2 * inner, x);
  convolve(p, l, row, uz.data(), inner);
  const Vector u(uz.begin(), uz.begin() + inner);
  const Vector xdb = product(l.x_proj, p.dtype, rank + 2 * N, u);
  const Vector dt = product(l.dt_proj, p.dtype, inner, Vector(xdb.begin(), xdb.begin() + rank));
  Vector y(u.size());
  for (int64_t i = 0; i < inner; i++) {
    const auto c = static_cast<size_t>(i);
    y[c] = scan(p, l, row, i, u[c], softplus(dt[c] + l.dt_bias[i]), &xdb[static_cast<size_t>(rank)], &xdb[static_cast<size_t>(rank + N)]);
    y[c] *= silu(uz[static_cast<size_t>(inner + i)]);
  }
  return large_product(p, l.out_proj_bits, l.out_proj, p.d_model, y);
}

Vector mamba2(const Params& p, const Layer& l, int64_t row, const Vector& x) {
  const int64_t inner = p.d_inner, N = p.d_state, groups = p.ngroups, bc = groups * N;
  Vector all = large_product(p, l.in_proj_bits, l.in_proj, 2 * inner + 2 * bc + p.nheads, x);  // z, then x, B and C, then dt
  double *u = &all[static_cast<size_t>(inner)], *B = u + inner, *C = B + bc, *dt = C + bc;
  convolve(p, l, row, u, inner + 2 * bc);
  Vector y(static_cast<size_t>(inner));
  for (int64_t i = 0; i < inner; i++) {
    const int64_t head = i / (inner / p.nheads), group = head / (p.nheads / groups);
    const double step = softplus(dt[head] + l.dt_bias[head]);
    y[static_cast<size_t>(i)] = scan(p, l, row, i, u[i], step, B + group * N, C + group * N) * silu(all[static_cast<size_t>(i)]);
  }
  return large_product(p, l.out_proj_bits, l.out_proj, p.d_model, rms_norm(y, l.gated_norm, p.dtype, p.gated_norm_eps));
}

void add(const Params& p, Vector* residual, const Vector& x) {
  for (size_t i = 0; i < x.size(); i++) {
    double& value = (*residual)[i];
    value += x[i];
    if (!p.residual_fp32 && p.dtype != MAMBA_F32) value = rounded(p.dtype, value);
  }
}

}  // namespace

double load(const void* memory, int32_t dtype, int64_t index) {
  if (dtype == MAMBA_F32) return static_cast<const float*>(memory)[index];
  return half_of(dtype).value(static_cast<const uint16_t*>(memory)[index]);
}

void store(void* memory, int32_t dtype, int64_t index, double value) {
  if (dtype == MAMBA_F32)
    static_cast<float*>(memory)[index] = static_cast<float>(value);
  else
    static_cast<uint16_t*>(memory)[index] = half_of(dtype).bits(value);
}

std::vector<char> random_packed(int bits, int64_t rows, int32_t width, int32_t scales, int32_t dtype, unsigned seed) {
  const auto stride = static_cast<size_t>(mamba_decode_row_bytes(bits, width, scales));
  const auto integers = static_cast<size_t>(width * bits / 8);
  const double usual = std::sqrt(width) * (bits == 8 ? 74.0 : 4.6);
  std::mt19937_64 engine(seed);
  std::vector<char> all(static_cast<size_t>(rows) * stride);
  for (size_t r = 0; r < static_cast<size_t>(rows); r++) {
    char* row = &all[r * stride];
    for (size_t i = 0; i < integers; i++) row[i] = static_cast<char>(engine());
    for (int32_t i = 0; i < scales; i++)
      store(row + integers, dtype, i, (0.5 + static_cast<double>(engine() % 1000) / 1000.0) / usual);
  }
  return all;
}

void reference_stack(const Params& p) {
  for (int64_t row = 0; row < p.batch; row++) {
    Vector x = embedding_row(p, p.input_ids[row]), residual(x.size());
    for (int i = 0; i < p.n_layer; i++) {
      const Layer& l = p.layers[i];
      add(p, &residual, x);
      const Vector normed = rms_norm(residual, l.norm, p.dtype, p.norm_eps);
      x = p.family == 1 ? mamba1(p, l, row, normed) : mamba2(p, l, row, normed);
    }
    add(p, &residual, x);
    const Vector logits = large_product(p, p.head_bits, p.lm_head, p.vocab_size, rms_norm(residual, p.norm_f, p.dtype, p.norm_eps));
    std::copy(logits.begin(), logits.end(), p.logits + row * p.vocab_size);
  }
}

}  // namespace plugin_tests
