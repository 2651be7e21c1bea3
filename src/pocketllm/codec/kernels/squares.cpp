// Sums of x^T x over tokens, x in bfloat16: pairs of tokens are multiplied in one instruction, and only one triangle is
// computed. Every number is the sum of the same terms in the same order with any number of threads.

#include <cstdint>
#include <cstdlib>

#ifdef __AVX512BF16__
#include <immintrin.h>

#include <cstring>

static const int WIDE = 48, TALL = 8, VECTORS = WIDE / 16;  // a panel of columns; rows that are summed in registers

// A panel of columns of x: two numbers in a word, one for each token of a pair. out [pairs, WIDE]
static void pack(const uint16_t* x, int64_t tokens, int64_t columns, int64_t first, uint32_t* out) {
    const int64_t there = columns - first < WIDE ? columns - first : WIDE;
    for (int64_t token = 0; token < tokens; token += 2, out += WIDE) {
        uint16_t both[2][WIDE] = {};
        for (int64_t side = 0; side < 2 && token + side < tokens; ++side)
            memcpy(both[side], x + (token + side) * columns + first, there * sizeof(uint16_t));
        for (int lane = 0; lane < WIDE; lane += 16) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(both[0] + lane)));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(both[1] + lane)));
            const __m512i words = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
            _mm512_storeu_si512(out + lane, words);
        }
    }
}

// Products of TALL columns of one panel with all of another. out [TALL, WIDE]
static void tile(const uint32_t* left, const uint32_t* right, int64_t pairs, float* out) {
    __m512 sums[TALL][VECTORS];
    for (int row = 0; row < TALL; ++row)
        for (int part = 0; part < VECTORS; ++part) sums[row][part] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; ++pair, left += WIDE, right += WIDE) {
        __m512bh columns[VECTORS];
        for (int part = 0; part < VECTORS; ++part)
            columns[part] = (__m512bh)_mm512_loadu_si512(right + 16 * part);
        for (int row = 0; row < TALL; ++row) {
            const __m512bh one = (__m512bh)_mm512_set1_epi32((int)left[row]);
            for (int part = 0; part < VECTORS; ++part)
                sums[row][part] = _mm512_dpbf16_ps(sums[row][part], one, columns[part]);
        }
    }
    for (int row = 0; row < TALL; ++row)
        for (int part = 0; part < VECTORS; ++part)
            _mm512_storeu_ps(out + row * WIDE + 16 * part, sums[row][part]);
}

// Adds a block of sums below the diagonal and, transposed, above it. rows, columns: those that exist.
static void add(const float* sums, float* below, float* above, int64_t pitch, int64_t rows, int64_t columns, bool both) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column) below[row * pitch + column] += sums[row * WIDE + column];
    for (int64_t column = 0; both && column < columns; ++column)
        for (int64_t row = 0; row < rows; ++row) above[column * pitch + row] = below[row * pitch + column];
}

static int add_square(const uint16_t* x, int64_t tokens, int64_t columns, int64_t threads, float* total) {
    const int64_t panels = (columns + WIDE - 1) / WIDE, pairs = (tokens + 1) / 2, size = pairs * WIDE;
    uint32_t* packed = (uint32_t*)malloc(panels * size * sizeof(uint32_t));
    if (!packed) return 1;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; ++panel)
            pack(x, tokens, columns, panel * WIDE, packed + panel * size);
#pragma omp for schedule(dynamic)
        for (int64_t left = panels - 1; left >= 0; --left)
            for (int64_t right = 0; right <= left; ++right) {
                float sums[WIDE * WIDE];
                for (int begin = 0; begin < WIDE; begin += TALL)
                    tile(packed + left * size + begin, packed + right * size, pairs, sums + begin * WIDE);
                const int64_t row = left * WIDE, column = right * WIDE, rest = columns - row;
                add(sums, total + row * columns + column, total + column * columns + row, columns,
                    rest < WIDE ? rest : WIDE, columns - column < WIDE ? columns - column : WIDE, left != right);
            }
    }
    free(packed);
    return 0;
}
#endif

extern "C" int squares_supported() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

// total [columns, columns], symmetric, += x^T x of x [tokens, columns]; 1 without memory.
extern "C" int add_square_bfloat16(const uint16_t* x, int64_t tokens, int64_t columns, int64_t threads, float* total) {
#ifdef __AVX512BF16__
    return add_square(x, tokens, columns, threads, total);
#else
    return 1;
#endif
}
