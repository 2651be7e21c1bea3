// The layout in bands that hashed_bands.cpp makes and the kernels of the hashed trellis read.
//
// A band is eight columns of subvectors of a strip: bit c of its byte m is bit m of column c. The window of row t
// then lies in bytes t * stride to t * stride + width of all eight columns. The first width - stride bytes repeat
// the end of the columns before; so bands are about 2 percent larger than the packed stream.

#pragma once

#include <cstdint>

namespace hashed {

const int64_t COLUMNS = 8;  // of subvectors in a band

// How the rows are cut into strips, and where those begin.
struct Shape {
    int64_t rows, n, width, stride, strips;

    int64_t bands() const { return (n + COLUMNS - 1) / COLUMNS; }
    int64_t strip_rows(int64_t strip) const { return rows / strips + (strip < rows % strips); }
    int64_t longer_before(int64_t strip) const { return strip < rows % strips ? strip : rows % strips; }
    int64_t strip_first(int64_t strip) const { return rows / strips * strip + longer_before(strip); }
    int64_t strip_of(int64_t row) const {
        const int64_t base = rows / strips, longer = rows % strips, rest = row - longer * (base + 1);
        return rest < 0 ? row / (base + 1) : longer + rest / base;
    }
    int64_t band_bytes(int64_t strip) const { return width - stride + strip_rows(strip) * stride; }
    int64_t strip_bits(int64_t strip) const { return strip_rows(strip) * n * stride; }

    // Where a strip begins in the packed stream and among the bands.
    int64_t packed_offset(int64_t strip) const {
        int64_t bytes = 0;
        for (int64_t s = 0; s < strip; ++s) bytes += (strip_bits(s) + 7) / 8;
        return bytes;
    }
    int64_t bands_offset(int64_t strip) const {
        return bands() * (strip * (width - stride) + strip_first(strip) * stride);
    }
};

// What does not change between products with a matrix; banded_cpu.py fills it in, eight bytes for each field.
struct Matrix {
    const uint8_t* bands;
    const int8_t* entries;  // [d, 256]
    const float* scale;
    const float *signs_in, *mixer_in, *signs_out, *mixer_out;  // null where a side is not rotated
    int64_t d, columns, rows, n, width, stride, strips;

    Shape shape() const { return Shape{rows, n, width, stride, strips}; }
};

}  // namespace hashed
