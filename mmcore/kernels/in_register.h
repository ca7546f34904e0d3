/* IN_REGISTER(x): the vector x is in a register from here on. Without it the compiler reads from memory again what several
   multiply-adds share, and loads, not they, set the pace (memory_read's tiles: 40 GFLOP/s a core). */
#ifndef MM_IN_REGISTER_H
#define MM_IN_REGISTER_H

#if defined(__AVX512F__)
#define IN_REGISTER(x) __asm__("" : "+v"(x)) /* of all 32; "x" are 16 */
#elif defined(__x86_64__)
#define IN_REGISTER(x) __asm__("" : "+x"(x))
#elif defined(__aarch64__)
#define IN_REGISTER(x) __asm__("" : "+w"(x))
#else
#define IN_REGISTER(x) ((void)0)
#endif

#endif
