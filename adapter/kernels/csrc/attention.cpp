// softmax(q k^T * scale) v in bfloat16: of a vision encoder, where every token sees every token of its image, of a prompt,
// where it sees those up to itself, and of a decode step's tokens. Scores and sums are float32, probabilities are rounded
// to bfloat16 for the second product, as in torch's flash attention on CPU, which takes twice the time at these sizes.
//
// Both products keep their results in the lanes of registers: keys and values are packed in pairs, so that one
// instruction multiplies a pair of a query (or of probabilities), broadcast, with 16 pairs of keys (or of columns).

#include "attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "pairs.h"

namespace {

using at::Tensor;

bool supported() { return HAVE_KERNELS; }

#if HAVE_KERNELS

constexpr int64_t QUERIES = 6;  // rows of q at a time: 6 x 4 registers of scores
constexpr int64_t TILE = 64;    // keys of a tile of scores
constexpr float LOG2_E = 1.44269504f;

// 2^x for x <= 0, to 2e-7 of it, 0 for -infinity: 2^floor(x) times a polynomial, fitted to its least largest error
inline __m512 power_of_two(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 1);  // x - floor(x)
  __m512 p = _mm512_set1_ps(1.867129817e-03f);
  for (float c : {9.017030708e-03f, 5.579991266e-02f, 2.401644439e-01f, 6.931512952e-01f, 1.f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, x);
}

// Keys and values of one head in pairs: keys [padded / TILE][pairs][TILE], values [padded / 2][wide]
struct Packed {
  int64_t D, padded, pairs, wide;  // head_dim, tokens rounded up to TILE, D / 2 and D rounded up to 16
  Tensor memory;
  uint32_t *keys, *values;

  Packed(Rows k, Rows v, int64_t S, int64_t D)
      : D(D), padded((S + TILE - 1) / TILE * TILE), pairs((D + 31) / 32 * 16), wide((D + 15) / 16 * 16),
        memory(at::empty({padded * pairs + padded / 2 * wide}, at::kInt)) {
    keys = static_cast<uint32_t*>(memory.data_ptr());
    values = keys + padded * pairs;
    for (int64_t s = 0; s < padded; s += LANES)
      pack_pairs(k.at + s * k.stride, k.stride, S - s, D, keys + s / TILE * pairs * TILE + s % TILE, TILE);
    for (int64_t s = 0; s < padded; s += 2)
      for (int64_t d = 0; d < wide; d += LANES) {
        const __mmask16 mask = D - d >= LANES ? ~__mmask16(0) : __mmask16((1u << (D - d)) - 1);
        auto part = [&](int64_t row) {
          return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(row < S ? mask : 0, v.at + row * v.stride + d));
        };
        _mm512_storeu_si512(values + s / 2 * wide + d, _mm512_or_si512(part(s), _mm512_slli_epi32(part(s + 1), 16)));
      }
  }
};

// scores [QUERIES][length] of QUERIES rows of q, each [D / 2] pairs, with the first `length` keys
void score(const uint32_t* q, const Packed& p, int64_t length, float scale, float* out) {
  for (int64_t s = 0; s < length; s += TILE) {
    __m512 acc[QUERIES][4];
    for (auto& row : acc)
      for (auto& a : row) a = _mm512_setzero_ps();
    const uint32_t* tile = p.keys + s * p.pairs;
    for (int64_t d = 0; d < p.D / 2; d++) {
      __m512bh keys[4];
      UNROLL for (int i = 0; i < 4; i++) keys[i] = (__m512bh)_mm512_load_si512(tile + d * TILE + 16 * i);
      UNROLL for (int r = 0; r < QUERIES; r++)
        UNROLL for (int i = 0; i < 4; i++) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], keys[i], both(q[r * (p.D / 2) + d]));
    }
    for (int r = 0; r < QUERIES; r++)
      for (int i = 0; i < 4; i++)
        _mm512_storeu_ps(out + r * length + s + 16 * i, _mm512_mul_ps(acc[r][i], _mm512_set1_ps(scale)));
  }
}

// A row of scores, of base two -> 2^(score - largest) in bfloat16, zero from `seen` on; returns their sum before rounding
float probabilities(float* row, int64_t seen, int64_t length, uint16_t* out) {
  std::fill(row + seen, row + length, -INFINITY);
  __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < length; s += LANES) most = _mm512_max_ps(most, _mm512_loadu_ps(row + s));
  most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t s = 0; s < length; s += LANES) {
    const __m512 e = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(row + s), most));
    sum = _mm512_add_ps(sum, e);
    _mm256_storeu_si256((__m256i*)(out + s), (__m256i)_mm512_cvtneps_pbh(e));
  }
  return _mm512_reduce_add_ps(sum);
}

// R rows of probabilities [length] times the values -> out[R][COLUMNS * 16]
template <int R, int COLUMNS>
void weigh(const uint32_t* p, const Packed& packed, int64_t length, float* out) {
  __m512 acc[R][COLUMNS];
  for (auto& row : acc)
    for (auto& a : row) a = _mm512_setzero_ps();
  for (int64_t s = 0; s < length / 2; s++)
    UNROLL for (int c = 0; c < COLUMNS; c++) {
      const __m512bh v = (__m512bh)_mm512_loadu_si512(packed.values + (s * COLUMNS + c) * LANES);
      UNROLL for (int r = 0; r < R; r++) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], v, both(p[r * length / 2 + s]));
    }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < COLUMNS; c++) _mm512_storeu_ps(out + (r * COLUMNS + c) * LANES, acc[r][c]);
}

// At most QUERIES rows; row r sees the first seen + r * more keys
template <int COLUMNS>
void attend_rows(Rows q, int64_t rows, const Packed& p, int64_t seen, int64_t more, float scale, uint16_t* out,
                 int64_t out_stride) {
  constexpr int R = COLUMNS <= 5 ? 6 : 3;  // 30 registers of sums at most
  const int64_t length = (seen + (rows - 1) * more + TILE - 1) / TILE * TILE, D = p.D;
  thread_local std::vector<float> scores;
  thread_local std::vector<uint32_t> probable;
  scores.resize(QUERIES * length);
  probable.resize(QUERIES * length / 2);
  uint32_t queries[QUERIES * MOST_DIM / 2] = {};
  for (int64_t r = 0; r < rows; r++) std::memcpy(queries + r * (D / 2), q.at + r * q.stride, D * 2);
  score(queries, p, length, scale * LOG2_E, scores.data());
  float total[QUERIES], sums[R * COLUMNS * LANES];
  for (int64_t r = 0; r < rows; r++)
    total[r] = probabilities(scores.data() + r * length, seen + r * more, length,
                             reinterpret_cast<uint16_t*>(probable.data() + r * length / 2));
  for (int64_t first = 0; first < rows; first += R) {
    weigh<R, COLUMNS>(probable.data() + first * length / 2, p, length, sums);
    for (int64_t r = first; r < std::min(rows, first + R); r++)
      for (int64_t d = 0; d < D; d += LANES) {
        const __m512 sum = _mm512_loadu_ps(sums + (r - first) * COLUMNS * LANES + d);
        const __mmask16 mask = D - d >= LANES ? ~__mmask16(0) : __mmask16((1u << (D - d)) - 1);
        _mm256_mask_storeu_epi16(out + r * out_stride + d, mask,
                                 (__m256i)_mm512_cvtneps_pbh(_mm512_div_ps(sum, _mm512_set1_ps(total[r]))));
      }
  }
}

using Attend = void (*)(Rows, int64_t, const Packed&, int64_t, int64_t, float, uint16_t*, int64_t);
constexpr Attend BY_COLUMNS[] = {attend_rows<1>, attend_rows<2>, attend_rows<3>, attend_rows<4>,
                                 attend_rows<5>, attend_rows<6>, attend_rows<7>, attend_rows<8>};

Rows rows_of(const Tensor& t, int64_t head) {
  return {static_cast<const uint16_t*>(t.data_ptr()) + head * t.stride(0), t.stride(1)};
}

#endif  // HAVE_KERNELS

// q bfloat16 [H, S, D], k and v [KV, S, D], H a multiple of KV, D even and at most 128, the last dimension contiguous; causal:
// a token sees those up to itself -> [S, H, D] contiguous
Tensor attend_all(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
#if HAVE_KERNELS
  const int64_t H = q.size(0), S = q.size(1), D = q.size(2), KV = k.size(0);
  for (const Tensor& t : {q, k, v})
    TORCH_CHECK(t.dim() == 3 && t.size(1) == S && t.size(2) == D && t.stride(2) == 1 && t.scalar_type() == at::kBFloat16,
                "bfloat16 tensors [heads, ", S, ", ", D, "], contiguous in their last dimension, are needed, not ", t.sizes());
  TORCH_CHECK(KV && H % KV == 0 && v.size(0) == KV, H, " query heads do not fit ", KV, " and ", v.size(0), " KV heads");
  TORCH_CHECK(D % 2 == 0 && D <= MOST_DIM, "head_dim ", D, ": an even one of at most ", MOST_DIM, " is needed");
  Tensor out = at::empty({S, H, D}, q.options());
  if (!S) return out;
  std::vector<std::unique_ptr<Packed>> packed(KV);
  at::parallel_for(0, KV, 1, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; i++) packed[i] = std::make_unique<Packed>(rows_of(k, i), rows_of(v, i), S, D);
  });
  const int64_t blocks = (S + QUERIES - 1) / QUERIES;
  uint16_t* to = static_cast<uint16_t*>(out.data_ptr());
  at::parallel_for(0, H * blocks, 8, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; i++) {
      const int64_t head = i / blocks, row = i % blocks * QUERIES;
      Rows part = rows_of(q, head);
      part.at += row * part.stride;
      BY_COLUMNS[(D + 15) / 16 - 1](part, std::min(QUERIES, S - row), *packed[head / (H / KV)], causal ? row + 1 : S, causal,
                                    float(scale), to + (row * H + head) * D, H * D);
    }
  });
  return out;
#else
  TORCH_CHECK(false, "this processor lacks AVX-512 BF16");
#endif
}

Tensor attend_all_meta(const Tensor& q, const Tensor&, const Tensor&, double, bool) {
  return at::empty_symint({q.sym_size(1), q.sym_size(0), q.sym_size(2)}, q.options());
}

TORCH_LIBRARY_FRAGMENT(qwenvl_tp, m) {
  m.def("attend_all_supported() -> bool", supported);
  m.def("attend_all(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> Tensor");
}
TORCH_LIBRARY_IMPL(qwenvl_tp, CPU, m) { m.impl("attend_all", attend_all); }
TORCH_LIBRARY_IMPL(qwenvl_tp, Meta, m) { m.impl("attend_all", attend_all_meta); }

}  // namespace

bool attend_head(Rows q, int64_t rows, Rows k, Rows v, int64_t S, int64_t D, float scale, uint16_t* out) {
#if HAVE_KERNELS
  if (D % 2 || D > MOST_DIM) return false;
  const Packed packed(k, v, S, D);
  for (int64_t r = 0; r < rows; r += QUERIES)
    BY_COLUMNS[(D + 15) / 16 - 1]({q.at + r * q.stride, q.stride}, std::min(QUERIES, rows - r), packed, S, 0, scale,
                                  out + r * D, D);
  return true;
#else
  return false;
#endif
}
