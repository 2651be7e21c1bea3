// Products with a matrix that stays packed. Built by library.py; packed_op.py holds the reference in torch.
//
// The matrix is U [rows, n * d], cut to `columns`: subvector j of row i is row `index` of a table, where the index
// is a window of `width` bits onto the stream. Strips of rows follow one another in the stream, each from a byte
// on. Inside a strip the windows of a trellis run down the rows of one column of subvectors, then down the next;
// independent indices lie row after row.
//
// A row of the table is a vector of d numbers, so the product adds x_j * table[index] for eight rows at a time:
// one multiplication whose operand is read from the table, and two operations to cut the window out. Gathers
// (one number from each of 16 rows of the table) were measured at half the speed.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "number.h"

namespace {

// Windows of one strip: that of row i (from the strip's first), column j starts at bit(i, j).
struct Strip {
    const uint8_t* bytes;
    int64_t nbytes;     // of the stream
    int64_t first_bit;  // of the strip: a window that reaches further back has zeros there
    int64_t base;       // where the window of row 0, column 0 starts
    int64_t row_step, column_step, width;

    inline int64_t bit(int64_t i, int64_t j) const { return base + i * row_step + j * column_step; }

    uint64_t careful_window(int64_t i, int64_t j) const {
        uint64_t found = 0;
        const int64_t start = bit(i, j);
        for (int64_t k = 0; k < width; ++k) {
            const int64_t at = start + k;
            if (at >= first_bit) found |= uint64_t(bytes[at >> 3] >> (at & 7) & 1) << k;
        }
        return found;
    }

    // Columns from here on start inside the strip in row i and below.
    int64_t first_fast_column(int64_t i, int64_t n) const {
        int64_t j = 0;
        while (j < n && bit(i, j) < first_bit) ++j;
        return j;
    }

    // Columns before this one can be read by words of 8 bytes in row i and above.
    int64_t last_fast_column(int64_t i, int64_t begin, int64_t n) const {
        int64_t j = n;
        while (j > begin && (bit(i, j - 1) >> 3) + 8 > nbytes) --j;
        return j;
    }
};

// How the rows are cut into strips and where the streams of those begin.
struct Shape {
    int64_t rows, n, width, stride, strips;  // stride 0: independent indices, one strip

    int64_t strip_rows(int64_t strip) const { return rows / strips + (strip < rows % strips); }
    int64_t strip_first(int64_t strip) const {
        const int64_t longer = strip < rows % strips ? strip : rows % strips;
        return rows / strips * strip + longer;
    }
    int64_t strip_of(int64_t row) const {
        const int64_t base = rows / strips, longer = rows % strips, rest = row - longer * (base + 1);
        return rest < 0 ? row / (base + 1) : longer + rest / base;
    }
    int64_t strip_bytes(int64_t length) const { return (length * n * stride + 7) / 8; }

    Strip strip(const uint8_t* stream, int64_t nbytes, int64_t number) const {
        if (stride == 0) return Strip{stream, nbytes, 0, 0, n * width, width, width};
        const int64_t length = strip_rows(number), longer = rows % strips;
        const int64_t before = number < longer ? number : longer;  // strips before that have a row more
        const int64_t offset = before * strip_bytes(rows / strips + 1) +
                               (number - before) * strip_bytes(rows / strips);
        const int64_t first_bit = offset * 8;
        return Strip{stream, nbytes, first_bit, first_bit + stride - width, stride, length * stride, width};
    }
};

#define BIT_FIELDS 0
namespace plain {
#include "packed_rows.inc"
#include "rotate.inc"
#include "rotate_eight.inc"
}
#undef BIT_FIELDS

#if defined(__x86_64__)
#define BIT_FIELDS 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
namespace avx2 {
#include "packed_rows.inc"
#include "rotate.inc"
#include "rotate_eight.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BIT_FIELDS
#endif

#if defined(__x86_64__)
#define BIT_FIELDS 1
#define SIXTEEN 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,avx512f,avx512vl,avx512bw,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512vl,avx512bw,avx512dq,prefer-vector-width=512")
#endif
namespace avx512 {
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
#include "rotate_eight.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BIT_FIELDS
#endif

enum Isa { PLAIN = 0, AVX2 = 1, AVX512 = 2 };

struct Kernels {
    decltype(&plain::multiply_block) multiply;
    decltype(&plain::decode_block) decode;
    decltype(&plain::rotate_vector) rotate;
};

Kernels kernels(int64_t isa) {
#if defined(__x86_64__)
    if (isa >= AVX2) return {avx2::multiply_block, avx2::decode_block, avx2::rotate_vector};
#endif
    (void)isa;
    return {plain::multiply_block, plain::decode_block, plain::rotate_vector};
}

// Calls work(strip, row in the strip, rows, row in the matrix) for blocks of rows in [first, last), in parallel.
template <class Work>
void for_blocks(const Shape& shape, const uint8_t* stream, int64_t nbytes, int64_t first, int64_t last,
                int64_t threads, const Work& work) {
    const int64_t block = plain::BLOCK, longest = (shape.rows / shape.strips + 1 + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t task = 0; task < shape.strips * longest; ++task) {
        const int64_t number = task / longest, length = shape.strip_rows(number);
        const int64_t origin = shape.strip_first(number);
        int64_t begin = task % longest * block, end = begin + block < length ? begin + block : length;
        if (origin + begin < first) begin = first - origin;
        if (origin + end > last) end = last - origin;
        if (begin < end) work(shape.strip(stream, nbytes, number), begin, end - begin, origin + begin);
    }
}

// What does not change between products with a matrix; packed_cpu.py fills it in, eight bytes for each field.
struct Matrix {
    const uint8_t* stream;
    int64_t nbytes;
    const float* entries;  // [2^width, d]
    const float* table;    // the same [2^width, pitch], zeros from d on
    int64_t d, pitch;
    const float* scale;
    const float *signs_in, *mixer_in, *signs_out, *mixer_out;  // null where a side is not rotated
    int64_t columns, rows, n, width, stride, strips;

    Shape shape() const { return Shape{rows, n, width, stride, strips}; }
};

// Rotates one vector of n numbers in place; does nothing without signs. scratch holds 2 n numbers.
void rotate_one(const Kernels& run, float* x, int64_t n, const float* signs, const float* mixer, bool inverse,
                float* scratch) {
    const int64_t power = n & -n;
    if (signs) run.rotate(x, n, signs, mixer, n / power, inverse, 1.0f / std::sqrt((float)power), scratch);
}

const int64_t WORTH_A_THREAD = 1 << 20;  // weights: fewer take less time than waking a thread that sleeps

// out [count, n] = vectors x [count, n] times `scale`, rotated, plus bias; without signs they are not rotated.
// unit_of [count]: the unit of each vector's integers; read if x are integers, written if `out` are.
template <class In, class Out>
void rotate_all(const In* x, Out* out, int64_t count, int64_t n, const float* signs, const float* mixer, bool inverse,
                const float* scale, const Out* bias, float* unit_of, int64_t isa, int64_t threads) {
    const int64_t power = n & -n, odd = n / power;
    const float unit = signs ? 1.0f / std::sqrt((float)power) : 1.0f;
    std::vector<float> before(n, 1.0f), after(n, unit);
    for (int64_t i = 0; i < n; ++i) {
        if (scale) before[i] = scale[i];
        if (signs) (inverse ? after : before)[i] *= signs[i];
    }
    const float* matrix = signs ? mixer : nullptr;
    const auto eight = [&](int64_t i, int64_t width, void* memory) {
#if defined(__x86_64__)
        if (isa >= AVX2)
            return avx2::rotate_eight(x + i * n, out + i * n, width, n, before.data(), matrix, odd, after.data(), bias,
                                      (avx2::Eight*)memory, unit_of + i);
#endif
        plain::rotate_eight(x + i * n, out + i * n, width, n, before.data(), matrix, odd, after.data(), bias,
                            (plain::Eight*)memory, unit_of + i);
    };
    const int64_t step = isa >= AVX512 && n % 8 == 0 ? 16 : 8;
#pragma omp parallel num_threads((int)threads) if (threads > 1 && count > 8)
    {
        std::vector<float> bytes((n + odd) * step + 16);
        float* memory = (float*)(((uintptr_t)bytes.data() + 63) / 64 * 64);  // whole vectors are aligned
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i += step) {
#if defined(__x86_64__)
            if (step == 16 && i + step <= count) {
                avx512::rotate_sixteen(x + i * n, out + i * n, n, before.data(), matrix, odd, after.data(), bias,
                                       (avx512::Eight*)memory, unit_of + i);
                continue;
            }
#endif
            for (int64_t j = i; j < i + step && j < count; j += 8)
                eight(j, j + 8 < count ? 8 : count - j, memory);
        }
    }
    (void)isa;
}

template <class Number>
void linear(const Matrix& m, const Number* x, int64_t tokens, const Number* bias, Number* out, int64_t isa,
            int64_t threads) {
    const Kernels run = kernels(isa);
    const Shape shape = m.shape();
    const int64_t length = m.n * m.pitch, longer = m.columns > m.rows ? m.columns : m.rows;
    std::vector<float> inputs(tokens * length), outputs(tokens * m.rows), scratch(m.columns + 2 * longer);
    for (int64_t t = 0; t < tokens; ++t) {
        float *flat = scratch.data(), *spread = inputs.data() + t * length;
        for (int64_t i = 0; i < m.columns; ++i) flat[i] = to_float(x[t * m.columns + i]);
        rotate_one(run, flat, m.columns, m.signs_in, m.mixer_in, false, flat + m.columns);
        if (m.pitch == m.d)
            std::memcpy(spread, flat, m.columns * sizeof(float));
        else
            for (int64_t i = 0; i < m.columns; ++i) spread[i / m.d * m.pitch + i % m.d] = flat[i];
    }
    if (m.rows * m.columns < WORTH_A_THREAD) threads = 1;
    for_blocks(shape, m.stream, m.nbytes, 0, m.rows, threads,
               [&](const Strip& strip, int64_t row, int64_t count, int64_t at) {
                   for (int64_t t = 0; t < tokens; ++t) {
                       float* to = outputs.data() + t * m.rows + at;
                       run.multiply(strip, row, count, m.n, m.pitch, m.table, inputs.data() + t * length, to);
                       for (int64_t k = 0; k < count; ++k) to[k] *= m.scale[at + k];
                   }
               });
    for (int64_t t = 0; t < tokens; ++t) {
        float* y = outputs.data() + t * m.rows;
        rotate_one(run, y, m.rows, m.signs_out, m.mixer_out, true, scratch.data());
        for (int64_t i = 0; i < m.rows; ++i)
            store(bias ? y[i] + to_float(bias[i]) : y[i], out + t * m.rows + i);
    }
}

// Single rows of the matrix, of one that is not rotated on the side of its outputs.
template <class Number>
void look_up(const Matrix& m, const int64_t* ids, int64_t count, Number* out, int64_t isa, int64_t threads) {
    const Kernels run = kernels(isa);
    const Shape shape = m.shape();
#pragma omp parallel num_threads((int)threads) if (threads > 1 && count > 8)
    {
        std::vector<float> memory(3 * m.columns);
        float* row = memory.data();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t strip = shape.strip_of(ids[i]), bytes = m.d * sizeof(float);
            run.decode(shape.strip(m.stream, m.nbytes, strip), ids[i] - shape.strip_first(strip), 1, m.n,
                       (const uint8_t*)m.entries, bytes, (uint8_t*)row, m.columns * sizeof(float));
            rotate_one(run, row, m.columns, m.signs_in, m.mixer_in, true, row + m.columns);
            for (int64_t j = 0; j < m.columns; ++j) store(row[j] * m.scale[ids[i]], out + i * m.columns + j);
        }
    }
}

}  // namespace

extern "C" {

// The best instruction set of this processor for the functions below.
int64_t packed_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2"))
        return AVX2;
#endif
    return PLAIN;
}

// y [tokens, rows] = scale * (x U^T). table [K, pitch] float32 and x [tokens, n * pitch] float32 are filled up
// with zeros from d to pitch: 1, 2, 4, or a multiple of 8.
int packed_multiply(const uint8_t* stream, int64_t nbytes, const float* table, int64_t pitch, const float* scale,
                    const float* x, int64_t tokens, float* y, int64_t rows, int64_t n, int64_t width,
                    int64_t stride, int64_t strips, int64_t isa, int64_t threads) {
    const Shape shape{rows, n, width, stride, strips};
    const auto multiply = kernels(isa).multiply;
    for_blocks(shape, stream, nbytes, 0, rows, threads,
               [&](const Strip& strip, int64_t row, int64_t count, int64_t at) {
                   for (int64_t t = 0; t < tokens; ++t) {
                       float* to = y + t * rows + at;
                       multiply(strip, row, count, n, pitch, table, x + t * n * pitch, to);
                       for (int64_t k = 0; k < count; ++k) to[k] *= scale[at + k];
                   }
               });
    return 0;
}

// out [last - first, row_bytes]: rows of U, whose entries are the `bytes` of a row of the table, of any dtype.
int packed_decode(const uint8_t* stream, int64_t nbytes, const uint8_t* table, int64_t bytes, uint8_t* out,
                  int64_t row_bytes, int64_t first, int64_t last, int64_t rows, int64_t n, int64_t width,
                  int64_t stride, int64_t strips, int64_t isa, int64_t threads) {
    const Shape shape{rows, n, width, stride, strips};
    const auto decode = kernels(isa).decode;
    for_blocks(shape, stream, nbytes, first, last, threads,
               [&](const Strip& strip, int64_t row, int64_t count, int64_t at) {
                   decode(strip, row, count, n, table, bytes, out + (at - first) * row_bytes, row_bytes);
               });
    return 0;
}

// In place, each of `count` vectors of n = power * odd numbers: times diag(signs), then Hadamard(power) (x) `matrix`
// [odd, odd]; the inverse in the other order.
int rotate_vectors(float* x, int64_t count, int64_t n, const float* signs, const float* matrix, int64_t odd,
                   int64_t inverse, int64_t isa, int64_t threads) {
    const auto rotate = kernels(isa).rotate;
    const float unit = 1.0f / std::sqrt((float)(n / odd));
#pragma omp parallel num_threads((int)threads) if (count > 1)
    {
        std::vector<float> scratch(2 * n);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i)
            rotate(x + i * n, n, signs, matrix, odd, inverse != 0, unit, scratch.data());
    }
    return 0;
}

// out [tokens, rows] = x [tokens, columns] W^T + bias, all of one dtype: float32, or bfloat16 where `half` is 1.
int packed_linear(const Matrix* matrix, const void* x, int64_t half, int64_t tokens, const void* bias, void* out,
                  int64_t isa, int64_t threads) {
    if (half)
        linear(*matrix, (const BFloat16*)x, tokens, (const BFloat16*)bias, (BFloat16*)out, isa, threads);
    else
        linear(*matrix, (const float*)x, tokens, (const float*)bias, (float*)out, isa, threads);
    return 0;
}

// out [count, columns] = rows `ids` of W, as `packed_linear`; 1 if an id is not that of a row.
int packed_look_up(const Matrix* matrix, const int64_t* ids, int64_t count, int64_t half, void* out, int64_t isa,
                   int64_t threads) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= matrix->rows) return 1;
    if (half)
        look_up(*matrix, ids, count, (BFloat16*)out, isa, threads);
    else
        look_up(*matrix, ids, count, (float*)out, isa, threads);
    return 0;
}

// out [count, n] = vectors x [count, n] times `scale`, rotated, plus bias; from one dtype to one dtype.
int packed_rotate(const void* x, void* out, int64_t half, int64_t count, int64_t n, const float* signs,
                  const float* mixer, int64_t inverse, const float* scale, const void* bias, int64_t isa,
                  int64_t threads) {
    if (half)
        rotate_all((const BFloat16*)x, (BFloat16*)out, count, n, signs, mixer, inverse != 0, scale,
                   (const BFloat16*)bias, nullptr, isa, threads);
    else
        rotate_all((const float*)x, (float*)out, count, n, signs, mixer, inverse != 0, scale, (const float*)bias,
                   nullptr, isa, threads);
    return 0;
}

// The same on both sides of a product of integers, in bfloat16: x to integers `whole` int8 with `unit_of` [count], and
// sums `whole` int32 of those, times unit_of and `scale`, back.
int packed_rotate_to_integers(const BFloat16* x, int8_t* whole, float* unit_of, int64_t count, int64_t n,
                              const float* signs, const float* mixer, int64_t isa, int64_t threads) {
    rotate_all(x, whole, count, n, signs, mixer, false, nullptr, (const int8_t*)nullptr, unit_of, isa, threads);
    return 0;
}

int packed_rotate_from_integers(const int32_t* whole, float* unit_of, BFloat16* out, int64_t count, int64_t n,
                                const float* signs, const float* mixer, const float* scale, const BFloat16* bias,
                                int64_t isa, int64_t threads) {
    rotate_all(whole, out, count, n, signs, mixer, true, scale, bias, unit_of, isa, threads);
    return 0;
}
}
