// Attention over packs of segments that form trees: forward, and the gradients of queries, keys and
// values. No array is T x T: the backward kernels compute the probabilities again from the log-sum-exps
// (Dao et al. 2022, arXiv:2205.14135).
//
//   O_i = sum_j P_ij V_j       P_ij = exp(s_ij - L_i)      L_i = log sum_j exp(s_ij)
//   s_ij = scale Q_i . K_j, with a soft cap c then c tanh(s_ij / c)
//   i sees j  iff  j <= i < ends[j]  and, with a window w,  positions[i] - positions[j] < w
//   dV_j = sum_i P_ij dO_i     dS_ij = P_ij (dO_i . V_j - delta_i)     delta_i = dO_i . O_i
//   dQ_i = scale sum_j dS_ij K_j                 dK_j = scale sum_i dS_ij Q_i
//   with a soft cap dS_ij times 1 - tanh^2
//
// They equal `plain_attention` of mlx_align/kernels/tree_attention.py.
//
// Arrays, row-contiguous and starting at a multiple of 16 bytes; P is T in whole blocks of 32, two at
// least:
//   queries, out, upstream   T [B, H, T, D]       ends, positions     int [B, P], 0 beyond T
//   keys, values             T [B, G, T, D]       spans               int [B, P / R, 4]
//   log_sums, delta      float [B, H, P]          sizes               int [8], see `Sizes`
// Query head h reads the keys of head h / (H / G). spans holds, for each R tokens, the smallest and
// greatest of their ends and of their positions. A query that sees nothing (padding) has O = 0 and
// L = 1e30, which makes all its probabilities 0.
//
// A threadgroup of 4 SIMD-groups takes 32 rows of one head, 8 a SIMD-group: queries in the forward pass
// and for their gradient, keys for those of keys and values. It walks over the other side in tiles of R
// tokens, which lie in threadgroup memory, and steps over every tile of which no row sees
// anything; a SIMD-group also steps over those of which its own 8 rows see nothing. Gradients of keys
// and values are summed over the query heads of a group in one threadgroup: no atomics, and the same
// sums every time.
//
// Threads: grid (ceil(T / 32) * 128, H or G, B), threadgroup (128, 1, 1).
// Threadgroup memory: 2 R (D + 16 / sizeof(T)) sizeof(T) + at most 16 R bytes.
// Registers of a thread, of 128: an 8 x 8 fragment takes 2 in float and 1 in half or bfloat. With
// n = D / 8, r = R / 8 and f = 1 or 2 for T:
//   forward               [f n] + 2 n + 2 r      queries; output; scores
//   gradient of queries  [2 f n] + 2 n + 4 r     queries, upstream; sums; scores and their gradient
//   gradient of keys     [2 f n] + 2 n + 4 r     keys, values; sums; scores and their gradient
//   gradient of values    [f n] + 2 n + 2 r      keys; sums; scores
// and about 36 for fragments on their way, addresses and row sums. Where that is over 128, HELD is 0
// and what stands in brackets is read from device memory again when it is used.
// `scripts/bench_kernels --registers` prints the sum for every variant.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

// Fragments stay in registers only where their indices are known when the kernel is compiled.
#define UNROLL _Pragma("clang loop unroll(full)")

namespace mlx_align {

// Finite stand-ins for infinities, which fast-math compilers may assume away.
constant constexpr float kHidden = -1e30f;
constant constexpr float kLog2E = 1.44269504088896341f;
constant constexpr float kLn2 = 0.693147180559945309f;
constant constexpr int kRows = 32;
constant constexpr int kThreads = 128;

// Whose gradient.
constant constexpr int kQueries = 0, kKeys = 1, kValues = 2;

typedef simdgroup_matrix<float, 8, 8> Sums;

struct Sizes {
  int heads, groups, tokens, padded, window;  // window 0: none
  float scale, softcap;                       // softcap 0: none

  explicit Sizes(const device int* from)
      : heads(from[0]), groups(from[1]), tokens(from[2]), padded(from[3]), window(from[4]),
        scale(as_type<float>(from[5])), softcap(as_type<float>(from[6])) {}
};

// The row and the first of the two columns of an 8 x 8 fragment that a lane holds.
inline int fragment_row(ushort lane) { return ((lane >> 2) & 4) | ((lane >> 1) & 3); }
inline int fragment_column(ushort lane) { return ((lane >> 1) & 4) | ((lane & 1) << 1); }

// Over a row of a fragment, whose lanes differ in bits 0 and 3.
inline float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, ushort(1)));
  return max(x, simd_shuffle_xor(x, ushort(8)));
}
inline float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}

inline Sums zeros() { return make_filled_simdgroup_matrix<float, 8, 8>(0.0f); }

// The 8 rows that a SIMD-group keeps, as D / 8 fragments: in registers if HELD, else read when used.
template <typename T, int D, int HELD>
struct RowBlock {
  simdgroup_matrix<T, 8, 8> held[HELD ? D / 8 : 1];
  const device T* source;

  // `source` is this lane's place in the first fragment.
  explicit RowBlock(const device T* source) : source(source) {
    if (HELD) {
      UNROLL for (int d = 0; d < D / 8; d++) held[d] = read(d);
    }
  }

  simdgroup_matrix<T, 8, 8> read(int d) const {
    simdgroup_matrix<T, 8, 8> part;
    part.thread_elements()[0] = source[8 * d];
    part.thread_elements()[1] = source[8 * d + 1];
    return part;
  }

  simdgroup_matrix<T, 8, 8> at(int d) const {
    if (HELD) return held[d];
    return read(d);
  }
};

// R rows of D values into threadgroup memory, zeros where there are no more than `rows`. Four values are
// moved at a time, which is why tiles are declared in fours: an array of T is aligned for one only.
template <typename T, int R, int D, int LD>
inline void load_tile(threadgroup T* tile, const device T* source, int rows, ushort thread_id) {
  for (int e = int(thread_id) * 4; e < R * D; e += kThreads * 4) {
    const int row = e / D, column = e % D;
    vec<T, 4> value = vec<T, 4>(T(0));
    if (row < rows) value = *(const device vec<T, 4>*)(source + e);
    *(threadgroup vec<T, 4>*)(tile + row * LD + column) = value;
  }
}

// What some tokens side by side have in common.
struct Span {
  int first, last;                      // tokens
  int low_end, high_end;                // of their ends
  int low_position, high_position;

  // `count` blocks of R tokens.
  template <int R>
  static Span of(const device int* spans, int block, int count) {
    const device int* at = spans + 4 * block;
    Span span = {block * R, (block + count) * R - 1, at[0], at[1], at[2], at[3]};
    for (int i = 1; i < count; i++) {
      at += 4;
      span.low_end = min(span.low_end, at[0]);
      span.high_end = max(span.high_end, at[1]);
      span.low_position = min(span.low_position, at[2]);
      span.high_position = max(span.high_position, at[3]);
    }
    return span;
  }

  // The same for only those 8 tokens that a SIMD-group takes, of which this thread holds one.
  Span narrowed(ushort simdgroup, int end, int position) const {
    const int start = first + 8 * int(simdgroup);
    return {start, start + 7, simd_min(end), simd_max(end), simd_min(position), simd_max(position)};
  }
};

// No query sees any of the keys.
inline bool apart(const Span queries, const Span keys, int window) {
  return keys.first > queries.last || keys.high_end <= queries.first ||
         (window > 0 && queries.low_position - keys.high_position >= window);
}

// Every query sees all of the keys.
inline bool together(const Span queries, const Span keys, int window) {
  return keys.last <= queries.first && keys.low_end > queries.last &&
         (window == 0 || queries.high_position - keys.low_position < window);
}

inline bool sees(int query, int key, int end, int query_position, int key_position, int window) {
  return key <= query && query < end && (window == 0 || query_position - key_position < window);
}

// The score of a product of query and key, in units of log 2.
inline float scored(float product, const Sizes sizes) {
  float score = product * sizes.scale;
  if (sizes.softcap > 0.0f) score = sizes.softcap * precise::tanh(score / sizes.softcap);
  return score * kLog2E;
}

// The derivative of a score by its product, without the scale.
inline float slope(float score, const Sizes sizes) {
  if (sizes.softcap == 0.0f) return 1.0f;
  const float bent = score / (sizes.softcap * kLog2E);
  return 1.0f - bent * bent;
}

}  // namespace mlx_align
using namespace mlx_align;

template <typename T, int D, int R, int HELD>
[[kernel]] void tree_attention_forward(
    const device T* queries [[buffer(0)]],
    const device T* keys [[buffer(1)]],
    const device T* values [[buffer(2)]],
    const device int* ends [[buffer(3)]],
    const device int* positions [[buffer(4)]],
    const device int* spans [[buffer(5)]],
    const device int* sizes [[buffer(6)]],
    device T* out [[buffer(7)]],
    device float* log_sums [[buffer(8)]],
    uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],
    uint thread_index_in_threadgroup [[thread_index_in_threadgroup]],
    uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
    uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr int LD = D + 16 / sizeof(T);
  threadgroup vec<T, 4> key_store[R * LD / 4];
  threadgroup vec<T, 4> value_store[R * LD / 4];
  threadgroup int tile_ends[R];
  threadgroup int tile_positions[R];
  threadgroup T* key_tile = (threadgroup T*)key_store;
  threadgroup T* value_tile = (threadgroup T*)value_store;
  const Sizes size(sizes);
  const ushort thread_id = thread_index_in_threadgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int row = fragment_row(thread_index_in_simdgroup);
  const int column = fragment_column(thread_index_in_simdgroup);
  const int head = threadgroup_position_in_grid.y, batch = threadgroup_position_in_grid.z;
  const int group = head / (size.heads / size.groups);
  const size_t query_base = size_t(batch * size.heads + head) * size.tokens;
  const size_t key_base = size_t(batch * size.groups + group) * size.tokens;
  ends += size_t(batch) * size.padded;
  positions += size_t(batch) * size.padded;
  spans += size_t(batch) * (size.padded / R) * 4;

  const int block = int(threadgroup_position_in_grid.x) * (kRows / R);
  const Span rows = Span::of<R>(spans, block, kRows / R);
  const int query = rows.first + 8 * simdgroup + row, query_position = positions[query];
  const Span mine = rows.narrowed(simdgroup, ends[query], query_position);
  const bool live = query < size.tokens;
  // A row that does not exist stands for the first one: it sees nothing, and is not written.
  const size_t place = (query_base + (live ? query : 0)) * D + column;
  const RowBlock<T, D, HELD> q(queries + place);
  Sums output[D / 8];
  UNROLL for (int d = 0; d < D / 8; d++) output[d] = zeros();
  float top = kHidden, total = 0.0f;

  for (int tile = 0; tile * R <= rows.last; tile++) {
    const Span seen = Span::of<R>(spans, tile, 1);
    if (apart(rows, seen, size.window)) continue;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const size_t start = (key_base + seen.first) * D;
    load_tile<T, R, D, LD>(key_tile, keys + start, size.tokens - seen.first, thread_id);
    load_tile<T, R, D, LD>(value_tile, values + start, size.tokens - seen.first, thread_id);
    if (thread_id < R) {
      tile_ends[thread_id] = ends[seen.first + thread_id];
      tile_positions[thread_id] = positions[seen.first + thread_id];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (apart(mine, seen, size.window)) continue;

    Sums scores[R / 8];
    UNROLL for (int j = 0; j < R / 8; j++) scores[j] = zeros();
    UNROLL for (int d = 0; d < D / 8; d++) {
      simdgroup_matrix<T, 8, 8> qd = q.at(d);
      UNROLL for (int j = 0; j < R / 8; j++) {
        simdgroup_matrix<T, 8, 8> k;
        simdgroup_load(k, key_tile + 8 * j * LD + 8 * d, LD, ulong2(0), true);
        simdgroup_multiply_accumulate(scores[j], qd, k, scores[j]);
      }
    }
    const bool full = together(mine, seen, size.window);
    float highest = top;
    UNROLL for (int j = 0; j < R / 8; j++) {
      UNROLL for (int e = 0; e < 2; e++) {
        const int key = 8 * j + column + e;
        const bool see = full || sees(query, seen.first + key, tile_ends[key], query_position,
                                      tile_positions[key], size.window);
        const float score = see ? scored(scores[j].thread_elements()[e], size) : kHidden;
        scores[j].thread_elements()[e] = score;
        highest = max(highest, score);
      }
    }
    highest = row_max(highest);
    const float shrink = fast::exp2(top - highest);
    float sum = 0.0f;
    UNROLL for (int j = 0; j < R / 8; j++) {
      UNROLL for (int e = 0; e < 2; e++) {
        const float score = scores[j].thread_elements()[e];
        const float mass = score == kHidden ? 0.0f : fast::exp2(score - highest);
        scores[j].thread_elements()[e] = mass;
        sum += mass;
      }
    }
    total = total * shrink + row_sum(sum);
    top = highest;
    UNROLL for (int d = 0; d < D / 8; d++) {
      output[d].thread_elements()[0] *= shrink;
      output[d].thread_elements()[1] *= shrink;
      UNROLL for (int j = 0; j < R / 8; j++) {
        simdgroup_matrix<T, 8, 8> v;
        simdgroup_load(v, value_tile + 8 * j * LD + 8 * d, LD);
        simdgroup_multiply_accumulate(output[d], scores[j], v, output[d]);
      }
    }
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  if (live) {
    UNROLL for (int d = 0; d < D / 8; d++) {
      out[place + 8 * d] = T(output[d].thread_elements()[0] * inverse);
      out[place + 8 * d + 1] = T(output[d].thread_elements()[1] * inverse);
    }
  }
  if (column == 0) {
    const size_t line = size_t(batch * size.heads + head) * size.padded + query;
    log_sums[line] = total == 0.0f ? -kHidden : (top + log2(total)) * kLn2;
  }
}

// One kernel for all three gradients. WHOSE says what its rows are and what it walks over:
//   kQueries   rows queries, row_partners upstream    columns keys, column_partners values
//   kKeys      rows keys, row_partners values         columns queries, column_partners upstream
//   kValues    rows keys, row_partners not read       columns queries, column_partners upstream
template <typename T, int D, int R, int HELD, int WHOSE>
[[kernel]] void tree_attention_gradient(
    const device T* rows [[buffer(0)]],
    const device T* row_partners [[buffer(1)]],
    const device T* columns [[buffer(2)]],
    const device T* column_partners [[buffer(3)]],
    const device float* log_sums [[buffer(4)]],
    const device float* delta [[buffer(5)]],
    const device int* ends [[buffer(6)]],
    const device int* positions [[buffer(7)]],
    const device int* spans [[buffer(8)]],
    const device int* sizes [[buffer(9)]],
    device T* gradient [[buffer(10)]],
    uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],
    uint thread_index_in_threadgroup [[thread_index_in_threadgroup]],
    uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
    uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr int LD = D + 16 / sizeof(T);
  constexpr bool OF_QUERIES = WHOSE == kQueries;
  threadgroup vec<T, 4> store[R * LD / 4];
  threadgroup vec<T, 4> partner_store[R * LD / 4];
  threadgroup int tile_ends[R];
  threadgroup int tile_positions[R];
  threadgroup float tile_sums[R];
  threadgroup float tile_deltas[R];
  threadgroup T* tile = (threadgroup T*)store;
  threadgroup T* partner_tile = (threadgroup T*)partner_store;
  const Sizes size(sizes);
  const ushort thread_id = thread_index_in_threadgroup;
  const ushort simdgroup = simdgroup_index_in_threadgroup;
  const int column = fragment_column(thread_index_in_simdgroup);
  const int head = threadgroup_position_in_grid.y, batch = threadgroup_position_in_grid.z;
  const int repeats = size.heads / size.groups;
  const int row_heads = OF_QUERIES ? size.heads : size.groups;
  const int column_heads = OF_QUERIES ? size.groups : size.heads;
  ends += size_t(batch) * size.padded;
  positions += size_t(batch) * size.padded;
  spans += size_t(batch) * (size.padded / R) * 4;

  const int first_block = int(threadgroup_position_in_grid.x) * (kRows / R);
  const Span block = Span::of<R>(spans, first_block, kRows / R);
  const int row = block.first + 8 * simdgroup + fragment_row(thread_index_in_simdgroup);
  const int row_end = ends[row], row_position = positions[row];
  const Span mine = block.narrowed(simdgroup, row_end, row_position);
  const bool live = row < size.tokens;
  const size_t place =
      (size_t(batch * row_heads + head) * size.tokens + (live ? row : 0)) * D + column;
  const RowBlock<T, D, HELD> own(rows + place);
  const RowBlock<T, D, HELD && WHOSE != kValues> partner(row_partners + place);
  float row_log_sum = 0.0f, row_delta = 0.0f;
  if (OF_QUERIES) {
    const size_t line = size_t(batch * row_heads + head) * size.padded + row;
    row_log_sum = log_sums[line] * kLog2E;
    row_delta = delta[line];
  }
  Sums sums[D / 8];
  UNROLL for (int d = 0; d < D / 8; d++) sums[d] = zeros();

  // Queries see nothing behind themselves; keys are seen by nothing in front of them, or behind the
  // last of their ends.
  const int first_tile = OF_QUERIES ? 0 : first_block;
  const int tiles_end = OF_QUERIES ? block.last + 1 : block.high_end;
  const int first_head = OF_QUERIES ? head / repeats : head * repeats;
  for (int other = first_head; other < first_head + (OF_QUERIES ? 1 : repeats); other++) {
    const size_t base = size_t(batch * column_heads + other) * size.tokens;
    for (int index = first_tile; index * R < tiles_end; index++) {
      const Span met = Span::of<R>(spans, index, 1);
      if (OF_QUERIES ? apart(block, met, size.window) : apart(met, block, size.window)) continue;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const size_t start = (base + met.first) * D;
      const int left = size.tokens - met.first;
      load_tile<T, R, D, LD>(tile, columns + start, left, thread_id);
      load_tile<T, R, D, LD>(partner_tile, column_partners + start, left, thread_id);
      if (thread_id < R) {
        const int token = met.first + thread_id;
        tile_positions[thread_id] = positions[token];
        if (OF_QUERIES) {
          tile_ends[thread_id] = ends[token];
        } else {
          const size_t line = size_t(batch * column_heads + other) * size.padded + token;
          tile_sums[thread_id] = log_sums[line] * kLog2E;
          tile_deltas[thread_id] = delta[line];
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (OF_QUERIES ? apart(mine, met, size.window) : apart(met, mine, size.window)) continue;

      Sums scores[R / 8], pulls[R / 8];
      UNROLL for (int j = 0; j < R / 8; j++) {
        scores[j] = zeros();
        pulls[j] = zeros();
      }
      UNROLL for (int d = 0; d < D / 8; d++) {
        simdgroup_matrix<T, 8, 8> left_factor = own.at(d);
        UNROLL for (int j = 0; j < R / 8; j++) {
          simdgroup_matrix<T, 8, 8> right_factor;
          simdgroup_load(right_factor, tile + 8 * j * LD + 8 * d, LD, ulong2(0), true);
          simdgroup_multiply_accumulate(scores[j], left_factor, right_factor, scores[j]);
        }
      }
      UNROLL for (int d = 0; d < (WHOSE == kValues ? 0 : D / 8); d++) {
        simdgroup_matrix<T, 8, 8> left_factor = partner.at(d);
        UNROLL for (int j = 0; j < R / 8; j++) {
          simdgroup_matrix<T, 8, 8> right_factor;
          simdgroup_load(right_factor, partner_tile + 8 * j * LD + 8 * d, LD, ulong2(0), true);
          simdgroup_multiply_accumulate(pulls[j], left_factor, right_factor, pulls[j]);
        }
      }
      const bool full =
          OF_QUERIES ? together(mine, met, size.window) : together(met, mine, size.window);
      UNROLL for (int j = 0; j < R / 8; j++) {
        UNROLL for (int e = 0; e < 2; e++) {
          const int c = 8 * j + column + e, met_token = met.first + c;
          bool see = full;
          if (!full && OF_QUERIES) {
            see = sees(row, met_token, tile_ends[c], row_position, tile_positions[c], size.window);
          } else if (!full) {
            see = sees(met_token, row, row_end, tile_positions[c], row_position, size.window);
          }
          const float score = scored(scores[j].thread_elements()[e], size);
          const float log_sum = OF_QUERIES ? row_log_sum : tile_sums[c];
          const float shift = OF_QUERIES ? row_delta : tile_deltas[c];
          float mass = see ? fast::exp2(score - log_sum) : 0.0f;
          if (WHOSE != kValues) {
            mass *= (pulls[j].thread_elements()[e] - shift) * slope(score, size);
          }
          scores[j].thread_elements()[e] = mass;
        }
      }
      const threadgroup T* factors = WHOSE == kValues ? partner_tile : tile;
      UNROLL for (int d = 0; d < D / 8; d++) {
        UNROLL for (int j = 0; j < R / 8; j++) {
          simdgroup_matrix<T, 8, 8> factor;
          simdgroup_load(factor, factors + 8 * j * LD + 8 * d, LD);
          simdgroup_multiply_accumulate(sums[d], scores[j], factor, sums[d]);
        }
      }
    }
  }
  const float scale = WHOSE == kValues ? 1.0f : size.scale;
  if (live) {
    UNROLL for (int d = 0; d < D / 8; d++) {
      gradient[place + 8 * d] = T(sums[d].thread_elements()[0] * scale);
      gradient[place + 8 * d + 1] = T(sums[d].thread_elements()[1] * scale);
    }
  }
}

#ifdef MLX_ALIGN_STANDALONE  // for a check by `xcrun metal`: the variants that are used
#define VARIANT(NAME, T, D, R, HELD)                                                              \
  template [[host_name("forward_" #NAME)]] [[kernel]]                                             \
  decltype(tree_attention_forward<T, D, R, HELD>) tree_attention_forward<T, D, R, HELD>;          \
  template [[host_name("queries_" #NAME)]] [[kernel]] decltype(                                   \
      tree_attention_gradient<T, D, R, HELD, 0>) tree_attention_gradient<T, D, R, HELD, 0>;       \
  template [[host_name("keys_" #NAME)]] [[kernel]] decltype(                                      \
      tree_attention_gradient<T, D, R, HELD, 1>) tree_attention_gradient<T, D, R, HELD, 1>;       \
  template [[host_name("values_" #NAME)]] [[kernel]] decltype(                                    \
      tree_attention_gradient<T, D, R, HELD, 2>) tree_attention_gradient<T, D, R, HELD, 2>;
VARIANT(half_64, half, 64, 16, 1)
VARIANT(half_80, half, 80, 16, 1)
VARIANT(half_96, half, 96, 16, 1)
VARIANT(half_128, half, 128, 16, 1)
VARIANT(half_256, half, 256, 16, 0)
VARIANT(bfloat_64, bfloat, 64, 16, 1)
VARIANT(bfloat_80, bfloat, 80, 16, 1)
VARIANT(bfloat_96, bfloat, 96, 16, 1)
VARIANT(bfloat_128, bfloat, 128, 16, 1)
VARIANT(bfloat_256, bfloat, 256, 16, 0)
VARIANT(float_64, float, 64, 16, 1)
VARIANT(float_80, float, 80, 16, 1)
VARIANT(float_96, float, 96, 16, 1)
VARIANT(float_128, float, 128, 16, 0)
VARIANT(float_256, float, 256, 8, 0)
#endif
