// Cheapest paths through a bitshift trellis (Viterbi). Built by cpu.py with the system's compiler;
// reference.py holds the search in torch, which does the same operations in the same order (no fused ones).
//
// points [n, d]; weights [n]; tables [C, d, 2^width], halves [C, 2^width] = |c|^2 / 2, both over bit-reversed
// states; which [strips], the table of each; start, stop [strips]; lengths [strips]; out [rows].
// A strip's points are followed by `ahead` more, of the column after it and with the table `next`: the path
// goes on through them, so that it ends where the next one can begin well, but they are not put out.
// The bits a state keeps are its low `kept` ones after a step, so that the 2^stride states that can precede one
// lie 2^kept apart.

#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

static const int LANES = 16;

static inline Lanes load(const float* from) {
    Lanes value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(float* to, Lanes value) { memcpy(to, &value, sizeof value); }

template <int STRIDE>
static inline Lanes spread(const float* least, int64_t state) {
    // least[(state + lane) >> STRIDE] for every lane
    if (STRIDE >= 4) return Lanes{} + least[state >> STRIDE];
    const Ints lane = {0 >> STRIDE, 1 >> STRIDE, 2 >> STRIDE,  3 >> STRIDE,  4 >> STRIDE,  5 >> STRIDE,
                       6 >> STRIDE, 7 >> STRIDE, 8 >> STRIDE,  9 >> STRIDE,  10 >> STRIDE, 11 >> STRIDE,
                       12 >> STRIDE, 13 >> STRIDE, 14 >> STRIDE, 15 >> STRIDE};
    return __builtin_shuffle(load(least + (state >> STRIDE)), lane);
}

// The cheapest of the states that can precede each group, and which it is: the first of equals.
template <int STRIDE>
static inline void wide_step(const float* cost, int64_t groups, float* least, uint8_t* back) {
    for (int64_t group = 0; group < groups; group += LANES) {
        Lanes best = load(cost + group);
        Ints where = Ints{};
        for (int choice = 1; choice < (1 << STRIDE); ++choice) {
            Lanes value = load(cost + choice * groups + group);
            Ints closer = value < best;
            best = closer ? value : best;
            where = closer ? (Ints{} + choice) : where;
        }
        store(least + group, best);
        Bytes narrow = __builtin_convertvector(where, Bytes);
        memcpy(back + group, &narrow, sizeof narrow);
    }
}

// The same for fewer groups than a vector has lanes.
template <int STRIDE>
static inline void narrow_step(const float* cost, int64_t groups, float* least, uint8_t* back) {
    for (int64_t group = 0; group < groups; ++group) {
        least[group] = cost[group];
        back[group] = 0;
        for (int choice = 1; choice < (1 << STRIDE); ++choice)
            if (cost[choice * groups + group] < least[group]) {
                least[group] = cost[choice * groups + group];
                back[group] = choice;
            }
    }
}

// Cost of the last step into 16 states: w (|c|^2 / 2 - p c), up to what all states share.
template <int D>
static inline Lanes branch(const float* table, const float* half, int64_t states, int64_t state, Lanes weight,
                           const Lanes* scaled) {
    Lanes cost = load(half + state) * weight;
    for (int i = 0; i < D; ++i) cost -= scaled[i] * load(table + i * states + state);
    return cost;
}

// `wide_step` on costs that are computed as they are needed and not written down.
template <int STRIDE, int D>
static inline void fused_step(const float* table, const float* half, int64_t states, Lanes weight, const Lanes* scaled,
                              const float* from, float* least, uint8_t* back) {
    const int64_t groups = states >> STRIDE;
    for (int64_t group = 0; group < groups; group += LANES) {
        Lanes best = spread<STRIDE>(from, group) + branch<D>(table, half, states, group, weight, scaled);
        Ints where = Ints{};
        for (int choice = 1; choice < (1 << STRIDE); ++choice) {
            const int64_t state = choice * groups + group;
            Lanes value = spread<STRIDE>(from, state) + branch<D>(table, half, states, state, weight, scaled);
            Ints closer = value < best;
            best = closer ? value : best;
            where = closer ? (Ints{} + choice) : where;
        }
        store(least + group, best);
        Bytes narrow = __builtin_convertvector(where, Bytes);
        memcpy(back + group, &narrow, sizeof narrow);
    }
}

static inline float lowest(const float* cost, int64_t states) {
    Lanes low = load(cost);
    for (int64_t state = LANES; state < states; state += LANES) {
        Lanes value = load(cost + state);
        low = value < low ? value : low;
    }
    float found = low[0];
    for (int lane = 1; lane < LANES; ++lane) found = low[lane] < found ? low[lane] : found;
    return found;
}

template <int STRIDE, int D>
static void path(const float* points, const float* weights, const float* table, const float* half,
                 const float* next_table, const float* next_half, int64_t start, int64_t stop,
                 int64_t length, int64_t ahead, int64_t width, int64_t* out, float* cost, float* least,
                 uint8_t* back) {
    const int64_t states = int64_t(1) << width, kept = width - STRIDE, groups = int64_t(1) << kept;
    float* from = least + groups + LANES;
    bool is_written = true;  // whether `cost` holds the costs of the step before
    for (int64_t state = 0; state < states; ++state) cost[state] = __builtin_inff();
    cost[start] = 0;
    Lanes scaled[D], weight = Lanes{};
    for (int64_t t = 0; t < length + ahead; ++t) {
        if (!is_written) {
            float* other = from;
            from = least, least = other;
            fused_step<STRIDE, D>(table, half, states, weight, scaled, from, least, back + t * groups);
        } else if (groups < LANES)
            narrow_step<STRIDE>(cost, groups, least, back + t * groups);
        else
            wide_step<STRIDE>(cost, groups, least, back + t * groups);
        if (t == length) table = next_table, half = next_half;
        weight = Lanes{} + weights[t];
        for (int i = 0; i < D; ++i) scaled[i] = Lanes{} + points[t * D + i] * weights[t];
        is_written = groups < LANES || t % 16 == 15 || t + 1 == length + ahead;
        if (!is_written) continue;
        for (int64_t state = 0; state < states; state += LANES)
            store(cost + state,
                  spread<STRIDE>(least, state) + branch<D>(table, half, states, state, weight, scaled));
        if (t % 16 == 15) {  // keep magnitudes small
            const float low = lowest(cost, states);
            for (int64_t state = 0; state < states; state += LANES) store(cost + state, load(cost + state) - low);
        }
    }
    int64_t state = stop;
    if (state < 0) {
        const float low = lowest(cost, states);
        for (state = 0; state < states - 1 && cost[state] != low;) ++state;
    }
    for (int64_t t = length + ahead - 1; t >= 0; --t) {
        if (t < length) out[t] = state;
        int64_t group = state >> STRIDE;
        state = (int64_t(back[t * groups + group]) << kept) | group;
    }
}

extern "C" int trellis_search(const float* points, const float* weights, const float* tables, const float* halves,
                              const int64_t* which, const int64_t* next, const int64_t* start,
                              const int64_t* stop, const int64_t* lengths, const int64_t* lookahead,
                              int64_t strips, int64_t width, int64_t stride, int64_t d, int64_t threads,
                              int64_t* out) {
    const int64_t states = int64_t(1) << width, groups = states >> stride;
    int64_t longest = 0;
    for (int64_t strip = 0; strip < strips; ++strip)
        longest = lengths[strip] + lookahead[strip] > longest ? lengths[strip] + lookahead[strip] : longest;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        // One vector more than needed: `spread` reads whole vectors.
        float* cost = (float*)aligned_alloc(64, (states + 2 * groups + 4 * LANES) / LANES * LANES * sizeof(float));
        uint8_t* back = (uint8_t*)aligned_alloc(64, (longest * groups + 127) / 64 * 64);
        if (!cost || !back) failed = 2;
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t strip = 0; strip < strips; ++strip) {
            if (failed == 2) continue;
            int64_t first = 0, skipped = 0;
            for (int64_t before = 0; before < strip; ++before)
                first += lengths[before], skipped += lookahead[before];
            bool done = false;
#define CASE(S, D) \
    if (stride == S && d == D) { \
        path<S, D>(points + (first + skipped) * D, weights + first + skipped, \
                   tables + which[strip] * D * states, halves + which[strip] * states, \
                   tables + next[strip] * D * states, halves + next[strip] * states, start[strip], \
                   stop[strip], lengths[strip], lookahead[strip], width, out + first, cost, cost + states, \
                   back); \
        done = true; \
    }
#define STRIDES(D) CASE(1, D) CASE(2, D) CASE(3, D) CASE(4, D) CASE(5, D) CASE(6, D) CASE(7, D) CASE(8, D)
            STRIDES(1) STRIDES(2) STRIDES(3) STRIDES(4)
#undef STRIDES
#undef CASE
            if (!done) failed = 1;
        }
        free(cost);
        free(back);
    }
    return failed;
}
