/* What comes before the memories: a causal convolution of each channel, silu, and rows of unit length.

   x holds queries, keys and values of every head behind each other, as `qkv` projects them. One lane is the K channels
   of one of the three, of one head and row. Backward computes the forward pass again. */

typedef struct {
    int64_t B, T, H, K, W, unit_values, branches;
    double floor;
    const REAL *x, *weight, *tail; /* B T 3HK, 3HK W (last: the token itself), B W-1 3HK */
    const int64_t *age;            /* B T, tokens since the document began, or null */
    const int64_t *cuts; /* B branches+1, where the branches of a row begin and the last one ends, or null */
    REAL *found[3];                /* query, key, value: B T H K */
    const REAL *sent[3];           /* their gradients */
    REAL *g_x, *g_weight, *g_tail; /* as x; B 3HK W, a part for each row; as tail */
} Front;

/* Room of one lane: tokens with those before them, their convolution, and its gradients, padded to whole vectors. */
typedef struct {
    const Front *call;
    long Kp, past, row, part, head, channel;
    long branch, jump, next; /* where the token's branch begins, how far that is from the stem (0 in it), and the next one */
    REAL *x, *weight, *conv, *gate, *g, *g_x, *g_weight;
    void *block;
} Lane;

static int open_lane(Lane *l, const Front *c)
{
    l->call = c, l->Kp = padded(c->K), l->past = c->W - 1;
    const long numbers = l->Kp * (2 * (c->T + l->past) + 2 * c->W + 3);
    if (posix_memalign(&l->block, 64, (size_t)numbers * sizeof(REAL))) return 0;
    memset(l->block, 0, (size_t)numbers * sizeof(REAL));
    l->x = l->block, l->g_x = l->x + l->Kp * (c->T + l->past), l->weight = l->g_x + l->Kp * (c->T + l->past);
    l->g_weight = l->weight + l->Kp * c->W, l->conv = l->g_weight + l->Kp * c->W;
    l->gate = l->conv + l->Kp, l->g = l->gate + l->Kp;
    return 1;
}

static void enter_lane(Lane *l, int64_t at)
{
    const Front *c = l->call;
    const long channels = 3 * c->H * c->K;
    l->row = at / (3 * c->H), l->part = at / c->H % 3, l->head = at % c->H;
    l->channel = (l->part * c->H + l->head) * c->K, l->branch = l->jump = l->next = 0;
    gather(l->past, c->K, l->Kp, c->tail + l->row * l->past * channels + l->channel, channels, l->x);
    gather(c->T, c->K, l->Kp, c->x + l->row * c->T * channels + l->channel, channels, l->x + l->past * l->Kp);
    EACH(j, c->K) EACH(w, c->W) l->weight[w * l->Kp + j] = c->weight[(l->channel + j) * c->W + w];
}

/* First column of the convolution that token t may see. */
INLINE long first_seen(const Lane *l, long t)
{
    if (!l->call->age) return 0;
    const int64_t age = l->call->age[l->row * l->call->T + t];
    return age < l->past ? l->past - age : 0;
}

/* Where the convolution's column w of token t is in l->x: before a branch comes the end of the stem. */
INLINE long seen(const Lane *l, long t, long w)
{
    return t + w < l->branch + l->past ? t + w - l->jump : t + w;
}

/* Enter token t's branch; tokens come in turn. */
static void enter_branch(Lane *l, long t)
{
    const int64_t *cuts = l->call->cuts + l->row * (l->call->branches + 1);
    while (l->next < l->call->branches && cuts[l->next] <= t) l->branch = cuts[l->next++];
    l->jump = l->next ? l->branch - cuts[0] : 0;
}

/* Convolution of token t, its gate, and silu of it in l->g; returns what the row is divided by. */
static REAL see_token(Lane *l, long t)
{
    const Front *c = l->call;
    const long Kp = l->Kp;
    for (long j = 0; j < Kp; j += VL) {
        vec sum = {0};
        for (long w = first_seen(l, t); w < c->W; w++) sum += load(l->weight + w * Kp + j) * load(l->x + seen(l, t, w) * Kp + j);
        store(l->conv + j, sum);
    }
    activate(Kp, l->conv, l->gate, l->g);
    if (l->part == 2 && !c->unit_values) return 1;
    const double length = sqrt((double)dot(Kp, l->g, l->g));
    return (REAL)(length > c->floor ? length : c->floor);
}

int front(const Front *c, int64_t first, int64_t last)
{
    Lane lane, *l = &lane;
    if (!open_lane(l, c)) return 1;
    for (int64_t at = first; at < last; at++) {
        enter_lane(l, at);
        EACH(t, c->T) {
            if (c->branches) enter_branch(l, t);
            const REAL divisor = see_token(l, t);
            scaled(l->Kp, l->g, 1 / divisor, l->g);
            scatter(1, c->K, l->Kp, l->g, c->found[l->part] + ((l->row * c->T + t) * c->H + l->head) * c->K, 0);
        }
    }
    return free(l->block), 0;
}

int front_backward(const Front *c, int64_t first, int64_t last)
{
    Lane lane, *l = &lane;
    if (!open_lane(l, c)) return 1;
    const long Kp = l->Kp, channels = 3 * c->H * c->K;
    REAL *unit = malloc((size_t)Kp * sizeof(REAL));
    if (!unit) return free(l->block), 1;
    for (int64_t at = first; at < last; at++) {
        enter_lane(l, at);
        memset(l->g_x, 0, (size_t)(Kp * (c->T + l->past)) * sizeof(REAL));
        memset(l->g_weight, 0, (size_t)(Kp * c->W) * sizeof(REAL));
        EACH(t, c->T) {
            const REAL divisor = see_token(l, t);
            scaled(Kp, unit, 1 / divisor, l->g);
            gather(1, c->K, Kp, c->sent[l->part] + ((l->row * c->T + t) * c->H + l->head) * c->K, 0, l->g);
            if (l->part != 2 || c->unit_values) {
                if (divisor > c->floor) add_scaled(Kp, l->g, -dot(Kp, l->g, unit), unit);
                scaled(Kp, l->g, 1 / divisor, l->g);
            }
            const long from = first_seen(l, t);
            for (long j = 0; j < Kp; j += VL) {
                const vec g = load(l->g + j) * silu_slope(load(l->conv + j), load(l->gate + j));
                for (long w = from; w < c->W; w++) {
                    REAL *g_x = l->g_x + (t + w) * Kp + j, *g_weight = l->g_weight + w * Kp + j;
                    store(g_x, load(g_x) + g * load(l->weight + w * Kp + j));
                    store(g_weight, load(g_weight) + g * load(l->x + (t + w) * Kp + j));
                }
            }
        }
        scatter(l->past, c->K, Kp, l->g_x, c->g_tail + l->row * l->past * channels + l->channel, channels);
        scatter(c->T, c->K, Kp, l->g_x + l->past * Kp, c->g_x + l->row * c->T * channels + l->channel, channels);
        EACH(j, c->K) EACH(w, c->W) c->g_weight[(l->row * channels + l->channel + j) * c->W + w] = l->g_weight[w * Kp + j];
    }
    return free(unit), free(l->block), 0;
}
