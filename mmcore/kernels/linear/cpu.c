/* Y_i = X W_i^T for several weight matrices, all of one format (linear_call.h). */

#include "linear_call.h"

#define HELD 16       /* tiles of X that are kept for all threads, of 8 to 66 KiB */
#define KEPT 64       /* tiles that a thread keeps for itself from round to round where a matrix unit multiplies, 4 MiB */
#define FEW_THREADS 4 /* of more each has so few panels that one round holds them */
#define EVEN_TILES 32 /* for each thread: with fewer, one more or less leaves another waiting (5 % of 512 rows) */

/* Columns [n, n + count) of all Y, from a block that is not written where they lie. */
static void scatter(const struct call *c, const float *from, whole row, whole rows, whole n, whole count) {
    for (whole i = 0, run; i < count; i += run) {
        whole at = n + i;
        const struct matrix *m = holder(c, &at);
        run = least(count - i, m->out - at);
        for (whole r = 0; r < rows; r++) {
            char *to = m->y + ((row + r) * m->y_row + at) * item(c->y_halves);
            if (c->y_halves)
                round_to_bf16((uint16_t *)to, from + r * COLUMNS + i, run);
            else
                memcpy(to, from + r * COLUMNS + i, run * sizeof *from);
        }
    }
}

static void fetch_back(const struct call *c, float *to, whole row, whole rows, whole n, whole count) {
    for (whole i = 0, run; i < count; i += run) {
        whole at = n + i;
        const struct matrix *m = holder(c, &at);
        run = least(count - i, m->out - at);
        for (whole r = 0; r < rows; r++)
            memcpy(to + r * COLUMNS + i, (const float *)m->y + (row + r) * m->y_row + at, run * sizeof *to);
    }
}

/* One block of Y: rows of X in `tile`, outputs [n, n + COLUMNS) in `panel`. Sums that become bf16 are whole: none is added to. */
static void forward_block(const struct call *c, whole row, whole rows, whole n, int add, whole depth, const float *tile,
                          const float *panel, struct ahead *next) {
    whole at = n, count = least(COLUMNS, c->total - n);
    const struct matrix *m = holder(c, &at);
    if (at + COLUMNS <= m->out && !c->y_halves) {
        c->block((float *)m->y + row * m->y_row + at, m->y_row, rows, add, depth, tile, panel, next);
        return;
    }
    float mixed[MOST_ROWS * COLUMNS];
    if (add) fetch_back(c, mixed, row, rows, n, count);
    c->block(mixed, COLUMNS, rows, add, depth, tile, panel, next);
    scatter(c, mixed, row, rows, n, count);
}

/* Numbers [0, depth) of a row of weights, as a tile would hold them: fp32, or 16 bits with zeros that fill the last words. */
static void unpack_weights(float *to, const char *w, float scale, whole depth, int format) {
    uint16_t *halves = (uint16_t *)to;
    if (!NARROW(format)) {
        widen(to, w, depth, format);
        for (whole j = 0; format == INT8 && j < depth; j++) to[j] *= scale;
        return;
    }
    if (format == INT8 && by_matrix(INT8)) {
        memset(to + depth / 4, 0, (laid_words(depth, format) - depth / 4) * sizeof *to);
        memcpy(to, w, depth);
        return;
    }
    fill_up(halves, depth, format);
    if (format == BF16) memcpy(halves, w, depth * sizeof *halves);
    if (format == ROUNDED) round_to_bf16(halves, (const float *)w, depth);
    for (whole j = 0; format == INT8 && j < depth; j++) halves[j] = (uint16_t)(int16_t)((const int8_t *)w)[j];
}

/* Outputs [n, n + COLUMNS) of all, numbers [k, k + depth), as a panel. */
static void pack_weights(const struct call *c, float *panel, whole n, whole k, whole depth) {
    const float *rows[COLUMNS];
    float unpacked[COLUMNS * TILE_ROW], *scales = scales_of(panel, c->format);
    whole count = least(COLUMNS, c->total - n);
    int as_they_are = c->format == FP32 || (c->format == BF16 && NARROW(BF16) && c->in % 2 == 0) || /* in whole words */
                      (c->format == INT8 && by_matrix(INT8) && c->in % 4 == 0);
    for (whole i = 0; i < count; i++) {
        whole at = n + i;
        const struct matrix *m = holder(c, &at);
        const char *w = m->weight + (at * c->in + k) * bytes_of(c->format);
        float scale = m->scale ? m->scale[at] : 1;
        rows[i] = as_they_are ? (const float *)w : unpacked + i * TILE_ROW;
        if (!as_they_are) unpack_weights(unpacked + i * TILE_ROW, w, scale, depth, c->format);
        if (in_steps(c->format)) scales[i] = scale;
    }
    pack_turned(panel, rows, count, words_in(depth, c->format), laid_words(depth, c->format));
}

/* What `panels` of them are packed from, as far as they are of one matrix. */
static struct ahead weights_of(const struct call *c, whole n, whole panels, whole k, whole depth) {
    whole at = n, bytes = bytes_of(c->format);
    const struct matrix *m = holder(c, &at);
    return (struct ahead){.at = m->weight + (at * c->in + k) * bytes, .width = depth * bytes, .row = c->in * bytes,
                          .rows = least(panels * COLUMNS, m->out - at)};
}

/* Whole numbers of 16 bits as row r of a tile: as they are, or as the matrix unit takes their two bytes. */
static void lay_whole_numbers(float *tile, whole r, const float *words, whole depth) {
    if (!by_matrix(INT8)) {
        memcpy(tile + r * TILE_ROW, words, words_of(depth) * sizeof *tile);
        return;
    }
    for (whole k = 0; k < depth; k += 64) {
        uint16_t x[64];
        uint8_t *high = (uint8_t *)(tile + k / 32 * MATRIX_STEP + r * TILE_SIDE);
        memcpy(x, (const uint16_t *)words + k, least(64, depth - k) * sizeof *x);
        memset(x + least(64, depth - k), 0, (64 - least(64, depth - k)) * sizeof *x);
        split_bytes(high, high + 4 * MATRIX_STEP, x);
    }
}

/* Rows of X, numbers [k, k + depth), as a tile. */
static void pack_tile(const struct call *c, float *tile, whole row, whole rows, whole k, whole depth) {
    const char *x = number(c->x, row * c->x_row + k, c->x_halves);
    const float *words = c->narrow + row * words_of(c->in) + k / 2;
    for (whole r = 0; r < rows; r++, x = number(x, c->x_row, c->x_halves), words += words_of(c->in)) {
        float *to = tile + r * TILE_ROW;
        if (in_steps(c->format)) {
            lay_whole_numbers(tile, r, words, depth);
            *step_of(tile, r, c->format) = c->steps[row + r];
        } else if (NARROW(c->format)) {
            round_into(tile, r, 0, x, depth, c->format, c->x_halves);
            fill_tile(tile, r, depth, c->format);
        } else {
            memcpy(to, x, depth * sizeof *to);
        }
    }
}

/* What they are packed from. */
static struct ahead rows_of(const struct call *c, whole row, whole end, whole k, whole depth) {
    whole rows = least(c->height, end - row), words = words_of(c->in);
    if (in_steps(c->format))
        return (struct ahead){.at = (const char *)(c->narrow + row * words + k / 2), .width = 4 * words_of(depth),
                              .row = 4 * words, .rows = rows};
    whole bytes = item(c->x_halves);
    return (struct ahead){.at = c->x + (row * c->x_row + k) * bytes, .width = bytes * depth, .row = bytes * c->x_row,
                          .rows = rows};
}

/* Floats of a tile of X. */
static whole tile_floats(int format) { return rows_of_block(format) * TILE_ROW; }

/* Tiles that a thread keeps of so many rows: beside the matrix unit's products packing them for each round of panels took a sixth
   of the time. fp32's are as fast packed again, into the first-level cache. 1: none is kept. */
static whole kept_tiles(whole rows, int format, whole threads) {
    whole tiles = parts_of(rows, rows_of_block(format));
    if (!by_matrix(format) || tiles <= HELD) return 1;
    if (tiles < EVEN_TILES * threads) return threads <= FEW_THREADS ? least(KEPT, tiles) : 1;
    return least(KEPT, parts_of(tiles, threads));
}

/* Rows [row, end) of X meet the panels of a round, outputs from n on. To `pack` them: into the thread's tiles, or into one where
   none is kept, each just before its products, while the next is asked for; else they lie in `tiles` already. */
static void forward_round(const struct call *c, whole row, whole end, whole n, whole held, int pack, whole k, whole depth,
                          float *tiles, const float *panels, struct ahead *then) {
    whole each = panel_floats(depth, c->format), apart = c->kept > 1 || !pack ? tile_floats(c->format) : 0;
    for (float *tile = tiles; row < end; row += c->height, tile += apart) {
        whole rows = least(c->height, end - row);
        struct ahead next = rows_of(c, row + c->height, pack ? end : 0, k, depth);
        next.then = then;
        if (pack) pack_tile(c, tile, row, rows, k, depth);
        for (whole p = 0; p < held; p++)
            forward_block(c, row, rows, n + p * COLUMNS, k > 0, depth, tile, panels + p * each, &next);
    }
}

/* Y where there are many rows: threads share the panels, and each takes rows of its own. */
static void forward(const struct call *c, float *tiles) {
    whole first, end, deep = depth_of(DEPTH, c->format), all = parts_of(c->rows, c->height);
    whole longest = parts_of(all, omp_get_num_threads()) * c->height, group = c->kept > 1 ? c->kept * c->height : longest;
    my_rows(c, &first, &end);
    for (whole k = 0; k < c->in; k += deep) {
        whole depth = least(deep, c->in - k), each = panel_floats(depth, c->format), most = ROUND_FLOATS / each;
        for (whole top = first; top < first + longest; top += group) /* as often for each thread */
            for (whole n = 0; n < c->total; n += most * COLUMNS) {
                whole held = least(most, parts_of(c->total - n, COLUMNS));
#pragma omp for schedule(static, 1)
                for (whole p = 0; p < held; p++) pack_weights(c, c->panels + p * each, n + p * COLUMNS, k, depth);
                int pack = n == 0 || c->kept == 1;
                forward_round(c, top, least(end, top + group), n, held, pack, k, depth, tiles, c->panels, NULL);
#pragma omp barrier
            }
    }
}

/* Y where there are few: each thread takes panels of its own, and all rows. Up to HELD tiles are packed once, by all threads for
   all, and meet the panels one by one; more are packed by each thread for itself. */
static void forward_columns(const struct call *c, float *panels, float *shared, float *own) {
    whole first, end, deep = depth_of(DEPTH, c->format);
    my_share(parts_of(c->total, COLUMNS), &first, &end);
    int share = parts_of(c->rows, c->height) <= HELD;
    whole group = c->kept > 1 ? c->kept * c->height : c->rows;
    for (whole k = 0; k < c->in; k += deep) {
        whole depth = least(deep, c->in - k), each = panel_floats(depth, c->format), most = share ? 1 : ROUND_FLOATS / each;
        if (share) {
#pragma omp for schedule(static)
            for (whole row = 0; row < c->rows; row += c->height)
                pack_tile(c, shared + row * TILE_ROW, row, least(c->height, c->rows - row), k, depth);
        }
        for (whole top = 0; top < c->rows; top += group)
            for (whole p = first; p < end; p += most) {
                whole held = least(most, end - p), after = p + held;
                struct ahead weights = {0};
                if (after < end)
                    weights = weights_of(c, after * COLUMNS, least(most, end - after), k, depth);
                else if (k + deep < c->in)
                    weights = weights_of(c, first * COLUMNS, least(most, end - first), k + deep, least(deep, c->in - k - deep));
                for (whole i = 0; i < held; i++) pack_weights(c, panels + i * each, (p + i) * COLUMNS, k, depth);
                int pack = !share && (p == first || c->kept == 1);
                forward_round(c, top, least(c->rows, top + group), p * COLUMNS, held, pack, k, depth, share ? shared : own, panels,
                              &weights);
            }
        if (share && k + deep < c->in) {
#pragma omp barrier
        }
    }
}

/* All of X in 16 bits. */
static void narrow_x(const struct call *c) {
    whole words = words_of(c->in);
#pragma omp for schedule(static)
    for (whole r = 0; r < c->rows; r++) {
        uint16_t *to = (uint16_t *)(c->narrow + r * words);
        to[2 * words - 1] = 0;
        const float *x = (const float *)c->x + r * c->x_row;
        c->steps[r] = narrow_step(x, c->in, c->format);
        narrow(to, x, c->in, c->steps[r], c->format);
    }
}

/* Floats of scratch for so many rows. */
whole mm_linear_scratch(whole rows, whole in, int format, int threads) {
    whole narrow = in_steps(format) ? rows * (words_of(in) + 1) : 0;
    whole own = kept_tiles(rows, format, threads) * tile_floats(format);
    return threads * (ROUND_FLOATS + own) + HELD * tile_floats(format) + narrow;
}

/* Whether this processor multiplies in bf16 faster than in fp32: without that nothing is to be ROUNDED. */
int mm_linear_rounds(void) { return bf16_pays(); }

/* The most numbers of a row of X that meet in one round: only so many give sums in bf16. */
whole mm_linear_depth(int format) { return depth_of(DEPTH, format); }

void mm_linear(const struct matrix *list, whole count, int format, const char *x, whole rows, whole in, whole x_row,
               int x_halves, int y_halves, float *scratch, int threads) {
    whole kept = kept_tiles(rows, format, threads), own = kept * tile_floats(format);
    float *tiles = scratch + threads * (whole)ROUND_FLOATS, *shared = tiles + threads * own;
    float *steps = shared + HELD * tile_floats(format);
    struct call c = {.list = list, .x = x, .count = count, .total = outputs_of(list, count), .rows = rows, .in = in,
                     .x_row = x_row, .height = rows_of_block(format), .kept = kept, .format = format, .x_halves = x_halves,
                     .y_halves = y_halves, .block = block_of(format), .panels = scratch, .steps = steps,
                     .narrow = steps + rows};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        whole thread = omp_get_thread_num(), team = omp_get_num_threads();
        float *mine = tiles + thread * own;
        if (by_matrix(format)) open_tiles();
        if (in_steps(format)) narrow_x(&c);
        if (parts_of(rows, c.height) < EVEN_TILES * team)
            forward_columns(&c, scratch + thread * (whole)ROUND_FLOATS, shared, mine);
        else
            forward(&c, mine);
        if (by_matrix(format)) close_tiles();
    }
}
