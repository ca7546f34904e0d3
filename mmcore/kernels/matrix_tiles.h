/* The matrix unit of Intel's server processors (AMX): a product of bf16 tiles, 16 x 32 by 32 x 16, in 16 cycles.

   On a Granite Rapids core that is 16 times the fused multiply-adds of fp32, and 28 times what vdpbf16ps does there, which is
   slower than fp32 (217 against 375 GFLOP/s on two cores) where a Zen 4 core has it at twice fp32's speed.

   A tile has 16 rows of 64 bytes. A's rows hold 32 numbers that follow each other; B's hold words of two, as panels do
   (narrow_products.h): row k the numbers 2k and 2k + 1 of 16 columns. Sums are fp32. Subnormal numbers count as zeros.

   int8 weights lie in words of four. x, in whole numbers of 16 bits, meets them as two bytes, of which the low one has no sign:
   its products take as long as bf16's, and both sums are exact. */
#ifndef MM_MATRIX_TILES_H
#define MM_MATRIX_TILES_H

#include <stdint.h>

#define TILE_SIDE 16 /* rows; words in a row */

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__linux__) && defined(__x86_64__)
#define MATRIX_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

enum { REQUEST_STATE = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA of Linux */

/* Whether this process may use tiles. Linux wants to be asked, for they are 8 KiB more of each thread's state. */
static int tiles_allowed(void) {
    static int known; /* 1 yes, -1 no; threads that ask at once learn the same */
    int now = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (!now) {
        now = syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0 ? 1 : -1;
        __atomic_store_n(&known, now, __ATOMIC_RELAXED);
    }
    return now > 0;
}

/* Between these a thread's eight tiles are whole ones. What the library held in its own is not kept: it asks each time. */
static void open_tiles(void) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = TILE_SIDE;
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
}
static void close_tiles(void) { __asm__ volatile("tilerelease"); }

/* Tile n is one of 0 to 7, as a literal; rows of memory lie `row` bytes apart. gcc's own loads do not say that they read it. */
#define LOAD_TILE(n, from, row) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #n ::"r"(from), "r"((int64_t)(row)) : "memory")
#define STORE_TILE(n, to, row) __asm__ volatile("tilestored %%tmm" #n ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(row)) : "memory")
#define ZERO_TILE(n) __asm__ volatile("tilezero %tmm" #n)
#define MULTIPLY_TILES(sum, a, b) __asm__ volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #sum)
/* Of bytes; a's have no sign; b's have none. */
#define MULTIPLY_BYTES(sum, a, b) __asm__ volatile("tdpbssd %tmm" #b ", %tmm" #a ", %tmm" #sum)
#define MULTIPLY_LOW_BYTES(sum, a, b) __asm__ volatile("tdpbusd %tmm" #b ", %tmm" #a ", %tmm" #sum)
#define MULTIPLY_BY_LOW_BYTES(sum, a, b) __asm__ volatile("tdpbsud %tmm" #b ", %tmm" #a ", %tmm" #sum)

#else
#define MATRIX_TILES 0 /* and what follows is never called */
#define LOAD_TILE(n, from, row) ((void)(from), (void)(row))
#define STORE_TILE(n, to, row) ((void)(to), (void)(row))
#define ZERO_TILE(n) ((void)0)
#define MULTIPLY_TILES(sum, a, b) ((void)0)
#define MULTIPLY_BYTES(sum, a, b) ((void)0)
#define MULTIPLY_LOW_BYTES(sum, a, b) ((void)0)
#define MULTIPLY_BY_LOW_BYTES(sum, a, b) ((void)0)
static inline int tiles_allowed(void) { return 0; }
static inline void open_tiles(void) {}
static inline void close_tiles(void) {}
#endif

/* What follows holds a block of sums, 2 x 2 tiles, in tiles 0 to 3: the two above, and where `low` the two below; the left
   ones, and where `right` the right ones. Distances count words. */
#define TILES_INLINE static inline __attribute__((always_inline))

/* The sums begin with c, or with zeros. */
TILES_INLINE void open_sums(const float *c, int64_t c_row, int add, int low, int right) {
    const float *below = c + TILE_SIDE * c_row;
    ZERO_TILE(0);
    ZERO_TILE(1);
    ZERO_TILE(2);
    ZERO_TILE(3);
    if (!add) return;
    LOAD_TILE(0, c, 4 * c_row);
    if (right) LOAD_TILE(1, c + TILE_SIDE, 4 * c_row);
    if (low) LOAD_TILE(2, below, 4 * c_row);
    if (low && right) LOAD_TILE(3, below + TILE_SIDE, 4 * c_row);
}

/* They go to c. */
TILES_INLINE void close_sums(float *c, int64_t c_row, int low, int right) {
    float *below = c + TILE_SIDE * c_row;
    STORE_TILE(0, c, 4 * c_row);
    if (right) STORE_TILE(1, c + TILE_SIDE, 4 * c_row);
    if (low) STORE_TILE(2, below, 4 * c_row);
    if (low && right) STORE_TILE(3, below + TILE_SIDE, 4 * c_row);
}

/* Adds two tiles of A, one below the other, times two of B, side by side. */
TILES_INLINE void add_tiles(const float *a, int64_t a_row, const float *b, int64_t b_row, int low, int right) {
    LOAD_TILE(4, a, 4 * a_row);
    LOAD_TILE(6, b, 4 * b_row);
    MULTIPLY_TILES(0, 4, 6);
    if (right) {
        LOAD_TILE(7, b + TILE_SIDE, 4 * b_row);
        MULTIPLY_TILES(1, 4, 7);
    }
    if (low) {
        LOAD_TILE(5, a + TILE_SIDE * a_row, 4 * a_row);
        MULTIPLY_TILES(2, 5, 6);
    }
    if (low && right) MULTIPLY_TILES(3, 5, 7);
}

/* The same of operands split in two, but for the product of both rests: eight loads for the twelve that three calls would take. */
TILES_INLINE void add_split_tiles(const float *a, const float *a_rest, int64_t a_row, const float *b, const float *b_rest,
                                  int64_t b_row) {
    LOAD_TILE(4, a, 4 * a_row);
    LOAD_TILE(6, b_rest, 4 * b_row);
    LOAD_TILE(7, b_rest + TILE_SIDE, 4 * b_row);
    MULTIPLY_TILES(0, 4, 6);
    MULTIPLY_TILES(1, 4, 7);
    LOAD_TILE(5, a + TILE_SIDE * a_row, 4 * a_row);
    MULTIPLY_TILES(2, 5, 6);
    MULTIPLY_TILES(3, 5, 7);
    LOAD_TILE(6, b, 4 * b_row);
    MULTIPLY_TILES(0, 4, 6);
    MULTIPLY_TILES(2, 5, 6);
    LOAD_TILE(7, b + TILE_SIDE, 4 * b_row);
    MULTIPLY_TILES(1, 4, 7);
    MULTIPLY_TILES(3, 5, 7);
    LOAD_TILE(4, a_rest, 4 * a_row);
    MULTIPLY_TILES(0, 4, 6);
    MULTIPLY_TILES(1, 4, 7);
    LOAD_TILE(5, a_rest + TILE_SIDE * a_row, 4 * a_row);
    MULTIPLY_TILES(2, 5, 6);
    MULTIPLY_TILES(3, 5, 7);
}

/* sums [4][16][16]: the high bytes of 16 rows times two tiles of W side by side, then their low bytes times the same. A's tiles
   follow each other, high and low, for each of `steps`. */
TILES_INLINE void multiply_bytes(int32_t *sums, const float *a, int64_t a_step, const float *b, int64_t b_row, int64_t steps) {
    ZERO_TILE(0);
    ZERO_TILE(1);
    ZERO_TILE(2);
    ZERO_TILE(3);
    for (int64_t k = 0; k < steps; k++, a += 2 * a_step, b += TILE_SIDE * b_row) {
        LOAD_TILE(4, a, 4 * TILE_SIDE);
        LOAD_TILE(6, b, 4 * b_row);
        LOAD_TILE(7, b + TILE_SIDE, 4 * b_row);
        MULTIPLY_BYTES(0, 4, 6);
        MULTIPLY_BYTES(1, 4, 7);
        LOAD_TILE(5, a + a_step, 4 * TILE_SIDE);
        MULTIPLY_LOW_BYTES(2, 5, 6);
        MULTIPLY_LOW_BYTES(3, 5, 7);
    }
    STORE_TILE(0, sums, 4 * TILE_SIDE);
    STORE_TILE(1, sums + 256, 4 * TILE_SIDE);
    STORE_TILE(2, sums + 512, 4 * TILE_SIDE);
    STORE_TILE(3, sums + 768, 4 * TILE_SIDE);
}

/* Whether rounding numbers to bf16 makes their products faster than fp32's. */
static inline int bf16_pays(void) {
#if defined(__AVX512BF16__)
    return tiles_allowed() || !__builtin_cpu_is("intel");
#else
    return 0;
#endif
}

#endif
