/* Momentum of the writes (Titans eq. 10): see `spread_of_momentum` in `ops/memory_writes.py`, which names what is what.

   kept[t, j] = gamma_t / gamma_j and left[j, i] = the share of push i that is in the momentum after token j, both
   lower triangular; spread = kept left: what of push i has arrived in the weights after token t. first[t]: what of the
   momentum before the piece has. own_end[i], the last row of `left`, and the last of passed[t]: what the momentum itself
   keeps of them at the end. */

static void lower_ratios(const Work *w, const REAL *logs, REAL *ratios)
{
    EACH(t, w->C) {
        REAL *row = ratios + t * w->Cp;
        for (long i = 0; i <= t; i += VL) store(row + i, exponential(logs[t] - load(logs + i)));
        for (long i = t + 1; i < w->Cp; i++) row[i] = 0;
    }
    clear_foreign(w, ratios);
}

/* Everything of a piece that momentum needs; what of each push has arrived at the end takes the place of `to_end`. */
static void spread_momentum(Work *w)
{
    const long C = w->C, Cp = w->Cp;
    REAL sum = 0;
    EACH(t, C) {
        if (w->origin[t] == t) sum = 0;
        w->log_left[t] = sum += w->log_momentum[t];
        w->passed[t] = (REAL)exp((double)sum);
    }
    lower_ratios(w, w->log_kept, w->kept);
    lower_ratios(w, w->log_left, w->left);
    if (w->call->mean) {
        REAL *entering = w->own_end; /* its room, until below */
        EACH(i, C) entering[i] = (REAL)-expm1((double)w->log_momentum[i]);
        EACH(t, C) EACH(i, t + 1) w->left[t * Cp + i] *= entering[i];
    }
    product(C, Cp, C, w->kept, Cp, 1, w->left, Cp, w->spread, Cp, 0, LOWER);
    EACH(t, C) {
        w->first[t] = 0;
        EACH(j, t + 1) w->first[t] += w->kept[t * Cp + j] * w->passed[j];
    }
    memcpy(w->own_end, w->left + (C - 1) * Cp, (size_t)C * sizeof(REAL));
    memcpy(w->to_end, w->spread + (C - 1) * Cp, (size_t)C * sizeof(REAL));
}

/* Gradients of logs from those of their ratios. */
static void ratios_backward(long C, long Cp, const REAL *ratios, const REAL *g, REAL *g_logs)
{
    EACH(t, C) EACH(i, t + 1)
    {
        const REAL through = g[t * Cp + i] * ratios[t * Cp + i];
        g_logs[t] += through;
        g_logs[i] -= through;
    }
}

/* Backward of `spread_momentum` to the logs of the retention, and to the logits of the momentum. */
static void spread_backward(Work *w)
{
    const Call *c = w->call;
    const long C = w->C, Cp = w->Cp, at = (w->row * c->T + w->begin) * c->H + w->head;
    REAL *g_left = w->g_log_left, *turned = w->minus, *g = w->square, running = 0;
    memset(g_left, 0, (size_t)C * sizeof(REAL));
    EACH(t, C) {
        EACH(j, t + 1) g_left[j] += w->g_first[t] * w->kept[t * Cp + j] * w->passed[j];
    }
    g_left[C - 1] += w->g_own_first * w->passed[C - 1];
    transpose(C, C, w->left, Cp, turned, Cp, Cp);
    product(C, Cp, C, w->g_spread, Cp, 1, turned, Cp, g, Cp, 0, LOWER);
    EACH(t, C) EACH(j, t + 1) g[t * Cp + j] += w->g_first[t] * w->passed[j]; /* first = kept passed */
    ratios_backward(C, Cp, w->kept, g, w->g_log_kept);
    product(C, Cp, C, w->kept, 1, Cp, w->g_spread, Cp, g, Cp, 0, UPPER);
    EACH(t, C) g[(C - 1) * Cp + t] += w->g_own_end[t];
    ratios_backward(C, Cp, w->left, g, g_left);
    for (long t = C - 1; t >= 0; t--) {
        running += g_left[t];
        double entering = 0; /* through the share at which a push enters a mean */
        if (c->mean) for (long j = t; j < C; j++) entering += (double)g[j * Cp + t] * w->left[j * Cp + t];
        const double log_share = w->log_momentum[t];
        c->g_moment[at + t * c->H] = (REAL)(-running * expm1(log_share) - entering * exp(log_share));
    }
}

/* One layer's momentum after the piece, and its part in the weights: in place, in this order. */
static void carry_momentum(Work *w, const REAL *direction, long Y, long Yp, REAL *weights, REAL *moving, long Xp,
                           const REAL *write, REAL *room)
{
    const REAL own = w->passed[w->C - 1], first = w->first[w->C - 1];
    EACH(t, w->C) scaled(Xp, room + t * Xp, w->own_end[t], write + t * Xp);
    EACH(y, Y) {
        add_scaled(Xp, weights + y * Xp, first, moving + y * Xp);
        scaled(Xp, moving + y * Xp, own, moving + y * Xp);
    }
    product(Y, Xp, w->C, direction, 1, Yp, room, Xp, moving, Xp, 1, FULL);
}

/* Backward of `carry_momentum`. g_weights, g_moving: gradients of both after the piece; g_moving becomes that before. */
static void carry_momentum_backward(Work *w, const REAL *direction, long Y, long Yp, const REAL *moving, long X, long Xp,
                                    const REAL *write, const REAL *g_weights, REAL *g_moving, REAL *g_write,
                                    REAL *g_direction, REAL *work_x)
{
    const long C = w->C;
    const REAL own = w->passed[C - 1], first = w->first[C - 1];
    product(C, Xp, Y, direction, Yp, 1, g_moving, Xp, work_x, Xp, 0, FULL);
    EACH(t, C) {
        w->g_own_end[t] += dot(Xp, write + t * Xp, work_x + t * Xp);
        add_scaled(Xp, g_write + t * Xp, w->own_end[t], work_x + t * Xp);
        scaled(Xp, work_x + t * Xp, w->own_end[t], write + t * Xp);
    }
    transpose(Y, X, g_moving, Xp, w->turned, Yp, Yp);
    product(C, Yp, X, work_x, Xp, 1, w->turned, Yp, g_direction, Yp, 1, FULL);
    vec to_first = {0}, to_own = {0};
    for (long j = 0; j < Y * Xp; j += VL) {
        const vec m = load(moving + j), gw = load(g_weights + j), gm = load(g_moving + j);
        to_first += m * gw;
        to_own += m * gm;
        store(g_moving + j, first * gw + own * gm);
    }
    w->g_first[C - 1] += total(to_first);
    w->g_own_first += total(to_own);
}
