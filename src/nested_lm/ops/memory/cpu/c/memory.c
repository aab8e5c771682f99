/* The self-modifying memories on a CPU: what `ops/memory_chunk.py` and `ops/memory_backward.py` compute, one row and head
   at a time, so that the weights of its memories stay in the core's cache.

   Letters as there: C tokens of a piece, K head width, E hidden width, M memories. Weights are kept transposed, `in` as
   K x E (a product with a token's row gives the hidden layer), `out` as E x K. K and E are padded to whole vectors.

   Forward keeps the weights before every piece (or every `group` pieces); backward computes a piece again. */

#include "dense.h"

enum { MOVES_GENERATORS = 1, MOVES_MEMORY = 2, ALIGNED = 4, FRESH = 8 };

/* One call. Mirrored by `Call` in memory_cpu.py; the order of the fields is its contract. */
typedef struct {
    int64_t B, T, H, K, E, M, pieces, longest, group;
    int64_t stem_pieces, branches, abreast; /* pieces after the stem's are of the longest branch, from where it begins */
    int64_t k, eta, alpha, v, q; /* place of each generator, -1 without it */
    int64_t erase_in, erase_out, erase_after_decay, since_border, since_border_generators;
    int64_t generated, generated_generators, inclusive, momentum, mean;
    double stretch, norm_floor, room_floor, gradient_floor;
    const int64_t *begin, *end, *flags; /* of each piece */
    const REAL *limits;                 /* largest rate of each memory */
    const REAL *reached;                /* share of it that each head reaches */
    const REAL *key, *value, *query;    /* B T H K */
    const REAL *rate, *decay;           /* B T H */
    const REAL *moment;                 /* B T H, or null: logits of what the momentum keeps (of a mean, the rest is new) */
    const REAL *start_in, *start_out;   /* H M E K, H M K E */
    const REAL *readout_rate, *readout_decay;                          /* H K, or null */
    const REAL *border_in, *border_out, *current_in, *current_out;     /* B H M E K, B H M K E */
    const REAL *moving_in, *moving_out;                                /* the same, or null: the momentum */
    const REAL *keep;                                                  /* pieces x B, or null */
    const int64_t *rows; /* B, or null: the row of the weights above that each row goes on from; else its own */
    const int64_t *cuts; /* B x (branches + 1), or null: where the branches of each row begin, and the last one ends */
    REAL *reads, *used_rate, *used_decay;                              /* B T H K, B T H, B T H */
    /* null when no call follows: */
    REAL *border_in_after, *border_out_after, *current_in_after, *current_out_after, *moving_in_after, *moving_out_after;
    REAL *saved; /* null in inference */
    const REAL *g_reads, *g_used_rate, *g_used_decay, *g_border_in, *g_border_out, *g_current_in, *g_current_out;
    const REAL *g_moving_in, *g_moving_out;
    REAL *g_key, *g_value, *g_query, *g_rate, *g_decay, *g_moment;
    REAL *g_start_in, *g_start_out;           /* B H M E K, B H M K E: one for each row */
    REAL *g_readout_rate, *g_readout_decay;   /* B H K, or null */
    REAL *g_first_border_in, *g_first_border_out, *g_first_current_in, *g_first_current_out;
    REAL *g_first_moving_in, *g_first_moving_out;
} Call;

/* What one memory computed of a piece. */
typedef struct {
    REAL *pre, *gate, *difference, *slope_value, *back, *direction, *known_in, *write_in; /* C x E */
    REAL *error, *moved, *known_out, *write_out;                                          /* C x K */
    REAL *overlap;                                                                        /* C x C */
    REAL *squared, *length, *damped, *steepness, *room, *size;                            /* C */
    int since_border; /* the erase term leaves to the gradient what the border held */
    int generated;    /* its target is its own answer to the value */
} Memory;

/* What one generator answered. */
typedef struct {
    REAL *pre, *gate, *out;
} Answer;

/* Everything about one row, head and piece, and the room for its gradients. */
typedef struct {
    const Call *call;
    long C, K, E, Kp, Ep, Cp, M, layer, all; /* layer: numbers of one layer; all: of both layers of all memories */
    long row, head, begin;
    REAL *start, *anchor, *turned_out, *turned_in; /* M x (in, out); M x (K x E); M x (E x K) */
    REAL *border; /* weights at the border, less the start */
    REAL *moving; /* the momentum before the piece */
    int fresh;    /* those are the weights before the piece */
    long *origin; /* of each token the first one that it knows of the piece: where its branch begins */
    int anchored; /* anchor and turned_out are of this border already */
    REAL *x_key, *x_value, *x_query, *key, *value, *query, *key_turned, *ratio, *gram;
    REAL *share, *log_decay, *log_kept, *log_before, *before, *erased, *to_end;
    REAL *long_key, *long_value, *long_query;
    Memory *memory;
    Answer *answer;
    REAL *read_pre, *read_gate, *read_in, *read_out; /* C x E, C x E, C x C, C x C */
    REAL *minus, *square, *wide, *narrow, *wide2, *narrow2, *turned; /* work space */
    REAL *g_anchor, *g_current, *g_border, *g_start;
    REAL *g_key, *g_value, *g_query, *g_share, *g_log_kept, *g_log_before, *g_gram;
    REAL *log_momentum, *log_left, *passed, *kept, *left, *spread, *first, *own_end; /* see momentum.h */
    REAL *g_spread, *g_first, *g_own_end, *g_log_left, *g_moving, g_own_first;
    REAL *branch_current, *branch_border, *branch_moving; /* weights of a branch that goes on after its first piece */
    REAL *off, *along; /* shares that the erase term takes off, and what they get, see erased_backward */
    REAL *g_write_in, *g_write_out, *g_direction, *g_read_pre, *read_hidden, *g_known_in, *g_known_out;
    void *block;
} Work;

INLINE REAL *in_of(const Work *w, REAL *weights, long m) { return weights + 2 * m * w->layer; }
INLINE REAL *out_of(const Work *w, REAL *weights, long m) { return weights + (2 * m + 1) * w->layer; }

/* Numbers of the saved weights of one row and head. */
static int64_t saved_slots(const Call *c, int64_t piece)
{
    int64_t slots = 0;
    for (int64_t p = 0; p < piece; p++)
        if (p % c->group == 0) slots += (c->flags[p] & FRESH ? 1 : 2) + c->momentum;
    return slots;
}

int64_t saved_numbers(const Call *c)
{
    return saved_slots(c, c->pieces) * c->M * 2 * padded(c->K) * padded(c->E);
}

/* Lay all arrays out behind each other; with a null base, only count. */
static long lay_out(Work *w, REAL *base)
{
    const long C = w->call->longest, K = w->Kp, E = w->Ep, S = padded(C), M = w->M;
    long used = 0;
#define ROOM(field, numbers) (w->field = base ? base + used : NULL, used += padded(numbers))
    ROOM(start, w->all), ROOM(anchor, w->all), ROOM(turned_out, M * w->layer), ROOM(turned_in, M * w->layer);
    ROOM(x_key, C * K), ROOM(x_value, C * K), ROOM(x_query, C * K), ROOM(key, C * K), ROOM(value, C * K);
    ROOM(query, C * K), ROOM(key_turned, K * S), ROOM(ratio, C * S), ROOM(gram, C * S);
    ROOM(share, C), ROOM(log_decay, C), ROOM(log_kept, C), ROOM(log_before, C), ROOM(before, C), ROOM(erased, C);
    ROOM(to_end, C), ROOM(long_key, C), ROOM(long_value, C), ROOM(long_query, C);
    ROOM(read_pre, C * E), ROOM(read_gate, C * E), ROOM(read_in, C * S), ROOM(read_out, C * S);
    ROOM(minus, C * S), ROOM(square, C * S), ROOM(wide, C * E), ROOM(narrow, C * K), ROOM(wide2, C * E);
    ROOM(narrow2, C * K), ROOM(turned, (K > E ? K : E) * (S > K ? (S > E ? S : E) : (K > E ? K : E)));
    ROOM(g_anchor, w->all), ROOM(g_current, w->all), ROOM(g_border, w->all), ROOM(g_start, w->all);
    ROOM(g_key, C * K), ROOM(g_value, C * K), ROOM(g_query, C * K), ROOM(g_share, C), ROOM(g_log_kept, C);
    ROOM(g_log_before, C), ROOM(g_gram, C * S), ROOM(g_write_in, C * E), ROOM(g_write_out, C * K);
    ROOM(g_direction, C * E), ROOM(g_read_pre, C * E), ROOM(read_hidden, C * (E > K ? E : K));
    ROOM(g_known_in, C * E), ROOM(g_known_out, C * K), ROOM(off, C), ROOM(along, C);
    const long with = w->call->momentum;
    ROOM(log_momentum, with * C), ROOM(log_left, with * C), ROOM(passed, with * C), ROOM(first, with * C);
    ROOM(own_end, with * C);
    ROOM(kept, with * C * S), ROOM(left, with * C * S), ROOM(spread, with * C * S), ROOM(g_spread, with * C * S);
    ROOM(g_first, with * C), ROOM(g_own_end, with * C), ROOM(g_log_left, with * C), ROOM(g_moving, with * w->all);
    const long branching = w->call->pieces > w->call->stem_pieces + 1;
    ROOM(branch_current, branching * w->all), ROOM(branch_border, branching * w->all);
    ROOM(branch_moving, branching * with * w->all);
#undef ROOM
#define ROOM(field, numbers) (x->field = base ? base + used : NULL, used += padded(numbers))
    EACH(m, M) {
        Memory *x = w->memory + m;
        ROOM(pre, C * E), ROOM(gate, C * E), ROOM(difference, C * E), ROOM(slope_value, C * E), ROOM(back, C * E);
        ROOM(direction, C * E), ROOM(known_in, C * E), ROOM(write_in, C * E), ROOM(error, C * K), ROOM(moved, C * K);
        ROOM(known_out, C * K), ROOM(write_out, C * K), ROOM(overlap, C * S);
        ROOM(squared, C), ROOM(length, C), ROOM(damped, C), ROOM(steepness, C), ROOM(room, C), ROOM(size, C);
    }
    EACH(m, M - 1) {
        Answer *x = w->answer + m;
        ROOM(pre, C * E), ROOM(gate, C * E), ROOM(out, C * K);
    }
#undef ROOM
    return used;
}

static int open_work(Work *w, const Call *c)
{
    memset(w, 0, sizeof *w);
    w->call = c, w->K = c->K, w->E = c->E, w->M = c->M, w->Kp = padded(c->K), w->Ep = padded(c->E);
    w->layer = w->Kp * w->Ep, w->all = 2 * w->M * w->layer;
    w->memory = calloc((size_t)w->M, sizeof(Memory));
    w->answer = calloc((size_t)w->M, sizeof(Answer));
    w->origin = calloc((size_t)c->longest, sizeof(long));
    if (!w->memory || !w->answer || !w->origin) return 0;
    const size_t bytes = (size_t)lay_out(w, NULL) * sizeof(REAL);
    if (posix_memalign(&w->block, 64, bytes)) return 0;
    memset(w->block, 0, bytes);
    lay_out(w, w->block);
    EACH(m, w->M) {
        const int last = m == w->M - 1;
        w->memory[m].since_border = (int)(last ? c->since_border : c->since_border_generators);
        w->memory[m].generated = (int)(last ? c->generated : c->generated_generators);
    }
    return 1;
}

static void close_work(Work *w) { free(w->block), free(w->memory), free(w->answer), free(w->origin); }

static void open_piece(Work *w, long row, long head, long begin, long end, int64_t flags)
{
    w->row = row, w->head = head, w->begin = begin, w->C = end - begin, w->Cp = padded(w->C);
    w->fresh = (flags & FRESH) != 0;
}

/* Weights of one row and head, as given (E x K, K x E), into transposed padded ones, and back. Fresh ones are zero. */
static void read_weights(const Work *w, const REAL *in, const REAL *out, REAL *to)
{
    const long size = w->K * w->E;
    memset(to, 0, (size_t)w->all * sizeof(REAL));
    if (all_zero(w->M * size, in) && all_zero(w->M * size, out)) return;
    EACH(m, w->M) {
        transpose(w->E, w->K, in + m * size, w->K, in_of(w, to, m), w->Ep, 0);
        transpose(w->K, w->E, out + m * size, w->E, out_of(w, to, m), w->Kp, 0);
    }
}

static void write_weights(const Work *w, REAL *from, REAL *in, REAL *out)
{
    const long size = w->K * w->E;
    EACH(m, w->M) {
        transpose(w->K, w->E, in_of(w, from, m), w->Ep, in + m * size, w->K, 0);
        transpose(w->E, w->K, out_of(w, from, m), w->Kp, out + m * size, w->E, 0);
    }
}

static void unit_rows(Work *w, const REAL *x, REAL *unit, REAL *length)
{
    EACH(t, w->C) {
        length[t] = (REAL)sqrt((double)dot(w->Kp, x + t * w->Kp, x + t * w->Kp));
        const double divisor = length[t] > w->call->norm_floor ? length[t] : w->call->norm_floor;
        scaled(w->Kp, unit + t * w->Kp, (REAL)(1 / divisor), x + t * w->Kp);
    }
}

/* x + W_out silu(W_in x) of generator m at its border. */
static void answer(Work *w, long m, const REAL *x)
{
    const Answer *a = w->answer + m;
    product(w->C, w->Ep, w->K, x, w->Kp, 1, in_of(w, w->anchor, m), w->Ep, a->pre, w->Ep, 0, FULL);
    activate(w->C * w->Ep, a->pre, a->gate, w->wide);
    memcpy(a->out, x, (size_t)(w->C * w->Kp) * sizeof(REAL));
    product(w->C, w->Kp, w->E, w->wide, w->Ep, 1, out_of(w, w->anchor, m), w->Kp, a->out, w->Kp, 1, FULL);
}

/* Keys, values, queries, rates and retentions of the piece (eq. 83). */
static void generate(Work *w)
{
    const Call *c = w->call;
    const long stride = c->H * c->K, first = ((w->row * c->T + w->begin) * c->H + w->head) * c->K;
    gather(w->C, w->K, w->Kp, c->key + first, stride, w->x_key);
    gather(w->C, w->K, w->Kp, c->value + first, stride, w->x_value);
    gather(w->C, w->K, w->Kp, c->query + first, stride, w->x_query);
    const size_t bytes = (size_t)(w->C * w->Kp) * sizeof(REAL);
    if (c->k >= 0) answer(w, c->k, w->x_key), unit_rows(w, w->answer[c->k].out, w->key, w->long_key);
    else memcpy(w->key, w->x_key, bytes);
    if (c->v >= 0) answer(w, c->v, w->x_value), unit_rows(w, w->answer[c->v].out, w->value, w->long_value);
    else memcpy(w->value, w->x_value, bytes);
    if (c->q >= 0) answer(w, c->q, w->x_query), unit_rows(w, w->answer[c->q].out, w->query, w->long_query);
    else memcpy(w->query, w->x_query, bytes);
    if (c->eta >= 0) answer(w, c->eta, w->x_key);
    if (c->alpha >= 0) answer(w, c->alpha, w->x_key);
    EACH(t, w->C) {
        const long gate = (w->row * c->T + w->begin + t) * c->H + w->head;
        REAL rate = c->rate[gate], decay = c->decay[gate];
        EACH(j, w->K) {
            if (c->eta >= 0) rate += w->answer[c->eta].out[t * w->Kp + j] * c->readout_rate[w->head * c->K + j];
            if (c->alpha >= 0) decay += w->answer[c->alpha].out[t * w->Kp + j] * c->readout_decay[w->head * c->K + j];
        }
        const REAL share = (REAL)((1 + 2 * c->stretch) * one_sigmoid(rate) - c->stretch);
        w->share[t] = (share < 0 ? 0 : share > 1 ? 1 : share) * c->reached[w->head]; /* NaN stays NaN */
        w->log_decay[t] = log_sigmoid(decay);
        if (c->momentum) w->log_momentum[t] = log_sigmoid(c->moment[gate]);
    }
}

/* Columns of tokens in other branches become 0. */
static void clear_foreign(const Work *w, REAL *square)
{
    EACH(t, w->C) EACH(i, w->origin[t]) square[t * w->Cp + i] = 0;
}

#include "momentum.h"

/* mutual products times ratio, 0 on and above the diagonal, where `product` left them unset. */
static void weigh(const Work *w, REAL *mutual)
{
    EACH(t, w->C) for (long i = 0; i < w->Cp; i += VL)
    {
        const long at = t * w->Cp + i;
        vec weighed = load(w->ratio + at);
        if (i < t) weighed *= load(mutual + at);
        store(mutual + at, weighed);
    }
}

/* Running products of the retention; gram = ratio x k.k. */
static void accumulate(Work *w)
{
    REAL sum = 0;
    EACH(t, w->C) {
        if (w->origin[t] == t) sum = 0;
        w->log_before[t] = sum;
        sum += w->log_decay[t];
        w->log_kept[t] = sum;
    }
    EACH(t, w->C) {
        w->before[t] = (REAL)exp((double)w->log_before[t]);
        w->to_end[t] = (REAL)exp((double)(sum - w->log_kept[t]));
        w->erased[t] = w->call->erase_after_decay ? (REAL)exp((double)w->log_decay[t]) : 1;
        REAL *ratio = w->ratio + t * w->Cp;
        for (long i = 0; i < w->Cp; i += VL) {
            if (i >= t) {
                store(ratio + i, (vec){0});
                continue;
            }
            store(ratio + i, exponential(w->log_before[t] - load(w->log_kept + i)));
            for (long s = t; s < i + VL; s++) ratio[s] = 0;
        }
    }
    clear_foreign(w, w->ratio);
    transpose(w->C, w->K, w->key, w->Kp, w->key_turned, w->Cp, w->Cp);
    product(w->C, w->Cp, w->K, w->key, w->Kp, 1, w->key_turned, w->Cp, w->gram, w->Cp, 0, LOWER_RESULT);
    weigh(w, w->gram);
    if (w->call->momentum) spread_momentum(w);
}

/* minus[t, i] = -erased_t rate_t overlap[t, i]: the negative of what the solve inverts. */
static void fill_minus(Work *w, const REAL *overlap, REAL limit)
{
    EACH(t, w->C) scaled(w->Cp, w->minus + t * w->Cp, -w->erased[t] * w->share[t] * limit, overlap + t * w->Cp);
}

/* Share of the weights before the piece that the erase term of a token takes off, less what it leaves to the gradient
   where those are the weights at the border. */
INLINE REAL taken_off(const Work *w, const Memory *x, long t)
{
    return w->erased[t] * w->before[t] - (x->since_border && w->fresh ? x->room[t] : 0);
}

/* Whether the erase term meets a border that is not the weights before the piece. */
INLINE int meets_border(const Work *w, const Memory *x) { return x->since_border && !w->fresh; }

/* Writes of one layer: known += erased before (direction old) - room (direction border), write = (I + L)^-1 (-rate
   known); see ops/memory_writes. */
static void solve_writes(Work *w, const Memory *x, REAL limit, int erase, const REAL *direction, long Y, long Yp,
                         const REAL *old, const REAL *border, long Xp, const REAL *overlap, REAL *known, REAL *write)
{
    if (erase) {
        product(w->C, Xp, Y, direction, Yp, 1, old, Xp, write, Xp, 0, FULL);
        EACH(t, w->C) add_scaled(Xp, known + t * Xp, taken_off(w, x, t), write + t * Xp);
    }
    if (erase && meets_border(w, x)) {
        product(w->C, Xp, Y, direction, Yp, 1, border, Xp, write, Xp, 0, FULL);
        EACH(t, w->C) add_scaled(Xp, known + t * Xp, -x->room[t], write + t * Xp);
    }
    EACH(t, w->C) scaled(Xp, write + t * Xp, -w->share[t] * limit, known + t * Xp);
    if (!erase) return;
    fill_minus(w, overlap, limit);
    solve_lower(w->C, Xp, w->minus, w->Cp, write, Xp);
}

/* weights after = gamma_C old + (to_end write)^T direction, in place. */
static void carry(Work *w, const REAL *direction, long Y, long Yp, REAL *old, long Xp, const REAL *write, REAL *room)
{
    const REAL kept = (REAL)exp((double)w->log_kept[w->C - 1]);
    EACH(t, w->C) scaled(Xp, room + t * Xp, w->to_end[t], write + t * Xp);
    EACH(y, Y) scaled(Xp, old + y * Xp, kept, old + y * Xp);
    product(Y, Xp, w->C, direction, 1, Yp, room, Xp, old, Xp, 1, FULL);
}

/* Closed-form gradients of one memory at its border (eqs. 84-85), their damping, and its writes (eq. 88). */
static void write_memory(Work *w, long m, REAL *current)
{
    const Call *c = w->call;
    const Memory *x = w->memory + m;
    const long C = w->C, K = w->K, E = w->E, Kp = w->Kp, Ep = w->Ep;
    const REAL *in = in_of(w, w->anchor, m), *out = out_of(w, w->anchor, m), limit = c->limits[m];
    REAL *turned_out = w->turned_out + m * w->layer, *hidden = w->wide, *gradient = x->known_in;
    if (!w->anchored) transpose(E, K, out, Kp, turned_out, Ep, Ep);
    product(C, Ep, K, w->key, Kp, 1, in, Ep, x->pre, Ep, 0, FULL);
    if (x->generated) product(C, Ep, K, w->value, Kp, 1, in, Ep, x->difference, Ep, 0, FULL);
    for (long j = 0; j < C * Ep; j += VL) {
        const vec p = load(x->pre + j), g = sigmoid(p);
        store(x->gate + j, g);
        store(hidden + j, p * g);
        if (!x->generated) {
            store(x->difference + j, p * g);
            continue;
        }
        const vec pv = load(x->difference + j), gv = sigmoid(pv);
        store(x->difference + j, p * g - pv * gv);
        store(x->slope_value + j, silu_slope(pv, gv));
    }
    for (long j = 0; j < C * Kp; j += VL) store(x->error + j, load(w->key + j) - load(w->value + j));
    product(C, Kp, E, x->difference, Ep, 1, out, Kp, x->error, Kp, 1, FULL);
    product(C, Ep, K, x->error, Kp, 1, turned_out, Ep, x->back, Ep, 0, FULL);
    EACH(t, C) {
        const REAL squared = dot(Ep, hidden + t * Ep, hidden + t * Ep);
        x->squared[t] = squared;
        x->length[t] = (REAL)sqrt((double)squared + c->norm_floor * c->norm_floor);
        scaled(Ep, x->direction + t * Ep, 1 / x->length[t], hidden + t * Ep);
        scaled(Kp, x->moved + t * Kp, squared, x->error + t * Kp);
    }
    for (long j = 0; j < C * Ep; j += VL) {
        const vec slope = silu_slope(load(x->pre + j), load(x->gate + j)), g = slope * load(x->back + j);
        store(gradient + j, g);
        store(w->wide2 + j, slope * g);
    }
    product(C, Kp, E, w->wide2, Ep, 1, out, Kp, x->moved, Kp, 1, FULL);
    EACH(t, C) {
        const REAL rate = w->share[t] * limit, *error = x->error + t * Kp, *moved = x->moved + t * Kp;
        double room = 1;
        if (c->erase_in || c->erase_out) {
            room = (2 - (double)rate) / (rate > 1 ? (double)rate : 1);
            room = room < c->room_floor ? c->room_floor : room > 1 ? 1 : room;
        }
        x->room[t] = (REAL)room;
        x->size[t] = (REAL)(dot(Ep, gradient + t * Ep, gradient + t * Ep) + x->squared[t] * dot(Kp, error, error) +
                            c->gradient_floor);
        x->steepness[t] = dot(Kp, moved, moved) / x->size[t] / x->room[t];
        const REAL damped = x->steepness[t] > 1 ? 1 / x->steepness[t] : x->steepness[t] <= 1 ? 1 : x->steepness[t];
        x->damped[t] = damped;
        scaled(Ep, gradient + t * Ep, damped, gradient + t * Ep);
        scaled(Kp, x->known_out + t * Kp, damped * x->length[t], error);
    }
    solve_writes(w, x, limit, (int)c->erase_in, w->key, K, Kp, in_of(w, current, m), in_of(w, w->border, m), Ep, w->gram,
                 x->known_in, x->write_in);
    if (c->erase_out) {
        transpose(C, E, x->direction, Ep, w->turned, w->Cp, w->Cp);
        product(C, w->Cp, E, x->direction, Ep, 1, w->turned, w->Cp, x->overlap, w->Cp, 0, LOWER_RESULT);
        weigh(w, x->overlap);
    }
    solve_writes(w, x, limit, (int)c->erase_out, x->direction, E, Ep, out_of(w, current, m), out_of(w, w->border, m), Kp,
                 x->overlap, x->known_out, x->write_out);
}

#include "memory_read.h"

/* Everything of a piece up to its writes and reads; `current` are the weights before it. */
static void forward_piece(Work *w, REAL *current)
{
    generate(w);
    accumulate(w);
    EACH(m, w->M) write_memory(w, m, current);
    read_memory(w, current);
}

static void carry_all(Work *w, REAL *current)
{
    EACH(m, w->M) {
        const Memory *x = w->memory + m;
        REAL *in = in_of(w, current, m), *out = out_of(w, current, m);
        carry(w, w->key, w->K, w->Kp, in, w->Ep, x->write_in, w->wide);
        carry(w, x->direction, w->E, w->Ep, out, w->Kp, x->write_out, w->narrow);
        if (!w->call->momentum) continue;
        carry_momentum(w, w->key, w->K, w->Kp, in, in_of(w, w->moving, m), w->Ep, x->write_in, w->wide);
        carry_momentum(w, x->direction, w->E, w->Ep, out, out_of(w, w->moving, m), w->Kp, x->write_out, w->narrow);
    }
}

static void set_back(const Call *c, int64_t piece, long row, long numbers, REAL *current, REAL *border, REAL *moving)
{
    if (!(c->flags[piece] & ALIGNED) || !c->keep) return;
    if (c->keep[piece * c->B + row] == 0) {
        memset(current, 0, (size_t)numbers * sizeof(REAL));
        if (c->momentum) memset(moving, 0, (size_t)numbers * sizeof(REAL));
    }
    memcpy(border, current, (size_t)numbers * sizeof(REAL));
}

/* Weights of the border and what is made of them. anchored: they are there already, of this border as it is now. */
static void set_anchor(Work *w, REAL *border, REAL *moving, int anchored)
{
    w->border = border, w->moving = moving, w->anchored = anchored;
    if (anchored) return;
    for (long j = 0; j < w->all; j += VL) store(w->anchor + j, load(w->start + j) + load(border + j));
}

/* Returns whether any moved. */
static int move_border(const Work *w, int64_t flags, const REAL *current, REAL *border)
{
    const long generators = 2 * (w->M - 1) * w->layer;
    if (flags & MOVES_GENERATORS) memcpy(border, current, (size_t)generators * sizeof(REAL));
    if (flags & MOVES_MEMORY) memcpy(border + generators, current + generators, (size_t)(2 * w->layer) * sizeof(REAL));
    return (flags & (MOVES_GENERATORS | MOVES_MEMORY)) != 0;
}

#include "memory_forward.h"
#include "memory_backward.h"
#include "front.h"
