/* Backward of memory.c: the same steps in reverse, after `ops/memory_backward.py`, which names what is what. */

/* Where gradients of log(erased_t gamma_{t-1}) go: the erase term meets gamma_t, or gamma_{t-1}. */
INLINE REAL *log_of_erase(Work *w) { return w->call->erase_after_decay ? w->g_log_kept : w->g_log_before; }

/* Derivative of `room_beside_erase` by the rate, from its value; 0 where it is cut. */
INLINE double room_slope(const Call *c, double room)
{
    return room > c->room_floor && room < 1 ? -0.5 * (room + 1) * (room + 1) : 0;
}

/* Backward of off_t (direction_t weights), which the erase term adds to what is known of a write, to weights and
   directions; `along` becomes the gradient of off. g: of what is known. */
static void erased_backward(Work *w, const REAL *direction, long Y, long Yp, REAL *weights, long X, long Xp, const REAL *g,
                            REAL *g_weights, REAL *g_direction, REAL *work_x, REAL *work_y)
{
    transpose(Y, X, weights, Xp, w->turned, Yp, Yp);
    product(w->C, Yp, X, g, Xp, 1, w->turned, Yp, work_y, Yp, 0, FULL);
    EACH(t, w->C) {
        w->along[t] = dot(Yp, direction + t * Yp, work_y + t * Yp);
        add_scaled(Yp, g_direction + t * Yp, w->off[t], work_y + t * Yp);
        scaled(Xp, work_x + t * Xp, w->off[t], g + t * Xp);
    }
    product(Y, Xp, w->C, direction, 1, Yp, work_x, Xp, g_weights, Xp, 1, FULL);
}

/* Backward of the writes of one layer and of its weights after the piece. g_write: gradient that reads send to the
   writes, replaced by that of the known part. overlap: ratio x mutual products of the directions. g_overlap: summed over
   memories that share directions, or null, when the directions get theirs at once. */
static void layer_backward(Work *w, const Memory *m, REAL limit, int erase, const REAL *direction, long Y, long Yp,
                           REAL *old, REAL *border, long X, long Xp, const REAL *overlap, const REAL *known,
                           const REAL *write, REAL *g_weights, REAL *g_border, REAL *g_write, REAL *g_direction,
                           REAL *g_overlap, REAL *work_x, REAL *work_y)
{
    const long C = w->C, Cp = w->Cp;
    const REAL kept = (REAL)exp((double)w->log_kept[C - 1]);
    REAL *g_log_kept = w->g_log_kept, *g_log_erase = log_of_erase(w), through_end = 0;
    /* after = kept old + (to_end write)^T direction */
    product(C, Xp, Y, direction, Yp, 1, g_weights, Xp, work_x, Xp, 0, FULL);
    EACH(t, C) {
        const REAL gradient = dot(Xp, write + t * Xp, work_x + t * Xp), sum = gradient * w->to_end[t];
        if (w->call->momentum) {
            w->g_spread[(C - 1) * Cp + t] += gradient;
        } else {
            through_end += sum;
            g_log_kept[t] -= sum;
        }
        add_scaled(Xp, g_write + t * Xp, w->to_end[t], work_x + t * Xp);
        scaled(Xp, work_x + t * Xp, w->to_end[t], write + t * Xp);
    }
    transpose(Y, X, g_weights, Xp, w->turned, Yp, Yp);
    product(C, Yp, X, work_x, Xp, 1, w->turned, Yp, g_direction, Yp, 1, FULL);
    vec held = {0};
    for (long j = 0; j < Y * Xp; j += VL) {
        const vec g = kept * load(g_weights + j);
        store(g_weights + j, g);
        held += g * load(old + j);
    }
    g_log_kept[C - 1] += total(held) + through_end;
    if (erase) {
        fill_minus(w, overlap, limit);
        solve_upper(C, Xp, w->minus, Cp, g_write, Xp);
        transpose(C, X, write, Xp, w->turned, Cp, Cp);
        product(C, Cp, X, g_write, Xp, 1, w->turned, Cp, w->square, Cp, 0, LOWER_RESULT);
    }
    EACH(t, C) {
        w->g_share[t] -= limit * dot(Xp, g_write + t * Xp, known + t * Xp);
        if (!erase) {
            scaled(Xp, g_write + t * Xp, -w->share[t] * limit, g_write + t * Xp);
            continue;
        }
        const REAL scale = -limit * w->erased[t];
        vec sum = {0};
        for (long i = 0; i < Cp; i += VL) {
            REAL *factor = w->square + t * Cp + i;
            if (i >= t) {
                store(factor, (vec){0});
                continue;
            }
            const vec f = scale * load(factor), weighted = f * load(overlap + t * Cp + i);
            sum += weighted;
            store(g_log_kept + i, load(g_log_kept + i) - w->share[t] * weighted);
            store(factor, f * w->share[t] * load(w->ratio + t * Cp + i));
        }
        const REAL all = total(sum);
        w->g_share[t] += all;
        g_log_erase[t] += all * w->share[t];
        scaled(Xp, g_write + t * Xp, -w->share[t] * limit, g_write + t * Xp);
    }
    if (!erase) return;
    if (g_overlap) {
        for (long j = 0; j < C * Cp; j += VL) store(g_overlap + j, load(g_overlap + j) + load(w->square + j));
    } else {
        product(C, Yp, C, w->square, Cp, 1, direction, Yp, g_direction, Yp, 1, LOWER);
        product(C, Yp, C, w->square, 1, Cp, direction, Yp, g_direction, Yp, 1, UPPER);
    }
    EACH(t, C) w->off[t] = taken_off(w, m, t);
    erased_backward(w, direction, Y, Yp, old, X, Xp, g_write, g_weights, g_direction, work_x, work_y);
    EACH(t, C) g_log_erase[t] += w->before[t] * w->erased[t] * w->along[t];
    if (meets_border(w, m)) {
        EACH(t, C) w->off[t] = -m->room[t];
        erased_backward(w, direction, Y, Yp, border, X, Xp, g_write, g_border, g_direction, work_x, work_y);
    }
    if (m->since_border) EACH(t, C) w->g_share[t] -= limit * w->along[t] * (REAL)room_slope(w->call, m->room[t]);
}

/* Backward of the damping and of the lengths, a token at a time: from the gradients of both known writes (g_known_in,
   g_known_out) and of the directions to those of the inner gradient (g_known_in), of the error (g_known_out), of the
   movement (w->narrow2) and of the hidden activations (g_direction). Returns whether any write was damped. */
static int damping_backward(Work *w, long m)
{
    const Call *c = w->call;
    const Memory *x = w->memory + m;
    const long Kp = w->Kp, Ep = w->Ep;
    int any = 0;
    EACH(t, w->C) {
        const REAL *error = x->error + t * Kp, *gradient = w->wide + t * Ep, *moved = x->moved + t * Kp;
        REAL *g_gradient = w->g_known_in + t * Ep, *g_error = w->g_known_out + t * Kp, *g_hidden = w->g_direction + t * Ep;
        const REAL damped = x->damped[t], length = x->length[t], squared = x->squared[t];
        const REAL along = dot(Kp, g_error, error);
        const REAL g_damped = dot(Ep, g_gradient, gradient) + along * length;
        REAL g_squared = (REAL)0.5 / length * damped * along;
        g_squared -= (REAL)0.5 * dot(Ep, g_hidden, x->direction + t * Ep) / (length * length);
        scaled(Ep, g_gradient, damped, g_gradient);
        scaled(Kp, g_error, damped * length, g_error);
        if (x->steepness[t] > 1) {
            any = 1;
            const REAL g_log = -g_damped * damped * damped * x->steepness[t], g_size = -g_log / x->size[t];
            w->g_share[t] += (REAL)(-g_log / x->room[t] * room_slope(c, x->room[t]) * c->limits[m]);
            const REAL moving = 2 * g_log / dot(Kp, moved, moved);
            scaled(Kp, w->narrow2 + t * Kp, moving, moved);
            add_scaled(Ep, g_gradient, 2 * g_size, gradient);
            add_scaled(Kp, g_error, squared * moving, moved);
            add_scaled(Kp, g_error, 2 * g_size * squared, error);
            g_squared += g_size * dot(Kp, error, error) + moving * dot(Kp, moved, error);
        } else
            memset(w->narrow2 + t * Kp, 0, (size_t)Kp * sizeof(REAL));
        scaled(Ep, g_hidden, 1 / length, g_hidden);
        add_scaled(Ep, g_hidden, 2 * length * g_squared, x->direction + t * Ep);
    }
    return any;
}

/* Backward of one memory's writes and inner gradients. */
static void memory_backward(Work *w, long m, REAL *current)
{
    const Call *c = w->call;
    const Memory *x = w->memory + m;
    const long C = w->C, K = w->K, E = w->E, Kp = w->Kp, Ep = w->Ep;
    REAL *gradient = w->wide, *g_out = out_of(w, w->g_anchor, m), *g_in = in_of(w, w->g_anchor, m);
    const REAL *out = out_of(w, w->anchor, m), *turned_out = w->turned_out + m * w->layer;
    REAL *g_known_in = w->g_known_in, *g_known_out = w->g_known_out, *g_hidden = w->g_direction;
    const size_t wide = (size_t)(C * Ep) * sizeof(REAL), narrow = (size_t)(C * Kp) * sizeof(REAL);
    if (m == w->M - 1) {
        memcpy(g_known_in, w->g_write_in, wide), memcpy(g_known_out, w->g_write_out, narrow);
    } else {
        memset(g_known_in, 0, wide), memset(g_known_out, 0, narrow), memset(g_hidden, 0, wide);
    }
    if (c->momentum) {
        carry_momentum_backward(w, w->key, K, Kp, in_of(w, w->moving, m), E, Ep, x->write_in, in_of(w, w->g_current, m),
                                in_of(w, w->g_moving, m), g_known_in, w->g_key, w->wide2);
        carry_momentum_backward(w, x->direction, E, Ep, out_of(w, w->moving, m), K, Kp, x->write_out,
                                out_of(w, w->g_current, m), out_of(w, w->g_moving, m), g_known_out, g_hidden, w->narrow2);
    }
    layer_backward(w, x, c->limits[m], (int)c->erase_in, w->key, K, Kp, in_of(w, current, m), in_of(w, w->border, m), E,
                   Ep, w->gram, x->known_in, x->write_in, in_of(w, w->g_current, m), in_of(w, w->g_border, m), g_known_in,
                   w->g_key, w->g_gram, w->wide2, w->narrow2);
    layer_backward(w, x, c->limits[m], (int)c->erase_out, x->direction, E, Ep, out_of(w, current, m),
                   out_of(w, w->border, m), K, Kp, x->overlap, x->known_out, x->write_out, out_of(w, w->g_current, m),
                   out_of(w, w->g_border, m), g_known_out, g_hidden, NULL, w->narrow2, w->wide2);
    for (long j = 0; j < C * Ep; j += VL)
        store(gradient + j, silu_slope(load(x->pre + j), load(x->gate + j)) * load(x->back + j));
    const int damped = damping_backward(w, m);
    REAL *g_moved = w->narrow2, *steep = w->g_write_in, *g_back = w->wide2; /* g_write_in was used up above */
    if (damped) { /* moved = (slope gradient) W_out + squared error */
        product(C, Ep, K, g_moved, Kp, 1, turned_out, Ep, steep, Ep, 0, FULL);
        for (long j = 0; j < C * Ep; j += VL)
            store(g_back + j, silu_slope(load(x->pre + j), load(x->gate + j)) * load(gradient + j));
        product(E, Kp, C, g_back, 1, Ep, g_moved, Kp, g_out, Kp, 1, FULL);
    } else
        memset(steep, 0, wide);
    for (long j = 0; j < C * Ep; j += VL) { /* gradient = slope back */
        const vec p = load(x->pre + j), gate = load(x->gate + j), slope = silu_slope(p, gate), up = load(steep + j);
        const vec g = load(g_known_in + j) + slope * up;
        store(g_back + j, g * slope);
        const vec g_slope = g * load(x->back + j) + load(gradient + j) * up;
        store(steep + j, g_slope * gate * (1 - gate) * (2 + p * (1 - 2 * gate))); /* to p, through the slope */
    }
    product(C, Kp, E, g_back, Ep, 1, out, Kp, g_known_out, Kp, 1, FULL);
    product(E, Kp, C, g_back, 1, Ep, x->error, Kp, g_out, Kp, 1, FULL);
    product(E, Kp, C, x->difference, 1, Ep, g_known_out, Kp, g_out, Kp, 1, FULL);
    REAL *g_difference = g_known_in;
    product(C, Ep, K, g_known_out, Kp, 1, turned_out, Ep, g_difference, Ep, 0, FULL);
    for (long j = 0; j < C * Ep; j += VL) {
        const vec g = load(g_difference + j), slope = silu_slope(load(x->pre + j), load(x->gate + j));
        store(steep + j, load(steep + j) + (load(g_hidden + j) + g) * slope);
        if (x->generated) store(g_difference + j, -g * load(x->slope_value + j));
    }
    REAL *g_pre = steep, *g_pre_value = g_difference, *turned_in = w->turned_in + m * w->layer;
    transpose(K, E, in_of(w, w->anchor, m), Ep, turned_in, Kp, Kp);
    product(K, Ep, C, w->key, 1, Kp, g_pre, Ep, g_in, Ep, 1, FULL);
    product(C, Kp, E, g_pre, Ep, 1, turned_in, Kp, w->g_key, Kp, 1, FULL);
    if (x->generated) {
        product(K, Ep, C, w->value, 1, Kp, g_pre_value, Ep, g_in, Ep, 1, FULL);
        product(C, Kp, E, g_pre_value, Ep, 1, turned_in, Kp, w->g_value, Kp, 1, FULL);
    }
    for (long j = 0; j < C * Kp; j += VL) {
        const vec g = load(g_known_out + j);
        store(w->g_key + j, load(w->g_key + j) + g);
        store(w->g_value + j, load(w->g_value + j) - g);
    }
}

/* Backward of `answer`; adds to the gradient of x. */
static void answer_backward(Work *w, long m, const REAL *g, const REAL *x, REAL *g_x)
{
    const Answer *a = w->answer + m;
    const long C = w->C, Kp = w->Kp, Ep = w->Ep;
    REAL *hidden = w->wide, *g_pre = w->wide2;
    product(C, Ep, w->K, g, Kp, 1, w->turned_out + m * w->layer, Ep, g_pre, Ep, 0, FULL);
    for (long j = 0; j < C * Ep; j += VL) {
        const vec p = load(a->pre + j), gate = load(a->gate + j);
        store(hidden + j, p * gate);
        store(g_pre + j, load(g_pre + j) * silu_slope(p, gate));
    }
    product(w->E, Kp, C, hidden, 1, Ep, g, Kp, out_of(w, w->g_anchor, m), Kp, 1, FULL);
    product(w->K, Ep, C, x, 1, Kp, g_pre, Ep, in_of(w, w->g_anchor, m), Ep, 1, FULL);
    for (long j = 0; j < C * Kp; j += VL) store(g_x + j, load(g_x + j) + load(g + j));
    product(C, Kp, w->E, g_pre, Ep, 1, w->turned_in + m * w->layer, Kp, g_x, Kp, 1, FULL);
}

static void unit_backward(Work *w, REAL *g, const REAL *unit, const REAL *length)
{
    const REAL floor = (REAL)w->call->norm_floor;
    EACH(t, w->C) {
        REAL *row = g + t * w->Kp;
        if (length[t] > floor) add_scaled(w->Kp, row, -dot(w->Kp, row, unit + t * w->Kp), unit + t * w->Kp);
        scaled(w->Kp, row, 1 / (length[t] > floor ? length[t] : floor), row);
    }
}

/* Gradients of a gate's logits, and through its memory. */
static void gate_backward(Work *w, long m, const REAL *logits, const REAL *readout, REAL *g_readout, REAL *g_x)
{
    REAL *g = w->narrow;
    EACH(t, w->C) EACH(j, w->Kp)
    {
        g[t * w->Kp + j] = j < w->K ? logits[t] * readout[w->head * w->K + j] : 0;
        if (j < w->K) g_readout[j] += logits[t] * w->answer[m].out[t * w->Kp + j];
    }
    answer_backward(w, m, g, w->x_key, g_x);
}

/* Backward of `generate` and of the running products; writes the gradients of the piece's inputs. */
static void generate_backward(Work *w)
{
    const Call *c = w->call;
    const long C = w->C, Kp = w->Kp, first = (w->row * c->T + w->begin) * c->H + w->head;
    const size_t bytes = (size_t)(C * Kp) * sizeof(REAL);
    const double stretch = c->stretch;
    const int64_t lane = w->row * c->H + w->head;
    REAL *rate = w->before, *decay = w->to_end, running = 0; /* logits; their room is free now */
    for (long t = C - 1; t >= 0; t--) {
        const long at = first + t * c->H;
        running += w->g_log_kept[t];
        const double reached = c->reached[w->head], share = w->share[t] / reached;
        const double g_log = running + c->g_used_decay[at] * exp((double)w->log_decay[t]);
        running += w->g_log_before[t];
        const double slope = (share + stretch) * (1 + stretch - share) / (1 + 2 * stretch);
        const int cut = stretch > 0 && (share <= 0 || share >= 1);
        const double g_share = w->g_share[t] + c->g_used_rate[at] * c->limits[w->M - 1];
        rate[t] = c->g_rate[at] = cut ? 0 : (REAL)(g_share * slope * reached);
        decay[t] = c->g_decay[at] = (REAL)(-g_log * expm1((double)w->log_decay[t]));
    }
    REAL *g_x = w->g_write_out;
    memset(g_x, 0, bytes);
    if (c->k >= 0) {
        unit_backward(w, w->g_key, w->key, w->long_key);
        answer_backward(w, c->k, w->g_key, w->x_key, g_x);
    } else
        memcpy(g_x, w->g_key, bytes);
    if (c->eta >= 0) gate_backward(w, c->eta, rate, c->readout_rate, c->g_readout_rate + lane * c->K, g_x);
    if (c->alpha >= 0) gate_backward(w, c->alpha, decay, c->readout_decay, c->g_readout_decay + lane * c->K, g_x);
    scatter(C, w->K, Kp, g_x, c->g_key + first * c->K, c->H * c->K);
    const int64_t others[2] = {c->v, c->q};
    REAL *g_others[2] = {w->g_value, w->g_query}, *to[2] = {c->g_value, c->g_query};
    const REAL *inputs[2] = {w->x_value, w->x_query}, *units[2] = {w->value, w->query};
    const REAL *lengths[2] = {w->long_value, w->long_query};
    EACH(i, 2) {
        REAL *found = g_others[i];
        if (others[i] >= 0) {
            unit_backward(w, found, units[i], lengths[i]);
            memset(g_x, 0, bytes);
            answer_backward(w, others[i], found, inputs[i], g_x);
            found = g_x;
        }
        scatter(C, w->K, Kp, found, to[i] + first * c->K, c->H * c->K);
    }
}

/* All gradients of one piece; `current` and w->anchor are the weights before it. */
static void piece_backward(Work *w, REAL *current)
{
    const Call *c = w->call;
    const long C = w->C;
    const long first = (w->row * c->T + w->begin) * c->H + w->head;
    memset(w->g_key, 0, (size_t)(C * w->Kp) * sizeof(REAL));
    memset(w->g_value, 0, (size_t)(C * w->Kp) * sizeof(REAL));
    memset(w->g_share, 0, (size_t)C * sizeof(REAL));
    memset(w->g_log_kept, 0, (size_t)w->Cp * sizeof(REAL));
    memset(w->g_log_before, 0, (size_t)w->Cp * sizeof(REAL));
    memset(w->g_gram, 0, (size_t)(C * w->Cp) * sizeof(REAL));
    memset(w->g_anchor, 0, (size_t)w->all * sizeof(REAL));
    if (c->momentum) {
        memset(w->g_spread, 0, (size_t)(C * w->Cp) * sizeof(REAL));
        memset(w->g_first, 0, (size_t)C * sizeof(REAL));
        memset(w->g_own_end, 0, (size_t)C * sizeof(REAL));
        w->g_own_first = 0;
    }
    gather(C, w->K, w->Kp, c->g_reads + first * c->K, c->H * c->K, w->narrow);
    read_backward(w, current);
    memory_backward(w, w->M - 1, current);
    read_weights_backward(w);
    EACH(m, w->M - 1) memory_backward(w, m, current);
    product(C, w->Kp, C, w->g_gram, w->Cp, 1, w->key, w->Kp, w->g_key, w->Kp, 1, LOWER);
    product(C, w->Kp, C, w->g_gram, 1, w->Cp, w->key, w->Kp, w->g_key, w->Kp, 1, UPPER);
    if (c->momentum) spread_backward(w);
    generate_backward(w);
    for (long j = 0; j < w->all; j += VL) {
        const vec g = load(w->g_anchor + j);
        store(w->g_border + j, load(w->g_border + j) + g);
        store(w->g_start + j, load(w->g_start + j) + g);
    }
}

/* Backward of `move_border`: what waited for a border that moved goes to the weights it moved to. */
static void move_border_backward(Work *w, int64_t flags)
{
    const long generators = 2 * (w->M - 1) * w->layer;
    const long from = flags & MOVES_GENERATORS ? 0 : generators, to = flags & MOVES_MEMORY ? w->all : generators;
    for (long j = from; j < to; j += VL) {
        store(w->g_current + j, load(w->g_current + j) + load(w->g_border + j));
        store(w->g_border + j, (vec){0});
    }
}

/* Backward of `forward`, from its last piece to its first. Returns 0, or 1 without memory. */
int backward(const Call *c, int64_t first, int64_t last)
{
    Work work, *w = &work;
    if (!open_work(w, c)) return close_work(w), 1;
    const int64_t size = c->M * c->K * c->E, per_head = saved_numbers(c);
    const size_t bytes = (size_t)w->all * sizeof(REAL);
    const long slots = c->momentum ? 3 : 2;
    REAL *states = malloc((size_t)(slots * c->group) * bytes), *room = malloc((size_t)slots * bytes);
    REAL *current = room, *border = room + w->all, *moving = room + (slots - 1) * w->all; /* without, unused */
    int failed = !states || !room;
    for (int64_t at = first; at < last && !failed; at++) {
        const long row = at / c->H, head = at % c->H;
        read_weights(w, c->start_in + head * size, c->start_out + head * size, w->start);
        read_weights(w, c->g_border_in + at * size, c->g_border_out + at * size, w->g_border);
        read_weights(w, c->g_current_in + at * size, c->g_current_out + at * size, w->g_current);
        if (c->momentum) read_weights(w, c->g_moving_in + at * size, c->g_moving_out + at * size, w->g_moving);
        memset(w->g_start, 0, bytes);
        for (int64_t group = (c->pieces - 1) / c->group * c->group; group >= 0; group -= c->group) {
            const int64_t stop = group + c->group < c->pieces ? group + c->group : c->pieces;
            const REAL *saved = c->saved + at * per_head + saved_slots(c, group) * w->all;
            memcpy(current, saved, bytes);
            if (!(c->flags[group] & FRESH)) saved += w->all;
            memcpy(border, saved, bytes);
            if (c->momentum) memcpy(moving, saved + w->all, bytes);
            for (int64_t p = group; p < stop; p++) {
                if (p > group) set_back(c, p, row, w->all, current, border, moving);
                memcpy(states + slots * (p - group) * w->all, room, (size_t)slots * bytes);
                if (p + 1 == stop) break;
                open_piece(w, row, head, c->begin[p], c->end[p], c->flags[p]);
                set_anchor(w, border, moving, 0);
                forward_piece(w, current);
                carry_all(w, current);
                move_border(w, c->flags[p], current, border);
            }
            for (int64_t p = stop - 1; p >= group; p--) {
                REAL *before = states + slots * (p - group) * w->all;
                move_border_backward(w, c->flags[p]);
                open_piece(w, row, head, c->begin[p], c->end[p], c->flags[p]);
                set_anchor(w, before + w->all, before + (slots - 1) * w->all, 0);
                forward_piece(w, before);
                piece_backward(w, before);
                if (!(c->flags[p] & ALIGNED) || !c->keep) continue;
                move_border_backward(w, MOVES_GENERATORS | MOVES_MEMORY);
                if (c->keep[p * c->B + row] != 0) continue;
                memset(w->g_current, 0, bytes);
                if (c->momentum) memset(w->g_moving, 0, bytes);
            }
        }
        write_weights(w, w->g_start, c->g_start_in + at * size, c->g_start_out + at * size);
        write_weights(w, w->g_border, c->g_first_border_in + at * size, c->g_first_border_out + at * size);
        write_weights(w, w->g_current, c->g_first_current_in + at * size, c->g_first_current_out + at * size);
        if (c->momentum)
            write_weights(w, w->g_moving, c->g_first_moving_in + at * size, c->g_first_moving_out + at * size);
    }
    free(states), free(room), close_work(w);
    return failed;
}
