// Layers with a hashed trellis: whole products by one call, single rows, and tiles of rows for many tokens.

#include <cstdint>
#include <cstring>
#include <vector>

#include "hashed_decode.h"
#include "number.h"

using namespace hashed;

extern "C" {
int hashed_multiply(const uint8_t* bands, const int8_t* entries, int64_t d, const float* scale, const float* x,
                    int64_t tokens, float* y, int64_t rows, int64_t n, int64_t width, int64_t stride, int64_t strips,
                    int64_t threads);
int rotate_vectors(float* x, int64_t count, int64_t n, const float* signs, const float* matrix, int64_t odd,
                   int64_t inverse, int64_t isa, int64_t threads);
}

namespace {

const int64_t AVX2 = 1;                    // for rotations
const int64_t WORTH_A_THREAD = 1 << 22;    // weights: fewer take less time than waking a thread that sleeps

void rotate(float* x, int64_t n, const float* signs, const float* mixer, bool inverse) {
    if (signs) rotate_vectors(x, 1, n, signs, mixer, n / (n & -n), inverse, AVX2, 1);
}

#if defined(__x86_64__)

HASHED_TARGET inline void store_sixteen(__m128i entries, __mmask16 which, float* to) {
    _mm512_mask_storeu_ps(to, which, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(entries)));
}

// Integers of eight bits are exact in bfloat16: the upper half of the float32.
HASHED_TARGET inline void store_sixteen(__m128i entries, __mmask16 which, BFloat16* to) {
    const __m512i bits = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(entries)));
    _mm256_mask_storeu_epi16(to, which, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

// Rows [first, first + count) of a strip, count <= 8, as integers; `pitch` numbers from one to the next.
template <int D, class Number>
HASHED_TARGET void decode_rows(const Matrix& m, int64_t strip, int64_t first, int64_t count, Number* out,
                               int64_t pitch) {
    const Shape shape = m.shape();
    const Order bytes = order(m.width, m.stride);
    const Table tables[2] = {signed_table(m.entries), signed_table(m.entries + 256 * (D - 1))};
    const uint8_t* from = m.bands + shape.bands_offset(strip) + first * m.stride;
    alignas(64) int8_t parts[D][64];
    for (int64_t band = 0; band < shape.bands(); ++band, from += shape.band_bytes(strip)) {
        __m512i entries[D];
        decode<D>(from, bytes, tables, entries);
        if (D == 2) {  // the two numbers of a subvector side by side: parts[0] has rows 0, 2, 4, 6
            const __m512i even = _mm512_unpacklo_epi8(entries[0], entries[D - 1]);
            entries[D - 1] = _mm512_unpackhi_epi8(entries[0], entries[D - 1]);
            entries[0] = even;
        }
        for (int i = 0; i < D; ++i) _mm512_store_si512(parts[i], entries[i]);
        const int64_t at = band * COLUMNS * D, left = m.columns - at;
        const __mmask16 which = (__mmask16)((1u << (left < COLUMNS * D ? left : COLUMNS * D)) - 1);
        for (int64_t row = 0; row < count; ++row) {
            const int8_t* one = D == 2 ? parts[(row & 1) * (D - 1)] + row / 2 * 16 : parts[0] + row * 8;
            const __m128i sixteen =
                D == 2 ? _mm_load_si128((const __m128i*)one) : _mm_loadl_epi64((const __m128i*)one);
            store_sixteen(sixteen, which, out + row * pitch + at);
        }
    }
}

// Rows [first, last) of U.
template <class Number>
void decode_tile(const Matrix& m, int64_t first, int64_t last, Number* out, int64_t threads) {
    const Shape shape = m.shape();
    const auto rows = m.d == 1 ? decode_rows<1, Number> : decode_rows<2, Number>;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t begin = first; begin < last; begin += GROUP) {
        const int64_t end = begin + GROUP < last ? begin + GROUP : last;
        for (int64_t row = begin; row < end;) {  // a group may lie across the end of a strip
            const int64_t strip = shape.strip_of(row), inside = row - shape.strip_first(strip);
            const int64_t left = shape.strip_rows(strip) - inside, count = end - row < left ? end - row : left;
            rows(m, strip, inside, count, out + (row - first) * m.columns, m.columns);
            row += count;
        }
    }
}

// Single rows of the matrix, of one that is not rotated on the side of its outputs.
template <class Number>
void look_up(const Matrix& m, const int64_t* ids, int64_t count, Number* out, int64_t threads) {
    const Shape shape = m.shape();
    const auto rows = m.d == 1 ? decode_rows<1, float> : decode_rows<2, float>;
#pragma omp parallel num_threads((int)threads) if (threads > 1 && count > 8)
    {
        std::vector<float> row(m.columns);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t strip = shape.strip_of(ids[i]);
            rows(m, strip, ids[i] - shape.strip_first(strip), 1, row.data(), m.columns);
            rotate(row.data(), m.columns, m.signs_in, m.mixer_in, true);
            for (int64_t j = 0; j < m.columns; ++j) store(row[j] * m.scale[ids[i]], out + i * m.columns + j);
        }
    }
}

#endif

template <class Number>
void linear(const Matrix& m, const Number* x, int64_t tokens, const Number* bias, Number* out, int64_t threads) {
    const int64_t padded = m.shape().bands() * COLUMNS;
    std::vector<float> inputs(tokens * m.d * padded), outputs(tokens * m.rows), flat(m.columns);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < m.columns; ++i) flat[i] = to_float(x[t * m.columns + i]);
        rotate(flat.data(), m.columns, m.signs_in, m.mixer_in, false);
        float* spread = inputs.data() + t * m.d * padded;
        if (m.d == 1)
            std::memcpy(spread, flat.data(), m.columns * sizeof(float));
        else
            for (int64_t i = 0; i < m.columns; ++i) spread[i % 2 * padded + i / 2] = flat[i];
    }
    hashed_multiply(m.bands, m.entries, m.d, m.scale, inputs.data(), tokens, outputs.data(), m.rows, m.n, m.width,
                    m.stride, m.strips, m.rows * m.columns < WORTH_A_THREAD ? 1 : threads);
    for (int64_t t = 0; t < tokens; ++t) {
        float* y = outputs.data() + t * m.rows;
        rotate(y, m.rows, m.signs_out, m.mixer_out, true);
        for (int64_t i = 0; i < m.rows; ++i)
            store(bias ? y[i] + to_float(bias[i]) : y[i], out + t * m.rows + i);
    }
}

}  // namespace

extern "C" {

// out [tokens, rows] = x [tokens, columns] W^T + bias, all of one dtype: float32, or bfloat16 where `half` is 1.
int hashed_linear(const Matrix* matrix, const void* x, int64_t half, int64_t tokens, const void* bias, void* out,
                  int64_t threads) {
    if (half)
        linear(*matrix, (const BFloat16*)x, tokens, (const BFloat16*)bias, (BFloat16*)out, threads);
    else
        linear(*matrix, (const float*)x, tokens, (const float*)bias, (float*)out, threads);
    return 0;
}

// out [count, columns] = rows `ids` of W; 1 if an id is not that of a row.
int hashed_look_up(const Matrix* matrix, const int64_t* ids, int64_t count, int64_t half, void* out,
                   int64_t threads) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= matrix->rows) return 1;
#if defined(__x86_64__)
    if (half)
        look_up(*matrix, ids, count, (BFloat16*)out, threads);
    else
        look_up(*matrix, ids, count, (float*)out, threads);
#endif
    return 0;
}

// out [last - first, columns]: rows of U in units of an entry, as numbers of `bytes` (float32, bfloat16).
int hashed_decode(const Matrix* matrix, int64_t first, int64_t last, int64_t bytes, void* out, int64_t threads) {
#if defined(__x86_64__)
    if (bytes == 2)
        decode_tile(*matrix, first, last, (BFloat16*)out, threads);
    else
        decode_tile(*matrix, first, last, (float*)out, threads);
#endif
    return 0;
}
}
