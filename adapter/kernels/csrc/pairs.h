// Rows side by side in pairs of elements, as products that keep their results in registers read them.

#pragma once

#include "bf16.h"

#if HAVE_KERNELS

constexpr int64_t LANES = 16;  // of 32 bits in a register

// out[j][i] = in[i][j], 16 x 16 of 32 bits; out has `stride` between its rows
inline void transpose(const __m512i* in, uint32_t* out, int64_t stride) {
  __m512i a[16], b[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    UNROLL for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
  }
  UNROLL for (int i = 0; i < 4; i++) {  // b[i], b[i + 4] ...: column i of each quarter
    const __m512i low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), high = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    _mm512_store_si512(out + i * stride, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_store_si512(out + (i + 4) * stride, _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_store_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_store_si512(out + (i + 12) * stride, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

// `rows` (at most 16) rows of x, K long, -> the 16 lanes of each pair of inputs, `width` lanes from pair to pair; zero
// for rows and inputs that are not there: K is rounded up to 32. out is aligned to 64 bytes, width a multiple of 16.
inline void pack_pairs(const uint16_t* x, int64_t stride, int64_t rows, int64_t K, uint32_t* out, int64_t width) {
  for (int64_t k = 0; k < K; k += 32) {
    const __mmask32 mask = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
    __m512i part[LANES];
    for (int64_t i = 0; i < LANES; i++)
      part[i] = i < rows ? _mm512_maskz_loadu_epi16(mask, x + i * stride + k) : _mm512_setzero_si512();
    transpose(part, out + k / 2 * width, width);
  }
}

#endif  // HAVE_KERNELS
