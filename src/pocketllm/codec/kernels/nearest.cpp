// Nearest codeword by exhaustive search: squared Euclidean distance, ties to the lower index.
// Built by cpu.py with the system's compiler; reference.py holds the torch code that it must agree with.
//
// points [n, d]; table [d, k] (transposed, so that eight codewords lie side by side), k a multiple of 16;
// half_norms [k] = |c|^2 / 2, +inf for filled-up codewords; out [n].
// Ordered by |c|^2 / 2 - <x, c>, which differs from |x - c|^2 / 2 by a constant.

#include <cstdint>

typedef float Lanes __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

static const int QUERIES = 4;   // share each load of the table
static const int VECTORS = 4;   // of eight codewords, looked at together: few of them hold a new best one

static inline bool any(Ints mask) {
#ifdef __AVX__
    return __builtin_ia32_movmskps256((Lanes)mask) != 0;
#else
    for (int lane = 0; lane < 8; ++lane)
        if (mask[lane]) return true;
    return false;
#endif
}

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
            best[q] = Lanes{} + __builtin_inff();
            where[q] = Ints{};
        }
        for (int64_t j = 0; j < k; j += 8 * VECTORS) {
            Lanes value[QUERIES][VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                Lanes norms;
                __builtin_memcpy(&norms, half_norms + j + 8 * v, sizeof norms);
                for (int q = 0; q < QUERIES; ++q) value[q][v] = norms;
                for (int i = 0; i < D; ++i) {
                    Lanes c;
                    __builtin_memcpy(&c, table + i * k + j + 8 * v, sizeof c);
                    for (int q = 0; q < QUERIES; ++q) value[q][v] -= c * x[q][i];
                }
            }
            for (int q = 0; q < QUERIES; ++q) {
                Lanes least = value[q][0];
                for (int v = 1; v < VECTORS; ++v) least = value[q][v] < least ? value[q][v] : least;
                if (!any(least < best[q])) continue;
                for (int v = 0; v < VECTORS; ++v) {
                    Ints closer = value[q][v] < best[q];
                    best[q] = closer ? value[q][v] : best[q];
                    where[q] = closer ? (Ints{} + (int32_t)(j + 8 * v)) : where[q];
                }
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
