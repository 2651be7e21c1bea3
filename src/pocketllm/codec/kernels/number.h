// Numbers as layers hold them: float32 or bfloat16; and the integers of a product of integers.

#pragma once

#include <cstdint>
#include <cstring>

struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(int8_t value) { return (float)value; }
inline float to_float(int32_t value) { return (float)value; }
inline float to_float(BFloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

inline void store(float value, float* to) { *to = value; }
inline void store(float value, int8_t* to) {  // rounded to the nearest, ties to even
    const float shifted = value + 12582912.0f;
    std::memcpy(to, &shifted, 1);
}
inline void store(float value, BFloat16* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to even
    to->bits = uint16_t((value == value ? rounded : bits | 0x400000) >> 16);
}
