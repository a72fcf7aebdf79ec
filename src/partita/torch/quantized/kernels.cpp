// Products with quantized and plain weights on CPUs. `native.py` compiles this for the CPU at hand when it is first needed.
//
// A weight [out, in] is stored by rows. A form says how `step` consecutive weights of a row are decoded, in vectors of
// sixteen, to exactly the float32 values of the form's definition. Products accumulate in float32.
#include "memory.h"
#include "steps.h"

struct Weight {
  const uint8_t* codes;   // [out, row_bytes]
  const void* scales;     // [ceil(out / group_rows), groups_per_row], unless the codes contain them
  const uint8_t* zeros;   // as the scales, or null
  const float* table;     // the 16 values of a codebook
  int64_t out, in, row_bytes, group_inverse, group_rows_inverse, groups_per_row;
  int32_t form, scales_dtype;
};

// What code 0, 1, ... 15 stands for: code * scale + offset. Each product of the GGUF forms below is exact in float32, so
// that the sum is rounded as by their definition, whether the compiler fuses it or not.
struct Affine {
#if defined(__AVX512F__)
  Floats16 table;
  INLINE Affine(float scale, float offset) {
    static const float codes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    table = Floats16::load(codes) * scale + offset;
  }
  INLINE Floats16 low(Ints16 bytes) const { return look_up(table, bytes); }
#else
  float scale, offset;
  INLINE Affine(float scale, float offset) : scale(scale), offset(offset) {}
  INLINE Floats16 low(Ints16 bytes) const { return as_floats(bytes & 15) * scale + offset; }
#endif
  INLINE Floats16 high(Ints16 bytes) const { return low(bytes >> 4); }
};

// Forms of GGUF, as ggml's ggml-common.h and ggml-quants.c define them.

struct Q4_0 {
  static constexpr int step = 32, bytes = 18;
  template <class Use>
  static INLINE void each(const Weight& w, int64_t row, int64_t i, Use use) {
    const uint8_t* block = w.codes + row * w.row_bytes + i * 18;
    float d = from_halves(block).first;
    Affine values(d, -8.0f * d);
    Ints16 bytes = unsigned_bytes(block + 2);
    use(0, values.low(bytes));
    use(1, values.high(bytes));
  }
};

struct Q4_1 {
  static constexpr int step = 32, bytes = 20;
  template <class Use>
  static INLINE void each(const Weight& w, int64_t row, int64_t i, Use use) {
    const uint8_t* block = w.codes + row * w.row_bytes + i * 20;
    Pair dm = from_halves(block);
    Affine values(dm.first, dm.second);
    Ints16 bytes = unsigned_bytes(block + 4);
    use(0, values.low(bytes));
    use(1, values.high(bytes));
  }
};

struct Q8_0 {
  static constexpr int step = 32, bytes = 34;
  template <class Use>
  static INLINE void each(const Weight& w, int64_t row, int64_t i, Use use) {
    const uint8_t* block = w.codes + row * w.row_bytes + i * 34;
    float d = from_halves(block).first;
    use(0, as_floats(signed_bytes(block + 2)) * d);
    use(1, as_floats(signed_bytes(block + 18)) * d);
  }
};

// 256 weights: d, dmin, 8 scales and 8 minima of 6 bits in 12 bytes, then 4 x 32 bytes of two sub-blocks each.
struct Q4_K {
  static constexpr int step = 256, bytes = 144;
  template <class Use>
  static INLINE void each(const Weight& w, int64_t row, int64_t i, Use use) {
    const uint8_t *block = w.codes + row * w.row_bytes + i * 144, *codes = block + 16;
    float scales[16];
    scales_and_offsets(block).spread(scales);
    UNROLLED for (int j = 0; j < 4; j++, codes += 32) {
      Ints16 first = unsigned_bytes(codes), second = unsigned_bytes(codes + 16);
      Affine lower(scales[2 * j], scales[8 + 2 * j]), upper(scales[2 * j + 1], scales[9 + 2 * j]);
      use(4 * j, lower.low(first));
      use(4 * j + 1, lower.low(second));
      use(4 * j + 2, upper.high(first));
      use(4 * j + 3, upper.high(second));
    }
  }
  // Of the eight sub-blocks.
  static INLINE Floats16 scales_and_offsets(const uint8_t* block) {
    Pair d = from_halves(block);
    uint32_t packed[3], six[4];
    std::memcpy(packed, block + 4, 12);
    six[0] = packed[0] & 0x3f3f3f3f;
    six[1] = (packed[2] & 0x0f0f0f0f) | (packed[0] >> 6 & 0x03030303) << 4;
    six[2] = packed[1] & 0x3f3f3f3f;
    six[3] = (packed[2] >> 4 & 0x0f0f0f0f) | (packed[1] >> 6 & 0x03030303) << 4;
    return as_floats(unsigned_bytes((const uint8_t*)six)).times_halves(d.first, -d.second);
  }
};

// 256 weights: low 4 bits in 128 bytes, high 2 bits in 64 bytes, 16 scales of int8, d.
struct Q6_K {
  static constexpr int step = 256, bytes = 210;
  template <class Use>
  static INLINE void each(const Weight& w, int64_t row, int64_t i, Use use) {
    const uint8_t *block = w.codes + row * w.row_bytes + i * 210, *low = block, *high = block + 128;
    float scales[16];
    (as_floats(signed_bytes(block + 192)) * from_half(load16(block + 208))).spread(scales);
    UNROLLED for (int j = 0; j < 4; j++) {  // 16 bytes of high bits belong to 4 x 16 weights
      int half = j / 2 * 8 + j % 2;
      const uint8_t* codes = low + j / 2 * 64 + j % 2 * 16;
      Ints16 a = unsigned_bytes(codes), b = unsigned_bytes(codes + 32), top = unsigned_bytes(high + j * 16);
      use(half, value((a & 15) | (top & 3) << 4, scales[half]));
      use(half + 2, value((b & 15) | (top >> 2 & 3) << 4, scales[half + 2]));
      use(half + 4, value(a >> 4 | (top >> 4 & 3) << 4, scales[half + 4]));
      use(half + 6, value(b >> 4 | top >> 6 << 4, scales[half + 6]));
    }
  }
  static INLINE Floats16 value(Ints16 codes, float scale) { return as_floats(codes) * scale + -32.0f * scale; }
};

// Codes beside their scales. Of 32 codes of 4 bits, byte i has code i in its low bits and code i + 16 in its high ones.

// The scale of 32 weights. The inverses of the sizes of groups are in units of 2^-32, since a division takes longer than the
// rest of what is done for 32 weights.
static INLINE int64_t scale_index(const Weight& w, int64_t row, int64_t i) {
  return (row * w.group_rows_inverse >> 32) * w.groups_per_row + (i * w.group_inverse >> 32);
}

struct Integers4 {
  static constexpr int step = 32, bytes = 16;
  template <class Use>
  static INLINE void each(const Weight& w, int64_t row, int64_t i, Use use) {
    int64_t at = scale_index(w, row, i);
    float scale = element(w.scales, at, w.scales_dtype), zero = w.zeros ? w.zeros[at] : 8;
    Ints16 bytes = unsigned_bytes(w.codes + row * w.row_bytes + i * 16);
#if defined(__AVX512F__)
    Floats16 values = Affine(1.0f, -zero).table * scale;
    use(0, look_up(values, bytes));
    use(1, look_up(values, bytes >> 4));
#else
    use(0, (as_floats(bytes & 15) + -zero) * scale);
    use(1, (as_floats(bytes >> 4) + -zero) * scale);
#endif
  }
};

struct Codebook4 {
  static constexpr int step = 32, bytes = 16;
  template <class Use>
  static INLINE void each(const Weight& w, int64_t row, int64_t i, Use use) {
    Floats16 values = Floats16::load(w.table) * element(w.scales, scale_index(w, row, i), w.scales_dtype);
    Ints16 bytes = unsigned_bytes(w.codes + row * w.row_bytes + i * 16);
    use(0, look_up(values, bytes));
    use(1, look_up(values, bytes >> 4));
  }
};

struct Float8 {
  static constexpr int step = 32, bytes = 32;
  template <class Use>
  static INLINE void each(const Weight& w, int64_t row, int64_t i, Use use) {
    float scale = element(w.scales, scale_index(w, row, i), w.scales_dtype);
    const uint8_t* codes = w.codes + row * w.row_bytes + i * 32;
    use(0, from_e4m3(codes) * scale);
    use(1, from_e4m3(codes + 16) * scale);
  }
};

// Weights that are not quantized, with any number of inputs.

struct Plain32 {
  static constexpr int step = 16, bytes = 64;
  template <class Use>
  static INLINE void each(const Weight& w, int64_t row, int64_t i, Use use) {
    use(0, Numbers<FLOAT32>::sixteen(reinterpret_cast<const float*>(w.codes + row * w.row_bytes) + i * 16));
  }
};

struct PlainB16 {
  static constexpr int step = 32, bytes = 64;
  template <class Use>
  static INLINE void each(const Weight& w, int64_t row, int64_t i, Use use) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(w.codes + row * w.row_bytes) + i * 32;
#if MULTIPLIES_PAIRS
    use(0, Pairs16::load(from));
#else
    use(0, Numbers<BFLOAT16>::sixteen(from));
    use(1, Numbers<BFLOAT16>::sixteen(from + 16));
#endif
  }
};

// The dtype of a plain form, or -1. Only plain weights have inputs beyond the last whole step.
template <class Form>
constexpr int plain_dtype = -1;
template <>
constexpr int plain_dtype<Plain32> = FLOAT32;
template <>
constexpr int plain_dtype<PlainB16> = BFLOAT16;

// Whether a form's values are multiplied by x in bfloat16.
template <class Form>
constexpr bool takes_bfloat16 = false;
template <>
constexpr bool takes_bfloat16<PlainB16> = MULTIPLIES_PAIRS;

struct Product {
  const float* x;          // [rows, in]
  const uint16_t* narrow;  // x for forms that take bfloat16
  int64_t rows;
  void* y;  // [rows, out]
  int dtype;
  const void* bias = nullptr;  // [out]
};

// The sum of a product, then the bias: each result is rounded to the dtype, as torch does it.
static INLINE void set_output(const Product& p, int64_t at, int64_t row, float sum) {
  set_element(p.y, at, sum, p.dtype);
  if (p.bias) set_element(p.y, at, element(p.y, at, p.dtype) + element(p.bias, row, p.dtype), p.dtype);
}

template <class Form>
static INLINE auto* input(const Product& p) {
  if constexpr (takes_bfloat16<Form>)
    return p.narrow;
  else
    return p.x;
}

// As many rows of the weight as registers hold sums of with four rows of x.
constexpr int ROWS = LANES == 16 ? 4 : 2;

// The product of M rows of x, from `first`, with R rows of the weight, from `row`. Of `passes` over these rows, each fetches its
// part of those that follow.
template <class Form, int R, int M>
static void tile(const Weight& w, const Product& p, int64_t row, int64_t first, int64_t pass, int64_t passes) {
  NarrowSum sums[R][M] = {};  // for any M, so that a row's result does not depend on the others
  const auto* x = input<Form>(p) + first * w.in;
  const int64_t distance = ROWS * w.row_bytes > 4096 ? ROWS * w.row_bytes : 4096;  // rows are too short for the CPU to foresee
  bool fetches[R];
  for (int r = 0; r < R; r++) fetches[r] = r % passes == pass;
  for (int64_t i = 0; i < w.in / Form::step; i++, x += Form::step)
    UNROLLED for (int r = 0; r < R; r++) {
      const uint8_t* ahead = w.codes + (row + r) * w.row_bytes + i * Form::bytes + distance;
      if (passes == 1)
        for (int line = 0; line < Form::bytes; line += 64) __builtin_prefetch(ahead + line);
      else if (fetches[r])
        for (int line = 0; line < Form::bytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
      Form::each(w, row + r, i, [&](int vector, auto values) __attribute__((always_inline)) {
        UNROLLED for (int m = 0; m < M; m++) sums[r][m].add_product(values, values.load(x + m * w.in + vector * 16));
      });
    }
  float outputs[M][R];
  sum_each(sums, outputs);
  if constexpr (plain_dtype<Form> >= 0)
    for (int64_t i = w.in / Form::step * Form::step; i < w.in; i++)
      for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++)
          // Fused in every tile, as the compiler would do it in some.
          outputs[m][r] = std::fma(
              element(input<Form>(p), (first + m) * w.in + i, takes_bfloat16<Form> ? BFLOAT16 : FLOAT32),
              element(w.codes + (row + r) * w.row_bytes, i, plain_dtype<Form>), outputs[m][r]);
  for (int m = 0; m < M; m++) {
    if (p.dtype == FLOAT32 && !p.bias)
      std::memcpy(static_cast<float*>(p.y) + (first + m) * w.out + row, outputs[m], sizeof outputs[m]);
    else
      for (int r = 0; r < R; r++) set_output(p, (first + m) * w.out + row + r, row + r, outputs[m][r]);
  }
}

// `ROWS` rows of the weight with all rows of x, for which they stay in the cache. Quantized weights take long to decode, and are
// multiplied by eight rows of x at a time.
template <class Form>
static void multiply_tile(const Weight& w, const Product& p, int64_t row) {
  constexpr bool by_eight = plain_dtype<Form> < 0;
  int64_t first = 0, pass = 0, passes = by_eight ? (p.rows + 7) / 8 : (p.rows + 3) / 4;
  if (passes > ROWS) passes = ROWS;
  if constexpr (by_eight)
    for (; first + 8 <= p.rows; first += 8, pass++)
      for (int r = 0; r < ROWS; r += ROWS / 2) tile<Form, ROWS / 2, 8>(w, p, row + r, first, pass, passes);
  for (; first + 4 <= p.rows; first += 4) tile<Form, ROWS, 4>(w, p, row, first, pass++, passes);
  if (first + 3 == p.rows) tile<Form, ROWS, 3>(w, p, row, first, pass, passes);
  if (first + 2 == p.rows) tile<Form, ROWS, 2>(w, p, row, first, pass, passes);
  if (first + 1 == p.rows) tile<Form, ROWS, 1>(w, p, row, first, pass, passes);
}

template <class Form>
static void multiply(const Weight& w, const Product& p, int64_t start, int64_t stop) {
  for (; start + ROWS <= stop; start += ROWS) multiply_tile<Form>(w, p, start);
  for (; start < stop; start++)
    for (int64_t first = 0; first < p.rows; first++) tile<Form, 1, 1>(w, p, start, first, 0, 1);
}

template <class Form>
static void dequantize(const Weight& w, int64_t row, void* to, int64_t at, int dtype) {
  for (int64_t i = 0; i < w.in / Form::step; i++)
    Form::each(w, row, i, [&](int vector, Floats16 values) __attribute__((always_inline)) {
      float floats[16];
      values.store(floats);
      int64_t place = at + i * Form::step + vector * 16;
      for (int j = 0; j < 16; j++) set_element(to, place + j, floats[j], dtype);
    });
}

// Some microseconds of work, in rows of the weight.
static int64_t chunk_rows(const Weight& w, int64_t rows) {
  int64_t rows_of_chunk = 65536 / (w.in * (rows < 4 ? 1 : rows / 4)) / 4 * 4;
  return rows_of_chunk < 4 ? 4 : rows_of_chunk;
}

template <class Form>
static void run_dequantize(const Weight& w, int64_t start, int64_t stop, void* to, int dtype, int threads) {
  in_parallel(start, stop, chunk_rows(w, 1), threads, [&](int64_t from, int64_t to_row) {
    for (int64_t row = from; row < to_row; row++) dequantize<Form>(w, row, to, (row - start) * w.in, dtype);
  });
}

#define FOR_EACH_FORM(CASE) \
  CASE(0, Q4_0) CASE(1, Q4_1) CASE(2, Q8_0) CASE(3, Q4_K) CASE(4, Q6_K) CASE(5, Integers4) CASE(6, Codebook4) CASE(7, Float8)

static void multiply_rows(const Weight& w, const Product& p, int64_t start, int64_t stop) {
  switch (w.form) {
#define CASE(number, Form) \
  case number: multiply<Form>(w, p, start, stop); break;
    FOR_EACH_FORM(CASE) CASE(8, Plain32) CASE(9, PlainB16)
#undef CASE
  }
}

struct Linear {
  const Weight* weight;
  const void* bias;  // [out] in the dtype of x, or null
};

// For each of `count` layers with as many inputs: y [rows, out] = x [rows, in] times the transposed weight, plus the bias; all
// but the weights have `dtype`. `wide` [rows, in] is memory for x in float32 if it has another dtype.
static void products(const Linear* layers, int count, const void* x, int64_t rows, void* const* ys, int dtype, float* wide,
                     int threads) {
  int64_t inputs = layers[0].weight->in, outputs = 0;
  const uint16_t* narrow = dtype == BFLOAT16 ? static_cast<const uint16_t*>(x) : nullptr;
  bool takes_floats = false;
  for (int i = 0; i < count; i++) {
    outputs += layers[i].weight->out;
    takes_floats |= !(takes_bfloat16<PlainB16> && layers[i].weight->form == 9);
  }
  if (dtype != FLOAT32 && takes_floats)
    for (int64_t i = 0; i < rows * inputs; i++) wide[i] = element(x, i, dtype);
  const float* floats = dtype == FLOAT32 ? static_cast<const float*>(x) : wide;
  // Threads share the outputs of all layers.
  in_parallel(0, outputs, chunk_rows(*layers[0].weight, rows), threads, [&](int64_t start, int64_t stop) {
    for (int i = 0; i < count && stop > 0; i++) {
      const Weight& w = *layers[i].weight;
      if (start < w.out) {
        Product p = {floats, narrow, rows, ys[i], dtype, layers[i].bias};
        multiply_rows(w, p, start < 0 ? 0 : start, stop < w.out ? stop : w.out);
      }
      start -= w.out, stop -= w.out;
    }
  });
}

// Memory for one call, which a thread keeps for the next; nullptr without memory.
static float* scratch(int64_t floats) {
  static thread_local struct Kept {
    float* memory = nullptr;
    int64_t size = 0;
    ~Kept() { free(memory); }
  } kept;
  if (kept.size < floats) {
    free(kept.memory);
    void* memory;
    kept.memory = posix_memalign(&memory, 64, floats * sizeof(float)) ? nullptr : static_cast<float*>(memory);
    kept.size = kept.memory ? floats : 0;
  }
  return kept.memory;
}

// See `products`. Returns 0, or 1 without memory.
extern "C" int partita_products(const Linear* layers, int count, const void* x, int64_t rows, void* const* ys, int dtype,
                                int threads) {
  float* wide = dtype == FLOAT32 ? nullptr : scratch(rows * layers[0].weight->in);
  if (dtype != FLOAT32 && !wide) return 1;
  products(layers, count, x, rows, ys, dtype, wide, threads);
  return 0;
}

// What enters the attention of a decoder layer, for one token of each sequence.
struct AttentionInputs {
  const Norm* norm;
  const Norm* head_norms[2];  // of each head of queries and of keys, or null
  const Linear* layers;  // of queries, keys and values
  int64_t hidden, width;  // of x, and of a head
};

// y: queries, keys and values [rows, heads, width] of the normed x [rows, hidden]; the first two with rotary positions.
extern "C" int partita_attention_inputs(const AttentionInputs* a, const void* x, int64_t rows, const void* cos,
                                        const void* sin, int64_t angle_stride, void* const* ys, int dtype, int threads) {
  float* memory = scratch(2 * rows * a->hidden);
  if (!memory) return 1;
  void* normed = memory + rows * a->hidden;
  partita_norm(a->norm, x, rows, normed);
  products(a->layers, 3, normed, rows, ys, dtype, memory, threads);
  Rotation both[2];
  for (int i = 0; i < 2; i++) {
    int64_t outputs = a->layers[i].weight->out;
    if (a->head_norms[i]) partita_norm(a->head_norms[i], ys[i], rows * outputs / a->width, ys[i]);
    both[i] = {rows, outputs / a->width, outputs, a->width, angle_stride, a->width};
  }
  partita_rotate(both, dtype, ys[0], ys[1], cos, sin, ys[0], ys[1]);
  return 0;
}

// What follows the attention of a decoder layer.
struct FeedForward {
  const Norm* norm;
  const Linear *gate_and_up, *down;
  int64_t hidden, inner;
  int32_t adds;  // whether the residual is added to the output
};

// residual [rows, hidden] = x + attended; y = down(SiLU(gate(norm(residual))) * up(norm(residual))), plus the residual.
extern "C" int partita_feed_forward(const FeedForward* f, const void* x, const void* attended, int64_t rows, void* residual,
                                    void* y, int dtype, int threads) {
  int64_t hidden = rows * f->hidden, inner = rows * f->inner;
  float* memory = scratch((hidden > inner ? hidden : inner) + hidden + 2 * inner);
  if (!memory) return 1;
  float *normed = memory + (hidden > inner ? hidden : inner), *gate = normed + hidden, *up = gate + inner;
  dtype == BFLOAT16 ? add<BFLOAT16>(x, attended, hidden, residual) : add<FLOAT32>(x, attended, hidden, residual);
  partita_norm(f->norm, residual, rows, normed);
  void* const ys[] = {gate, up};
  products(f->gate_and_up, 2, normed, rows, ys, dtype, memory, threads);
  dtype == BFLOAT16 ? gated<BFLOAT16>(gate, up, inner) : gated<FLOAT32>(gate, up, inner);
  products(f->down, 1, gate, rows, &y, dtype, memory, threads);
  if (f->adds) dtype == BFLOAT16 ? add<BFLOAT16>(residual, y, hidden, y) : add<FLOAT32>(residual, y, hidden, y);
  return 0;
}

// A decoder layer, and those that follow it with as many heads.
struct Layer {
  const AttentionInputs* inputs;
  const Linear* out;
  const FeedForward* rest;
  float scale;  // of the scores
};

// The memory of a layer's keys and values: of a sequence, a slot of a token in it, and a head. Strides are in elements.
struct Slots {
  void *keys, *values;
  int64_t batch, token, head;
};

// One new token of each of `rows` sequences.
struct Step {
  int64_t rows, tokens;                        // with the new ones; sequences end together
  int64_t hidden, heads, groups, width;        // of x; heads of queries, and of keys and values; of a head
  const int64_t *read, *write;                 // the slots of all tokens [rows, tokens] and of the new ones [rows]; or null
  const uint8_t* mask;                         // bool [rows or 1, tokens], true where a token is seen; or null
  int64_t mask_batch, angle_stride;            // of a row
  const void *cos, *sin;                       // [rows or 1, width]
  void *x, *residual, *attended, *y;           // [rows, hidden] each
  void *q, *k, *v, *seen;                      // [rows, heads or groups, width]
  int32_t dtype, threads;
};

// x = the output of `count` layers for x. `sum` adds up `attended` (0) or y (1) over the ranks and returns 0; it may be null.
// Returns 0, 1 without memory, or what `sum` returned.
extern "C" int partita_layers(const Layer* layers, const Slots* slots, int64_t count, const Step* s, int (*sum)(int)) {
  int64_t bytes = s->width * (s->dtype == FLOAT32 ? 4 : 2), hidden = s->rows * s->hidden;
  void* const inputs[] = {s->q, s->k, s->v};
  for (int64_t i = 0; i < count; i++) {
    const Layer& layer = layers[i];
    const Slots& at = slots[i];
    if (partita_attention_inputs(layer.inputs, s->x, s->rows, s->cos, s->sin, s->angle_stride, inputs, s->dtype, s->threads))
      return 1;
    for (int64_t row = 0; row < s->rows; row++)
      for (int64_t group = 0; group < s->groups; group++) {
        int64_t slot = s->write ? s->write[row] : s->tokens - 1;
        int64_t to = (row * at.batch + slot * at.token + group * at.head) * (s->dtype == FLOAT32 ? 4 : 2);
        int64_t from = (row * s->groups + group) * bytes;
        std::memcpy(static_cast<char*>(at.keys) + to, static_cast<char*>(s->k) + from, bytes);
        std::memcpy(static_cast<char*>(at.values) + to, static_cast<char*>(s->v) + from, bytes);
      }
    Attention a = {s->heads * s->width, s->width, at.batch, at.head, at.token, at.batch, at.head, at.token, s->mask_batch,
                   s->rows, s->heads, s->groups, s->tokens, s->width, s->dtype, s->q, at.keys, at.values, s->mask, s->seen,
                   s->read};
    attend(a, layer.scale, s->threads);
    if (partita_products(layer.out, 1, s->seen, s->rows, &s->attended, s->dtype, s->threads)) return 1;
    if (sum)
      if (int error = sum(0)) return error;
    if (partita_feed_forward(layer.rest, s->x, s->attended, s->rows, s->residual, s->y, s->dtype, s->threads)) return 1;
    if (sum) {
      if (int error = sum(1)) return error;
      s->dtype == BFLOAT16 ? add<BFLOAT16>(s->residual, s->y, hidden, s->x) : add<FLOAT32>(s->residual, s->y, hidden, s->x);
    } else {
      std::memcpy(s->x, s->y, hidden * (s->dtype == FLOAT32 ? 4 : 2));
    }
  }
  return 0;
}

// y = SiLU(x), as `partita_feed_forward` computes it.
extern "C" void partita_silu(const void* x, int64_t size, void* y, int dtype) {
  dtype == BFLOAT16 ? silu<BFLOAT16>(x, size, y) : silu<FLOAT32>(x, size, y);
}

// Rows `start` to `stop` of the weight, dequantized to `to` [stop - start, in] in `dtype`.
extern "C" void partita_dequantize(const Weight* w, int64_t start, int64_t stop, void* to, int dtype, int threads) {
  switch (w->form) {
#define CASE(number, Form) \
  case number: run_dequantize<Form>(*w, start, stop, to, dtype, threads); break;
    FOR_EACH_FORM(CASE)
#undef CASE
  }
}
