// Multiplies with one packed matrix on an ARM processor, or in an emulator of one: product CASE OUTPUT.
//
// CASE is a sequence of fields, each three parts: 0 and a number, or 1, a number of bytes and these bytes, or 2 for a
// null pointer. They are those of `Matrix` in packed_matmul.cpp, then x (float32), its rows, and the size of the output.

#include <cstdint>
#include <cstdio>
#include <cstdlib>

extern "C" int packed_linear(const void* matrix, const void* x, int64_t half, int64_t count, const void* bias, void* out,
                             int64_t isa, int64_t threads);

static int64_t number(FILE* from) {
    int64_t value = 0;
    if (std::fread(&value, sizeof value, 1, from) != 1) std::exit(2);
    return value;
}

static int64_t field(FILE* from) {
    const int64_t kind = number(from);
    if (kind == 2) return 0;
    const int64_t value = number(from);
    if (kind == 0) return value;
    void* bytes = std::aligned_alloc(64, (value + 127) / 64 * 64);
    if (!bytes || std::fread(bytes, 1, value, from) != size_t(value)) std::exit(2);
    return int64_t(bytes);
}

int main(int count, char** names) {
    FILE* from = count == 3 ? std::fopen(names[1], "rb") : nullptr;
    if (!from) return 2;
    int64_t matrix[17];
    for (int64_t& one : matrix) one = field(from);
    const int64_t x = field(from), rows = field(from), numbers = field(from);
    float* out = static_cast<float*>(std::malloc(numbers * sizeof(float)));
    if (packed_linear(matrix, reinterpret_cast<const void*>(x), 0, rows, nullptr, out, 0, 1)) return 1;
    FILE* to = std::fopen(names[2], "wb");
    if (!to || std::fwrite(out, sizeof(float), numbers, to) != size_t(numbers)) return 2;
    return std::fclose(to);
}
