// Nearest codeword by exhaustive search: squared Euclidean distance, ties to the lower index.
// Built by compiled.py with the system's compiler; codebook.py holds the path in torch that it must agree with.
//
// points [n, d]; table [d, k] (transposed, so that eight codewords lie side by side), k a multiple of 8;
// half_norms [k] = |c|^2 / 2, +inf for filled-up codewords; out [n].
// Ordered by |c|^2 / 2 - <x, c>, which differs from |x - c|^2 / 2 by a constant.

#include <cstdint>

typedef float Lanes __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

static const int QUERIES = 4;  // share each load of the table

template <int D>
static void search(const float* points, const float* table, const float* half_norms, int64_t n, int64_t k,
                   int32_t* out) {
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < n; begin += QUERIES) {
        Lanes best[QUERIES];
        Ints where[QUERIES];
        float x[QUERIES][D];
        for (int q = 0; q < QUERIES; ++q) {
            int64_t row = begin + q < n ? begin + q : n - 1;
            for (int i = 0; i < D; ++i) x[q][i] = points[row * D + i];
            for (int lane = 0; lane < 8; ++lane) {
                best[q][lane] = __builtin_inff();
                where[q][lane] = 0;
            }
        }
        for (int64_t j = 0; j < k; j += 8) {
            Lanes norms;
            __builtin_memcpy(&norms, half_norms + j, sizeof norms);
            Lanes value[QUERIES];
            for (int q = 0; q < QUERIES; ++q) value[q] = norms;
            for (int i = 0; i < D; ++i) {
                Lanes c;
                __builtin_memcpy(&c, table + i * k + j, sizeof c);
                for (int q = 0; q < QUERIES; ++q) value[q] -= c * x[q][i];
            }
            for (int q = 0; q < QUERIES; ++q) {
                Ints closer = value[q] < best[q];
                best[q] = closer ? value[q] : best[q];
                where[q] = closer ? (Ints{} + (int32_t)j) : where[q];
            }
        }
        for (int q = 0; q < QUERIES && begin + q < n; ++q) {
            float least = best[q][0];
            int32_t index = where[q][0];
            for (int lane = 1; lane < 8; ++lane) {
                int32_t candidate = where[q][lane] + lane;
                if (best[q][lane] < least || (best[q][lane] == least && candidate < index)) {
                    least = best[q][lane];
                    index = candidate;
                }
            }
            out[begin + q] = index;
        }
    }
}

extern "C" int nearest(const float* points, const float* table, const float* half_norms, int64_t n, int64_t k,
                       int64_t d, int32_t* out) {
    switch (d) {
#define CASE(D) \
    case D: \
        search<D>(points, table, half_norms, n, k, out); \
        return 0;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15) CASE(16)
#undef CASE
    }
    return 1;
}
