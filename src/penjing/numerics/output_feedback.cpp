// One column of a matrix to an integer grid, with feedback among outputs; see output_feedback.py for the mathematics.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// column, scale, zero, codes: of all outputs; order: (n,) numbers of those of this block; factor: (n, n) upper, in that
// order. A scale of zero means that the value is zero, and the code the zero point.
extern "C" void round_with_feedback(const float* column, const float* scale, const float* zero, const int64_t* order,
                                    const float* factor, float* codes, int64_t n, float low, float high) {
    std::vector<float> wanted(n);
    for (int64_t i = 0; i < n; ++i) wanted[i] = column[order[i]];
    for (int64_t i = 0; i < n; ++i) {
        const float step = scale[order[i]], shift = zero[order[i]], *row = factor + i * n;
        const float code = step == 0 ? shift : std::min(std::max(std::nearbyint(wanted[i] / step + shift), low), high);
        codes[order[i]] = code;
        const float error = (wanted[i] - step * (code - shift)) / row[i];
        for (int64_t k = i + 1; k < n; ++k) wanted[k] -= error * row[k];
    }
}
