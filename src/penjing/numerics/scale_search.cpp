// The cheapest of many scales and zero points for every row of a group; see scale_search.py for the mathematics.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));  // one candidate in each

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction, ties to even

// A value is (code - shift) * scale + offset, its code the nearest between low and high. These are whole numbers, so
// that moving into the range before rounding changes nothing. Multiplying by the inverse of a scale instead of dividing
// can move a tie: the caller judges what is nominated here.
struct Candidates {
    Lanes scale, inverse, shift, offset, low, high;

    Candidates(int kind, const float* scales, const float* zeros, float lowest, float highest) {
        const Lanes none = {};
        Lanes zero;
        std::memcpy(&scale, scales, sizeof scale);
        std::memcpy(&zero, zeros, sizeof zero);
        inverse = 1.0f / scale;
        shift = kind == 1 ? zero : none;   // zero points of any value
        offset = kind == 2 ? zero : none;  // minima
        low = none + lowest, high = none + highest;
        if (kind == 0) low -= zero, high -= zero;         // whole zero points
        if (kind == 2) low = none, high = none + (highest - lowest);
    }

    Lanes losses(const float* weight, const float* costs, int64_t columns) const {
        Lanes total = {};
        for (int64_t i = 0; i < columns; ++i) {
            Lanes code = (weight[i] - offset) * inverse + shift;
            code = code < low ? low : code;
            code = code > high ? high : code;
            code = (code + kRound) - kRound;
            const Lanes change = (code - shift) * scale + (offset - weight[i]);
            total += change * change * costs[i];
        }
        return total;
    }
};

}  // namespace

// weight: (rows, columns); costs: (columns,); scales, zeros: (rows, count), count a multiple of 16; best: (rows,), which
// candidate costs least, the first of equals.
extern "C" void cheapest_scales(const float* weight, const float* costs, const float* scales, const float* zeros,
                                int64_t rows, int64_t columns, int64_t count, int kind, float low, float high,
                                int64_t* best, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        float least = std::numeric_limits<float>::infinity();
        best[r] = 0;
        for (int64_t c = 0; c < count; c += kLanes) {
            const Candidates some(kind, scales + r * count + c, zeros + r * count + c, low, high);
            const Lanes losses = some.losses(weight + r * columns, costs, columns);
            for (int64_t lane = 0; lane < kLanes; ++lane)
                if (losses[lane] < least) least = losses[lane], best[r] = c + lane;
        }
    }
}
