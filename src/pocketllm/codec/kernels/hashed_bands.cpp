// The packed stream of a trellis as bands (hashed_layout.h), and back.

#include <cstdint>
#include <cstring>

#include "hashed_decode.h"

using namespace hashed;

namespace {

// Bits [at, at + 8) of a strip; zeros outside it.
inline uint64_t eight_bits(const uint8_t* bytes, int64_t bits, int64_t at) {
    if (at <= -8 || at >= bits) return 0;
    if (at < 0) return uint64_t(bytes[0]) << -at & 255;
    uint64_t found = bytes[at >> 3] >> (at & 7);
    if ((at & 7) && (at >> 3) + 1 < (bits + 7) / 8) found |= uint64_t(bytes[(at >> 3) + 1]) << (8 - (at & 7));
    return bits - at < 8 ? found & ((1 << (bits - at)) - 1) : found & 255;
}

// Bits [at, at + 64) of a strip; zeros outside it.
inline uint64_t word_at(const uint8_t* bytes, int64_t bits, int64_t at) {
    uint64_t found = 0;
    if (at >= 0 && at + 72 <= bits) {
        const int64_t shift = at & 7;
        std::memcpy(&found, bytes + (at >> 3), sizeof found);
        return shift ? found >> shift | (uint64_t)bytes[(at >> 3) + 8] << (64 - shift) : found;
    }
    for (int64_t k = 0; k < 8; ++k) found |= eight_bits(bytes, bits, at + 8 * k) << (8 * k);
    return found;
}

// Bit k of byte c becomes bit c of byte k.
inline uint64_t transposed(uint64_t x) {
    uint64_t t = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAull;
    x ^= t ^ (t << 7);
    t = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCull;
    x ^= t ^ (t << 14);
    t = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ull;
    return x ^ t ^ (t << 28);
}

// Byte k of word c becomes byte c of word k, and then bit k of that byte c bit c of byte k.
inline void interleave(const uint64_t words[COLUMNS], uint64_t out[8]) {
    for (int64_t k = 0; k < 8; ++k) {
        uint64_t eight = 0;
        for (int64_t c = 0; c < COLUMNS; ++c) eight |= (words[c] >> (8 * k) & 255) << (8 * c);
        out[k] = transposed(eight);
    }
}

#if defined(__x86_64__)

// Where the bytes of each word come from; backwards, since row 0 of the matrix is byte 7.
struct Order8 {
    alignas(64) uint8_t from[64];
    constexpr Order8() : from() {
        for (int k = 0; k < 8; ++k)
            for (int c = 0; c < 8; ++c) from[8 * k + 7 - c] = uint8_t(8 * c + k);
    }
};
constexpr Order8 ORDER;

HASHED_TARGET inline void interleave_at_once(const uint64_t words[COLUMNS], uint64_t out[8]) {
    const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(ORDER.from), _mm512_loadu_si512(words));
    const __m512i unit = _mm512_set1_epi64(0x8040201008040201);
    _mm512_storeu_si512(out, _mm512_gf2p8affine_epi64_epi8(unit, bytes, 0));
}

#endif

template <void interleave(const uint64_t*, uint64_t*)>
inline __attribute__((always_inline)) void strip_to_bands(const Shape& shape, int64_t strip, const uint8_t* packed, uint8_t* out) {
    const int64_t bits = shape.strip_bits(strip), column_bits = shape.strip_rows(strip) * shape.stride;
    const int64_t bytes = shape.band_bytes(strip), before = shape.width - shape.stride;
    for (int64_t band = 0; band < shape.bands(); ++band)
        for (int64_t m = 0; m < bytes; m += 64) {
            uint64_t words[COLUMNS], found[8];
            for (int64_t c = 0; c < COLUMNS; ++c)
                words[c] = word_at(packed, bits, (band * COLUMNS + c) * column_bits + m - before);
            interleave(words, found);
            std::memcpy(out + band * bytes + m, found, bytes - m < 64 ? bytes - m : 64);
        }
}

void strip_to_bands_in_steps(const Shape& shape, int64_t strip, const uint8_t* packed, uint8_t* out) {
    strip_to_bands<interleave>(shape, strip, packed, out);
}

#if defined(__x86_64__)

HASHED_TARGET void strip_to_bands_at_once(const Shape& shape, int64_t strip, const uint8_t* packed, uint8_t* out) {
    strip_to_bands<interleave_at_once>(shape, strip, packed, out);
}

#endif

// The inverse; `packed` is zero on entry.
void bands_to_strip(const Shape& shape, int64_t strip, const uint8_t* bands, uint8_t* packed) {
    const int64_t bits = shape.strip_bits(strip), column_bits = shape.strip_rows(strip) * shape.stride;
    const int64_t bytes = shape.band_bytes(strip), before = shape.width - shape.stride;
    for (int64_t band = 0; band < shape.bands(); ++band)
        for (int64_t m = 0; m < column_bits; m += 8) {
            const int64_t count = column_bits - m < 8 ? column_bits - m : 8;
            uint64_t eight = 0;
            std::memcpy(&eight, bands + band * bytes + before + m, count);
            eight = transposed(eight);
            for (int64_t c = 0; c < COLUMNS && band * COLUMNS + c < shape.n; ++c) {
                const int64_t at = (band * COLUMNS + c) * column_bits + m;
                const uint64_t value = (eight >> (8 * c) & ((1 << count) - 1)) << (at & 7);
                packed[at >> 3] |= uint8_t(value);
                if (value >> 8 && at + 8 < bits + 8) packed[(at >> 3) + 1] |= uint8_t(value >> 8);
            }
        }
}

}  // namespace

extern "C" {

int64_t hashed_supported();  // of hashed_matmul.cpp

// Packed stream -> bands (inverse 0), or back (inverse 1; `packed` zero on entry).
int hashed_bands(uint8_t* packed, uint8_t* bands, int64_t rows, int64_t n, int64_t width, int64_t stride,
                 int64_t strips, int64_t inverse, int64_t threads) {
    const Shape shape{rows, n, width, stride, strips};
    auto to_bands = strip_to_bands_in_steps;
#if defined(__x86_64__)
    if (hashed_supported()) to_bands = strip_to_bands_at_once;
#endif
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t strip = 0; strip < strips; ++strip) {
        uint8_t *one = packed + shape.packed_offset(strip), *other = bands + shape.bands_offset(strip);
        if (inverse)
            bands_to_strip(shape, strip, other, one);
        else
            to_bands(shape, strip, one, other);
    }
    return 0;
}
}
