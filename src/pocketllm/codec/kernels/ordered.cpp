// Products of matrices and a few columns, each sum taken in the order of its terms and without fused operations. A BLAS
// made for many columns leaves most of its registers idle here. Built together with trellis.cpp, for the same flags.
//
// a [batch, rows, depth], rows next to each other in memory; b [batch, depth, columns] with any strides; out [batch,
// rows, columns].

#include <cstdint>
#include <cstring>

typedef float Sixteen __attribute__((vector_size(64)));
typedef float Four __attribute__((vector_size(16)));

static const int MOST_COLUMNS = 10;

struct Sides {
    const float *a, *b;
    int64_t a_step, b_step, b_next, depth;  // from one term to the next; from one column of b to the next
};

// VECTORS * lanes rows of the product.
template <int COLUMNS, int VECTORS, class Lanes>
static void some_rows(const Sides& sides, int64_t first, float* out) {
    const int lanes = sizeof(Lanes) / sizeof(float);
    Lanes sums[VECTORS][COLUMNS] = {};
    for (int64_t term = 0; term < sides.depth; ++term) {
        const float *a = sides.a + term * sides.a_step + first, *b = sides.b + term * sides.b_step;
        for (int vector = 0; vector < VECTORS; ++vector) {
            Lanes left;
            memcpy(&left, a + vector * lanes, sizeof left);
            for (int column = 0; column < COLUMNS; ++column)
                sums[vector][column] += left * (Lanes{} + b[column * sides.b_next]);
        }
    }
    for (int vector = 0; vector < VECTORS; ++vector)
        for (int lane = 0; lane < lanes; ++lane)
            for (int column = 0; column < COLUMNS; ++column)
                out[(first + vector * lanes + lane) * COLUMNS + column] = sums[vector][column][lane];
}

template <int COLUMNS>
static void product(const Sides& sides, int64_t rows, float* out) {
    const int wide = COLUMNS == 1 ? 8 : COLUMNS <= 4 ? 4 : 2;
    int64_t row = 0;
    for (; row + wide * 16 <= rows; row += wide * 16) some_rows<COLUMNS, wide, Sixteen>(sides, row, out);
    for (; row + 16 <= rows; row += 16) some_rows<COLUMNS, 1, Sixteen>(sides, row, out);
    for (; row + 4 <= rows; row += 4) some_rows<COLUMNS, 1, Four>(sides, row, out);
    for (; row < rows; ++row)
        for (int column = 0; column < COLUMNS; ++column) {
            float sum = 0;
            for (int64_t term = 0; term < sides.depth; ++term)
                sum += sides.a[term * sides.a_step + row] *
                       sides.b[term * sides.b_step + column * sides.b_next];
            out[row * COLUMNS + column] = sum;
        }
}

extern "C" int ordered_product(const float* a, int64_t a_batch, int64_t a_step, const float* b, int64_t b_batch,
                               int64_t b_step, int64_t b_next, int64_t batch, int64_t depth, int64_t rows,
                               int64_t columns, int64_t threads, float* out) {
    if (columns < 1 || columns > MOST_COLUMNS) return 1;
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch > 1)
    for (int64_t number = 0; number < batch; ++number) {
        const Sides sides = {a + number * a_batch, b + number * b_batch, a_step, b_step, b_next, depth};
        float* into = out + number * rows * columns;
#define CASE(N) \
    case N: product<N>(sides, rows, into); break;
        switch (columns) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) }
#undef CASE
    }
    return 0;
}
