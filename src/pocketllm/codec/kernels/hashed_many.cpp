// Products of many tokens with a hashed trellis: rotated tokens as 8-bit integers times decoded entries.
//
// A few rows at a time are decoded into memory that stays in the first-level cache, and multiplied with a block of
// tokens: `vpdpbusd` adds their products with unsigned entries (entry + 128), four columns at a time. Threads share
// the rows of a block, so that each is decoded once, and the tokens of it where they are rotated.

#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "hashed_decode.h"
#include "number.h"

using namespace hashed;

extern "C" {
int packed_rotate_to_integers(const BFloat16* x, int8_t* whole, float* unit_of, int64_t count, int64_t n,
                              const float* signs, const float* mixer, int64_t isa, int64_t threads);
int packed_rotate_from_integers(const int32_t* whole, float* unit_of, BFloat16* out, int64_t count, int64_t n,
                                const float* signs, const float* mixer, const float* scale, const BFloat16* bias,
                                int64_t isa, int64_t threads);
}

namespace {

#if defined(__x86_64__)

const int64_t AVX512 = 2;    // for rotations
const int64_t BLOCK = 256;   // tokens that share one decoding
const int64_t ROTATED = 16;  // tokens that are rotated together
const int64_t TILE = 12;     // tokens whose sums with GROUPS groups of rows stay in registers
const int64_t GROUPS = 2;

struct alignas(64) Entries {  // of eight rows times eight columns
    uint8_t bytes[64];
};

// A block of tokens as integers, in the order in which they are multiplied with bands:
// [tiles][bands * d][TILE][COLUMNS], zero beyond the columns of the matrix.
struct Tokens {
    const Matrix& m;
    int64_t steps;
    std::unique_ptr<int8_t[]> rotated, bytes;  // not filled with zeros: what nothing is written to is not used either
    std::vector<float> unit;
    std::vector<int32_t> offset;  // 128 times the sum of a token, which products with unsigned entries have too much

    Tokens(const Matrix& m, int64_t most)
        : m(m), steps(m.shape().bands() * m.d), rotated(new int8_t[most * m.columns]),
          bytes(new int8_t[(most + TILE - 1) / TILE * TILE * steps * COLUMNS]), unit(most), offset(most) {}

    const int8_t* tile(int64_t number) const { return bytes.get() + number * TILE * steps * COLUMNS; }

    // Tokens [first, first + count) of the block, from x.
    HASHED_TARGET void take(const BFloat16* x, int64_t first, int64_t count) {
        int8_t* whole = rotated.get() + first * m.columns;
        packed_rotate_to_integers(x, whole, unit.data() + first, count, m.columns, m.signs_in, m.mixer_in, AVX512, 1);
        for (int64_t t = first; t < first + count; ++t, whole += m.columns) arrange(whole, t);
    }

    HASHED_TARGET void arrange(const int8_t* whole, int64_t token) {
        const int64_t wide = COLUMNS * m.d;
        const __m128i halves = m.d == 1 ? _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                                        : _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        int8_t* to = bytes.get() + token / TILE * TILE * steps * COLUMNS + token % TILE * COLUMNS;
        __m128i sums = _mm_setzero_si128();
        for (int64_t at = 0; at < m.columns; at += wide) {
            const int64_t left = m.columns - at < wide ? m.columns - at : wide;
            const __m128i sixteen = _mm_maskz_loadu_epi8((__mmask16)((1u << left) - 1), whole + at);
            const __m128i both = _mm_shuffle_epi8(sixteen, halves);
            sums = _mm_dpbusd_epi32(sums, _mm_set1_epi8(1), both);
            for (int64_t k = 0; k < m.d; ++k, to += TILE * COLUMNS)
                std::memcpy(to, (const int8_t*)&both + k * COLUMNS, COLUMNS);
        }
        int32_t parts[4];
        _mm_storeu_si128((__m128i*)parts, sums);
        offset[token] = 128 * (parts[0] + parts[1] + parts[2] + parts[3]);
    }
};

// GROUPS groups of rows of a strip from `first` on, of which `count` rows are there: [bands * d][GROUPS].
template <int D>
HASHED_TARGET void decode_rows(const Matrix& m, int64_t strip, int64_t first, int64_t count, Entries* out) {
    const Shape shape = m.shape();
    const Order bytes = order(m.width, m.stride);
    const Table tables[2] = {unsigned_table(m.entries), unsigned_table(m.entries + 256 * (D - 1))};
    const uint8_t* from = m.bands + shape.bands_offset(strip) + first * m.stride;
    for (int64_t band = 0; band < shape.bands(); ++band, from += shape.band_bytes(strip), out += D * GROUPS)
        for (int64_t g = 0; g < GROUPS; ++g) {
            __m512i entries[D];
            decode<D>(from + (g * GROUP < count ? g * GROUP * m.stride : 0), bytes, tables, entries);
            for (int k = 0; k < D; ++k) _mm512_store_si512(out[k * GROUPS + g].bytes, entries[k]);
        }
}

// Adds eight columns of one token times two groups of rows. In assembly, since GCC would keep sums in memory.
HASHED_TARGET inline void add(const Entries* rows, const int8_t* token, __m512i& first, __m512i& second) {
    int64_t columns;
    std::memcpy(&columns, token, sizeof columns);
    const __m512i x = _mm512_set1_epi64(columns);
    asm("vpdpbusd %2, %1, %0" : "+v"(first) : "v"(_mm512_load_si512(rows[0].bytes)), "v"(x));
    asm("vpdpbusd %2, %1, %0" : "+v"(second) : "v"(_mm512_load_si512(rows[1].bytes)), "v"(x));
}

// The sums of 16 rows, of which both groups have two for each row.
HASHED_TARGET inline __m512i sums_of_rows(__m512i first, __m512i second) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_permutex2var_epi32(first, even, second),
                            _mm512_permutex2var_epi32(first, odd, second));
}

// sums [TILE], 16 rows each = decoded rows times a tile of tokens. T counts the tokens for the compiler, which keeps
// sums in registers only if it knows every index.
template <size_t... T>
HASHED_TARGET inline void multiply_tile(const Entries* rows, const int8_t* tokens, int64_t steps, __m512i* sums,
                                        std::index_sequence<T...>) {
    __m512i first[] = {((void)T, _mm512_setzero_si512())...}, second[] = {((void)T, _mm512_setzero_si512())...};
    for (int64_t k = 0; k < steps; ++k, rows += GROUPS, tokens += TILE * COLUMNS)
        (add(rows, tokens + T * COLUMNS, first[T], second[T]), ...);
    ((sums[T] = sums_of_rows(first[T], second[T])), ...);
}

// out [tokens, rows] for rows [first, first + count) of a strip and the first tokens of a block.
HASHED_TARGET void multiply_rows(const Matrix& m, int64_t strip, int64_t first, int64_t count, const Tokens& x,
                                 int64_t tokens, Entries* decoded, int32_t* out) {
    (m.d == 1 ? decode_rows<1> : decode_rows<2>)(m, strip, first, count, decoded);
    const __mmask16 which = (__mmask16)((1u << count) - 1);
    for (int64_t t = 0; t < tokens; t += TILE) {
        __m512i sums[TILE];
        multiply_tile(decoded, x.tile(t / TILE), x.steps, sums, std::make_index_sequence<TILE>());
        for (int64_t k = 0; k < TILE && t + k < tokens; ++k)
            _mm512_mask_storeu_epi32(out + (t + k) * m.rows + m.shape().strip_first(strip) + first, which,
                                     _mm512_sub_epi32(sums[k], _mm512_set1_epi32(x.offset[t + k])));
    }
}

// Tokens for each thread of a block, a multiple of those that are rotated together.
int64_t share(int64_t count, int64_t threads) {
    return (count + threads * ROTATED - 1) / (threads * ROTATED) * ROTATED;
}

#endif

}  // namespace

extern "C" {

// out [tokens, rows] = x [tokens, columns] W^T + bias, in bfloat16, with entries and tokens as 8-bit integers.
int hashed_many(const Matrix* matrix, const BFloat16* x, int64_t tokens, const BFloat16* bias, BFloat16* out,
                int64_t threads) {
#if defined(__x86_64__)
    const Matrix& m = *matrix;
    const Shape shape = m.shape();
    const int64_t most = tokens < BLOCK ? tokens : BLOCK, step = GROUPS * GROUP;
    const int64_t chunks = (shape.strip_rows(0) + step - 1) / step;
    Tokens block(m, most);
    const std::unique_ptr<int32_t[]> sums(new int32_t[most * m.rows]);
#pragma omp parallel num_threads((int)threads)
    {
        std::vector<Entries> decoded(block.steps * GROUPS);
        for (int64_t first = 0; first < tokens; first += BLOCK) {
            const int64_t count = tokens - first < BLOCK ? tokens - first : BLOCK, part = share(count, threads);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < count; t += part)
                block.take(x + (first + t) * m.columns, t, t + part < count ? part : count - t);
#pragma omp for schedule(static)
            for (int64_t task = 0; task < shape.strips * chunks; ++task) {
                const int64_t strip = task / chunks, row = task % chunks * step, left = shape.strip_rows(strip) - row;
                if (left > 0)
                    multiply_rows(m, strip, row, left < step ? left : step, block, count, decoded.data(), sums.get());
            }
#pragma omp for schedule(static)
            for (int64_t t = 0; t < count; t += part)
                packed_rotate_from_integers(sums.get() + t * m.rows, block.unit.data() + t,
                                            out + (first + t) * m.rows, t + part < count ? part : count - t, m.rows,
                                            m.signs_out, m.mixer_out, m.scale, bias, AVX512, 1);
        }
    }
    return 0;
#else
    return 1;
#endif
}
}
