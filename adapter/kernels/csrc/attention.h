#pragma once

#include <cstdint>

constexpr int64_t MOST_DIM = 128;  // of a head

struct Rows {  // of bfloat16
  const uint16_t* at;
  int64_t stride;
};

// `rows` queries [rows][D] of one KV head over the S keys and values of it -> out [rows][D], contiguous. False where this
// processor or D is none for it, and nothing was done.
bool attend_head(Rows q, int64_t rows, Rows k, Rows v, int64_t S, int64_t D, float scale, uint16_t* out);
