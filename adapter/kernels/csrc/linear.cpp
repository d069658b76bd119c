// y = x W^T + b. Few rows of x, as decoding has them, are bound by reading W, so W is read once, in order, in the format
// in which it lies in memory: bfloat16, or codes of 8 or 4 bits with a float16 scale for each group of 64 along the inputs.
// Many rows are bound by multiplying: product.cpp, or torch's product where the processor has tiles (AMX).
//
// A quantised weight is scale * (code - zero), zero 128 or 8. x is quantised on the way, per row and group, to signed 8
// bits, so that VNNI multiplies codes as they are: sum((c - z) q) = sum(c q) - z sum(q).
// The last group of a row may lack inputs: its codes are there, and x counts as zero.
// 4-bit codes of a group: byte i holds element i in its low half and element i + 32 in its high half.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "bf16.h"
#include "product.h"

namespace {

using at::Tensor;
constexpr int64_t GROUP = 64;   // weights that share a scale; adapter/kernels/linear.py has the same number
constexpr int64_t FEW_ROWS = 16;  // of x, which a quantised weight takes as codes; adapter/kernels/linear.py has the same number
constexpr int64_t READING_ROWS = 8;  // of x, up to which multiplying keeps up with reading W
constexpr int64_t AHEAD = 4096;  // bytes of W asked for before they are needed

bool supported() { return HAVE_KERNELS; }

#if HAVE_KERNELS

inline uint16_t* raw(const Tensor& t) { return static_cast<uint16_t*>(t.data_ptr()); }
inline void put(uint16_t* y, float v) { *y = to_bf16(v); }
inline void put(float* y, float v) { *y = v; }
inline float get(const uint16_t* x) { return from_bf16(*x); }
inline float get(const float* x) { return *x; }

inline __m512bh load(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh load(const uint16_t* p, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, p); }

// w . x of K inputs: a single stream of memory, asked for ahead (into the second cache: the first is too small for what
// comes 4 KB later, and loses x to it)
inline float dot(const uint16_t* w, const uint16_t* x, int64_t K) {
  constexpr int STEPS = 8;
  __m512 sums[STEPS];
  UNROLL for (int u = 0; u < STEPS; u++) sums[u] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 32 * STEPS <= K; k += 32 * STEPS)
    UNROLL for (int u = 0; u < STEPS; u++) {
      _mm_prefetch(reinterpret_cast<const char*>(w + k + 32 * u) + AHEAD, _MM_HINT_T1);
      sums[u] = _mm512_dpbf16_ps(sums[u], load(w + k + 32 * u), load(x + k + 32 * u));
    }
  for (; k < K; k += 32) {
    const __mmask32 mask = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
    sums[0] = _mm512_dpbf16_ps(sums[0], load(w + k, mask), load(x + k, mask));
  }
  UNROLL for (int u = 1; u < STEPS; u++) sums[0] = _mm512_add_ps(sums[0], sums[u]);
  return _mm512_reduce_add_ps(sums[0]);
}

struct Dense {
  const uint16_t *x, *w;
  int64_t stride;  // of w, between rows
  const uint16_t* bias;
  uint16_t* y;
  int64_t K, N;

  void store(int64_t m, int64_t n, float v) const { put(y + m * N + n, bias ? v + from_bf16(bias[n]) : v); }

  void one(int64_t n0, int64_t n1) const {
    for (int64_t n = n0; n < n1; n++) store(0, n, dot(w + n * stride, x, K));
  }

  // R rows of w times M of x; on the way the next R rows of w are asked for
  template <int R, int M>
  void block(int64_t n) const {
    const uint16_t* from = w + n * stride;
    __m512 sums[R][M];
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int m = 0; m < M; m++) sums[r][m] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 32) {
      const __mmask32 mask = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
      __m512bh ws[R];
      UNROLL for (int r = 0; r < R; r++) {
        _mm_prefetch(reinterpret_cast<const char*>(from + (R + r) * stride + k), _MM_HINT_T1);
        ws[r] = load(from + r * stride + k, mask);
      }
      UNROLL for (int m = 0; m < M; m++) {
        const __m512bh xs = load(x + m * K + k, mask);
        UNROLL for (int r = 0; r < R; r++) sums[r][m] = _mm512_dpbf16_ps(sums[r][m], ws[r], xs);
      }
    }
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int m = 0; m < M; m++) store(m, n + r, _mm512_reduce_add_ps(sums[r][m]));
  }

  template <int M>
  void several(int64_t n0, int64_t n1) const {
    constexpr int R = M > 6 ? 3 : 4;  // as many sums as registers hold
    int64_t n = n0;
    for (; n + R <= n1; n += R) block<R, M>(n);
    for (; n < n1; n++) block<1, M>(n);
  }

  void run(int64_t rows, int64_t n0, int64_t n1) const {
    switch (rows) {
      case 1: return one(n0, n1);
      case 2: return several<2>(n0, n1);
      case 3: return several<3>(n0, n1);
      case 4: return several<4>(n0, n1);
      case 5: return several<5>(n0, n1);
      case 6: return several<6>(n0, n1);
      case 7: return several<7>(n0, n1);
      case 8: return several<8>(n0, n1);
    }
  }
};

// x quantised: codes [rows][groups * 64], for each group its scale and scale * zero * sum of its codes
struct Quantised {
  std::vector<int8_t> codes;
  std::vector<float> scale, shift;
  int64_t groups, stride, padded;
};

template <typename T>
Quantised quantise(const T* x, int64_t rows, int64_t K, int bits) {
  Quantised q;
  q.groups = (K + GROUP - 1) / GROUP;
  q.padded = (q.groups + 15) / 16 * 16;
  q.stride = q.padded * GROUP;
  q.codes.assign(rows * q.stride, 0);
  q.scale.assign(rows * q.padded, 0.f);
  q.shift.assign(rows * q.padded, 0.f);
  const float zero = bits == 8 ? 128.f : 8.f;
  for (int64_t m = 0; m < rows; m++)
    for (int64_t g = 0; g < q.groups; g++) {
      const T* from = x + m * K + g * GROUP;
      float v[GROUP] = {}, most = 0.f;
      const int inputs = int(std::min<int64_t>(GROUP, K - g * GROUP));
      for (int i = 0; i < inputs; i++) v[i] = get(from + i);
#pragma omp simd reduction(max : most)
      for (int i = 0; i < GROUP; i++) most = std::max(most, std::fabs(v[i]));
      const float inverse = most > 0.f ? 127.f / most : 0.f;
      int8_t c[GROUP];
      int sum = 0;
      for (int i = 0; i < GROUP; i++) c[i] = int8_t(std::nearbyint(v[i] * inverse));
      for (int i = 0; i < GROUP; i++) sum += c[i];
      q.scale[m * q.padded + g] = most / 127.f;
      q.shift[m * q.padded + g] = most / 127.f * zero * sum;
      int8_t* to = q.codes.data() + m * q.stride;
      if (bits == 8) {
        std::memcpy(to + g * GROUP, c, GROUP);
      } else {  // two groups make 128: their first halves, then their second halves
        std::memcpy(to + g / 2 * 128 + g % 2 * 32, c, 32);
        std::memcpy(to + g / 2 * 128 + 64 + g % 2 * 32, c + 32, 32);
      }
    }
  return q;
}

// R rows of w, `bytes` apart, times M of x -> out[R][M]. What is asked for ahead is a whole number of R rows away, or the
// streams of the rows would ask for the same lines.
template <int BITS, int R, int M>
inline void rows(const uint8_t* w, const at::Half* scales, int64_t bytes, const Quantised& q, int64_t m0, float* out) {
  const int64_t ahead = R > 1 ? (2 * AHEAD / (R * bytes) + 1) * R * bytes : AHEAD;
  __m512 acc[R][M], less[R][M];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int m = 0; m < M; m++) acc[r][m] = less[r][m] = _mm512_setzero_ps();
  const __m512i low = _mm512_set1_epi8(15), lanes = _mm512_srli_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 3);  // 8 times 0, 8 times 1
  for (int64_t g0 = 0; g0 < q.groups; g0 += 16) {
    const int count = int(std::min<int64_t>(16, q.groups - g0));
    alignas(64) float both[R][M][16];  // scales of w and of x
    UNROLL for (int r = 0; r < R; r++) {
      const __mmask16 there = __mmask16((1u << count) - 1);
      const __m512 ws = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, scales + r * q.groups + g0));
      UNROLL for (int m = 0; m < M; m++) {
        const int64_t at = (m0 + m) * q.padded + g0;
        _mm512_store_ps(both[r][m], _mm512_mul_ps(ws, _mm512_loadu_ps(&q.scale[at])));
        less[r][m] = _mm512_fmadd_ps(ws, _mm512_loadu_ps(&q.shift[at]), less[r][m]);
      }
    }
    constexpr int STEP = BITS == 8 ? 1 : 2;  // groups in a line of memory
    for (int g = 0; g < count; g += STEP) {
      const __m512i pick = _mm512_add_epi32(lanes, _mm512_set1_epi32(g));
      UNROLL for (int r = 0; r < R; r++) {
        const uint8_t* p = w + r * bytes + (g0 + g) * (GROUP * BITS / 8);
        _mm_prefetch(reinterpret_cast<const char*>(p) + ahead, _MM_HINT_T1);
        const __m512i c = g + STEP <= count ? _mm512_loadu_si512(p)
                                            : _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p));
        const __m512i first = BITS == 8 ? c : _mm512_and_si512(c, low);
        const __m512i second = _mm512_and_si512(_mm512_srli_epi16(c, 4), low);
        UNROLL for (int m = 0; m < M; m++) {
          const int8_t* x = q.codes.data() + (m0 + m) * q.stride + (g0 + g) * GROUP;
          __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, _mm512_loadu_si512(x));
          if (BITS == 4) dot = _mm512_dpbusd_epi32(dot, second, _mm512_loadu_si512(x + 64));
          const __m512 s = BITS == 8 ? _mm512_set1_ps(both[r][m][g])
                                     : _mm512_permutexvar_ps(pick, _mm512_load_ps(both[r][m]));
          acc[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), s, acc[r][m]);
        }
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int m = 0; m < M; m++) out[r * M + m] = _mm512_reduce_add_ps(_mm512_sub_ps(acc[r][m], less[r][m]));
}

template <int N>
using Number = std::integral_constant<int, N>;

template <int BITS, typename T>
void few_rows(const Tensor& x, const Tensor& codes, const Tensor& scales, const T* bias, Tensor& y) {
  const int64_t count = x.size(0), K = x.size(1), N = codes.size(0), bytes = codes.size(1);
  const Quantised q = quantise(static_cast<const T*>(x.data_ptr()), count, K, BITS);
  const auto* w = codes.data_ptr<uint8_t>();
  const auto* s = scales.data_ptr<at::Half>();
  T* out = static_cast<T*>(y.data_ptr());
  auto multiply = [&](auto w_rows, auto x_rows, int64_t n, int64_t m) {
    constexpr int R = w_rows, M = x_rows;
    float v[R * M];
    rows<BITS, R, M>(w + n * bytes, s + n * q.groups, bytes, q, m, v);
    for (int r = 0; r < R; r++)
      for (int i = 0; i < M; i++) put(out + (m + i) * N + n + r, bias ? v[r * M + i] + get(bias + n + r) : v[r * M + i]);
  };
  at::parallel_for(0, N, 64, [&](int64_t n, int64_t stop) {
    for (; count == 1 && n + 4 <= stop; n += 4) multiply(Number<4>{}, Number<1>{}, n, 0);
    for (; n < stop; n++)
      for (int64_t m = 0; m < count; m += 4) {
        switch (std::min<int64_t>(count - m, 4)) {
          case 4: multiply(Number<1>{}, Number<4>{}, n, m); break;
          case 3: multiply(Number<1>{}, Number<3>{}, n, m); break;
          case 2: multiply(Number<1>{}, Number<2>{}, n, m); break;
          default: multiply(Number<1>{}, Number<1>{}, n, m);
        }
      }
  });
}

template <int BITS, typename T>
void unpack(const uint8_t* w, const at::Half* scales, int64_t groups, T* out) {
  constexpr float zero = BITS == 8 ? 128.f : 8.f;
  for (int64_t g = 0; g < groups; g++) {
    const float s = float(scales[g]);
    const uint8_t* p = w + g * GROUP * BITS / 8;
    T* to = out + g * GROUP;
    for (int i = 0; i < 32; i++) {
      put(to + i, s * (float(BITS == 8 ? p[i] : p[i] & 15) - zero));
      put(to + 32 + i, s * (float(BITS == 8 ? p[32 + i] : p[i] >> 4) - zero));
    }
  }
}

#endif  // HAVE_KERNELS

// Rows of x up to which `linear` is the fastest product here: all, but for a processor with tiles
int64_t linear_rows() {
#ifdef __AMX_BF16__
  return FEW_ROWS;
#else
  return std::numeric_limits<int64_t>::max();
#endif
}

// x [rows, K], weight [N, K], bias [N], all bfloat16 and contiguous, but for space between the rows of weight -> [rows, N]
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
#if HAVE_KERNELS
  TORCH_CHECK(x.dim() == 2 && x.size(1) == weight.size(1), "x ", x.sizes(), " does not fit weight ", weight.sizes());
  TORCH_CHECK(x.is_contiguous() && weight.stride(1) == 1, "x and the rows of weight must be contiguous");
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, "bfloat16 is needed");
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kBFloat16 && bias->is_contiguous()), "a bfloat16 bias is needed");
  const int64_t rows = x.size(0), K = x.size(1), N = weight.size(0), stride = weight.stride(0);
  Tensor y = at::empty({rows, N}, x.options());
  const uint16_t *from = raw(x), *w = raw(weight), *b = bias ? raw(*bias) : nullptr;
  uint16_t* to = raw(y);
  if (rows > READING_ROWS) product(from, w, stride, b, to, N, rows, K, N);
  else at::parallel_for(0, N, 64, [&](int64_t n0, int64_t n1) { Dense{from, w, stride, b, to, K, N}.run(rows, n0, n1); });
  return y;
#else
  TORCH_CHECK(false, "this processor lacks AVX-512 BF16 and VNNI");
#endif
}

// codes uint8 [N, groups * 8 * bits], scales float16 [N, groups] -> [N, groups * 64] of `dtype` (bfloat16 or float32)
Tensor dequantise(const Tensor& codes, const Tensor& scales, int64_t bits, at::ScalarType dtype) {
#if HAVE_KERNELS
  const int64_t N = codes.size(0), groups = scales.size(1);
  TORCH_CHECK(codes.is_contiguous() && scales.is_contiguous() && codes.size(1) * 8 == groups * GROUP * bits,
              "codes ", codes.sizes(), " and scales ", scales.sizes(), " are not of one matrix of ", bits, " bits");
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kFloat, "bfloat16 or float32 is needed");
  Tensor out = at::empty({N, groups * GROUP}, codes.options().dtype(dtype));
  const auto* w = codes.data_ptr<uint8_t>();
  const auto* s = scales.data_ptr<at::Half>();
  at::parallel_for(0, N, 8, [&](int64_t a, int64_t b) {
    for (int64_t n = a; n < b; n++) {
      const uint8_t* p = w + n * codes.size(1);
      auto go = [&](auto* to) {
        to += n * groups * GROUP;
        if (bits == 8) unpack<8>(p, s + n * groups, groups, to);
        else unpack<4>(p, s + n * groups, groups, to);
      };
      if (dtype == at::kFloat) go(out.data_ptr<float>());
      else go(static_cast<uint16_t*>(out.data_ptr()));
    }
  });
  return out;
#else
  TORCH_CHECK(false, "this processor lacks AVX-512 BF16 and VNNI");
#endif
}

// The same as `linear` for a quantised weight; x bfloat16 or float32, any number of rows: many are multiplied with
// pieces of the weight that are unpacked while they are in the cache.
Tensor linear_quantised(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& bias,
                        int64_t bits) {
#if HAVE_KERNELS
  const int64_t rows = x.size(0), K = x.size(1), N = codes.size(0);
  const int64_t groups = scales.size(1);
  TORCH_CHECK(x.dim() == 2 && groups == (K + GROUP - 1) / GROUP, "x ", x.sizes(), " does not fit ", groups,
              " groups of ", GROUP);
  TORCH_CHECK(bits == 8 || bits == 4, "8 or 4 bits");
  TORCH_CHECK(codes.size(1) * 8 == groups * GROUP * bits && codes.is_contiguous() && scales.is_contiguous() && x.is_contiguous(),
              "codes ", codes.sizes(), ": contiguous tensors of ", K, " inputs are needed");
  const bool half = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK(half || x.scalar_type() == at::kFloat, "bfloat16 or float32 is needed");
  TORCH_CHECK(!bias || (bias->scalar_type() == x.scalar_type() && bias->is_contiguous()), "a bias like x is needed");
  Tensor y = at::empty({rows, N}, x.options());
  if (rows > FEW_ROWS) {
    const int64_t step = std::max<int64_t>(64, (int64_t(1) << 20) / K / 64 * 64);  // 2 MB of bfloat16
    for (int64_t n = 0; n < N; n += step) {
      const int64_t count = std::min(step, N - n);
      const Tensor piece = dequantise(codes.narrow(0, n, count), scales.narrow(0, n, count), bits, x.scalar_type());
      const auto some = bias ? std::optional<Tensor>(bias->narrow(0, n, count)) : std::nullopt;
      if (half && rows <= linear_rows())
        product(raw(x), raw(piece), groups * GROUP, some ? raw(*some) : nullptr, raw(y) + n, N, rows, K, count);
      else
        y.narrow(1, n, count).copy_(at::linear(x, piece.narrow(1, 0, K), some));
    }
    return y;
  }
  auto go = [&](auto* b) {
    if (bits == 8) few_rows<8>(x, codes, scales, b, y);
    else few_rows<4>(x, codes, scales, b, y);
  };
  if (half) go(bias ? static_cast<const uint16_t*>(bias->data_ptr()) : nullptr);
  else go(bias ? bias->data_ptr<float>() : static_cast<const float*>(nullptr));
  return y;
#else
  TORCH_CHECK(false, "this processor lacks AVX-512 BF16 and VNNI");
#endif
}

Tensor linear_meta(const Tensor& x, const Tensor& weight, const std::optional<Tensor>&) {
  return at::empty_symint({x.sym_size(0), weight.sym_size(0)}, x.options());
}
Tensor linear_quantised_meta(const Tensor& x, const Tensor& codes, const Tensor&, const std::optional<Tensor>&, int64_t) {
  return at::empty_symint({x.sym_size(0), codes.sym_size(0)}, x.options());
}

TORCH_LIBRARY_FRAGMENT(qwenvl_tp, m) {
  m.def("linear_supported() -> bool", supported);
  m.def("linear_rows() -> int", linear_rows);
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("dequantise(Tensor codes, Tensor scales, int bits, ScalarType dtype) -> Tensor");
  m.def("linear_quantised(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int bits) -> Tensor");
}
TORCH_LIBRARY_IMPL(qwenvl_tp, CPU, m) {
  m.impl("linear", linear);
  m.impl("dequantise", dequantise);
  m.impl("linear_quantised", linear_quantised);
}
TORCH_LIBRARY_IMPL(qwenvl_tp, Meta, m) {
  m.impl("linear", linear_meta);
  m.impl("linear_quantised", linear_quantised_meta);
}

}  // namespace
