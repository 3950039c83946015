// Log-probabilities of tokens from a chunk of logits, n rows of V, in one pass over it; their gradient in
// a second one; and the log-ratio of two models' chunks.
//
//   z = c tanh(x / c) / t     for logits x, a soft cap c (0: none) and a temperature t
//   forward     L_i = log sum_j exp(z_ij), z_i at the target, max_j z_ij, sum_j p_ij z_ij with
//               p = exp(z - L), and log sum_j exp(2 z_ij)
//   gradient    dx_ij = (a_i [j = target_i] + b_i exp(z_ij - L_i)) dz_ij / dx_ij
//   log_ratio   l_i = z_i at the target - L_i for both, l - l', exp(l' - l) - 1 - (l' - l), and
//               L_i - sum_j p_ij z_ij of the first
//
// The sums run online, with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867). The chunk
// may be columns [first, first + V) of a wider vocabulary: a target outside counts 0, parts are joined
// by the caller, and L in `gradient` is that of all columns. They equal
// `plain_log_probs` and `plain_log_ratios` of mlx_align/kernels/token_log_prob.py.
//
// Arrays, row-contiguous:
//   logits, policy, reference   T [n, V]      targets  int [n]     sizes  int [8], see `Shape`
//   the rest                float [n]         dlogits    T [n, V]
// Threads: `forward` and `log_ratio`: grid (256, n, 1), threadgroup (256, 1, 1), a row each;
//          `gradient`: grid (ceil(V / 1024) * 256, n, 1), threadgroup (256, 1, 1), 1,024 logits each.
// Threadgroup memory: 16 bytes a SIMD-group and row of logits. Registers: fewer than 40 of 128.
#include <metal_stdlib>
using namespace metal;

namespace mlx_align {

// A finite stand-in for minus infinity, which fast-math compilers may assume away.
constant constexpr float kLowest = -1e30f;
constant constexpr int kBatch = 4;     // logits a thread takes at a time
constant constexpr int kSimdgroups = 8;
constant constexpr int kThreads = 32 * kSimdgroups;

struct Shape {
  int vocabulary, first;
  float softcap, inverse_temperature;

  explicit Shape(const device int* from)
      : vocabulary(from[0]), first(from[1]), softcap(as_type<float>(from[2])),
        inverse_temperature(as_type<float>(from[3])) {}

  float bent(float x) const { return softcap > 0.0f ? softcap * precise::tanh(x / softcap) : x; }
  float logit(float x) const { return bent(x) * inverse_temperature; }
  float slope(float x) const {
    if (softcap == 0.0f) return inverse_temperature;
    const float share = bent(x) / softcap;
    return (1.0f - share * share) * inverse_temperature;
  }
};

// Sums over some logits: of exp(z - top), of (z - top) exp(z - top) and of exp(2 (z - top)).
struct Mass {
  float top, total, weighted, squares;

  // The same sums with another top.
  Mass moved(float to) const {
    const float by = top - to, factor = exp(by);
    return {to, total * factor, (weighted + by * total) * factor, squares * factor * factor};
  }
  float log_sum() const { return top + log(total); }
};

// The sums of all lanes of a SIMD-group, in each of them.
inline Mass joined(const Mass mass) {
  const Mass level = mass.moved(simd_max(mass.top));
  return {level.top, simd_sum(level.total), simd_sum(level.weighted), simd_sum(level.squares)};
}

// The sums of a row, in the first SIMD-group of the threadgroup. All threads have to call it.
template <typename T>
inline Mass row_mass(const device T* row, const Shape shape, threadgroup float4* parts, uint thread_id,
                     uint lane, uint simdgroup) {
  Mass mass = {kLowest, 0.0f, 0.0f, 0.0f};
  for (int start = thread_id; start < shape.vocabulary; start += kThreads * kBatch) {
    float z[kBatch];
    float top = mass.top;
    for (int k = 0; k < kBatch; k++) {
      const int j = start + k * kThreads;
      z[k] = j < shape.vocabulary ? shape.logit(float(row[j])) : kLowest;
      top = max(top, z[k]);
    }
    mass = mass.moved(top);
    for (int k = 0; k < kBatch; k++) {
      if (z[k] <= kLowest) continue;  // not there, or minus infinity; 0 times that were NaN
      const float share = exp(z[k] - top);
      mass.total += share;
      mass.weighted += share * (z[k] - top);
      mass.squares += share * share;
    }
  }
  mass = joined(mass);
  if (lane == 0) parts[simdgroup] = float4(mass.top, mass.total, mass.weighted, mass.squares);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0) {
    mass = {kLowest, 0.0f, 0.0f, 0.0f};
    if (lane < kSimdgroups) {
      const float4 part = parts[lane];
      mass = {part.x, part.y, part.z, part.w};
    }
    mass = joined(mass);
  }
  return mass;
}

// exp(x) - 1 - x, whose terms cancel near 0; Metal has no expm1.
inline float exp_less_line(float x) {
  if (abs(x) > 0.5f) return exp(x) - 1.0f - x;
  float sum = 1.0f;
  for (int k = 9; k > 2; k--) sum = 1.0f + sum * x / float(k);
  return 0.5f * x * x * sum;
}

}  // namespace mlx_align
using namespace mlx_align;

template <typename T>
[[kernel]] void token_log_prob_forward(
    const device T* logits [[buffer(0)]],
    const device int* targets [[buffer(1)]],
    const device int* sizes [[buffer(2)]],
    device float* log_sums [[buffer(3)]],
    device float* target_logits [[buffer(4)]],
    device float* tops [[buffer(5)]],
    device float* means [[buffer(6)]],
    device float* log_squares [[buffer(7)]],
    uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],
    uint thread_index_in_threadgroup [[thread_index_in_threadgroup]],
    uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
    uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float4 parts[kSimdgroups];
  const Shape shape(sizes);
  const uint row = threadgroup_position_in_grid.y;
  logits += size_t(row) * shape.vocabulary;
  const Mass mass = row_mass<T>(logits, shape, parts, thread_index_in_threadgroup,
                                thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
  if (thread_index_in_threadgroup == 0) {
    const int target = targets[row] - shape.first;
    const bool inside = target >= 0 && target < shape.vocabulary;
    log_sums[row] = mass.log_sum();
    target_logits[row] = inside ? shape.logit(float(logits[target])) : 0.0f;
    tops[row] = mass.top;
    means[row] = mass.top + mass.weighted / mass.total;
    log_squares[row] = 2.0f * mass.top + log(mass.squares);
  }
}

template <typename T>
[[kernel]] void token_log_prob_gradient(
    const device T* logits [[buffer(0)]],
    const device int* targets [[buffer(1)]],
    const device float* log_sums [[buffer(2)]],
    const device float* target_factors [[buffer(3)]],
    const device float* softmax_factors [[buffer(4)]],
    const device int* sizes [[buffer(5)]],
    device T* dlogits [[buffer(6)]],
    uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],
    uint thread_index_in_threadgroup [[thread_index_in_threadgroup]]) {
  const Shape shape(sizes);
  const uint row = threadgroup_position_in_grid.y;
  const size_t base = size_t(row) * shape.vocabulary;
  const int start = threadgroup_position_in_grid.x * kThreads * kBatch + thread_index_in_threadgroup;
  const float log_sum = log_sums[row], softmax_factor = softmax_factors[row];
  const int target = targets[row] - shape.first;
  for (int k = 0; k < kBatch; k++) {
    const int j = start + k * kThreads;
    if (j < shape.vocabulary) {
      const float x = float(logits[base + j]);
      float factor = softmax_factor * exp(shape.logit(x) - log_sum);
      if (j == target) factor += target_factors[row];
      dlogits[base + j] = T(factor * shape.slope(x));
    }
  }
}

template <typename T>
[[kernel]] void token_log_prob_log_ratio(
    const device T* policy [[buffer(0)]],
    const device T* reference [[buffer(1)]],
    const device int* targets [[buffer(2)]],
    const device int* sizes [[buffer(3)]],
    device float* log_sums [[buffer(4)]],
    device float* log_probs [[buffer(5)]],
    device float* log_ratios [[buffer(6)]],
    device float* k3 [[buffer(7)]],
    device float* entropies [[buffer(8)]],
    uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],
    uint thread_index_in_threadgroup [[thread_index_in_threadgroup]],
    uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
    uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float4 policy_parts[kSimdgroups];
  threadgroup float4 reference_parts[kSimdgroups];
  const Shape shape(sizes);
  const uint row = threadgroup_position_in_grid.y;
  policy += size_t(row) * shape.vocabulary;
  reference += size_t(row) * shape.vocabulary;
  const Mass mass = row_mass<T>(policy, shape, policy_parts, thread_index_in_threadgroup,
                                thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
  const Mass other = row_mass<T>(reference, shape, reference_parts, thread_index_in_threadgroup,
                                 thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
  if (thread_index_in_threadgroup == 0) {
    const int target = targets[row];
    const float log_sum = mass.log_sum();
    const float log_prob = shape.logit(float(policy[target])) - log_sum;
    const float log_ratio = log_prob - (shape.logit(float(reference[target])) - other.log_sum());
    log_sums[row] = log_sum;
    log_probs[row] = log_prob;
    log_ratios[row] = log_ratio;
    k3[row] = exp_less_line(-log_ratio);
    entropies[row] = log_sum - mass.top - mass.weighted / mass.total;
  }
}

#ifdef MLX_ALIGN_STANDALONE  // for a check by `xcrun metal`: the variants that are used
#define VARIANT(T)                                                                               \
  template [[host_name("forward_" #T)]] [[kernel]]                                               \
  decltype(token_log_prob_forward<T>) token_log_prob_forward<T>;                                 \
  template [[host_name("gradient_" #T)]] [[kernel]]                                              \
  decltype(token_log_prob_gradient<T>) token_log_prob_gradient<T>;                               \
  template [[host_name("log_ratio_" #T)]] [[kernel]]                                             \
  decltype(token_log_prob_log_ratio<T>) token_log_prob_log_ratio<T>;
VARIANT(float)
VARIANT(half)
VARIANT(bfloat)
#endif
