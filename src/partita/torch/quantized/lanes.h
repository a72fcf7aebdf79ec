// Sixteen floats in the registers of the instruction set that this is compiled for, and conversions to and from memory.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 8")  // before loops whose sums are to stay in registers

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int VECTORS = 16 / LANES;

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t IntLanes __attribute__((vector_size(4 * LANES)));
typedef float Lanes4 __attribute__((vector_size(16)));

static INLINE uint16_t load16(const void* from) {
  uint16_t bits;
  std::memcpy(&bits, from, 2);
  return bits;
}

struct Pair {
  float first, second;
};

#if defined(__F16C__)
static INLINE float from_half(uint16_t bits) { return _cvtsh_ss(bits); }
static INLINE uint16_t to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
// Two halves that follow each other, in one conversion.
static INLINE Pair from_halves(const void* from) {
  int32_t bits;
  std::memcpy(&bits, from, 4);
  Lanes4 floats = (Lanes4)_mm_cvtph_ps(_mm_cvtsi32_si128(bits));
  return {floats[0], floats[1]};
}
#else
static INLINE float from_half(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return half;
}
static INLINE uint16_t to_half(float value) {
  _Float16 half = value;
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
static INLINE Pair from_halves(const void* from) {
  return {from_half(load16(from)), from_half(load16(static_cast<const uint8_t*>(from) + 2))};
}
#endif

static INLINE float from_bfloat16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

static INLINE uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

struct Ints16 {
  IntLanes part[VECTORS];

  INLINE Ints16 operator&(int mask) const {
    Ints16 out;
    for (int i = 0; i < VECTORS; i++) out.part[i] = part[i] & mask;
    return out;
  }
  INLINE Ints16 operator|(Ints16 other) const {
    Ints16 out;
    for (int i = 0; i < VECTORS; i++) out.part[i] = part[i] | other.part[i];
    return out;
  }
  INLINE Ints16 operator>>(int bits) const {
    Ints16 out;
    for (int i = 0; i < VECTORS; i++) out.part[i] = part[i] >> bits;
    return out;
  }
  INLINE Ints16 operator<<(int bits) const {
    Ints16 out;
    for (int i = 0; i < VECTORS; i++) out.part[i] = part[i] << bits;
    return out;
  }
};

struct Floats16 {
  Lanes part[VECTORS];

  static INLINE Floats16 load(const float* from) {
    Floats16 out;
    for (int i = 0; i < VECTORS; i++) std::memcpy(&out.part[i], from + i * LANES, sizeof(Lanes));
    return out;
  }
  INLINE void store(float* to) const {
    for (int i = 0; i < VECTORS; i++) std::memcpy(to + i * LANES, &part[i], sizeof(Lanes));
  }
  // Stores them for loads of single floats, which the compiler would otherwise replace by slower shuffles of registers.
  INLINE void spread(float (&to)[16]) const {
    store(to);
    asm("" : "+m"(to));
  }
  // The first eight times `first`, the others times `second`.
  INLINE Floats16 times_halves(float first, float second) const {
#if defined(__AVX512F__)
    __m512 factors = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(first), _mm512_set1_ps(second));
    return {{part[0] * (Lanes)factors}};
#else
    Floats16 out;
    for (int i = 0; i < VECTORS; i++) out.part[i] = part[i] * (i < VECTORS / 2 ? first : second);
    return out;
#endif
  }
  INLINE Floats16 operator*(float factor) const {
    Floats16 out;
    for (int i = 0; i < VECTORS; i++) out.part[i] = part[i] * factor;
    return out;
  }
  INLINE Floats16 operator+(float term) const {
    Floats16 out;
    for (int i = 0; i < VECTORS; i++) out.part[i] = part[i] + term;
    return out;
  }
  INLINE void add_product(Floats16 a, Floats16 b) {
    for (int i = 0; i < VECTORS; i++) part[i] += a.part[i] * b.part[i];
  }
  INLINE float sum() const {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)part[0]);
#elif defined(__AVX2__)
    __m256 eight = (__m256)(part[0] + part[1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    Lanes four = (part[0] + part[1]) + (part[2] + part[3]);
    return (four[0] + four[1]) + (four[2] + four[3]);
#endif
  }
};

#if defined(__AVX512BF16__)
#define MULTIPLIES_PAIRS 1
// Thirty-two numbers in bfloat16. Decoding them takes longer than their product with others, which the CPU adds up by pairs.
struct Pairs16 {
  __m512i bits;
  static INLINE Pairs16 load(const uint16_t* from) { return {_mm512_loadu_si512(from)}; }
};
#else
#define MULTIPLIES_PAIRS 0
#endif

// A sum of products in as many lanes as one register has.
struct NarrowSum {
  Lanes lanes;
#if MULTIPLIES_PAIRS
  INLINE void add_product(Pairs16 a, Pairs16 b) {
    lanes = (Lanes)_mm512_dpbf16_ps((__m512)lanes, (__m512bh)a.bits, (__m512bh)b.bits);
  }
#endif
  INLINE void add_product(Floats16 a, Floats16 b) {
    for (int i = 0; i < VECTORS; i++) lanes += a.part[i] * b.part[i];
  }
  INLINE float sum() const {
    Floats16 wide = {};
    wide.part[0] = lanes;
    return wide.sum();
  }
};

// to[m][r] = sums[r][m].sum(), with the same bits.
template <int R, int M>
static INLINE void sum_each(const NarrowSum (&sums)[R][M], float (&to)[M][R]) {
#if defined(__AVX512F__)
  if constexpr (R == 4 && M <= 4) {
    __m512 quarters[4];  // of 128 bits: one for each r
    UNROLLED for (int m = 0; m < M; m++) {
      __m512 a = (__m512)sums[0][m].lanes, b = (__m512)sums[1][m].lanes, c = (__m512)sums[2][m].lanes, d = (__m512)sums[3][m].lanes;
      __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
      __m512 cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
      quarters[m] = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
    }
    UNROLLED for (int m = M; m < 4; m++) quarters[m] = quarters[0];
    __m512 first = _mm512_shuffle_ps(quarters[0], quarters[1], 0x44) + _mm512_shuffle_ps(quarters[0], quarters[1], 0xee);
    __m512 second = _mm512_shuffle_ps(quarters[2], quarters[3], 0x44) + _mm512_shuffle_ps(quarters[2], quarters[3], 0xee);
    __m512 all = _mm512_shuffle_ps(first, second, 0x88) + _mm512_shuffle_ps(first, second, 0xdd);
    all = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), all);
    float each[16];
    _mm512_storeu_ps(each, all);
    std::memcpy(to, each, sizeof to);
    return;
  }
#endif
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) to[m][r] = sums[r][m].sum();
}

// Sixteen bytes of memory as integers.
#if defined(__AVX512F__)
static INLINE Ints16 unsigned_bytes(const uint8_t* from) {
  return {{(IntLanes)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from))}};
}
static INLINE Ints16 signed_bytes(const uint8_t* from) {
  return {{(IntLanes)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from))}};
}
static INLINE Floats16 as_floats(Ints16 ints) { return {{(Lanes)_mm512_cvtepi32_ps((__m512i)ints.part[0])}}; }
#elif defined(__AVX2__)
static INLINE Ints16 unsigned_bytes(const uint8_t* from) {
  return {{(IntLanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)),
           (IntLanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8)))}};
}
static INLINE Ints16 signed_bytes(const uint8_t* from) {
  return {{(IntLanes)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)),
           (IntLanes)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8)))}};
}
static INLINE Floats16 as_floats(Ints16 ints) {
  return {{(Lanes)_mm256_cvtepi32_ps((__m256i)ints.part[0]), (Lanes)_mm256_cvtepi32_ps((__m256i)ints.part[1])}};
}
#else
template <class Byte>
static INLINE Ints16 bytes(const Byte* from) {
  Ints16 out;
  for (int i = 0; i < 16; i++) out.part[i / LANES][i % LANES] = from[i];
  return out;
}
static INLINE Ints16 unsigned_bytes(const uint8_t* from) { return bytes(from); }
static INLINE Ints16 signed_bytes(const uint8_t* from) { return bytes((const int8_t*)from); }
static INLINE Floats16 as_floats(Ints16 ints) {
  Floats16 out;
  for (int i = 0; i < VECTORS; i++) out.part[i] = __builtin_convertvector(ints.part[i], Lanes);
  return out;
}
#endif

// The entries of `table` at sixteen codes, of which only the low 4 bits count.
static INLINE Floats16 look_up(Floats16 table, Ints16 codes) {
#if defined(__AVX512F__)
  return {{(Lanes)_mm512_permutexvar_ps((__m512i)codes.part[0], (__m512)table.part[0])}};
#elif defined(__AVX2__)
  Floats16 out;
  for (int i = 0; i < VECTORS; i++) {
    __m256i index = (__m256i)codes.part[i];
    __m256 low = _mm256_permutevar8x32_ps((__m256)table.part[0], index);
    __m256 high = _mm256_permutevar8x32_ps((__m256)table.part[1], index);
    out.part[i] = (Lanes)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  return out;
#else
  float values[16];
  table.store(values);
  Floats16 out;
  for (int i = 0; i < 16; i++) out.part[i / LANES][i % LANES] = values[codes.part[i / LANES][i % LANES] & 15];
  return out;
#endif
}

#if !defined(__F16C__)
static const struct E4m3Table {
  float values[256];
  E4m3Table() {
    for (int i = 0; i < 256; i++) values[i] = from_half((uint16_t)((i & 0x80) << 8 | (i & 0x7f) << 7)) * 256.0f;
  }
} E4M3;
#endif

// Sixteen float8_e4m3fn as floats. NaN is not among them.
static INLINE Floats16 from_e4m3(const uint8_t* from) {
#if defined(__F16C__)
  // The same bits are those of a half whose exponent is too small by 8.
  Floats16 out;
  __m256i wide = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from)), 8);
  __m256i halves = _mm256_and_si256(_mm256_srai_epi16(wide, 1), _mm256_set1_epi16((short)0xbfff));
#if defined(__AVX512F__)
  out.part[0] = (Lanes)_mm512_cvtph_ps(halves);
#else
  out.part[0] = (Lanes)_mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  out.part[1] = (Lanes)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
#endif
  return out * 256.0f;
#else
  float values[16];
  for (int i = 0; i < 16; i++) values[i] = E4M3.values[from[i]];
  return Floats16::load(values);
#endif
}
