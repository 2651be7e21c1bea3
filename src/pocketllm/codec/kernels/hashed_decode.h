// Entries of a hashed trellis from its bands, eight rows times eight columns at a time.
//
//     entry = table[(low byte + reversed bits of the high byte) mod 256]
//
// With d = 2 the second number of a subvector has a table of its own, at (low byte + high byte). A table of 256 bytes
// fits into four registers, where every byte of a vector looks up its own entry.
//
// For that the stream is laid out in bands when it is loaded (hashed_layout.h): the windows of a row lie in the same
// bytes for eight columns, so one 8 x 8 bit transposition (`vgf2p8affineqb`) makes eight low bytes of a row from eight
// bytes of a band, another one eight high bytes; bits are reversed by taking the bytes in reverse.

#pragma once

#include <cstdint>

#include "hashed_layout.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define HASHED_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512vbmi,avx512vnni,gfni")))

namespace hashed {

const int64_t GROUP = 8;  // rows that are decoded at once

struct Table {
    __m512i quarter[4];
};

HASHED_TARGET inline Table signed_table(const int8_t* entries) {
    Table table;
    for (int q = 0; q < 4; ++q) table.quarter[q] = _mm512_loadu_si512(entries + 64 * q);
    return table;
}

// Entries + 128.
HASHED_TARGET inline Table unsigned_table(const int8_t* entries) {
    Table table = signed_table(entries);
    for (__m512i& quarter : table.quarter) quarter = _mm512_xor_si512(quarter, _mm512_set1_epi8(-128));
    return table;
}

HASHED_TARGET inline __m512i look_up(const Table& table, __m512i hash) {
    const __m512i lower = _mm512_permutex2var_epi8(table.quarter[0], hash, table.quarter[1]);
    const __m512i upper = _mm512_permutex2var_epi8(table.quarter[2], hash, table.quarter[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(hash), lower, upper);
}

// Which bytes of a band go into the bit transposition of eight rows. The last of eight bytes becomes the lowest bit:
// bytes in reverse order give bits in order.
struct Order {
    __m512i low, high, high_reversed;
};

HASHED_TARGET inline Order order(int64_t width, int64_t stride) {
    alignas(64) uint8_t at[3][64];
    for (int row = 0; row < 8; ++row)
        for (int k = 0; k < 8; ++k) {
            const int low = row * (int)stride, high = low + (int)width - 8;
            at[0][8 * row + k] = (uint8_t)(low + 7 - k);
            at[1][8 * row + k] = (uint8_t)(high + 7 - k);
            at[2][8 * row + k] = (uint8_t)(high + k);
        }
    return Order{_mm512_load_si512(at[0]), _mm512_load_si512(at[1]), _mm512_load_si512(at[2])};
}

// Byte c of eight collects bit c of each of the eight bytes of a band.
HASHED_TARGET inline __m512i eight_by_eight(__m512i bytes, __m512i which) {
    const __m512i picks = _mm512_set1_epi64(int64_t(0x8040201008040201ull));
    return _mm512_gf2p8affine_epi64_epi8(picks, _mm512_permutexvar_epi8(which, bytes), 0);
}

// Entries of eight rows times eight columns, a row in each eight bytes; D of them, one for each component.
template <int D>
HASHED_TARGET inline void decode(const uint8_t* band, const Order& order, const Table* tables, __m512i* entries) {
    const __m512i bytes = _mm512_loadu_si512(band), low = eight_by_eight(bytes, order.low);
    const __m512i hash = _mm512_add_epi8(low, eight_by_eight(bytes, order.high_reversed));
    entries[0] = look_up(tables[0], hash);
    if (D == 2) entries[1] = look_up(tables[1], _mm512_add_epi8(low, eight_by_eight(bytes, order.high)));
}

}  // namespace hashed

#endif
