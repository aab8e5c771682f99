/* Reads of `memory`: see `ops/memory_read.py`. */

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

/* One layer of a read: x (start + faded old + first moving) + seen write; the mutual products of x with the keys are kept. */
static void read_layer(Work *w, const REAL *x, long Y, long Yp, const REAL *start, const REAL *old,
                       const REAL *moving, long Xp, const REAL *keys_turned, const REAL *write, REAL *mutual, REAL *result)
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
