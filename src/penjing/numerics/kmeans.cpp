// Exact one-dimensional k-means of every row; see kmeans.py for the mathematics.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

struct Row {
    int64_t n;
    std::vector<double> weight, first, second;  // prefix sums, n + 1 each
    std::vector<double> before, least;          // of the layer before and this one
    std::vector<int32_t> cuts;                  // best cut of every prefix, layer by layer

    double cost(int64_t start, int64_t stop) const {
        const double w = weight[stop] - weight[start], a = first[stop] - first[start];
        const double c = second[stop] - second[start] - (w > 0 ? a * a / w : 0);
        return c > 0 ? c : 0;
    }

    // Cuts of the prefixes from..to (inclusive) lie in low..high: the middle one is searched, halves follow.
    void fill(int32_t* cut, int64_t from, int64_t to, int64_t low, int64_t high) {
        if (from > to) return;
        const int64_t middle = (from + to) / 2, last = std::min(high, middle);
        int64_t best = low;
        double smallest = before[low] + cost(low, middle);
        for (int64_t i = low + 1; i <= last; ++i) {
            const double total = before[i] + cost(i, middle);
            if (total < smallest) smallest = total, best = i;
        }
        cut[middle] = static_cast<int32_t>(best);
        least[middle] = smallest;
        fill(cut, from, middle - 1, low, best);
        fill(cut, middle + 1, to, best, high);
    }

    void solve(const double* values, const double* weights, int64_t count, int64_t* ends) {
        weight.assign(n + 1, 0), first.assign(n + 1, 0), second.assign(n + 1, 0);
        for (int64_t i = 0; i < n; ++i) {
            weight[i + 1] = weight[i] + weights[i];
            first[i + 1] = first[i] + weights[i] * values[i];
            second[i + 1] = second[i] + weights[i] * values[i] * values[i];
        }
        before.resize(n + 1), least.resize(n + 1), cuts.resize((count - 1) * (n + 1));
        for (int64_t j = 0; j <= n; ++j) before[j] = cost(0, j);
        for (int64_t layer = 0; layer + 1 < count; ++layer) {
            fill(cuts.data() + layer * (n + 1), 0, n, 0, n);
            std::swap(before, least);
        }
        ends[count - 1] = n;
        for (int64_t place = count - 1; place > 0; --place)
            ends[place - 1] = cuts[(place - 1) * (n + 1) + ends[place]];
    }
};

}  // namespace

// values, weights: (rows, n), sorted and centred; ends: (rows, count), where each run stops.
extern "C" void exact_kmeans(const double* values, const double* weights, int64_t rows, int64_t n, int64_t count,
                             int64_t* ends, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Row row;
        row.n = n;
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < rows; ++r) row.solve(values + r * n, weights + r * n, count, ends + r * count);
    }
}
