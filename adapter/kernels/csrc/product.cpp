// A matrix product whose weights stay as they lie in memory, row after row: the rows of x are what is packed, 16 or 32
// of them side by side, in pairs of inputs. One instruction multiplies a pair of a weight, broadcast, with the pairs of
// 16 rows; a tile of results, outputs by rows of x, stays in registers until its last input.

#include "product.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "pairs.h"

#if HAVE_KERNELS

namespace {

constexpr int64_t CHUNK = int64_t(1) << 19;  // bytes of packed x that are multiplied with all of w: they stay in the cache

// R outputs by B * 16 rows of x. `far`: how many elements ahead of each weight's line the next tile's lies
template <int R, int B>
void tile(const uint16_t* w, int64_t stride, const uint16_t* bias, int64_t K, const uint32_t* x, int64_t far, uint16_t* y,
          int64_t y_stride, int64_t rows) {
  __m512 sums[R][B];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int b = 0; b < B; b++) sums[r][b] = _mm512_set1_ps(bias ? from_bf16(bias[r]) : 0.f);
  const int64_t pairs = K / 2;
  for (int64_t k = 0; k < pairs;) {
    const int64_t stop = std::min(pairs, k + 16);  // a line of memory of each weight
    UNROLL for (int r = 0; r < R; r++) _mm_prefetch(reinterpret_cast<const char*>(w + r * stride + 2 * k + far), _MM_HINT_T0);
    for (; k < stop; k++) {
      __m512bh xs[B];
      UNROLL for (int b = 0; b < B; b++) {
        xs[b] = (__m512bh)_mm512_load_si512(x + (k * B + b) * LANES);
        _mm_prefetch(reinterpret_cast<const char*>(x + ((k + 16) * B + b) * LANES), _MM_HINT_T0);
      }
      UNROLL for (int r = 0; r < R; r++) {
        uint32_t pair;
        std::memcpy(&pair, w + r * stride + 2 * k, 4);
        UNROLL for (int b = 0; b < B; b++) sums[r][b] = _mm512_dpbf16_ps(sums[r][b], xs[b], both(pair));
      }
    }
  }
  if (K % 2)  // half a pair: what follows in memory is another weight, or none
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int b = 0; b < B; b++)
        sums[r][b] = _mm512_dpbf16_ps(sums[r][b], (__m512bh)_mm512_load_si512(x + (pairs * B + b) * LANES),
                                      both(w[r * stride + K - 1]));
  UNROLL for (int b = 0; b < B; b++) {
    alignas(32) uint16_t out[R][LANES];
    UNROLL for (int r = 0; r < R; r++) _mm256_store_si256((__m256i*)out[r], (__m256i)_mm512_cvtneps_pbh(sums[r][b]));
    for (int64_t i = 0; i < std::min(LANES, rows - b * LANES); i++)
      UNROLL for (int r = 0; r < R; r++) y[(b * LANES + i) * y_stride + r] = out[r][i];
  }
}

struct Operands {
  const uint16_t* w;
  int64_t w_stride;
  const uint16_t* bias;
  uint16_t* y;
  int64_t y_stride, K, rows;
  const uint32_t* x;  // packed

  // outputs n .. n + R for every row of x; those after them are asked for on the way
  template <int R, int B>
  void run(int64_t n) const {
    const int64_t width = B * LANES, pairs = (K + 31) / 32 * 16;
    for (int64_t m = 0; m < rows; m += width)
      tile<R, B>(w + n * w_stride, w_stride, bias ? bias + n : nullptr, K, x + m * pairs, m + width < rows ? 0 : R * w_stride,
                 y + m * y_stride + n, y_stride, rows - m);
  }

  template <int R, int B>
  void run(int64_t n, int64_t stop) const {
    for (; n + R <= stop; n += R) run<R, B>(n);
    for (; n + 4 <= stop; n += 4) run<4, B>(n);
    for (; n < stop; n++) run<1, B>(n);
  }
};

template <int R, int B>
void multiply(const uint16_t* x, int64_t K, int64_t N, int64_t M, const Operands& all) {
  const int64_t width = B * LANES, pairs = (K + 31) / 32 * 16;
  const int64_t most = std::max<int64_t>(1, CHUNK / (width * pairs * 4)) * width;
  const at::Tensor packed = at::empty({(std::min(M, most) + width - 1) / width * width * pairs}, at::kInt);
  auto* to = static_cast<uint32_t*>(packed.data_ptr());
  for (int64_t start = 0; start < M; start += most) {
    const int64_t rows = std::min(most, M - start), parts = (rows + width - 1) / width * B;
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        pack_pairs(x + (start + i * LANES) * K, K, rows - i * LANES, K, to + i / B * width * pairs + i % B * LANES, width);
    });
    Operands part = all;
    part.x = to, part.rows = rows, part.y += start * all.y_stride;
    at::parallel_for(0, (N + R - 1) / R, 1, [&](int64_t begin, int64_t end) {
      part.run<R, B>(begin * R, std::min(N, end * R));
    });
  }
}

}  // namespace

void product(const uint16_t* x, const uint16_t* w, int64_t w_stride, const uint16_t* bias, uint16_t* y, int64_t y_stride,
             int64_t M, int64_t K, int64_t N) {
  const Operands all{w, w_stride, bias, y, y_stride, K, M, nullptr};
  if (M <= LANES) multiply<8, 1>(x, K, N, M, all);  // bound by reading w
  else multiply<12, 2>(x, K, N, M, all);            // bound by multiplying: 24 of 32 registers are sums
}

#endif  // HAVE_KERNELS
