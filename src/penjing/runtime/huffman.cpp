// Decoding blocks of canonical Huffman codes; see penjing/numerics/huffman.py for the layout.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int kLongest = 12;
constexpr int64_t kBlock = 2048;

// False for a stream with no code at some place, or one that ends too early.
bool decode_block(const uint8_t* stream, int64_t bytes, const uint16_t* table, int64_t count, uint8_t* out) {
    uint64_t bits = 0;  // the lowest `held` bits come next
    int held = 0;
    int64_t next = 0, used = 0;
    for (int64_t i = 0; i < count; ++i) {
        while (held < kLongest) {
            bits = bits << 8 | (next < bytes ? stream[next] : 0);
            ++next, held += 8;
        }
        const uint16_t entry = table[bits >> (held - kLongest) & ((1u << kLongest) - 1)];
        const int length = entry >> 8;
        if (length == 0) return false;
        out[i] = static_cast<uint8_t>(entry);
        held -= length, used += length;
    }
    return used <= 8 * bytes;
}

}  // namespace

// starts: where each block begins in the stream, and where the last one ends. Returns the number of damaged blocks.
extern "C" int64_t huffman_decode(const uint8_t* stream, const int64_t* starts, const uint16_t* table, int64_t count,
                                  uint8_t* out, int threads) {
    const int64_t blocks = (count + kBlock - 1) / kBlock;
    int64_t damaged = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : damaged)
    for (int64_t b = 0; b < blocks; ++b)
        damaged += !decode_block(stream + starts[b], starts[b + 1] - starts[b], table,
                                 std::min(kBlock, count - b * kBlock), out + b * kBlock);
    return damaged;
}
