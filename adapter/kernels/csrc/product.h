#pragma once

#include <cstdint>

// y[m][n] = x[m] . w[n] + bias[n] for M rows of x and N of w, K long, bfloat16; sums are float32, bias may be null.
// w and y have their own strides between rows. Memory of its own: at most 512 KB, or 32 rows of x.
void product(const uint16_t* x, const uint16_t* w, int64_t w_stride, const uint16_t* bias, uint16_t* y, int64_t y_stride,
             int64_t M, int64_t K, int64_t N);
