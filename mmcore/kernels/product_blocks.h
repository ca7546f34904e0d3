/* The blocks that linear's products are made of: BLOCK_ROWS x 2 vectors of the result, from a tile of A and a panel of B.

With AVX-512 28 registers gather sums, 2 hold what comes from B and 1 the number of A that meets it. A block alone runs at 0.99
of the instruction's peak on a Zen 4 core, from the second-level cache as well, with words of two numbers (narrow_products.h)
as with fp32. Where there is a matrix unit (matrix_tiles.h), bf16 and int8 meet there, in blocks of 32 rows. What a product
loses, it loses to copies and memory: so a block asks for the lines of its own result as it begins, and for what will be copied
next while it multiplies (4,096 rows in bf16: 350-400 -> 390-420 of 468 GFLOP/s). */
#ifndef PRODUCT_BLOCKS_H
#define PRODUCT_BLOCKS_H

#include "matrix_tiles.h"
#include "memory_read_tiles.h"
#include "narrow_products.h"

#if LANES == 16
#define BLOCK_ROWS 14
#define TILE_STEP 16 /* of a tile that lies depth first */
#else
#define BLOCK_ROWS 6
#define TILE_STEP 8
#endif
#define COLUMNS (2 * LANES)
#define MATRIX_ROWS (2 * TILE_SIDE) /* of a block that the matrix unit makes */
#define MATRIX_STEP (MATRIX_ROWS * TILE_SIDE) /* words of A that it takes at once */
#define MOST_ROWS (MATRIX_TILES ? MATRIX_ROWS : BLOCK_ROWS)
#define DEPTH 512 /* words of a panel and a tile; of int8 half as many, for a lane can add no more (EXACT_PAIRS) */
#define TILE_ROW (DEPTH + 16) /* not a power of two: 14 rows would share a cache set */
#define BEHIND (DEPTH / 2)    /* words of int8 at most; then come steps and scales */
#define BYTES_BEHIND (DEPTH / 4) /* the same of words of four */

typedef int64_t whole;
static whole least(whole a, whole b) { return a < b ? a : b; }
static whole parts_of(whole n, whole size) { return (n + size - 1) / size; }

/* Memory that will be read soon: `rows` runs of `width` bytes, `row` bytes from one to the next, and what comes after. */
struct ahead {
    const char *at;
    whole width, row, rows, done;
    struct ahead *then;
};

/* Asks for its next line. */
INLINE void call_ahead(struct ahead *next) {
    if (next->rows <= 0 && next->then) next = next->then;
    if (next->rows <= 0) return;
    __builtin_prefetch(next->at + next->done);
    if ((next->done += 64) >= next->width) next->done = 0, next->at += next->row, next->rows--;
}
#define CALLS (LANES == 16 ? 2 : 4) /* steps of a block's depth for each line */

/* c [rows, COLUMNS] = (add ? c : 0) + tile a times panel, `depth` numbers deep; `next` is asked for meanwhile. */
typedef void block(float *c, whole c_row, whole rows, int add, whole depth, const float *a, const float *panel,
                   struct ahead *next);

/* Words that `n` numbers fill, two in each. */
static whole words_of(whole n) { return (n + 1) / 2; }

/* Whether numbers of `format` meet in the matrix unit. */
static int by_matrix(int format) { return format != FP32 && tiles_allowed(); }

/* Words that `n` numbers of `format` fill in a tile or a panel; and with the zeros that the matrix unit's tiles end in. */
static whole words_in(whole n, int format) {
    return !NARROW(format) ? n : format == INT8 && by_matrix(format) ? parts_of(n, 4) : words_of(n);
}
static whole laid_words(whole n, int format) {
    return by_matrix(format) ? parts_of(words_in(n, format), TILE_SIDE) * TILE_SIDE : words_in(n, format);
}
static whole rows_of_block(int format) { return by_matrix(format) ? MATRIX_ROWS : BLOCK_ROWS; }

/* A row of `depth` numbers of 16 bits gets its zeros. */
static void fill_up(uint16_t *row, whole depth, int format) {
    memset(row + depth, 0, (2 * laid_words(depth, format) - depth) * sizeof *row);
}

/* Bytes of a number, bf16 or not, and `x` moved on by some. */
static whole item(int halves) { return halves ? 2 : 4; }
static const char *number(const char *x, whole n, int halves) { return x + n * item(halves); }

/* `count` numbers at x as bf16. */
static void as_bf16(uint16_t *to, const char *x, whole count, int halves) {
    if (halves)
        memcpy(to, x, count * sizeof *to);
    else
        round_to_bf16(to, (const float *)x, count);
}

/* Rounds `count` numbers into row r of a tile, from number k on; and the zeros that follow `depth` of them. */
static void round_into(float *tile, whole r, whole k, const char *x, whole count, int format, int halves) {
    if (!by_matrix(format)) {
        as_bf16((uint16_t *)(tile + r * TILE_ROW) + k, x, count, halves);
        return;
    }
    for (whole part; count > 0; k += part, x = number(x, part, halves), count -= part) {
        part = least(count, 2 * TILE_SIDE - k % (2 * TILE_SIDE));
        float *row = tile + k / (2 * TILE_SIDE) * MATRIX_STEP + r * TILE_SIDE;
        as_bf16((uint16_t *)row + k % (2 * TILE_SIDE), x, part, halves);
    }
}

static void fill_tile(float *tile, whole r, whole depth, int format) {
    const uint16_t zeros[2 * TILE_SIDE] = {0};
    round_into(tile, r, depth, (const char *)zeros, 2 * laid_words(depth, format) - depth, format, 1);
}

/* Whether rows of X count in steps of their own, and columns in scales, which both lie BEHIND the numbers. */
static int in_steps(int format) { return format == INT8 && NARROW(INT8); }

/* The scales of a panel, and the step of row r of a tile. */
static float *scales_of(const float *panel, int format) {
    return (float *)panel + (by_matrix(format) ? BYTES_BEHIND : BEHIND) * COLUMNS;
}
static float *step_of(const float *tile, whole r, int format) {
    return (float *)tile + (by_matrix(format) ? 2 * BYTES_BEHIND * MATRIX_ROWS + r : r * TILE_ROW + BEHIND);
}

static whole panel_floats(whole depth, int format) {
    whole of_bytes = by_matrix(format) ? BYTES_BEHIND + TILE_SIDE : DEPTH;
    return (in_steps(format) ? of_bytes : laid_words(depth, format)) * COLUMNS;
}

/* Numbers of `format` that fill `words`. */
static whole depth_of(whole words, int format) { return NARROW(format) && format != INT8 ? 2 * words : words; }

/* acc[r][2] += a[r * a_row] * panel[COLUMNS]: one number of each row. */
INLINE void gather_one(vec *acc, const int rows, const float *a, const int a_row, const float *panel) {
    vec first = load(panel), second = load(panel + LANES);
    IN_REGISTER(first);
    IN_REGISTER(second);
    for (int i = 0; i < COLUMNS; i += 16) __builtin_prefetch(panel + 16 * COLUMNS + i);
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        acc[2 * r] += a[r * a_row] * first;
        acc[2 * r + 1] += a[r * a_row] * second;
    }
}

/* acc[r][2] += sum over k < depth of a[r * a_row + k * a_step] * panel[k][COLUMNS]. */
INLINE void gather(vec *acc, const int rows, whole depth, const float *a, const int a_row, const int a_step,
                   const float *panel, struct ahead *next) {
    for (; depth >= CALLS; depth -= CALLS, a += CALLS * a_step, panel += CALLS * COLUMNS) {
        call_ahead(next);
#pragma GCC unroll 4
        for (int k = 0; k < CALLS; k++) gather_one(acc, rows, a + k * a_step, a_row, panel + k * COLUMNS);
    }
    for (; depth > 0; depth--, a += a_step, panel += COLUMNS) gather_one(acc, rows, a, a_row, panel);
}

/* Asks for the lines that sums will go to. */
INLINE void call_results(float *c, whole c_row, const int rows) {
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < COLUMNS; i += 16) __builtin_prefetch(c + r * c_row + i, 1);
}

/* c = (add ? c : 0) + tile * panel, for `rows` rows of whole COLUMNS. */
INLINE void few_rows(float *c, whole c_row, const int rows, int add, whole depth, const float *a, const float *panel,
                     struct ahead *next, const int a_row, const int a_step) {
    vec acc[2 * 14];
    call_results(c, c_row, rows);
#pragma GCC unroll 28
    for (int i = 0; i < 2 * rows; i++) acc[i] = (vec){};
    gather(acc, rows, depth, a, a_row, a_step, panel, next);
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        float *to = c + r * c_row;
        store(to, add ? acc[2 * r] + load(to) : acc[2 * r]);
        store(to + LANES, add ? acc[2 * r + 1] + load(to + LANES) : acc[2 * r + 1]);
    }
}

/* The same where tile and panel hold words of two numbers. int8's sums count in the steps of the rows and the scales of the
   columns, which stand behind the numbers, BEHIND words from where they begin. */
INLINE void few_narrow_rows(float *c, whole c_row, const int rows, int add, whole depth, const float *a,
                            const float *panel, struct ahead *next, const int a_row, const int a_step,
                            const int format) {
    nvec acc[2 * 14];
    const float *scales = panel + BEHIND * COLUMNS;
    const loose_int *two = (const loose_int *)a;
    call_results(c, c_row, rows);
#pragma GCC unroll 28
    for (int i = 0; i < 2 * rows; i++) acc[i] = (nvec){0};
    for (whole k = 0; k < words_of(depth); k++, two += a_step, panel += COLUMNS) {
        if (k % CALLS == 0) call_ahead(next);
        nvec first = (nvec)load(panel), second = (nvec)load(panel + LANES);
        IN_REGISTER(first);
        IN_REGISTER(second);
        for (int i = 0; i < COLUMNS; i += 16) __builtin_prefetch(panel + 16 * COLUMNS + i);
#pragma GCC unroll 14
        for (int r = 0; r < rows; r++) {
            nvec both = (nvec){0} + two[r * a_row];
            acc[2 * r] = add_products(acc[2 * r], both, first, format);
            acc[2 * r + 1] = add_products(acc[2 * r + 1], both, second, format);
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            float *to = c + r * c_row + half * LANES;
            vec sum = sums_as_floats(acc[2 * r + half], format);
            if (format == INT8) sum *= a[r * a_row + BEHIND] * load(scales + half * LANES);
            store(to, add ? sum + load(to) : sum);
        }
}

/* The same for a number of rows that is known at run time: `few` with the tile's a_row and what follows its name here. */
#define BLOCK(name, a_row, few, ...)                                                                                   \
    NOINLINE static void name(float *c, whole c_row, whole rows, int add, whole depth, const float *a,                 \
                              const float *panel, struct ahead *next) {                                                \
        if (rows == BLOCK_ROWS) {                                                                                      \
            few(c, c_row, BLOCK_ROWS, add, depth, a, panel, next, __VA_ARGS__);                                        \
            return;                                                                                                    \
        }                                                                                                              \
        for (; BLOCK_ROWS > 8 && rows >= 8; rows -= 8, c += 8 * c_row, a += 8 * (a_row))                               \
            few(c, c_row, 8, add, depth, a, panel, next, __VA_ARGS__);                                                 \
        for (; rows >= 4; rows -= 4, c += 4 * c_row, a += 4 * (a_row))                                                 \
            few(c, c_row, 4, add, depth, a, panel, next, __VA_ARGS__);                                                 \
        for (; rows > 0; rows--, c += c_row, a += (a_row)) few(c, c_row, 1, add, depth, a, panel, next, __VA_ARGS__);  \
    }
BLOCK(block_by_row, TILE_ROW, few_rows, TILE_ROW, 1)
BLOCK(block_by_depth, 1, few_rows, 1, TILE_STEP)
#if NARROW_BF16
BLOCK(bf16_block, TILE_ROW, few_narrow_rows, TILE_ROW, 1, BF16)
BLOCK(bf16_block_by_depth, 1, few_narrow_rows, 1, TILE_STEP, BF16)
#endif
#if NARROW_INT8
BLOCK(int8_block, TILE_ROW, few_narrow_rows, TILE_ROW, 1, INT8)
#endif

#define CALLS_OF_TILES 8 /* lines asked for while two tiles of A meet two of B, 64 cycles */

/* The same in the matrix unit, for up to MATRIX_ROWS rows. Its tiles of A lie step by step, 16 words of each row, so that they fill
   the first-level cache evenly (rows a little more than 2 KiB apart did not); `depth` is filled up with zeros. */
NOINLINE static void matrix_block(float *c, whole c_row, whole rows, int add, whole depth, const float *a, const float *panel,
                                  struct ahead *next) {
    float part[MATRIX_ROWS * COLUMNS], *to = c;
    whole row = c_row, steps = parts_of(words_of(depth), TILE_SIDE), low = rows > TILE_SIDE;
    if (rows % TILE_SIDE) {
        to = part, row = COLUMNS;
        for (whole r = 0; add && r < rows; r++) memcpy(part + r * COLUMNS, c + r * c_row, COLUMNS * sizeof *c);
    }
    open_sums(to, row, add, low, 1);
    for (whole k = 0; k < steps; k++, a += MATRIX_STEP, panel += TILE_SIDE * COLUMNS) {
        add_tiles(a, TILE_SIDE, panel, COLUMNS, low, 1);
        for (int i = 0; i < CALLS_OF_TILES; i++) call_ahead(next);
    }
    close_sums(to, row, low, 1);
    for (whole r = 0; to == part && r < rows; r++) memcpy(c + r * c_row, part + r * COLUMNS, COLUMNS * sizeof *c);
}

/* The same of int8 weights and a tile of bytes, `depth` numbers of each: for every step 16 words of high bytes of all rows, then
   of low ones. */
NOINLINE static void matrix_int8_block(float *c, whole c_row, whole rows, int add, whole depth, const float *a, const float *panel,
                                       struct ahead *next) {
    const float *scales = scales_of(panel, INT8);
    for (whole from = 0; from < rows; from += TILE_SIDE) {
        int32_t sums[4 * TILE_SIDE * TILE_SIDE];
        multiply_bytes(sums, a + from * TILE_SIDE, MATRIX_STEP, panel, COLUMNS, parts_of(depth, 4 * TILE_SIDE));
        for (int i = 0; i < 64; i++) call_ahead(next);
        for (whole r = from; r < least(rows, from + TILE_SIDE); r++)
            for (int half = 0; half < 2; half++) {
                const int32_t *high = sums + half * 256 + (r - from) * TILE_SIDE;
                float *to = c + r * c_row + half * LANES;
                vec sum = __builtin_convertvector(load_ints(high), vec) * 256.0f;
                sum += __builtin_convertvector(load_ints(high + 512), vec);
                sum *= *step_of(a, r, INT8) * load(scales + half * LANES);
                store(to, add ? sum + load(to) : sum);
            }
    }
}

/* How rows of X meet weights of a format; and rows of dY^T rows of X. */
static block *block_of(int format) {
    if (by_matrix(format)) return format == INT8 ? matrix_int8_block : matrix_block;
#if NARROW_BF16
    if (format == BF16 || format == ROUNDED) return bf16_block;
#endif
#if NARROW_INT8
    if (format == INT8) return int8_block;
#endif
    (void)format;
    return block_by_row;
}

static block *block_by_depth_of(int format) {
    if (by_matrix(format)) return matrix_block;
#if NARROW_BF16
    if (format == ROUNDED) return bf16_block_by_depth;
#endif
    (void)format;
    return block_by_depth;
}

/* panel[k][COLUMNS], k < laid, from `count` rows of x, which are its columns, `depth` words deep; zeros beyond. */
static void pack_turned(float *panel, const float *const *x, whole count, whole depth, whole laid) {
    for (whole i = 0; i < COLUMNS; i += LANES)
        for (whole k = 0; k < depth; k += LANES) {
            vec v[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) v[r] = i + r < count ? load_part(x[i + r] + k, depth - k) : (vec){};
            transpose(v);
            for (int r = 0; r < least(LANES, laid - k); r++) store(panel + (k + r) * COLUMNS + i, v[r]);
        }
}

/* `width` numbers at `to`, or words of two numbers, the second of each a zero where there is no `high`; zeros beyond `count`. */
INLINE void lay_numbers(float *to, const float *x, whole count, const int width) {
    for (int i = 0; i < width; i += LANES) store(to + i, load_part(x + i, count - i));
}

/* Numbers [i, i + LANES) at x, bf16 or not, of which there are `count`; zeros beyond. */
INLINE vec some_numbers(const char *x, whole i, whole count, const int halves) {
    if (!halves) return load_part((const float *)x + i, count - i);
    uint16_t from[LANES] = {0};
    nvec bits;
    x = number(x, i, halves);
    if (count - i >= LANES)
        memcpy(from, x, sizeof from);
    else if (count > i)
        memcpy(from, x, (count - i) * sizeof *from);
    for (int n = 0; n < LANES; n++) bits[n] = (int32_t)((uint32_t)from[n] << 16);
    return (vec)bits;
}

INLINE void lay_words(float *to, const char *low, const char *high, whole count, const int width, const int halves) {
    for (int i = 0; i < width; i += LANES)
        store(to + i, (vec)rounded_pairs(some_numbers(low, i, count, halves),
                                         high ? some_numbers(high, i, count, halves) : (vec){}));
}

#endif
