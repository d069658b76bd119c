// bfloat16 on a processor with AVX-512 BF16 and VNNI; elsewhere HAVE_KERNELS is 0 and the kernels are left out.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAVE_KERNELS 1
#include <immintrin.h>
#else
#define HAVE_KERNELS 0
#endif

// Before a loop over an array of registers: unrolled whole, or the compiler keeps the array in memory.
#define UNROLL _Pragma("GCC unroll 32")

inline uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

inline float from_bf16(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

#if HAVE_KERNELS
inline __m512bh both(uint32_t pair) { return (__m512bh)_mm512_set1_epi32(int(pair)); }
#endif
