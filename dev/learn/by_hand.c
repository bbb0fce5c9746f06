// by_hand.c: the figures of by_hand.md, computed by train_gpt.c's own functions.
//
//     make by_hand                                      prints them
//     build/by_hand --check dev/learn/by_hand.md        fails if the page says anything else; part of make test
//
// train_gpt.c is included and its plain functions are called; what they keep to themselves, such as the scores, is
// computed beside them in the page's words. The sections are the page's, in the page's order, and end_block() is the
// end of one of its blocks.

#define NO_MAIN
#include "../../train_gpt.c"

static FILE* to;      // where the figures go
static bool checking; // the page, and so the figures too: whoever tries other inputs just gets what comes out

// ====================================================================================================================
// Printing and measuring

// x in so many decimals. Compilers and machines differ in the last bits of a float. A figure so near to the middle of
// two that `noise` could round it either way is not for the page.
static void number(double x, int decimals, double noise) {
    double units = fabs(x) * pow(10, decimals);
    if (checking && fabs(units - floor(units) - 0.5) < noise * pow(10, decimals))
        die("%.9g is not rounded to %d decimals the same way everywhere; choose other inputs", x, decimals);
    fprintf(to, "%9.*f", decimals, units < 0.5 ? 0 : x); // 0, so that there is no -0.0000
}

static void say(const char* text) { fprintf(to, "%s\n", text); }
static void end_block(void) { say(""); }

// A line: what it is, n numbers.
static void numbers(const float* x, size_t n) {
    for (size_t i = 0; i < n; i++) number(x[i], 4, 2e-6);
}
static void line(const char* label, const float* x, size_t n) {
    fprintf(to, "%-12s", label);
    numbers(x, n);
    say("");
}
static void line1(const char* label, double x) {
    float one = (float)x;
    line(label, &one, 1);
}

// A line for each row of x (rows,n), which are `stride` apart.
static void index_label(const char* label, size_t i) { fprintf(to, "%s %-*zu", label, 11 - (int)strlen(label), i); }
static void lines(const char* label, const float* x, size_t rows, size_t n, size_t stride) {
    for (size_t i = 0; i < rows; i++) {
        index_label(label, i);
        numbers(x + i * stride, n);
        say("");
    }
}

// The same for x (3,3) of attention, where row i has numbers for the keys 0 to i only.
static void triangle(const char* label, const float* x) {
    for (size_t i = 0; i < 3; i++) {
        index_label(label, i);
        numbers(x + 3 * i, i + 1);
        say("");
    }
}

// A line for each row of x (rows,n): its gradient dx as the formula has it, then as measured, which is how much the
// loss rises for each unit of x when x moves from 0.01 below to 0.01 above. That differs from the slope in the middle by
// about 0.01^2, and by 1e-5 for the floats' rounding; more than 5e-4 means that the formula is wrong.
static void slopes(const char* label, const float* dx, float* x, size_t rows, size_t n, size_t stride,
                   double (*loss)(void)) {
    for (size_t i = 0; i < rows; i++) {
        index_label(label, i);
        numbers(dx + i * stride, n);
        fprintf(to, "   |");
        for (size_t j = i * stride; j < i * stride + n; j++) {
            float here = x[j], above = here + 0.01f, below = here - 0.01f;
            x[j] = above;
            double rise = loss();
            x[j] = below;
            rise -= loss();
            x[j] = here;
            double slope = rise / ((double)above - below);
            if (checking && fabs(slope - dx[j]) > 5e-4)
                die("%s: the formula says %g, measured is %g", label, dx[j], slope);
            number(slope, 3, 2e-5);
        }
        say("");
    }
}

static double weighted_sum(const float* a, const float* b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)a[i] * b[i];
    return sum;
}

// ====================================================================================================================
// Softmax

static float scores[3];
static const float dp_given[3] = {1, 0, 2};

// p from lse, as the file's backward passes have it.
static void softmax(float* p, const float* s) {
    float loss, lse;
    int target = 0;
    cross_entropy_forward(&loss, &lse, s, &target, 1, 3);
    for (int j = 0; j < 3; j++) p[j] = exp_(s[j] - lse);
}

static void softmax_backward(float* ds, const float* p, const float* dp, size_t n) {
    float sum = (float)weighted_sum(p, dp, n);
    for (size_t j = 0; j < n; j++) ds[j] = p[j] * (dp[j] - sum);
}

static double softmax_loss(void) {
    float p[3];
    softmax(p, scores);
    return weighted_sum(p, dp_given, 3);
}

static void section_softmax(void) {
    float e[3], p[3], ds[3], jacobian[9];
    for (int j = 0; j < 3; j++) {
        scores[j] = logf(j == 0 ? 2 : j == 1 ? 3 : 5);
        e[j] = exp_(scores[j]);
    }
    softmax(p, scores);
    line("s", scores, 3);
    line("e^s", e, 3);
    line1("sum", e[0] + e[1] + e[2]);
    line("p", p, 3);
    end_block();

    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) jacobian[3 * i + j] = p[i] * ((float)(i == j) - p[j]);
    lines("dp_i/ds", jacobian, 3, 3, 3);
    end_block();

    softmax_backward(ds, p, dp_given, 3);
    line("dp", dp_given, 3);
    line1("sum p dp", weighted_sum(p, dp_given, 3));
    line("ds", ds, 3);
    line1("their sum", ds[0] + ds[1] + ds[2]);
    end_block();

    float here = scores[2];
    line1("loss", softmax_loss());
    scores[2] = here + 0.01f;
    line1("s_2 + 0.01", softmax_loss());
    scores[2] = here - 0.01f;
    line1("s_2 - 0.01", softmax_loss());
    scores[2] = here;
    end_block();

    say("             formula                      | measured, each s moved by 0.01");
    slopes("ds", ds, scores, 1, 3, 3, softmax_loss);
    end_block();
}

// ====================================================================================================================
// Attention: one sequence of T = 3 positions, one head of D = 2 channels

enum { T = 3, D = 2, ROW = 3 * D };
static float qkv[T * ROW] = {
    2, -1, 1,  -1, 1, 0,  // position 0: q, k, v
    1, 0,  0,  1,  0, 1,  // position 1
    1, 1,  -1, 0,  2, -1, // position 2
};
static const float dout[T * D] = {1, 1, 0, 1, 1, 2};
static const Attention shape = {1, T, 0, 1, D};

static double attention_loss(void) {
    float out[T * D], lse[T];
    attention_forward_plain(out, lse, qkv, shape);
    return weighted_sum(out, dout, T * D);
}

// The weights p (T,T), which attention_forward_plain keeps to itself. If v_j is (1,0) and every other v is zero, then
// the first number of out_i is p_ij.
static void head_weights(float* p, const float* from) {
    for (int j = 0; j < T; j++) {
        float probe[T * ROW], out[T * D], lse[T];
        memcpy(probe, from, sizeof probe);
        for (int t = 0; t < T; t++) {
            probe[t * ROW + 2 * D] = t == j;
            probe[t * ROW + 2 * D + 1] = 0;
        }
        attention_forward_plain(out, lse, probe, shape);
        for (int i = 0; i < T; i++) p[i * T + j] = out[i * D];
    }
}

// p, dp and dscore of position 2 when its query, and so each of its scores, is `factor` times as large.
static void larger_scores(float factor) {
    float larger[T * ROW], p[T * T], ds[T], dp[T];
    memcpy(larger, qkv, sizeof larger);
    for (int c = 0; c < D; c++) larger[2 * ROW + c] *= factor;
    head_weights(p, larger);
    matmul_plain(dp, matrix(dout + 2 * D, D), transposed(qkv + 2 * D, ROW), NULL, NULL, 1, T, D);
    softmax_backward(ds, p + 2 * T, dp, T);
    fprintf(to, "scores x %.0f\n", factor);
    line("p", p + 2 * T, T);
    line("dscore", ds, T);
}

static void section_attention(void) {
    const float *q = qkv, *k = q + D, *v = k + D;
    float s[T * T], e[T], p[T * T], dp[T * T], ds[T * T], sums[T], out[T * D], lse[T], dqkv[T * ROW];
    float scale = 1 / sqrtf(D);
    say("                 q                 k                 v");
    lines("position", qkv, T, ROW, ROW);
    end_block();

    matmul_plain(s, matrix(q, ROW), transposed(k, ROW), NULL, NULL, T, T, D);
    triangle("q . k", s);
    line1("1/sqrt(2)", scale);
    for (int i = 0; i < T * T; i++) s[i] *= scale;
    triangle("score", s);
    end_block();

    for (int j = 0; j < T; j++) e[j] = exp_(s[2 * T + j]);
    head_weights(p, qkv);
    attention_forward_plain(out, lse, qkv, shape);
    line("e^score 2", e, T);
    line1("their sum", e[0] + e[1] + e[2]);
    triangle("p", p);
    end_block();

    lines("out", out, T, D, D);
    line("lse", lse, T);
    end_block();

    matmul_plain(dp, matrix(dout, D), transposed(v, ROW), NULL, NULL, T, T, D);
    for (size_t i = 0; i < T; i++) {
        sums[i] = (float)weighted_sum(p + i * T, dp + i * T, i + 1);
        softmax_backward(ds + i * T, p + i * T, dp + i * T, i + 1);
    }
    lines("dout", dout, T, D, D);
    triangle("dp", dp);
    lines("sum p dp", sums, T, 1, 1);
    triangle("dscore", ds);
    end_block();

    attention_backward_plain(dqkv, dout, qkv, out, lse, shape);
    say("             formula             | measured, each number moved by 0.01");
    slopes("dq", dqkv, qkv, T, D, ROW, attention_loss);
    slopes("dk", dqkv + D, qkv + D, T, D, ROW, attention_loss);
    slopes("dv", dqkv + 2 * D, qkv + 2 * D, T, D, ROW, attention_loss);
    end_block();

    larger_scores(1);
    larger_scores(8);
    end_block();
}

// ====================================================================================================================
// Layernorm: three rows of C = 4 channels

enum { C = 4 };
static float ln_x[T * C] = {
    3,  9, 11, 17, // mean 10, standard deviation 5
    -4, 8, 12, 24, // the same row, twice as wide
    1,  1, 3,  3,
};
static float ln_w[C] = {1, 1, 2, 1}, ln_b[C] = {0, 0, 0, 1};
static const float ln_dy[T * C] = {
    1, 0, 2, -1, // for rows 0 and 1
    1, 0, 2, -1, //
    0, 1, 0, 1,
};

static double layernorm_loss(void) {
    float y[T * C], mean[T], rstd[T];
    layernorm_forward(y, mean, rstd, ln_x, ln_w, ln_b, T, C);
    return weighted_sum(y, ln_dy, T * C);
}

static void section_layernorm(void) {
    const float ones[C] = {1, 1, 1, 1}, zeros[C] = {0};
    float y[T * C], n[T * C], mean[T], rstd[T], g[T * C], g_avg[T], gn_avg[T];
    float dx[T * C] = {0}, dw[C] = {0}, db[C] = {0}, path[4 * C];
    layernorm_forward(n, mean, rstd, ln_x, ones, zeros, T, C);
    layernorm_forward(y, mean, rstd, ln_x, ln_w, ln_b, T, C);
    lines("x", ln_x, T, C, C);
    line("mean", mean, T);
    line("rstd", rstd, T);
    lines("n", n, T, C, C);
    line("w", ln_w, C);
    line("b", ln_b, C);
    lines("y", y, T, C, C);
    end_block();

    for (int j = 0; j < C; j++) {
        path[j] = j == 0 ? rstd[0] : 0;
        path[C + j] = -rstd[0] / C;
        path[2 * C + j] = -rstd[0] * n[0] * n[j] / C;
        path[3 * C + j] = path[j] + path[C + j] + path[2 * C + j];
    }
    line("directly", path, C);
    line("mean", path + C, C);
    line("variance", path + 2 * C, C);
    line("dn/dx_0", path + 3 * C, C);
    end_block();

    for (int i = 0; i < T; i++) {
        for (int c = 0; c < C; c++) g[i * C + c] = ln_dy[i * C + c] * ln_w[c];
        g_avg[i] = (float)weighted_sum(g + i * C, ones, C) / C;
        gn_avg[i] = (float)weighted_sum(g + i * C, n + i * C, C) / C;
    }
    layernorm_backward(dx, dw, db, ln_dy, ln_x, mean, rstd, ln_w, T, C);
    lines("dy", ln_dy, T, C, C);
    lines("g", g, T, C, C);
    line("avg(g)", g_avg, T);
    line("avg(g n)", gn_avg, T);
    end_block();

    say("             formula                               | measured, each number moved by 0.01");
    slopes("dx", dx, ln_x, T, C, C, layernorm_loss);
    slopes("dw", dw, ln_w, 1, C, C, layernorm_loss);
    slopes("db", db, ln_b, 1, C, C, layernorm_loss);
    end_block();
}

// ====================================================================================================================
// GELU

enum { INPUTS = T * D };
static float gelu_x[INPUTS] = {-2, -1, -0.5f, 0, 1, 2};

static double gelu_loss(void) {
    const float ones[INPUTS] = {1, 1, 1, 1, 1, 1};
    float y[INPUTS];
    gelu_forward(y, gelu_x, INPUTS);
    return weighted_sum(y, ones, INPUTS);
}

static void section_gelu(void) {
    float twice_u[INPUTS], gate[INPUTS], y[INPUTS], exact[INPUTS], parts[3 * INPUTS], dx[INPUTS];
    const float dy[INPUTS] = {1, 1, 1, 1, 1, 1};
    gelu_forward(y, gelu_x, INPUTS);
    gelu_backward(dx, dy, gelu_x, INPUTS);
    for (int i = 0; i < INPUTS; i++) {
        float x = gelu_x[i];
        twice_u[i] = 2 * sqrtf(2 / 3.14159265f) * (x + 0.044715f * x * x * x);
        gate[i] = gelu_gate(x);
        exact[i] = x * 0.5f * (1 + erff(x / sqrtf(2)));
        parts[i] = gate[i] * (1 - gate[i]);
        parts[INPUTS + i] = 2 * sqrtf(2 / 3.14159265f) * (1 + 3 * 0.044715f * x * x);
    }
    say("2u = 1.5958 (x + 0.044715 x^3), 1.5958 being 2 sqrt(2/pi)");
    line("x", gelu_x, INPUTS);
    line("2u", twice_u, INPUTS);
    line("s", gate, INPUTS);
    line("y = x s", y, INPUTS);
    line("x Phi(x)", exact, INPUTS);
    end_block();

    line("s (1-s)", parts, INPUTS);
    line("2u'", parts + INPUTS, INPUTS);
    line("dy/dx", dx, INPUTS);
    end_block();

    say("             formula  | measured, x moved by 0.01");
    slopes("dx", dx, gelu_x, INPUTS, 1, 1, gelu_loss);
    end_block();
}

// ====================================================================================================================
// Cross-entropy: three rows, a vocabulary of V = 3 tokens

enum { V = 3 };
static float logits[T * V];
static const int targets[T] = {2, 0, 2};

static double cross_entropy_loss(void) {
    float losses[T], lse[T];
    cross_entropy_forward(losses, lse, logits, targets, T, V);
    return ((double)losses[0] + losses[1] + losses[2]) / T;
}

static void section_cross_entropy(void) {
    const float odds[T * V] = {2, 3, 5, 1, 1, 1, 7, 2, 1};
    float losses[T], lse[T], p[T * V], dlogits[T * V], sums[T];
    for (int i = 0; i < T * V; i++) logits[i] = logf(odds[i]);
    for (int i = 0; i < T; i++) softmax(p + i * V, logits + i * V);
    cross_entropy_forward(losses, lse, logits, targets, T, V);
    lines("logits", logits, T, V, V);
    lines("p", p, T, V, V);
    line("lse", lse, T);
    line("losses", losses, T);
    line1("mean", cross_entropy_loss());
    line1("in bits", cross_entropy_loss() / log(2));
    end_block();

    memcpy(dlogits, logits, sizeof dlogits);
    cross_entropy_backward(dlogits, lse, targets, 1, T, V);
    lines("p - y", dlogits, T, V, V);
    memcpy(dlogits, logits, sizeof dlogits);
    cross_entropy_backward(dlogits, lse, targets, 1.0f / T, T, V);
    for (int i = 0; i < T; i++) sums[i] = dlogits[i * V] + dlogits[i * V + 1] + dlogits[i * V + 2];
    line("row sums", sums, T);
    end_block();

    say("             formula                      | measured, each logit moved by 0.01");
    slopes("dlogits", dlogits, logits, T, V, V, cross_entropy_loss);
    end_block();
}

// ====================================================================================================================
// AdamW: four weights of a model, three steps

enum { STEPS = 3, WEIGHTS = 4 };
static const float adam_gradients[STEPS][WEIGHTS] = {{3, -4, 0, 0}, {3, 4, 0, 0}, {3, -4, 0, 0}};

static const AdamW settings = {0.1, 0.9, 0.99, 0.1, 1, 1}; // lr, beta1, beta2, weight_decay, clip, step

// A small model of which four numbers are used: three of wte, which decay, and a bias, which does not.
static void adamw_run(size_t steps, double clip, float gradient_factor, bool details) {
    Model model;
    memset(&model, 0, sizeof model);
    model.config.V = 3, model.config.T = 3, model.config.C = 2, model.config.H = 1, model.config.L = 1;
    cpu_create_model(&model, true);
    float *w[WEIGHTS], *d[WEIGHTS], *m[WEIGHTS], *v[WEIGHTS];
    for (int i = 0; i < WEIGHTS; i++) {
        w[i] = i < 3 ? model.w.wte + i : model.w.lnf_b;
        d[i] = i < 3 ? model.d.wte + i : model.d.lnf_b;
        m[i] = model.moment1 + (w[i] - model.weights);
        v[i] = model.moment2 + (w[i] - model.weights);
        *w[i] = 1;
    }
    for (size_t step = 1; step <= steps; step++) {
        AdamW o = settings;
        o.clip = clip, o.step = step;
        Factors f = adamw_factors(o);
        float g[WEIGHTS], now[4][WEIGHTS];
        for (int i = 0; i < WEIGHTS; i++) *d[i] = adam_gradients[step - 1][i] * gradient_factor;
        for (int i = 0; i < WEIGHTS; i++) g[i] = *d[i];
        cpu_update(&model, o);
        for (int i = 0; i < WEIGHTS; i++) {
            float mean = *m[i] / (float)(1 - pow(o.beta1, (double)step)), size = sqrtf(*v[i]) * f.root;
            now[0][i] = *m[i];
            now[1][i] = *v[i];
            now[2][i] = size > 0 ? mean / size : 0;
            now[3][i] = *w[i];
        }
        if (details) {
            fprintf(to, "step %zu\n", step);
            line("gradient", g, WEIGHTS);
            for (int i = 0; i < WEIGHTS; i++) g[i] *= (float)fmin(1, clip / model.gradient_norm);
            if (step == 1) line1("norm", model.gradient_norm);
            line("g", g, WEIGHTS);
            line("m", now[0], WEIGHTS);
            line("v", now[1], WEIGHTS);
            line("direction", now[2], WEIGHTS);
        }
        line("w", now[3], WEIGHTS);
        if (step == 1 || step == steps) end_block();
    }
    cpu_free_model(&model);
}

static void section_adamw(void) {
    fprintf(to, "lr %g   b1 %g   b2 %g   decay %g   clip %g   1 - b1 %g   1 - b2 %g\n", settings.lr, settings.beta1,
            settings.beta2, settings.weight_decay, settings.clip, 1 - settings.beta1, 1 - settings.beta2);
    adamw_run(STEPS, settings.clip, 1, true);
}

// ====================================================================================================================
// Answers

static void answer_softmax(void) {
    const float same[3] = {7, 7, 7};
    float p[3], ds[3];
    softmax(p, scores);
    softmax_backward(ds, p, same, 3);
    line("dp", same, 3);
    line1("sum p dp", weighted_sum(p, same, 3));
    line("ds", ds, 3);
    end_block();
}

// Position 2 sees positions 1 and 2 only: the last row of the sequence of these two.
static void answer_attention(void) {
    const Attention two = {1, 2, 0, 1, D};
    float s[2], out[2 * D], lse[2];
    matmul_plain(s, matrix(qkv + 2 * ROW, ROW), transposed(qkv + ROW + D, ROW), NULL, NULL, 1, 2, D);
    attention_forward_plain(out, lse, qkv + ROW, two);
    for (int j = 0; j < 2; j++) s[j] = exp_(s[j] / sqrtf(D) - lse[1]);
    line("p 2", s, 2);
    line("out 2", out + D, D);
    end_block();
}

static void answer_layernorm(void) {
    const float x[2] = {3, 7}, w[2] = {1, 1}, b[2] = {0, 0}, dy[2] = {1, 0};
    float y[2], mean, rstd, dx[2] = {0}, dw[2] = {0}, db[2] = {0};
    layernorm_forward(y, &mean, &rstd, x, w, b, 1, 2);
    layernorm_backward(dx, dw, db, dy, x, &mean, &rstd, w, 1, 2);
    line("x", x, 2);
    line("n", y, 2);
    line("dy", dy, 2);
    line("dx", dx, 2);
    end_block();
}

static void answer_gelu(void) {
    const float x[2] = {0.5f, -0.5f}, dy[2] = {1, 1};
    float dx[2];
    gelu_backward(dx, dy, x, 2);
    line("x", x, 2);
    line("dy/dx", dx, 2);
    line1("their sum", dx[0] + dx[1]);
    end_block();
}

static void answer_cross_entropy(void) {
    enum { GPT2 = 50257 };
    static float equal[GPT2];
    const int target = 0;
    float loss, lse;
    cross_entropy_forward(&loss, &lse, equal, &target, 1, GPT2);
    line1("loss", loss);
    line1("in bits", loss / log(2));
    end_block();
}

static void answer_adamw(void) { adamw_run(1, 0, 1000, false); }

// ====================================================================================================================
// The check

// The next line of *text, which is moved behind it and its line's end replaced by 0; NULL at the end.
static char* next_line(char** text) {
    char *start = *text, *end = strchr(start, '\n');
    if (!*start) return NULL;
    if (end) *end = 0;
    *text = end ? end + 1 : start + strlen(start);
    return start;
}

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Whether a number with a decimal point begins at s, in text, and which. A minus is its sign unless it follows a digit.
static bool decimal_at(const char* s, const char* text, double* value) {
    size_t whole = strspn(s, "0123456789"), before = (size_t)(s - text);
    if (!whole || s[whole] != '.' || !is_digit(s[whole + 1])) return false;
    if (before > 0 && (is_digit(s[-1]) || s[-1] == '.')) return false;
    bool negative = before > 0 && s[-1] == '-' && !(before > 1 && is_digit(s[-2]));
    *value = strtod(s - negative, NULL);
    return true;
}

// Whether some number in text is x.
static bool contains(const char* text, double x) {
    for (const char* s = text; *s; s++) {
        double value;
        if (decimal_at(s, text, &value) && fabs(value - x) < 1e-9) return true;
    }
    return false;
}

// Every ```figures block of the page must be the program's next block, line by line, and none may be missing. Every
// number with a decimal point elsewhere on the page must be among the figures. Returns the number of errors; after ten
// it stops.
static int check(const char* path, const char* figures) {
    FILE* f = fopen(path, "rb");
    if (!f) die("cannot open %s: %s", path, strerror(errno));
    char* page = (char*)allocate(1 << 20, 1, "the page");
    if (fread(page, 1, (1 << 20) - 1, f) == 0 || !feof(f)) die("cannot read %s", path);
    fclose(f);
    char *copy = strdup(figures), *expected = copy, *rest = page, *text;
    bool inside = false;
    int errors = 0, number_of_line = 0;
    while (errors < 10 && (text = next_line(&rest))) {
        number_of_line++;
        if (!strcmp(text, "```figures") && !inside) {
            inside = true;
        } else if (inside) {
            bool end = !strcmp(text, "```");
            const char* should = next_line(&expected);
            if (!should || strcmp(end ? "" : text, should)) {
                printf("%s:%d: the page says '%s', the program '%s'\n", path, number_of_line, text,
                       should ? should : "nothing more");
                errors++;
            }
            if (end) inside = false;
        } else {
            double value;
            for (const char* s = text; *s; s++)
                if (decimal_at(s, text, &value) && !contains(figures, value)) {
                    printf("%s:%d: %g is not among the program's figures\n", path, number_of_line, value);
                    errors++;
                }
        }
    }
    if (!errors && *expected) {
        printf("%s: lacks the program's '%s'\n", path, next_line(&expected));
        errors++;
    }
    free(copy);
    free(page);
    return errors;
}

int main(int argc, char** argv) {
    checking = argc == 3 && !strcmp(argv[1], "--check");
    if (argc > 1 && !checking) fail(2, "usage: by_hand [--check PAGE]");
    omp_set_num_threads(1); // to wake others would take longer than all of this
    char* figures = NULL;
    size_t size = 0;
    to = open_memstream(&figures, &size);
    if (!to) die("no memory for the figures");
    section_softmax();
    section_attention();
    section_layernorm();
    section_gelu();
    section_cross_entropy();
    section_adamw();
    answer_softmax();
    answer_attention();
    answer_layernorm();
    answer_gelu();
    answer_cross_entropy();
    answer_adamw();
    fclose(to);
    int errors = 0;
    if (checking)
        errors = check(argv[2], figures);
    else
        fputs(figures, stdout);
    free(figures);
    return errors ? 1 : 0;
}
