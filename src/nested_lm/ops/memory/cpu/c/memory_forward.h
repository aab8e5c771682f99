/* Forward of memory.c: all pieces of a row and head, and the branches that may follow. */

static void emit(Work *w)
{
    const Call *c = w->call;
    const long first = (w->row * c->T + w->begin) * c->H + w->head;
    scatter(w->C, w->K, w->Kp, w->narrow, c->reads + first * c->K, c->H * c->K);
    EACH(t, w->C) {
        c->used_rate[first + t * c->H] = w->share[t] * c->limits[w->M - 1];
        c->used_decay[first + t * c->H] = (REAL)exp((double)w->log_decay[t]);
    }
}

/* The branch after those that are read with branch n in one piece: as many as fit, if they end within their first. */
static long together(const Call *c, const int64_t *cuts, long n)
{
    const int64_t whole = c->end[c->stem_pieces];
    long last = n + 1;
    if (cuts[last] - cuts[n] > whole) return last;
    while (last < c->branches && cuts[last + 1] - cuts[last] <= whole && cuts[last + 1] - cuts[n] <= c->abreast)
        last++;
    return last;
}

/* Read branches n to last - 1 in one piece, in which the tokens of each know those of no other, for these count 0 times.
   So one that is not finite spoils the others. */
static void read_abreast(Work *w, const int64_t *cuts, long n, long last, REAL *current)
{
    for (long i = n; i < last; i++)
        for (int64_t t = cuts[i]; t < cuts[i + 1]; t++) w->origin[t - cuts[n]] = cuts[i] - cuts[n];
    forward_piece(w, current);
    emit(w);
    memset(w->origin, 0, (size_t)w->C * sizeof(long));
}

/* Write and read a branch that is longer than its first piece, on copies of the weights. Returns whether a border moved. */
static int read_long(Work *w, const int64_t *cuts, long n, const REAL *current, const REAL *border, const REAL *moving,
                     int anchored)
{
    const Call *c = w->call;
    const size_t bytes = (size_t)w->all * sizeof(REAL);
    REAL *now = memcpy(w->branch_current, current, bytes), *at_border = memcpy(w->branch_border, border, bytes);
    REAL *momentum = c->momentum ? memcpy(w->branch_moving, moving, bytes) : NULL;
    int moved = 0;
    for (long p = c->stem_pieces;; p++) {
        const long end = cuts[n] + c->end[p] < cuts[n + 1] ? cuts[n] + c->end[p] : cuts[n + 1];
        open_piece(w, w->row, w->head, cuts[n] + c->begin[p], end, c->flags[p]);
        set_anchor(w, at_border, momentum, anchored);
        forward_piece(w, now);
        emit(w);
        if (end == cuts[n + 1]) return moved;
        carry_all(w, now);
        anchored = !move_border(w, c->flags[p], now, at_border);
        moved |= !anchored;
    }
}

/* Write and read what a row branches into. Each branch goes on from the weights after the stem, and leaves them as they
   are. Returns whether the anchor is still the border's. */
static int read_branches(Work *w, long row, long head, REAL *current, REAL *border, REAL *moving, int anchored)
{
    const Call *c = w->call;
    const int64_t *cuts = c->cuts + row * (c->branches + 1);
    if (c->pieces == c->stem_pieces) return anchored; /* all are empty */
    for (long n = 0, last; n < c->branches; n = last) {
        last = together(c, cuts, n);
        if (cuts[last] == cuts[n]) continue;
        if (cuts[n + 1] - cuts[n] > c->end[c->stem_pieces]) {
            anchored = !read_long(w, cuts, n, current, border, moving, anchored);
            continue;
        }
        open_piece(w, row, head, cuts[n], cuts[last], c->flags[c->stem_pieces]);
        set_anchor(w, border, moving, anchored);
        read_abreast(w, cuts, n, last, current);
        anchored = 1;
    }
    return anchored;
}

/* Write and read all pieces of rows and heads first to last - 1, head by head (head x rows + row), so that neighbouring
   rows that go on from one stream find its weights where they are. Returns 0, or 1 without memory. */
int forward(const Call *c, int64_t first, int64_t last)
{
    Work work, *w = &work;
    if (!open_work(w, c)) return close_work(w), 1;
    REAL *current = w->g_current, *border = w->g_border; /* no gradients here: their room serves */
    REAL *moving = c->momentum ? w->g_moving : border;
    const int64_t size = c->M * c->K * c->E, per_head = saved_numbers(c);
    const size_t bytes = (size_t)w->all * sizeof(REAL);
    const int is_final = !c->current_in_after, stays = is_final && c->pieces == 1 && !c->keep;
    int64_t there = -1, border_there = -1; /* whose weights `current` and `moving`, and `border`, are */
    for (int64_t lane = first; lane < last; lane++) {
        const long row = lane % c->B, head = lane / c->B;
        const int64_t at = row * c->H + head, from = c->rows ? c->rows[row] * c->H + head : at;
        REAL *saved = c->saved ? c->saved + at * per_head : NULL;
        if (lane == first || !row) read_weights(w, c->start_in + head * size, c->start_out + head * size, w->start);
        int anchored = from == border_there;
        if (!anchored) read_weights(w, c->border_in + from * size, c->border_out + from * size, border);
        if (from != there) {
            read_weights(w, c->current_in + from * size, c->current_out + from * size, current);
            if (c->momentum) read_weights(w, c->moving_in + from * size, c->moving_out + from * size, moving);
        }
        there = stays ? from : -1, border_there = c->keep ? -1 : from;
        EACH(p, c->stem_pieces) {
            set_back(c, p, row, w->all, current, border, moving);
            if (saved && p % c->group == 0) {
                memcpy(saved, current, bytes), saved += w->all;
                if (!(c->flags[p] & FRESH)) memcpy(saved, border, bytes), saved += w->all;
                if (c->momentum) memcpy(saved, moving, bytes), saved += w->all;
            }
            open_piece(w, row, head, c->begin[p], c->end[p], c->flags[p]);
            set_anchor(w, border, moving, anchored && !c->keep);
            forward_piece(w, current);
            emit(w);
            anchored = 1;
            if (is_final && p + 1 == c->pieces) break;
            carry_all(w, current);
            if (move_border(w, c->flags[p], current, border)) anchored = 0, border_there = -1;
        }
        if (c->branches && !read_branches(w, row, head, current, border, moving, anchored)) border_there = -1;
        if (is_final) continue;
        write_weights(w, border, c->border_in_after + at * size, c->border_out_after + at * size);
        write_weights(w, current, c->current_in_after + at * size, c->current_out_after + at * size);
        if (c->momentum) write_weights(w, moving, c->moving_in_after + at * size, c->moving_out_after + at * size);
    }
    close_work(w);
    return 0;
}
