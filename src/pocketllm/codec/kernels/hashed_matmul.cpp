// Products with a hashed trellis: a window of 9 to 16 bits is hashed to 8 bits, which choose one of 256 int8
// entries; // hashed_decode.h looks them up.
//
// Activations become 16-bit integers with one scale per token, as two bytes each: `vpdpbusd` adds their products
// with unsigned entries (entry + 128), four columns at a time.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "hashed_decode.h"

using namespace hashed;

namespace {

const int64_t GROUPS = 40;      // whose sums stay in the first-level cache
const int64_t AHEAD = 2;        // how many rounds of bands are fetched in advance: one band is too short a run
const int64_t MOST_TOKENS = 8;  // that share one decoding

#if defined(__x86_64__)

// Activations as integers: x = scale * (256 * high + low), both bytes signed. What is multiplied with eight columns
// lies together for all tokens: [d * bands][tokens][high, low][COLUMNS].
struct Activations {
    int64_t tokens, size;
    std::vector<int8_t> bytes;
    std::vector<float> scale;
    std::vector<int32_t> sums;  // [tokens][high, low]

    const int8_t* columns(int64_t band, int64_t token) const {
        return bytes.data() + (band * tokens + token) * 2 * COLUMNS;
    }

    Activations(const float* x, int64_t tokens, int64_t size)
        : tokens(tokens), size(size), bytes(tokens * 2 * size), scale(tokens), sums(tokens * 2) {
        for (int64_t t = 0; t < tokens; ++t) quantize(x + t * size, t);
    }

    HASHED_TARGET void quantize(const float* x, int64_t token) {
        const float most = 32512;  // 127 * 256: the high byte stays below 128 when the low one is rounded up
        __m256 peaks = _mm256_setzero_ps(), nothing = _mm256_setzero_ps();
        for (int64_t i = 0; i < size; i += COLUMNS) {
            const __m256 values = _mm256_loadu_ps(x + i);
            peaks = _mm256_max_ps(peaks, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), values));
            nothing = _mm256_add_ps(nothing, _mm256_mul_ps(values, _mm256_setzero_ps()));
        }
        float peak = 0, wrong = 0;  // `wrong` is zero unless a number is not finite: then the product is not either
        for (int64_t i = 0; i < COLUMNS; ++i) peak = peaks[i] > peak ? peaks[i] : peak, wrong += nothing[i];
        scale[token] = peak / most + wrong;
        const __m256 factor = _mm256_set1_ps(peak > 0 ? most / peak : 0);
        __m256i high_sums = _mm256_setzero_si256(), low_sums = _mm256_setzero_si256();
        for (int64_t i = 0; i < size; i += COLUMNS) {
            const __m256i value = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor));
            const __m256i high = _mm256_srai_epi32(_mm256_add_epi32(value, _mm256_set1_epi32(128)), 8);
            const __m256i low = _mm256_sub_epi32(value, _mm256_slli_epi32(high, 8));
            int8_t* to = bytes.data() + (i / COLUMNS * tokens + token) * 2 * COLUMNS;
            _mm_storel_epi64((__m128i*)to, _mm256_cvtepi32_epi8(high));
            _mm_storel_epi64((__m128i*)(to + COLUMNS), _mm256_cvtepi32_epi8(low));
            high_sums = _mm256_add_epi32(high_sums, high);
            low_sums = _mm256_add_epi32(low_sums, low);
        }
        int32_t parts[2][COLUMNS];
        _mm256_storeu_si256((__m256i*)parts[0], high_sums);
        _mm256_storeu_si256((__m256i*)parts[1], low_sums);
        for (int64_t i = 0; i < COLUMNS; ++i) {
            sums[2 * token] += parts[0][i];
            sums[2 * token + 1] += parts[1][i];
        }
    }
};

HASHED_TARGET inline __m512i eight_columns(const int8_t* x) {
    int64_t value;
    std::memcpy(&value, x, sizeof value);
    return _mm512_set1_epi64(value);
}

// Some rows of a strip times some tokens. sums: [groups][tokens][high, low], 16 numbers each.
struct Product {
    Order order;
    Table tables[2];
    const Activations& x;
    const uint8_t* bands;  // of the strip, at the first of the rows
    int64_t band_bytes, stride, first_token, tokens;
    __m512i* sums;
};

// Adds BANDS bands from `band` on to the sums of TOGETHER groups from `group` on.
template <int D, int BANDS, int TOGETHER>
HASHED_TARGET inline void add_bands(const Product& product, int64_t band, int64_t group) {
    const int64_t component = product.x.size / D / COLUMNS, tokens = product.tokens;
    __m512i entries[TOGETHER][BANDS * D];
    for (int g = 0; g < TOGETHER; ++g)
        for (int b = 0; b < BANDS; ++b) {
            const uint8_t* from =
                product.bands + (band + b) * product.band_bytes + (group + g) * GROUP * product.stride;
            __builtin_prefetch(from + AHEAD * BANDS * product.band_bytes);
            decode<D>(from, product.order, product.tables, entries[g] + b * D);
        }
    for (int64_t t = 0; t < tokens; ++t) {
        __m512i* to = product.sums + (group * tokens + t) * 2;
        __m512i high[TOGETHER], low[TOGETHER];
        for (int g = 0; g < TOGETHER; ++g) high[g] = to[g * tokens * 2], low[g] = to[g * tokens * 2 + 1];
        for (int k = 0; k < BANDS * D; ++k) {
            const int8_t* inputs =
                product.x.columns(k % D * component + band + k / D, product.first_token + t);
            const __m512i upper = eight_columns(inputs), lower = eight_columns(inputs + COLUMNS);
            for (int g = 0; g < TOGETHER; ++g) {
                high[g] = _mm512_dpbusd_epi32(high[g], entries[g][k], upper);
                low[g] = _mm512_dpbusd_epi32(low[g], entries[g][k], lower);
            }
        }
        for (int g = 0; g < TOGETHER; ++g) to[g * tokens * 2] = high[g], to[g * tokens * 2 + 1] = low[g];
    }
}

// The same for all groups; two at a time share what they load of the tokens.
template <int D, int BANDS>
HASHED_TARGET inline void add_bands_to_all(const Product& product, int64_t band, int64_t groups) {
    int64_t group = 0;
    for (; product.tokens > 1 && group + 2 <= groups; group += 2) add_bands<D, BANDS, 2>(product, band, group);
    for (; group < groups; ++group) add_bands<D, BANDS, 1>(product, band, group);
}

// y [tokens of x, rows] for rows [begin, end) of a strip and tokens from `first` on.
template <int D>
HASHED_TARGET void multiply_rows(const Shape& shape, int64_t strip, const uint8_t* bands, const int8_t* entries,
                                 const float* scale, const Activations& x, int64_t first, int64_t tokens,
                                 int64_t begin, int64_t end, float* y) {
    __m512i sums[GROUPS * MOST_TOKENS * 2];
    const int64_t groups = (end - begin + GROUP - 1) / GROUP, most = 4 / D;
    for (int64_t i = 0; i < groups * tokens * 2; ++i) sums[i] = _mm512_setzero_si512();
    const Product product{order(shape.width, shape.stride),
                          {unsigned_table(entries), unsigned_table(entries + 256 * (D - 1))},
                          x,
                          bands + shape.bands_offset(strip) + begin * shape.stride,
                          shape.band_bytes(strip),
                          shape.stride,
                          first,
                          tokens,
                          sums};
    int64_t band = 0;
    for (; band + most <= shape.bands(); band += most) add_bands_to_all<D, 4 / D>(product, band, groups);
    for (; band < shape.bands(); ++band) add_bands_to_all<D, 1>(product, band, groups);
    for (int64_t row = begin; row < end; ++row)
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t group = (row - begin) / GROUP, lane = (row - begin) % GROUP * 2;
            alignas(64) int32_t high[16], low[16];
            _mm512_store_si512(high, sums[(group * tokens + t) * 2]);
            _mm512_store_si512(low, sums[(group * tokens + t) * 2 + 1]);
            const int64_t at = shape.strip_first(strip) + row, token = first + t;
            const int32_t upper = high[lane] + high[lane + 1] - 128 * x.sums[2 * token];
            const int32_t lower = low[lane] + low[lane + 1] - 128 * x.sums[2 * token + 1];
            y[token * shape.rows + at] = scale[at] * x.scale[token] * (256.0f * (float)upper + (float)lower);
        }
}

#endif

}  // namespace

extern "C" {

// Whether this processor can run `hashed_multiply`.
int64_t hashed_supported() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("gfni");
#else
    return 0;
#endif
}

// y [tokens, rows] = scale * (x U^T) with x [tokens, d, 8 * bands] float32, zero beyond n; entries [d, 256] int8.
int hashed_multiply(const uint8_t* bands, const int8_t* entries, int64_t d, const float* scale, const float* x,
                    int64_t tokens, float* y, int64_t rows, int64_t n, int64_t width, int64_t stride,
                    int64_t strips, int64_t threads) {
#if defined(__x86_64__)
    const Shape shape{rows, n, width, stride, strips};
    const Activations integers(x, tokens, d * shape.bands() * COLUMNS);
    const int64_t parts = (tokens + MOST_TOKENS - 1) / MOST_TOKENS, groups = (rows / strips + GROUP) / GROUP;
    // Bands are read in order if a strip is one task; it is cut where there would be too few to share out evenly.
    int64_t chunks = (groups + GROUPS - 1) / GROUPS;
    while (strips * parts * chunks < 8 * threads && strips * parts * chunks % threads && chunks < groups) ++chunks;
    const int64_t chunk = (groups + chunks - 1) / chunks * GROUP;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t task = 0; task < strips * chunks * parts; ++task) {
        const int64_t strip = task / parts / chunks, begin = task / parts % chunks * chunk;
        const int64_t first = task % parts * MOST_TOKENS, length = shape.strip_rows(strip);
        const int64_t end = begin + chunk < length ? begin + chunk : length;
        const int64_t count = tokens - first < MOST_TOKENS ? tokens - first : MOST_TOKENS;
        if (begin >= end) continue;
        const auto multiply = d == 1 ? multiply_rows<1> : multiply_rows<2>;
        multiply(shape, strip, bands, entries, scale, integers, first, count, begin, end, y);
    }
    return 0;
#else
    return 1;
#endif
}
}
