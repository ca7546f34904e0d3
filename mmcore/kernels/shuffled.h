/* SHUFFLED(order, a, b, ...): numbers of the vectors a and b in the listed order, in which b's follow a's; `order` is the type of
   as many integers. gcc knows clang's name for this from version 12 on, and Ubuntu 22.04 has 11. */
#ifndef MM_SHUFFLED_H
#define MM_SHUFFLED_H

#ifdef __clang__
#define SHUFFLED(order, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(order, a, b, ...) __builtin_shuffle(a, b, (order){__VA_ARGS__})
#endif

#endif
