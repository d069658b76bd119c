// softmax(q k^T * scale) v of a vision tower in bfloat16: every token sees every token of its picture. Scores and sums are
// float32, probabilities are rounded to bfloat16 for the second product, as in torch's flash attention on CPU, which
// takes twice the time at the head sizes of these towers.
//
// Both products keep their results in the lanes of registers: keys and values are packed in pairs, so that one
// instruction multiplies a pair of a query (or of probabilities), broadcast, with 16 pairs of keys (or of columns).

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "pairs.h"

namespace {

using at::Tensor;
constexpr int64_t MOST_DIM = 128;  // of a head

bool supported() { return HAVE_KERNELS; }

#if HAVE_KERNELS

constexpr int QUERIES = 6;  // rows of q at a time: 6 x 4 registers of scores, 3 x 8 of outputs

// e^x for x <= 0, to 1e-7 of it: 2^n times a polynomial of the rest (Cephes, expf)
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(x, x), _mm512_add_ps(x, _mm512_set1_ps(1.f)));
  return _mm512_scalef_ps(p, n);
}

struct Packed {  // one head, in pairs: keys [D / 2, rounded up to 16][padded] and values [padded / 2][D, rounded up to 16]
  Tensor memory;
  uint32_t *keys, *values;
};

struct Head {
  int64_t S, D, padded;  // tokens, head_dim, tokens rounded up to 64
};

Packed pack(const uint16_t* k, const uint16_t* v, int64_t k_stride, int64_t v_stride, const Head& h) {
  const int64_t wide = (h.D + 15) / 16 * 16, pairs = (h.D + 31) / 32 * 16;
  Packed p{at::empty({pairs * h.padded + h.padded / 2 * wide}, at::kInt), nullptr, nullptr};
  p.keys = static_cast<uint32_t*>(p.memory.data_ptr());
  p.values = p.keys + pairs * h.padded;
  for (int64_t s = 0; s < h.padded; s += LANES) pack_pairs(k + s * k_stride, k_stride, h.S - s, h.D, p.keys + s, h.padded);
  for (int64_t s = 0; s < h.padded; s += 2)
    for (int64_t d = 0; d < wide; d += LANES) {
      const __mmask16 mask = h.D - d >= LANES ? ~__mmask16(0) : __mmask16((1u << (h.D - d)) - 1);
      auto part = [&](int64_t row) {
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(row < h.S ? mask : 0, v + row * v_stride + d));
      };
      _mm512_storeu_si512(p.values + s / 2 * wide + d, _mm512_or_si512(part(s), _mm512_slli_epi32(part(s + 1), 16)));
    }
  return p;
}

// scores [QUERIES][padded] of QUERIES rows of q, each [D / 2] pairs
void score(const uint32_t* q, const Packed& p, const Head& h, float scale, float* out) {
  for (int64_t s = 0; s < h.padded; s += 64) {
    __m512 acc[QUERIES][4];
    for (auto& row : acc)
      for (auto& a : row) a = _mm512_setzero_ps();
    for (int64_t d = 0; d < h.D / 2; d++) {
      __m512bh keys[4];
      for (int i = 0; i < 4; i++) keys[i] = (__m512bh)_mm512_loadu_si512(&p.keys[d * h.padded + s + 16 * i]);
      for (int r = 0; r < QUERIES; r++)
        for (int i = 0; i < 4; i++) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], both(q[r * (h.D / 2) + d]), keys[i]);
    }
    for (int r = 0; r < QUERIES; r++)
      for (int i = 0; i < 4; i++)
        _mm512_storeu_ps(out + r * h.padded + s + 16 * i, _mm512_mul_ps(acc[r][i], _mm512_set1_ps(scale)));
  }
}

// A row of scores -> e^(score - largest) in bfloat16 (zero beyond S); returns their sum before rounding
float probabilities(float* row, const Head& h, uint16_t* out) {
  std::fill(row + h.S, row + h.padded, -INFINITY);
  __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < h.padded; s += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(row + s));
  most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t s = 0; s < h.padded; s += 16) {
    const __m512 x = _mm512_loadu_ps(row + s);
    const __mmask16 real = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    const __m512 e = _mm512_maskz_mov_ps(real, exponential(_mm512_sub_ps(x, most)));
    sum = _mm512_add_ps(sum, e);
    _mm256_storeu_si256((__m256i*)(out + s), (__m256i)_mm512_cvtneps_pbh(e));
  }
  return _mm512_reduce_add_ps(sum);
}

// Three rows of probabilities [padded] times the values -> out[3][COLUMNS * 16]
template <int COLUMNS>
void weigh(const uint32_t* p, const Packed& packed, const Head& h, float* out) {
  __m512 acc[3][COLUMNS];
  for (auto& row : acc)
    for (auto& a : row) a = _mm512_setzero_ps();
  for (int64_t s = 0; s < h.padded / 2; s++) {
    const uint32_t* v = packed.values + s * COLUMNS * 16;
    const __m512bh ps[3] = {both(p[s]), both(p[h.padded / 2 + s]), both(p[h.padded + s])};
    for (int c = 0; c < COLUMNS; c++) {
      const __m512bh vs = (__m512bh)_mm512_loadu_si512(v + 16 * c);
      for (int r = 0; r < 3; r++) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], ps[r], vs);
    }
  }
  for (int r = 0; r < 3; r++)
    for (int c = 0; c < COLUMNS; c++) _mm512_storeu_ps(out + (r * COLUMNS + c) * 16, acc[r][c]);
}

template <int COLUMNS>
void attend_rows(const uint16_t* q, int64_t q_stride, uint16_t* out, int64_t out_stride, int64_t rows, const Packed& p,
                 const Head& h, float scale) {
  thread_local std::vector<float> scores;
  thread_local std::vector<uint32_t> probable;
  scores.resize(QUERIES * h.padded);
  probable.resize(QUERIES * h.padded / 2);
  uint32_t queries[QUERIES * MOST_DIM / 2] = {};
  for (int64_t r = 0; r < rows; r++) std::memcpy(queries + r * (h.D / 2), q + r * q_stride, h.D * 2);
  score(queries, p, h, scale, scores.data());
  float total[QUERIES], sums[3 * COLUMNS * 16];
  for (int r = 0; r < QUERIES; r++)
    total[r] = probabilities(scores.data() + r * h.padded, h, reinterpret_cast<uint16_t*>(probable.data() + r * h.padded / 2));
  for (int r0 = 0; r0 < rows; r0 += 3) {
    weigh<COLUMNS>(probable.data() + r0 * h.padded / 2, p, h, sums);
    for (int r = r0; r < std::min<int64_t>(rows, r0 + 3); r++)
      for (int64_t d = 0; d < h.D; d++)
        out[r * out_stride + d] = to_bf16(sums[(r - r0) * COLUMNS * 16 + d] / total[r]);
  }
}

using Rows = void (*)(const uint16_t*, int64_t, uint16_t*, int64_t, int64_t, const Packed&, const Head&, float);
constexpr Rows BY_COLUMNS[] = {attend_rows<1>, attend_rows<2>, attend_rows<3>, attend_rows<4>,
                               attend_rows<5>, attend_rows<6>, attend_rows<7>, attend_rows<8>};

#endif  // HAVE_KERNELS

// q, k, v bfloat16 [H, S, D], D even and at most 128, the last dimension contiguous -> [S, H, D] contiguous
Tensor attend_all(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
#if HAVE_KERNELS
  const int64_t H = q.size(0), S = q.size(1), D = q.size(2);
  for (const Tensor& t : {q, k, v})
    TORCH_CHECK(t.dim() == 3 && t.sizes() == q.sizes() && t.stride(2) == 1 && t.scalar_type() == at::kBFloat16,
                "bfloat16 tensors of one shape [H, S, D], contiguous in D, are needed, not ", t.sizes());
  TORCH_CHECK(D % 2 == 0 && D <= MOST_DIM, "head_dim ", D, ": an even one of at most ", MOST_DIM, " is needed");
  Tensor out = at::empty({S, H, D}, q.options());
  if (!S) return out;
  const Head h{S, D, (S + 63) / 64 * 64};
  auto raw = [](const Tensor& t, int64_t head) { return static_cast<uint16_t*>(t.data_ptr()) + head * t.stride(0); };
  std::vector<Packed> packed(H);
  at::parallel_for(0, H, 1, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; i++) packed[i] = pack(raw(k, i), raw(v, i), k.stride(1), v.stride(1), h);
  });
  const int64_t blocks = (S + QUERIES - 1) / QUERIES;
  uint16_t* to = static_cast<uint16_t*>(out.data_ptr());
  at::parallel_for(0, H * blocks, 8, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; i++) {
      const int64_t head = i / blocks, row = i % blocks * QUERIES;
      BY_COLUMNS[(D + 15) / 16 - 1](raw(q, head) + row * q.stride(1), q.stride(1), to + (row * H + head) * D, H * D,
                                    std::min<int64_t>(QUERIES, S - row), packed[head], h, float(scale));
    }
  });
  return out;
#else
  TORCH_CHECK(false, "this processor lacks AVX-512 BF16");
#endif
}

Tensor attend_all_meta(const Tensor& q, const Tensor&, const Tensor&, double) {
  return at::empty_symint({q.sym_size(1), q.sym_size(0), q.sym_size(2)}, q.options());
}

TORCH_LIBRARY_FRAGMENT(qwenvl_tp, m) {
  m.def("attend_all_supported() -> bool", supported);
  m.def("attend_all(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(qwenvl_tp, CPU, m) { m.impl("attend_all", attend_all); }
TORCH_LIBRARY_IMPL(qwenvl_tp, Meta, m) { m.impl("attend_all", attend_all_meta); }

}  // namespace
