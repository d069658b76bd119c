// What layers do between their matrix products, fused: norms, gates and activations, and attention of one new token over
// a cache that is allocated once. bfloat16, float16 or float32; sums are float32; results are rounded where Transformers
// rounds them, but for the gate, whose steps between are not.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention.h"
#include "bf16.h"

namespace {

using at::Tensor;

#define DISPATCH(TYPE, ...) AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, TYPE, "qwenvl_tp", __VA_ARGS__)

// e^x to 1e-7 of it, for x from -87 to 87 (what is beyond is taken for those), in steps that a compiler turns into vector
// instructions: 2^n times a polynomial of the rest (Cephes, expf).
inline float exponential(float x) {
  const float y = std::min(std::max(x, -87.0f), 87.0f);
  const float shifted = y * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
  const float n = shifted - 12582912.0f, r = y - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

constexpr int64_t PIECE = 4096;  // elements that are converted, computed and rounded at a time, in the cache

template <typename T>
void widen(const T* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = float(x[i]);
}

template <typename T>
void narrow(const float* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = T(x[i]);
}
#if HAVE_KERNELS
template <>
void widen(const at::BFloat16* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(y + i, _mm512_castsi512_ps(_mm512_slli_epi32(
                                _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + i))), 16)));
  for (; i < n; i++) y[i] = float(x[i]);
}
template <>
void narrow(const float* x, at::BFloat16* y, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i*)(y + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
  for (; i < n; i++) y[i] = at::BFloat16(x[i]);
}
#endif

template <typename T>
void normalise(const T* x, const T* w, T* y, int64_t n, double eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += float(x[i]) * float(x[i]);
  const float by = 1.0f / std::sqrt(sum / float(n) + float(eps));
  for (int64_t i = 0; i < n; i++) y[i] = T(float(w[i]) * float(T(float(x[i]) * by)));
}

void check_rows(const Tensor& x, const Tensor& w) {
  TORCH_CHECK(x.is_contiguous() && w.is_contiguous() && w.dim() == 1 && x.size(-1) == w.size(0) &&
              x.scalar_type() == w.scalar_type(), "x ", x.sizes(), " and weight ", w.sizes(), " do not fit");
}

// x [*, n], weight [n] -> RMSNorm of each row, [*, n]
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_rows(x, weight);
  Tensor y = at::empty_like(x);
  const int64_t n = x.size(-1);
  DISPATCH(x.scalar_type(), [&] {
    for (int64_t r = 0; r < x.numel() / n; r++)
      normalise(x.const_data_ptr<scalar_t>() + r * n, weight.const_data_ptr<scalar_t>(),
                y.mutable_data_ptr<scalar_t>() + r * n, n, eps);
  });
  return y;
}

// x += delta, in place; -> RMSNorm of the sum
Tensor add_rms_norm(Tensor& x, const Tensor& delta, const Tensor& weight, double eps) {
  check_rows(x, weight);
  TORCH_CHECK(delta.is_contiguous() && delta.sizes() == x.sizes() && delta.scalar_type() == x.scalar_type(), "delta ",
              delta.sizes(), " is not like x ", x.sizes());
  Tensor y = at::empty_like(x);
  const int64_t n = x.size(-1);
  DISPATCH(x.scalar_type(), [&] {
    for (int64_t r = 0; r < x.numel() / n; r++) {
      scalar_t* to = x.mutable_data_ptr<scalar_t>() + r * n;
      const scalar_t* from = delta.const_data_ptr<scalar_t>() + r * n;
      for (int64_t i = 0; i < n; i++) to[i] = scalar_t(float(to[i]) + float(from[i]));
      normalise(to, weight.const_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>() + r * n, n, eps);
    }
  });
  return y;
}

// silu(gate) * up, alike [*]
Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  TORCH_CHECK(gate.is_contiguous() && up.is_contiguous() && gate.sizes() == up.sizes() &&
              gate.scalar_type() == up.scalar_type(), "gate ", gate.sizes(), " is not like up ", up.sizes());
  Tensor y = at::empty_like(gate);
  DISPATCH(gate.scalar_type(), [&] {
    const scalar_t *g = gate.const_data_ptr<scalar_t>(), *u = up.const_data_ptr<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, gate.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      float a[PIECE], b[PIECE];
      for (int64_t i = begin; i < end; i += PIECE) {
        const int64_t n = std::min(PIECE, end - i);
        widen(g + i, a, n);
        widen(u + i, b, n);
        for (int64_t j = 0; j < n; j++) a[j] = a[j] * sigmoid(a[j]) * b[j];
        narrow(a, out + i, n);
      }
    });
  });
  return y;
}

// y[i] = table[x[i]]: any function of one number of 16 bits, whose table has its value for each of the 65,536
Tensor look_up(const Tensor& x, const Tensor& table) {
  TORCH_CHECK(x.is_contiguous() && table.is_contiguous() && x.element_size() == 2 && table.numel() == 1 << 16 &&
              table.scalar_type() == x.scalar_type(), "x of 16 bits and a table of 65,536 of them, contiguous, are needed");
  Tensor y = at::empty_like(x);
  const auto *from = static_cast<const uint16_t*>(x.const_data_ptr()), *values = static_cast<const uint16_t*>(table.const_data_ptr());
  auto* to = static_cast<uint16_t*>(y.mutable_data_ptr());
  at::parallel_for(0, x.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) to[i] = values[from[i]];
  });
  return y;
}

// x [D] rotated by cos, sin [D]: x cos + (-x[D/2:], x[:D/2]) sin
template <typename T>
void rotate(const T* x, const T* c, const T* s, T* y, int64_t D) {
  const int64_t half = D / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = float(x[i]), b = float(x[i + half]);
    y[i] = T(a * float(c[i]) - b * float(s[i]));
    y[i + half] = T(b * float(c[i + half]) + a * float(s[i + half]));
  }
}

// x [S, H, D], its last dimension contiguous, D even: every head rotated in place by cos, sin float32 [S, D]
void rotate_rows(Tensor& x, const Tensor& cos, const Tensor& sin) {
  TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1 && x.size(2) % 2 == 0, "x [S, H, D], D even and contiguous, is needed, not ",
              x.sizes());
  const int64_t S = x.size(0), H = x.size(1), D = x.size(2), half = D / 2;
  for (const Tensor& t : {cos, sin})
    TORCH_CHECK(t.is_contiguous() && t.scalar_type() == at::kFloat && t.dim() == 2 && t.size(0) == S && t.size(1) == D,
                "cos and sin: float32 [", S, ", ", D, "] is needed, not ", t.scalar_type(), " ", t.sizes());
  const float *cosines = cos.const_data_ptr<float>(), *sines = sin.const_data_ptr<float>();
  DISPATCH(x.scalar_type(), [&] {
    scalar_t* data = x.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, S, 64, [&](int64_t begin, int64_t end) {
      std::vector<float> memory(2 * D);
      float *from = memory.data(), *to = from + D;
      for (int64_t i = begin; i < end; i++) {
        const float *c = cosines + i * D, *s = sines + i * D;
        for (int64_t h = 0; h < H; h++) {
          scalar_t* at = data + i * x.stride(0) + h * x.stride(1);
          widen(at, from, D);
          for (int64_t j = 0; j < half; j++) to[j] = from[j] * c[j] - from[j + half] * s[j];
          for (int64_t j = half; j < D; j++) to[j] = from[j] * c[j] + from[j - half] * s[j];
          narrow(to, at, D);
        }
      }
    });
  });
}

struct Shape {
  int64_t batch, kv, groups, D, length;  // kv heads, query heads for each, head_dim, places of the cache
};

// One row and KV head: `groups` queries over the keys and values of places [from, to).
template <typename T>
void attend_places(const T* q, const T* keys, const T* values, T* out, const Shape& s, int64_t from, int64_t to,
                 float scale) {
  const int64_t D = s.D, count = to - from;
  std::vector<float> score(s.groups * count), query(s.groups * D), sum(s.groups * D, 0.f), row(D), most(s.groups, -INFINITY);
  for (int64_t i = 0; i < s.groups * D; i++) query[i] = float(q[i]) * scale;
  for (int64_t t = 0; t < count; t++) {
    const T* k = keys + (from + t) * D;
    widen(k, row.data(), D);
    for (int64_t g = 0; g < s.groups; g++) {
      const float* qg = query.data() + g * D;
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < D; i++) dot += qg[i] * row[i];
      score[g * count + t] = dot;
      most[g] = std::max(most[g], dot);
    }
  }
  std::vector<float> total(s.groups, 0.f);
  for (int64_t g = 0; g < s.groups; g++) {
    float *p = score.data() + g * count, all = 0;
    for (int64_t t = 0; t < count; t++) p[t] = exponential(p[t] - most[g]);
#pragma omp simd reduction(+ : all)
    for (int64_t t = 0; t < count; t++) all += p[t];
    total[g] = all;
  }
  for (int64_t t = 0; t < count; t++) {
    const T* v = values + (from + t) * D;
    widen(v, row.data(), D);
    for (int64_t g = 0; g < s.groups; g++) {
      const float p = score[g * count + t];
      float* to_sum = sum.data() + g * D;
      for (int64_t i = 0; i < D; i++) to_sum[i] += p * row[i];
    }
  }
  for (int64_t g = 0; g < s.groups; g++)
    for (int64_t i = 0; i < D; i++) out[g * D + i] = T(sum[g * D + i] / total[g]);
}

// Attention of one new token a row. q [B, heads * D], k and v [B, kv * D], not rotated; cos and sin [B, D]; keys and values
// [B, kv, L, D]: the new key and value are written to place `position` (int64 [1]); start (int64 [B]): the first place of
// each row that is no padding -> [B, heads * D]
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin, Tensor& keys,
              Tensor& values, const Tensor& start, const Tensor& position, double scale) {
  const Shape s{keys.size(0), keys.size(1), q.size(1) / (keys.size(1) * keys.size(3)), keys.size(3), keys.size(2)};
  for (const Tensor& t : {q, k, v, cos, sin, keys, values})
    TORCH_CHECK(t.is_contiguous() && t.scalar_type() == q.scalar_type(), "contiguous tensors of one dtype are needed");
  TORCH_CHECK(q.dim() == 2 && q.size(0) == s.batch && q.size(1) == s.kv * s.groups * s.D && k.size(1) == s.kv * s.D &&
              v.sizes() == k.sizes() && values.sizes() == keys.sizes() && cos.size(1) == s.D && cos.size(0) == s.batch &&
              sin.sizes() == cos.sizes() && start.size(0) == s.batch, "q ", q.sizes(), ", k ", k.sizes(), ", keys ",
              keys.sizes(), " do not fit");
  const int64_t at = *position.const_data_ptr<int64_t>();
  TORCH_CHECK(0 <= at && at < s.length, "place ", at, " of a cache of ", s.length);
  Tensor out = at::empty_like(q);
  const int64_t* first = start.const_data_ptr<int64_t>();
  DISPATCH(q.scalar_type(), [&] {
    const scalar_t *qp = q.const_data_ptr<scalar_t>(), *kp = k.const_data_ptr<scalar_t>(),
                   *vp = v.const_data_ptr<scalar_t>(), *c = cos.const_data_ptr<scalar_t>(),
                   *si = sin.const_data_ptr<scalar_t>();
    scalar_t *kc = keys.mutable_data_ptr<scalar_t>(), *vc = values.mutable_data_ptr<scalar_t>(),
             *o = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, s.batch * s.kv, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> turned(s.groups * s.D);
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / s.kv;
        scalar_t *key = kc + i * s.length * s.D, *value = vc + i * s.length * s.D;
        rotate(kp + i * s.D, c + b * s.D, si + b * s.D, key + at * s.D, s.D);
        std::copy_n(vp + i * s.D, s.D, value + at * s.D);
        for (int64_t g = 0; g < s.groups; g++)
          rotate(qp + (i * s.groups + g) * s.D, c + b * s.D, si + b * s.D, turned.data() + g * s.D, s.D);
        scalar_t* to = o + i * s.groups * s.D;
        if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
          auto rows = [&](const scalar_t* t) { return Rows{reinterpret_cast<const uint16_t*>(t), s.D}; };
          if (attend_head(rows(turned.data()), s.groups, rows(key + first[b] * s.D), rows(value + first[b] * s.D),
                          at + 1 - first[b], s.D, float(scale), reinterpret_cast<uint16_t*>(to)))
            continue;
        }
        attend_places(turned.data(), key, value, to, s, first[b], at + 1, float(scale));
      }
    });
  });
  return out;
}

Tensor like_first(const Tensor& x, const Tensor&, double) { return at::empty_like(x); }
Tensor add_meta(Tensor& x, const Tensor&, const Tensor&, double) { return at::empty_like(x); }
Tensor look_up_meta(const Tensor& x, const Tensor&) { return at::empty_like(x); }
Tensor mul_meta(const Tensor& gate, const Tensor&) { return at::empty_like(gate); }
Tensor attend_meta(const Tensor& q, const Tensor&, const Tensor&, const Tensor&, const Tensor&, Tensor&, Tensor&,
                   const Tensor&, const Tensor&, double) {
  return at::empty_like(q);
}

TORCH_LIBRARY_FRAGMENT(qwenvl_tp, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor(a!) x, Tensor delta, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("look_up(Tensor x, Tensor table) -> Tensor");
  m.def("rotate(Tensor(a!) x, Tensor cos, Tensor sin) -> ()");
  m.def("attend(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor start, "
        "Tensor position, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(qwenvl_tp, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("silu_mul", silu_mul);
  m.impl("look_up", look_up);
  m.impl("rotate", rotate_rows);
  m.impl("attend", attend);
}
TORCH_LIBRARY_IMPL(qwenvl_tp, Meta, m) {
  m.impl("rms_norm", like_first);
  m.impl("add_rms_norm", add_meta);
  m.impl("silu_mul", mul_meta);
  m.impl("look_up", look_up_meta);
  m.impl("attend", attend_meta);
}

}  // namespace
