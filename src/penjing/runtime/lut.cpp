// Products of binary-coded matrices with vectors, by table look-up.
//
//     y[n] = sum_g ( sum_i alpha[n, g, i] * sum_{k in g} b_i[n, k] x[k]  +  offset[n, g] * sum_{k in g} x[k] )
//
// The signs b_i of a few neighbouring inputs form a number, and for every such number the sum of +-x is in a table
// that all outputs share: one look-up takes the place of that many multiplications. How many inputs a look-up covers
// is up to the widest table that the processor can index from a register:
//
//     AVX-512    4 inputs, 16 entries, one permutation looks up 16 outputs
//     AVX2       3 inputs,  8 entries, one permutation looks up  8 outputs
//     otherwise  8 inputs, 256 entries in memory, one output at a time
//
// All arithmetic is fp32 whatever the path. Layout, with the inputs of each group padded to whole words of 32:
//
//     words   uint32 [rows / 16][groups * words per group][planes][16]    bit j: the sign of input j of the word, 1 = +
//     alpha   [rows / 16][groups][planes][16]
//     offset  [rows / 16][groups][16]                                     absent when null
//
// A block of 16 rows lies together, in the order in which it is read.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int kRows = 16;   // rows of a block
constexpr int kInputs = 32; // inputs of a word
constexpr int kMostPlanes = 8;

enum Type : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

} // namespace

// Mirrored field by field in lut.py.
struct Matrix {
  int64_t rows, columns;           // of the matrix
  int64_t width, groups, planes;   // inputs of a full group, groups of a row, bits
  int64_t alpha_type, offset_type; // Type
  const uint32_t *words;
  const void *alpha;
  const void *offset;
};

namespace {

int64_t words_per_group(const Matrix &m) { return (m.width + kInputs - 1) / kInputs; }

int64_t blocks(const Matrix &m) { return (m.rows + kRows - 1) / kRows; }

// 16 consecutive stored numbers as fp32.
inline void widen(const void *from, int64_t type, int64_t at, float *to) {
  uint32_t bits[kRows];
  if (type == kFloat32) {
    memcpy(to, static_cast<const float *>(from) + at, sizeof bits);
    return;
  }
  const uint16_t *half = static_cast<const uint16_t *>(from) + at;
  if (type == kBFloat16) {
    for (int r = 0; r < kRows; ++r)
      bits[r] = uint32_t(half[r]) << 16;
    memcpy(to, bits, sizeof bits);
    return;
  }
  for (int r = 0; r < kRows; ++r) // sign, exponent and mantissa moved into place; the exponent is 112 too small
    bits[r] = uint32_t(half[r] & 0x8000) << 16 | uint32_t(half[r] & 0x7fff) << 13;
  memcpy(to, bits, sizeof bits);
  for (int r = 0; r < kRows; ++r)
    to[r] *= 0x1p112f;
}

#if defined(__AVX512F__)

constexpr int kCovered = 4;

// Adds to sums[plane][row] what the words of one block say about 32 inputs.
template <int Planes> struct Sums {
  static constexpr int kChains = Planes <= 2 ? 4 : Planes <= 4 ? 2 : 1; // independent additions in flight
  __m512 parts[kChains][Planes];

  void clear() {
    for (auto &chain : parts)
      for (auto &part : chain)
        part = _mm512_setzero_ps();
  }

  void add(const uint32_t *words, const float *tables) {
    __m512i word[Planes];
    for (int i = 0; i < Planes; ++i)
      word[i] = _mm512_loadu_si512(words + i * kRows);
#pragma GCC unroll 8
    for (int l = 0; l < 8; ++l) {
      const __m512 table = _mm512_load_ps(tables + 16 * l);
#pragma GCC unroll 8
      for (int i = 0; i < Planes; ++i) { // a permutation reads the lowest 4 bits of each lane
        auto &part = parts[l % kChains][i];
        part = _mm512_add_ps(part, _mm512_permutexvar_ps(_mm512_srli_epi32(word[i], 4 * l), table));
      }
    }
  }

  void write(float (*sums)[kRows]) const {
    for (int i = 0; i < Planes; ++i) {
      __m512 sum = parts[0][i];
      for (int c = 1; c < kChains; ++c)
        sum = _mm512_add_ps(sum, parts[c][i]);
      _mm512_storeu_ps(sums[i], sum);
    }
  }
};

#elif defined(__AVX2__)

constexpr int kCovered = 3;

template <int Planes> struct Sums {
  __m256 parts[2][Planes];

  void clear() {
    for (auto &half : parts)
      for (auto &part : half)
        part = _mm256_setzero_ps();
  }

  void add(const uint32_t *words, const float *tables) {
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < Planes; ++i) {
        const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(words + i * kRows + 8 * h));
        __m256 odd = _mm256_setzero_ps(); // two chains of additions in flight
#pragma GCC unroll 11
        for (int l = 0; l < 11; ++l) { // a permutation reads the lowest 3 bits of each lane
          const __m256i index = _mm256_srli_epi32(word, 3 * l);
          const __m256 found = _mm256_permutevar8x32_ps(_mm256_load_ps(tables + 8 * l), index);
          auto &sum = l % 2 ? odd : parts[h][i];
          sum = _mm256_add_ps(sum, found);
        }
        parts[h][i] = _mm256_add_ps(parts[h][i], odd);
      }
  }

  void write(float (*sums)[kRows]) const {
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < Planes; ++i)
        _mm256_storeu_ps(sums[i] + 8 * h, parts[h][i]);
  }
};

#else

constexpr int kCovered = 8;

template <int Planes> struct Sums {
  float parts[Planes][kRows];

  void clear() { memset(parts, 0, sizeof parts); }

  void add(const uint32_t *words, const float *tables) {
    for (int i = 0; i < Planes; ++i)
      for (int r = 0; r < kRows; ++r) {
        const uint32_t word = words[i * kRows + r];
        parts[i][r] += (tables[word & 255] + tables[256 + (word >> 8 & 255)]) +
                       (tables[512 + (word >> 16 & 255)] + tables[768 + (word >> 24)]);
      }
  }

  void write(float (*sums)[kRows]) const { memcpy(sums, parts, sizeof parts); }
};

#endif

constexpr int kEntries = 1 << kCovered;
constexpr int kTables = (kInputs + kCovered - 1) / kCovered; // of a word; the last may cover fewer inputs
constexpr int kFloats = kTables * kEntries;

// Tables of the inputs x of one word, of which `count` exist.
void build(const float *x, int64_t count, float *tables) {
  float padded[kTables * kCovered] = {};
  memcpy(padded, x, count * sizeof(float));
  for (int t = 0; t < kTables; ++t, tables += kEntries) {
    for (int e = 0; e < kEntries; ++e)
      tables[e] = 0;
#pragma GCC unroll 8
    for (int s = 0; s < kCovered; ++s)
      for (int e = 0; e < kEntries; ++e)
        tables[e] += e >> s & 1 ? padded[t * kCovered + s] : -padded[t * kCovered + s];
  }
}

// y[16] of one block of rows for one token.
template <int Planes>
void multiply_block(const Matrix &m, int64_t block, const float *tables, const float *totals, float *y) {
  const int64_t words = words_per_group(m);
  const uint32_t *word = m.words + block * m.groups * words * Planes * kRows;
  float result[kRows] = {}, sums[Planes][kRows], scale[kRows];
  for (int64_t g = 0; g < m.groups; ++g) {
    Sums<Planes> partial;
    partial.clear();
    for (int64_t c = 0; c < words; ++c, word += Planes * kRows, tables += kFloats)
      partial.add(word, tables);
    partial.write(sums);
    for (int i = 0; i < Planes; ++i) {
      widen(m.alpha, m.alpha_type, ((block * m.groups + g) * Planes + i) * kRows, scale);
      for (int r = 0; r < kRows; ++r)
        result[r] += scale[r] * sums[i][r];
    }
    if (m.offset) {
      widen(m.offset, m.offset_type, (block * m.groups + g) * kRows, scale);
      for (int r = 0; r < kRows; ++r)
        result[r] += scale[r] * totals[g];
    }
  }
  memcpy(y, result, sizeof result);
}

using MultiplyBlock = void (*)(const Matrix &, int64_t, const float *, const float *, float *);

constexpr MultiplyBlock kMultiplyBlock[kMostPlanes] = {
    multiply_block<1>, multiply_block<2>, multiply_block<3>, multiply_block<4>,
    multiply_block<5>, multiply_block<6>, multiply_block<7>, multiply_block<8>,
};

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
extern "C" int lut_multiply(const Matrix *matrix, const float *x, float *y, int64_t tokens, int threads) {
  if (tokens == 0)
    return 0;
  const Matrix &m = *matrix;
  const int64_t words = words_per_group(m), tables_of_token = m.groups * words * kFloats;
  static thread_local Scratch scratch;
  float *tables = scratch.reserve(tokens * (tables_of_token + m.groups));
  if (!tables)
    return 1;
  float *totals = tables + tokens * tables_of_token;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t job = 0; job < tokens * m.groups; ++job) {
      const int64_t token = job / m.groups, g = job % m.groups;
      const float *from = x + token * m.columns + g * m.width;
      const int64_t count = g + 1 < m.groups ? m.width : m.columns - g * m.width;
      float total = 0;
      for (int64_t k = 0; k < count; ++k)
        total += from[k];
      totals[job] = total;
      for (int64_t c = 0; c < words; ++c) {
        const int64_t left = count - c * kInputs;
        build(from + c * kInputs, left < 0 ? 0 : left < kInputs ? left : kInputs,
              tables + token * tables_of_token + (g * words + c) * kFloats);
      }
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks(m); ++block) {
      const int64_t first = block * kRows, count = m.rows - first < kRows ? m.rows - first : kRows;
      for (int64_t token = 0; token < tokens; ++token) {
        float result[kRows];
        kMultiplyBlock[m.planes - 1](m, block, tables + token * tables_of_token, totals + token * m.groups, result);
        memcpy(y + token * m.rows + first, result, count * sizeof(float));
      }
    }
  }
  return 0;
}

// The transposed values of `count` blocks of 16 rows from block `first`: (columns, 16 * count), padded rows included.
extern "C" void lut_decode(const Matrix *matrix, float *values, int64_t first, int64_t count, int threads) {
  const Matrix &m = *matrix;
  const int64_t words = words_per_group(m), step = count * kRows;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t job = 0; job < count * m.groups; ++job) {
    const int64_t g = job / count, block = first + job % count, group = block * m.groups + g;
    const int64_t inputs = g + 1 < m.groups ? m.width : m.columns - g * m.width;
    float *to = values + g * m.width * step + job % count * kRows;
    float base[kRows] = {};
    uint32_t scale[kMostPlanes][kRows]; // the bits of alpha, which is not negative
    if (m.offset)
      widen(m.offset, m.offset_type, group * kRows, base);
    for (int i = 0; i < m.planes; ++i) {
      float alpha[kRows];
      widen(m.alpha, m.alpha_type, (group * m.planes + i) * kRows, alpha);
      memcpy(scale[i], alpha, sizeof alpha);
    }
    for (int64_t k = 0; k < inputs; ++k, to += step) {
      const uint32_t *word = m.words + (group * words + k / kInputs) * m.planes * kRows;
      float sum[kRows];
      memcpy(sum, base, sizeof sum);
      for (int i = 0; i < m.planes; ++i, word += kRows) {
        uint32_t bits[kRows];
        float term[kRows];
        for (int r = 0; r < kRows; ++r) // a stored bit of 0 is the sign bit 1
          bits[r] = scale[i][r] ^ (~word[r] >> (k % kInputs) << 31);
        memcpy(term, bits, sizeof term);
        for (int r = 0; r < kRows; ++r)
          sum[r] += term[r];
      }
      memcpy(to, sum, sizeof sum);
    }
  }
}
