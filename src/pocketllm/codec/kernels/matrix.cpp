// Decoding a matrix and its gradient: table look-up and its transpose, and the rotation of either side.
// Built by cpu.py with the system's compiler; rotation.py and reference.py hold the torch code
// that it must agree with up to rounding.
//
// Matrices are row-major float32. A rotation multiplies a vector of n = power * odd numbers by
// diag(signs), then by Hadamard(power) (x) Hartley(odd); its inverse does the same in the other order.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

static const int LANES = 16;  // vectors that are rotated side by side
typedef float Lanes __attribute__((vector_size(64), aligned(4)));

// x holds n numbers of each of LANES vectors: [n] Lanes.
static void mix(Lanes* x, Lanes* scratch, int64_t n, const float* hartley, int64_t odd) {
    int64_t power = n / odd;
    for (int64_t p = 0; odd > 1 && p < power; ++p) {
        Lanes* group = x + p * odd;
        for (int64_t j = 0; j < odd; ++j) {
            Lanes sum = group[0] * hartley[j];
            for (int64_t k = 1; k < odd; ++k) sum += group[k] * hartley[k * odd + j];
            scratch[j] = sum;
        }
        std::memcpy(group, scratch, odd * sizeof(Lanes));
    }
    int64_t half = odd;
    for (; half * 4 <= n; half *= 4)  // two stages at a time
        for (int64_t base = 0; base < n; base += 4 * half)
            for (int64_t i = base; i < base + half; ++i) {
                Lanes a = x[i], b = x[i + half], c = x[i + 2 * half], d = x[i + 3 * half];
                Lanes ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
                x[i] = ab + cd;
                x[i + half] = a_b + c_d;
                x[i + 2 * half] = ab - cd;
                x[i + 3 * half] = a_b - c_d;
            }
    for (; half * 2 <= n; half *= 2)
        for (int64_t base = 0; base < n; base += 2 * half)
            for (int64_t i = base; i < base + half; ++i) {
                Lanes a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
}

static float* buffer(int64_t count) {
    void* found = nullptr;
    if (posix_memalign(&found, 64, count * sizeof(float))) return nullptr;
    return (float*)found;
}

// Rotates `count` vectors of n numbers; number i of vector v lies at x[v * across + i * along].
static int rotate(float* x, int64_t count, int64_t n, int64_t across, int64_t along, const float* signs,
                  const float* hartley, int64_t odd, int inverse, int threads) {
    const float unit = 1.0f / std::sqrt((float)(n / odd));
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float* memory = buffer((n + odd) * LANES);
        failed |= memory == nullptr;
#pragma omp for schedule(static)
        for (int64_t begin = 0; begin < count; begin += LANES) {
            if (memory == nullptr) continue;
            const int64_t width = begin + LANES <= count ? LANES : count - begin;
            Lanes* lanes = (Lanes*)memory;
            float* block = x + begin * across;
            if (across == 1 && width == LANES) {
                for (int64_t i = 0; i < n; ++i)
                    std::memcpy(memory + i * LANES, block + i * along, LANES * sizeof(float));
            } else {
                if (width < LANES) std::memset(memory, 0, n * LANES * sizeof(float));
                for (int64_t v = 0; v < width; ++v)
                    for (int64_t i = 0; i < n; ++i) memory[i * LANES + v] = block[v * across + i * along];
            }
            if (!inverse)
                for (int64_t i = 0; i < n; ++i) lanes[i] *= signs[i];
            mix(lanes, lanes + n, n, hartley, odd);
            for (int64_t i = 0; i < n; ++i) lanes[i] *= inverse ? unit * signs[i] : unit;
            if (across == 1 && width == LANES) {
                for (int64_t i = 0; i < n; ++i)
                    std::memcpy(block + i * along, memory + i * LANES, LANES * sizeof(float));
            } else {
                for (int64_t v = 0; v < width; ++v)
                    for (int64_t i = 0; i < n; ++i) block[v * across + i * along] = memory[i * LANES + v];
            }
        }
        std::free(memory);
    }
    return failed;
}

extern "C" {

// In place, every row of x [rows, columns].
int rotate_rows(float* x, int64_t rows, int64_t columns, const float* signs, const float* hartley, int64_t odd,
                int64_t inverse, int64_t threads) {
    return rotate(x, rows, columns, columns, 1, signs, hartley, odd, (int)inverse, (int)threads);
}

// In place, every column of x [rows, columns].
int rotate_columns(float* x, int64_t rows, int64_t columns, const float* signs, const float* hartley,
                   int64_t odd, int64_t inverse, int64_t threads) {
    return rotate(x, columns, rows, 1, columns, signs, hartley, odd, (int)inverse, (int)threads);
}

// out [rows, columns] = scale[row] * table [k, d] at indices [rows, n], n d >= columns.
int gather(const float* table, const int32_t* indices, const float* scale, float* out, int64_t rows, int64_t n,
           int64_t columns, int64_t d, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t row = 0; row < rows; ++row) {
        const float factor = scale[row];
        float* to = out + row * columns;
        const int32_t* index = indices + row * n;
        for (int64_t j = 0; j < n; ++j) {
            const float* from = table + (int64_t)index[j] * d;
            const int64_t width = (j + 1) * d <= columns ? d : columns - j * d;
            for (int64_t i = 0; i < width; ++i) to[j * d + i] = factor * from[i];
        }
    }
    return 0;
}

// The transpose: table_grad [parts, k, d] (zeroed by the caller) takes scale * grad [rows, columns], each part
// from its own share of the rows; scale_grad [rows] takes <grad, table at indices>.
int scatter(const float* table, const int32_t* indices, const float* scale, const float* grad,
            float* table_grad, float* scale_grad, int64_t rows, int64_t n, int64_t columns, int64_t d, int64_t k,
            int64_t parts) {
#pragma omp parallel for schedule(static) num_threads((int)parts)
    for (int64_t part = 0; part < parts; ++part) {
        float* sums = table_grad + part * k * d;
        for (int64_t row = part * rows / parts; row < (part + 1) * rows / parts; ++row) {
            const float factor = scale[row];
            const float* from = grad + row * columns;
            const int32_t* index = indices + row * n;
            float total = 0;
            for (int64_t j = 0; j < n; ++j) {
                const int64_t at = (int64_t)index[j] * d;
                const int64_t width = (j + 1) * d <= columns ? d : columns - j * d;
                for (int64_t i = 0; i < width; ++i) {
                    const float g = from[j * d + i];
                    total += g * table[at + i];
                    sums[at + i] += factor * g;
                }
            }
            scale_grad[row] = total;
        }
    }
    return 0;
}
}
