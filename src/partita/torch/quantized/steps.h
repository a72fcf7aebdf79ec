// What a decoder layer computes beside its products, for one new token of each sequence: norms, rotary positions and attention
// over a cache. Tensors are float32 or bfloat16; sums are float32.
#pragma once
#include <cmath>
#include <vector>

#include "memory.h"

template <int DTYPE>
struct Numbers;

template <>
struct Numbers<FLOAT32> {
  typedef float Stored;
  static INLINE Floats16 sixteen(const float* from) { return Floats16::load(from); }
};

template <>
struct Numbers<BFLOAT16> {
  typedef uint16_t Stored;
  static INLINE Floats16 sixteen(const uint16_t* from) {
    typedef uint16_t ShortLanes __attribute__((vector_size(2 * LANES)));
    Floats16 out;
    for (int i = 0; i < VECTORS; i++) {
      ShortLanes shorts;
      std::memcpy(&shorts, from + i * LANES, sizeof shorts);
      out.part[i] = (Lanes)(__builtin_convertvector(shorts, IntLanes) << 16);
    }
    return out;
  }
};

template <int DTYPE>
static INLINE float rounded(float value) {
  return DTYPE == BFLOAT16 ? from_bfloat16(to_bfloat16(value)) : value;
}

struct Norm {
  const void* weight;  // [width]
  int64_t width;
  float epsilon, offset;  // what is added to the mean square, and to the weight
  int32_t dtype, rounds;  // `rounds`: the normalized row is rounded to the dtype before it is multiplied by the weight
};

template <int DTYPE>
static void norm(const Norm& n, const void* from, int64_t rows, void* to) {
  typedef typename Numbers<DTYPE>::Stored Stored;
  int64_t whole = n.width / 16 * 16;
  for (int64_t row = 0; row < rows; row++) {
    const Stored* x = static_cast<const Stored*>(from) + row * n.width;
    Floats16 squares = {};
    for (int64_t i = 0; i < whole; i += 16) {
      Floats16 values = Numbers<DTYPE>::sixteen(x + i);
      squares.add_product(values, values);
    }
    float sum = squares.sum();
    for (int64_t i = whole; i < n.width; i++) sum += element(x, i, DTYPE) * element(x, i, DTYPE);
    float scale = 1.0f / std::sqrt(sum / n.width + n.epsilon);
    for (int64_t i = 0; i < n.width; i++) {
      float value = element(x, i, DTYPE) * scale, weight = element(n.weight, i, DTYPE) + n.offset;
      set_element(to, row * n.width + i, (n.rounds ? rounded<DTYPE>(value) : value) * weight, DTYPE);
    }
  }
}

extern "C" void partita_norm(const Norm* n, const void* x, int64_t rows, void* y) {
  n->dtype == BFLOAT16 ? norm<BFLOAT16>(*n, x, rows, y) : norm<FLOAT32>(*n, x, rows, y);
}

// Strides are in elements; the last dim of each tensor is contiguous.
struct Rotation {
  int64_t batch, heads, batch_stride, head_stride, angle_stride, width;
};

// y [batch, heads, width] = x * cos + (-second half of x, first half of x) * sin, each result rounded to the dtype.
template <int DTYPE>
static void rotate(const Rotation& r, const void* from, const void* cosines, const void* sines, void* to) {
  typedef typename Numbers<DTYPE>::Stored Stored;
  int64_t half = r.width / 2;
  for (int64_t b = 0; b < r.batch; b++)
    for (int64_t h = 0; h < r.heads; h++) {
      const Stored* x = static_cast<const Stored*>(from) + b * r.batch_stride + h * r.head_stride;
      const Stored* cos = static_cast<const Stored*>(cosines) + b * r.angle_stride;
      const Stored* sin = static_cast<const Stored*>(sines) + b * r.angle_stride;
      Stored* y = static_cast<Stored*>(to) + (b * r.heads + h) * r.width;
      for (int64_t i = 0; i < half; i++) {
        float first = element(x, i, DTYPE), second = element(x, i + half, DTYPE);
        float a = rounded<DTYPE>(first * element(cos, i, DTYPE)), b = rounded<DTYPE>(-second * element(sin, i, DTYPE));
        float c = rounded<DTYPE>(second * element(cos, i + half, DTYPE));
        float d = rounded<DTYPE>(first * element(sin, i + half, DTYPE));
        set_element(y, i, a + b, DTYPE);
        set_element(y, i + half, c + d, DTYPE);
      }
    }
}

// Queries and keys.
extern "C" void partita_rotate(const Rotation* both, int dtype, const void* q, const void* k, const void* cos, const void* sin,
                               void* new_q, void* new_k) {
  auto one = dtype == BFLOAT16 ? rotate<BFLOAT16> : rotate<FLOAT32>;
  one(both[0], q, cos, sin, new_q);
  one(both[1], k, cos, sin, new_k);
}

// e^x, 0 below -87; NaN stays NaN. Source: Cephes' expf.
static INLINE Floats16 exponential(Floats16 x) {
  Floats16 out;
  for (int i = 0; i < VECTORS; i++) {
    Lanes value = x.part[i];
    IntLanes is_small = value < -87.0f;
    value = (Lanes)((IntLanes)value & ~is_small);
    const float magic = 12582912.0f;  // after its addition the last bits of a float are an integer
    Lanes shifted = value * 1.44269504f + magic, n = shifted - magic;
    Lanes r = value - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Lanes y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    IntLanes power = (IntLanes)(shifted) - 0x4b400000;
    y = y * (Lanes)((power + 127) << 23);
    out.part[i] = (Lanes)((IntLanes)y & ~is_small);
  }
  return out;
}

// Sixteen elements, or the last `count` of a row.
template <int DTYPE>
static INLINE Floats16 some(const void* from, int64_t i, int64_t count) {
  typedef typename Numbers<DTYPE>::Stored Stored;
  const Stored* place = static_cast<const Stored*>(from) + i;
  if (count >= 16) return Numbers<DTYPE>::sixteen(place);
  Stored kept[16] = {};
  std::memcpy(kept, place, count * sizeof(Stored));
  return Numbers<DTYPE>::sixteen(kept);
}

template <int DTYPE>
static INLINE void set_some(void* to, int64_t i, int64_t count, Floats16 values) {
  float floats[16];
  values.store(floats);
  for (int64_t j = 0; j < 16 && j < count; j++) set_element(to, i + j, floats[j], DTYPE);
}

// x / (1 + e^-x), each result rounded to the dtype.
template <int DTYPE>
static void silu(const void* from, int64_t size, void* to) {
  for (int64_t i = 0; i < size; i += 16) {
    Floats16 x = some<DTYPE>(from, i, size - i), negative;
    for (int j = 0; j < VECTORS; j++) {
      Lanes value = -x.part[j];
      IntLanes is_large = value > 87.0f;
      negative.part[j] = (Lanes)(((IntLanes)value & ~is_large) | ((IntLanes)(Lanes{} + 87.0f) & is_large));
    }
    Floats16 below = exponential(negative) + 1.0f;
    for (int j = 0; j < VECTORS; j++) x.part[j] /= below.part[j];
    set_some<DTYPE>(to, i, size - i, x);
  }
}

template <int DTYPE>
static void gated(void* gate, const void* up, int64_t size) {
  silu<DTYPE>(gate, size, gate);
  for (int64_t i = 0; i < size; i++) set_element(gate, i, element(gate, i, DTYPE) * element(up, i, DTYPE), DTYPE);
}

template <int DTYPE>
static void add(const void* a, const void* b, int64_t size, void* to) {
  for (int64_t i = 0; i < size; i++) set_element(to, i, element(a, i, DTYPE) + element(b, i, DTYPE), DTYPE);
}

struct Attention {
  int64_t q_batch, q_head;                      // strides of q [batch, heads, width]
  int64_t k_batch, k_head, k_token;             // of k [batch, groups, tokens, width]
  int64_t v_batch, v_head, v_token;             // of v [batch, groups, tokens, width]
  int64_t mask_batch;                           // of the mask, if there is one
  int64_t batch, heads, groups, tokens, width;  // heads / groups heads share keys and values
  int64_t dtype;
  const void *q, *k, *v;
  const uint8_t* mask;                          // bool [batch, tokens], true where a token is seen; or null
  void* y;                                      // [batch, heads, width], contiguous
  const int64_t* slots;                         // [batch, tokens], which of the memory's tokens each is; or null: in order
};

template <int DTYPE>
static INLINE float dot(const float* a, const typename Numbers<DTYPE>::Stored* b, int64_t width) {
  Floats16 sums = {};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) sums.add_product(Floats16::load(a + i), Numbers<DTYPE>::sixteen(b + i));
  float sum = sums.sum();
  for (; i < width; i++) sum += a[i] * element(b, i, DTYPE);
  return sum;
}

template <int DTYPE>
static void attend(const Attention& a, float scale, int64_t place) {
  typedef typename Numbers<DTYPE>::Stored Stored;
  int64_t b = place / a.heads, h = place % a.heads, group = h / (a.heads / a.groups), tokens = a.tokens, width = a.width;
  std::vector<float> scores((tokens + 15) / 16 * 16, -INFINITY), rows(2 * width);
  float *query = rows.data(), *sum = query + width, most = -INFINITY, total = 0.0f;
  for (int64_t i = 0; i < width; i++)
    query[i] = element(static_cast<const Stored*>(a.q) + b * a.q_batch + h * a.q_head, i, DTYPE) * scale;
  const Stored* keys = static_cast<const Stored*>(a.k) + b * a.k_batch + group * a.k_head;
  const Stored* values = static_cast<const Stored*>(a.v) + b * a.v_batch + group * a.v_head;
  const uint8_t* mask = a.mask ? a.mask + b * a.mask_batch : nullptr;
  int64_t padding = 0;  // without which a row has the same bits as alone
  for (; mask && tokens > 0 && !*mask; mask++, tokens--) padding++;
  const int64_t* slots = a.slots ? a.slots + b * a.tokens + padding : nullptr;
  auto slot = [&](int64_t t) { return slots ? slots[t] : padding + t; };
  for (int64_t t = 0; t < tokens; t++) {
    if (mask && !mask[t]) continue;
    scores[t] = dot<DTYPE>(query, keys + slot(t) * a.k_token, width);
    if (scores[t] > most) most = scores[t];
  }
  if (most == -INFINITY) most = 0.0f;
  for (int64_t t = 0; t < tokens; t += 16) {
    Floats16 shares = exponential(Floats16::load(&scores[t]) + -most);
    shares.store(&scores[t]);
    total += shares.sum();
  }
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) {
    Floats16 found = {};
    for (int64_t t = 0; t < tokens; t++) {
      if (mask && !mask[t]) continue;
      Floats16 share = Floats16{} + scores[t];
      found.add_product(share, Numbers<DTYPE>::sixteen(values + slot(t) * a.v_token + i));
    }
    found.store(sum + i);
  }
  for (; i < width; i++)
    for (int64_t t = 0; t < tokens; t++)
      if (!mask || mask[t]) sum[i] += scores[t] * element(values + slot(t) * a.v_token, i, DTYPE);
  for (i = 0; i < width; i++) set_element(a.y, place * width + i, total == 0 ? 0 : sum[i] / total, DTYPE);
}

// The attention of one query a sequence and head.
static void attend(const Attention& a, float scale, int threads) {
  int64_t few = 32768 / (a.tokens * a.width + 1) + 1;  // heads that are worth a thread
  in_parallel(0, a.batch * a.heads, few, threads, [&](int64_t start, int64_t stop) {
    for (int64_t place = start; place < stop; place++)
      a.dtype == BFLOAT16 ? attend<BFLOAT16>(a, scale, place) : attend<FLOAT32>(a, scale, place);
  });
}

extern "C" void partita_attend(const Attention* sizes, const void* q, const void* k, const void* v, const uint8_t* mask, void* y,
                               float scale, int threads) {
  Attention a = *sizes;
  a.q = q, a.k = k, a.v = v, a.mask = mask, a.y = y, a.slots = nullptr;
  attend(a, scale, threads);
}
