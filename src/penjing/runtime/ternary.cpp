// Matrix times a few vectors, where the weights are -1, 0 or +1 times a scale per group: by table look-up.
//
//     y[n] = sum_g scale[n, g] * sum_{k in g} t[n, k] x[k]
//
// The codes of three neighbouring inputs form a number below 27, and for every such number the sum of t x is in a table
// of 32 that all outputs share: one look-up takes the place of three multiplications. With AVX-512 the table lies in two
// registers and one permutation looks up 16 outputs; elsewhere it is read from memory, one output at a time.
//
// All arithmetic is fp32. Layout, with the inputs of each group padded to whole words of 18:
//
//     words   uint32 [rows / 64][groups * words per group][64]    bits 5 l to 5 l + 4: the number of triple l,
//             (t0 + 1) + 3 (t1 + 1) + 9 (t2 + 1)
//     scale   [rows / 64][groups][64]
//
// 64 rows lie together, in the order in which they are read, and share what is loaded of the tables.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int kRows = 64;    // rows of a block
constexpr int kTriples = 6;  // of a word
constexpr int kInputs = 18;  // of a word
constexpr int kEntries = 32; // of a table; 27 are used
constexpr int kFloats = kTriples * kEntries;

enum Type : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

} // namespace

// Mirrored field by field in ternary.py.
struct Matrix {
  int64_t rows, columns, width, groups, scale_type;
  const uint32_t *words;
  const void *scale;
};

namespace {

int64_t words_per_group(const Matrix &m) { return (m.width + kInputs - 1) / kInputs; }

// The code of input `position` of a triple with this number: -1, 0 or 1.
constexpr int digit(int number, int position) {
  return (position == 0 ? number : position == 1 ? number / 3 : number / 9) % 3 - 1;
}

struct Digits {
  float of[3][kEntries];
  constexpr Digits() : of() {
    for (int position = 0; position < 3; ++position)
      for (int number = 0; number < kEntries; ++number)
        of[position][number] = float(number < 27 ? digit(number, position) : 0);
  }
};

constexpr Digits kDigits;

// Tables of the inputs x of one word, of which `count` exist.
void build(const float *x, int64_t count, float *tables) {
  float padded[kInputs] = {};
  memcpy(padded, x, count * sizeof(float));
  for (int l = 0; l < kTriples; ++l, tables += kEntries)
    for (int e = 0; e < kEntries; ++e)
      tables[e] = kDigits.of[0][e] * padded[3 * l] + kDigits.of[1][e] * padded[3 * l + 1] +
                  kDigits.of[2][e] * padded[3 * l + 2];
}

// The stored scales of one group of a block as fp32.
inline void widen(const Matrix &m, int64_t group, float *to) {
  const int64_t at = group * kRows;
  if (m.scale_type == kFloat32) {
    memcpy(to, static_cast<const float *>(m.scale) + at, kRows * sizeof(float));
    return;
  }
  uint32_t bits[kRows];
  const uint16_t *half = static_cast<const uint16_t *>(m.scale) + at;
  for (int r = 0; r < kRows; ++r) // of fp16: sign, exponent and mantissa moved into place; the exponent 112 too small
    bits[r] = m.scale_type == kBFloat16 ? uint32_t(half[r]) << 16
                                        : uint32_t(half[r] & 0x8000) << 16 | uint32_t(half[r] & 0x7fff) << 13;
  memcpy(to, bits, sizeof bits);
  if (m.scale_type == kFloat16)
    for (int r = 0; r < kRows; ++r)
      to[r] *= 0x1p112f;
}

// sums[64] of one group of a block: `count` words, read along with their tables.
void add_up(const uint32_t *words, const float *tables, int64_t count, float *sums) {
#if defined(__AVX512F__)
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t c = 0; c < count; ++c, words += kRows, tables += kFloats) {
    __m512i word[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
      word[r] = _mm512_loadu_si512(words + 16 * r);
#pragma GCC unroll 6
    for (int l = 0; l < kTriples; ++l) {
      const __m512 low = _mm512_load_ps(tables + kEntries * l), high = _mm512_load_ps(tables + kEntries * l + 16);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) // a permutation of two registers reads the lowest 5 bits of each lane
        sum[r] = _mm512_add_ps(sum[r], _mm512_permutex2var_ps(low, _mm512_srli_epi32(word[r], 5 * l), high));
    }
  }
  for (int r = 0; r < 4; ++r)
    _mm512_storeu_ps(sums + 16 * r, sum[r]);
#else
  memset(sums, 0, kRows * sizeof(float));
  for (int64_t c = 0; c < count; ++c, words += kRows, tables += kFloats)
    for (int r = 0; r < kRows; ++r) {
      const uint32_t word = words[r];
      sums[r] += (tables[word & 31] + tables[32 + (word >> 5 & 31)]) +
                 (tables[64 + (word >> 10 & 31)] + tables[96 + (word >> 15 & 31)]) +
                 (tables[128 + (word >> 20 & 31)] + tables[160 + (word >> 25 & 31)]);
    }
#endif
}

// Memory of the calling thread that lives from call to call.
struct Scratch {
  float *data = nullptr;
  size_t size = 0;

  float *reserve(size_t floats) {
    const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    if (bytes > size) {
      free(data);
      data = static_cast<float *>(aligned_alloc(64, bytes));
      size = data ? bytes : 0;
    }
    return data;
  }

  ~Scratch() { free(data); }
};

} // namespace

// y (tokens, rows) = x (tokens, columns) times the matrix, transposed. Returns 0, or 1 when memory runs out.
extern "C" int ternary_multiply(const Matrix *matrix, const float *x, float *y, int64_t tokens, int threads) {
  if (tokens == 0)
    return 0;
  const Matrix &m = *matrix;
  const int64_t words = words_per_group(m), tables_of_token = m.groups * words * kFloats;
  static thread_local Scratch scratch;
  float *tables = scratch.reserve(tokens * tables_of_token);
  if (!tables)
    return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t job = 0; job < tokens * m.groups; ++job) {
      const int64_t token = job / m.groups, g = job % m.groups;
      const float *from = x + token * m.columns + g * m.width;
      const int64_t count = g + 1 < m.groups ? m.width : m.columns - g * m.width;
      for (int64_t c = 0; c < words; ++c) {
        const int64_t left = count - c * kInputs;
        build(from + c * kInputs, left < 0 ? 0 : left < kInputs ? left : kInputs,
              tables + token * tables_of_token + (g * words + c) * kFloats);
      }
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (m.rows + kRows - 1) / kRows; ++block) {
      const int64_t first = block * kRows, count = m.rows - first < kRows ? m.rows - first : kRows;
      for (int64_t token = 0; token < tokens; ++token) {
        float result[kRows] = {}, sums[kRows], scale[kRows];
        for (int64_t g = 0; g < m.groups; ++g) {
          add_up(m.words + (block * m.groups + g) * words * kRows,
                 tables + token * tables_of_token + g * words * kFloats, words, sums);
          widen(m, block * m.groups + g, scale);
          for (int r = 0; r < kRows; ++r)
            result[r] += scale[r] * sums[r];
        }
        memcpy(y + token * m.rows + first, result, count * sizeof(float));
      }
    }
  }
  return 0;
}

// The transposed values of `count` blocks of 64 rows from block `first`: (columns, 64 * count), padded rows included.
extern "C" void ternary_decode(const Matrix *matrix, float *values, int64_t first, int64_t count, int threads) {
  const Matrix &m = *matrix;
  const int64_t words = words_per_group(m), step = count * kRows;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t job = 0; job < count * m.groups; ++job) {
    const int64_t g = job / count, group = (first + job % count) * m.groups + g;
    const int64_t inputs = g + 1 < m.groups ? m.width : m.columns - g * m.width;
    float *to = values + g * m.width * step + job % count * kRows;
    float scale[kRows];
    widen(m, group, scale);
    for (int64_t k = 0; k < inputs; ++k, to += step) {
      const uint32_t *word = m.words + (group * words + k / kInputs) * kRows;
      const float *digits = kDigits.of[k % 3];
      const int shift = 5 * int(k % kInputs / 3);
      for (int r = 0; r < kRows; ++r)
        to[r] = digits[word[r] >> shift & 31] * scale[r];
    }
  }
}
