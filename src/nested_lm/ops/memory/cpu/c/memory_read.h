/* Reads of `memory`, and their backward: see `ops/memory_read.py` for what is read. */

/* seen[t, i] = ratio of the retention between write i and read t, or what of a push has arrived, times what is there: see
   `read_chunks`. */
static void weigh_seen(Work *w, const REAL *mutual, REAL *seen)
{
    if (w->call->momentum) {
        EACH(t, w->C) for (long i = 0; i < w->Cp; i += VL)
        {
            const long at = t * w->Cp + i;
            vec weighed = {0};
            if (i <= t) weighed = load(w->spread + at) * load(mutual + at);
            store(seen + at, weighed);
        }
        return;
    }
    const int64_t inclusive = w->call->inclusive;
    EACH(t, w->C) {
        const REAL step = inclusive ? (REAL)exp((double)w->log_decay[t]) : 1;
        for (long i = 0; i < w->Cp; i += VL) {
            const long at = t * w->Cp + i;
            vec weighed = step * load(w->ratio + at);
            if (i < t) weighed *= load(mutual + at);
            store(seen + at, weighed);
        }
        if (inclusive) seen[t * w->Cp + t] = mutual[t * w->Cp + t];
    }
}

INLINE REAL faded(const Work *w, long t)
{
    return (REAL)exp((double)(w->call->inclusive ? w->log_kept[t] : w->log_before[t]));
}

/* One layer of a read: x (start + faded old + first moving) + seen write; the mutual products of x with the keys are
   kept. */
static void read_layer(Work *w, const REAL *x, long Y, long Yp, const REAL *start, const REAL *old, const REAL *moving,
                       long Xp, const REAL *keys_turned, const REAL *write, REAL *mutual, REAL *result)
{
    product(w->C, Xp, Y, x, Yp, 1, old, Xp, result, Xp, 0, FULL);
    EACH(t, w->C) scaled(Xp, result + t * Xp, faded(w, t), result + t * Xp);
    if (w->call->momentum) {
        product(w->C, Xp, Y, x, Yp, 1, moving, Xp, w->read_hidden, Xp, 0, FULL);
        EACH(t, w->C) add_scaled(Xp, result + t * Xp, w->first[t], w->read_hidden + t * Xp);
    }
    product(w->C, Xp, Y, x, Yp, 1, start, Xp, result, Xp, 1, FULL);
    product(w->C, w->Cp, Y, x, Yp, 1, keys_turned, w->Cp, mutual, w->Cp, 0, LOWER_RESULT);
    weigh_seen(w, mutual, w->square);
    product(w->C, Xp, w->C, w->square, w->Cp, 1, write, Xp, result, Xp, 1, LOWER);
}

/* Read `memory` at every token of the piece. */
static void read_memory(Work *w, REAL *current)
{
    const long m = w->M - 1;
    const Memory *x = w->memory + m;
    read_layer(w, w->query, w->K, w->Kp, in_of(w, w->start, m), in_of(w, current, m),
               in_of(w, w->moving, m), w->Ep, w->key_turned, x->write_in, w->read_in, w->read_pre);
    activate(w->C * w->Ep, w->read_pre, w->read_gate, w->wide);
    transpose(w->C, w->E, x->direction, w->Ep, w->turned, w->Cp, w->Cp);
    read_layer(w, w->wide, w->E, w->Ep, out_of(w, w->start, m), out_of(w, current, m),
               out_of(w, w->moving, m), w->Kp, w->turned, x->write_out, w->read_out, w->narrow);
    for (long j = 0; j < w->C * w->Kp; j += VL) store(w->narrow + j, load(w->narrow + j) + load(w->query + j));
}

/* One layer of a read. g: gradient of its result. Adds to the gradients of x, of keys, writes and logs. That of the
   weights is left to `read_weights_backward`, since the writes' backward must see the weights first. */
static void read_layer_backward(Work *w, const REAL *g, long Xp, long X, const REAL *x, long Y, long Yp,
                                REAL *start, const REAL *old_turned, const REAL *keys, const REAL *write,
                                REAL *moving, const REAL *mutual, REAL *g_x, REAL *g_keys, REAL *g_write, REAL *work_x,
                                REAL *work_y)
{
    const long C = w->C, Cp = w->Cp;
    REAL *g_log_seen = w->call->inclusive ? w->g_log_kept : w->g_log_before;
    /* x start */
    transpose(Y, X, start, Xp, w->turned, Yp, Yp);
    product(C, Yp, X, g, Xp, 1, w->turned, Yp, g_x, Yp, 1, FULL);
    /* faded x old */
    EACH(t, C) scaled(Xp, work_x + t * Xp, faded(w, t), g + t * Xp);
    product(C, Yp, X, work_x, Xp, 1, old_turned, Yp, work_y, Yp, 0, FULL);
    EACH(t, C) {
        g_log_seen[t] += dot(Yp, x + t * Yp, work_y + t * Yp);
        add_scaled(Yp, g_x + t * Yp, 1, work_y + t * Yp);
    }
    if (w->call->momentum) { /* first x moving */
        transpose(Y, X, moving, Xp, w->turned, Yp, Yp);
        product(C, Yp, X, g, Xp, 1, w->turned, Yp, work_y, Yp, 0, FULL);
        EACH(t, C) {
            w->g_first[t] += dot(Yp, x + t * Yp, work_y + t * Yp);
            add_scaled(Yp, g_x + t * Yp, w->first[t], work_y + t * Yp);
        }
    }
    /* seen write, seen = ratio x mutual, or spread x mutual */
    weigh_seen(w, mutual, w->square);
    product(C, Xp, C, w->square, 1, Cp, g, Xp, g_write, Xp, 1, UPPER);
    transpose(C, X, write, Xp, w->turned, Cp, Cp);
    product(C, Cp, X, g, Xp, 1, w->turned, Cp, w->minus, Cp, 0, LOWER_RESULT);
    EACH(t, C) {
        const int inclusive = (int)w->call->inclusive;
        const REAL step = inclusive ? (REAL)exp((double)w->log_decay[t]) : 1;
        REAL sum = 0;
        for (long i = 0; i <= t; i++) {
            if (w->call->momentum) {
                w->g_spread[t * Cp + i] += w->minus[t * Cp + i] * mutual[t * Cp + i];
                w->minus[t * Cp + i] *= w->spread[t * Cp + i];
                continue;
            }
            const REAL gradient = w->minus[t * Cp + i], through = gradient * w->square[t * Cp + i];
            sum += through;
            w->g_log_kept[i] -= through;
            w->minus[t * Cp + i] = gradient * (i < t ? step * w->ratio[t * Cp + i] : inclusive);
        }
        for (long i = t + 1; i < Cp; i++) w->minus[t * Cp + i] = 0;
        g_log_seen[t] += sum;
    }
    product(C, Yp, C, w->minus, Cp, 1, keys, Yp, g_x, Yp, 1, LOWER);
    product(C, Yp, C, w->minus, 1, Cp, x, Yp, g_keys, Yp, 1, UPPER);
}

/* Gradients of the reads of a piece (in w->narrow) to queries, keys, writes and the start. */
static void read_backward(Work *w, REAL *current)
{
    const long m = w->M - 1, C = w->C, Kp = w->Kp, Ep = w->Ep;
    const Memory *x = w->memory + m;
    REAL *hidden = w->g_known_in, *g_hidden = w->g_read_pre; /* work space until the writes' backward */
    for (long j = 0; j < C * Ep; j += VL) store(hidden + j, load(w->read_pre + j) * load(w->read_gate + j));
    memset(g_hidden, 0, (size_t)(C * Ep) * sizeof(REAL));
    memset(w->g_write_in, 0, (size_t)(C * Ep) * sizeof(REAL));
    memset(w->g_write_out, 0, (size_t)(C * Kp) * sizeof(REAL));
    memset(w->g_direction, 0, (size_t)(C * Ep) * sizeof(REAL));
    memcpy(w->g_query, w->narrow, (size_t)(C * Kp) * sizeof(REAL));
    product(w->E, Kp, C, hidden, 1, Ep, w->narrow, Kp, out_of(w, w->g_start, m), Kp, 1, FULL);
    transpose(w->E, w->K, out_of(w, current, m), Kp, w->turned_in, Ep, Ep); /* room of generator 0, filled later */
    read_layer_backward(w, w->narrow, Kp, w->K, hidden, w->E, Ep, out_of(w, w->start, m), w->turned_in, x->direction,
                        x->write_out, out_of(w, w->moving, m), w->read_out, g_hidden, w->g_direction, w->g_write_out,
                        w->narrow2, w->wide2);
    /* for what the weights of the second layer get, when the writes' backward has been there */
    memcpy(w->read_hidden, hidden, (size_t)(C * Ep) * sizeof(REAL));
    for (long j = 0; j < C * Ep; j += VL)
        store(g_hidden + j, load(g_hidden + j) * silu_slope(load(w->read_pre + j), load(w->read_gate + j)));
    product(w->K, Ep, C, w->query, 1, Kp, g_hidden, Ep, in_of(w, w->g_start, m), Ep, 1, FULL);
    transpose(w->K, w->E, in_of(w, current, m), Ep, w->turned_in, Kp, Kp);
    read_layer_backward(w, g_hidden, Ep, w->E, w->query, w->K, Kp, in_of(w, w->start, m), w->turned_in, w->key,
                        x->write_in, in_of(w, w->moving, m), w->read_in, w->g_query, w->g_key, w->g_write_in, w->wide2,
                        w->narrow2);
}

/* What reads send to the weights before the piece. */
static void read_weights_backward(Work *w)
{
    const long m = w->M - 1, C = w->C, Kp = w->Kp, Ep = w->Ep;
    EACH(t, C) scaled(Ep, w->wide2 + t * Ep, faded(w, t), w->read_hidden + t * Ep);
    product(w->E, Kp, C, w->wide2, 1, Ep, w->narrow, Kp, out_of(w, w->g_current, m), Kp, 1, FULL);
    EACH(t, C) scaled(Kp, w->narrow2 + t * Kp, faded(w, t), w->query + t * Kp);
    product(w->K, Ep, C, w->narrow2, 1, Kp, w->g_read_pre, Ep, in_of(w, w->g_current, m), Ep, 1, FULL);
    if (!w->call->momentum) return;
    EACH(t, C) scaled(Ep, w->wide2 + t * Ep, w->first[t], w->read_hidden + t * Ep);
    product(w->E, Kp, C, w->wide2, 1, Ep, w->narrow, Kp, out_of(w, w->g_moving, m), Kp, 1, FULL);
    EACH(t, C) scaled(Kp, w->narrow2 + t * Kp, w->first[t], w->query + t * Kp);
    product(w->K, Ep, C, w->narrow2, 1, Kp, w->g_read_pre, Ep, in_of(w, w->g_moving, m), Ep, 1, FULL);
}
