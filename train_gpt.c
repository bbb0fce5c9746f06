// train_gpt.c: trains and runs a GPT-2 on the CPU. One file of C: gcc or clang, OpenMP, libm, nothing else.
//
//     make train_gpt && ./train_gpt             train on the text in data/
//     ./train_gpt --generate "ROMEO:"           continue a prompt from what was trained
//     ./train_gpt --help                        all options
//
// The file is meant to be read from top to bottom by somebody who knows C and has read one article on attention. The
// idea comes first, then what makes it fast, then what reads files and options. The first four rooms are a whole GPT:
// what it computes, why each gradient is what it is, how it learns and how it writes.
//
//     layers                   embedding, layernorm, linear, attention, gelu, cross-entropy: each forward is directly
//                              followed by its backward
//     model                    the tables of its shape, its parameters and its activations; forward, backward
//     learning                 first values, AdamW, the learning rate
//     generation               drawing the next token, again and again
//     ---                      an hour's reading ends here
//     made fast                matrix multiply, attention in tiles, the exponential
//     random numbers           number i of stream k, computed, not stored
//     errors and files         every failure is one line and exit status 1; files are mapped, and replaced whole
//     the model in memory      where each tensor lies; what a device is
//     tokenizer                text to tokens and back
//     data loader              shards of tokens, shuffled windows
//     checkpoint               safetensors, with Hugging Face's names for GPT-2's weights
//     command line             the options
//     several processes        one model trained by many that send messages, on one machine or on a cluster
//     training loop            start, step, validate, report, save, resume
//     looking at attention     what every head attends to, as a table and as a page
//     the program              which of these is asked for
//
// Letters used throughout: B sequences in a batch, T tokens in a sequence, C channels, H heads, D = C/H channels
// of a head, V tokens in the vocabulary, L layers. A comment such as "x (B,T,C)" gives a tensor's shape, the last
// index running fastest. A gradient of the loss is called d + the name of what it is the gradient of: dx is the
// derivative of the loss with respect to x, and has x's shape. A derivative of one number by another is written
// ∂y/∂x, and [i = j] is 1 where i = j and else 0.
//
// The same build, seed, data and options give the same bits for any number of threads: work is cut into pieces by
// the problem's sizes, each piece is computed by one thread, and every sum is taken in a fixed order.

#define _GNU_SOURCE 1 // Linux has more calls than C and POSIX ask for
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <glob.h>
#include <libgen.h>
#include <limits.h>
#include <math.h>
#ifdef WITH_MPI
#include <mpi.h>
#include <sched.h>
#endif
#include <omp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define VERSION "1.0"

// ====================================================================================================================
// What later rooms provide

// Ends the program with one line on stderr and this status; die is for everything but a wrong command line, which is 2.
__attribute__((noreturn, format(printf, 2, 3))) static void fail(int status, const char* format, ...);
#define die(...) fail(1, __VA_ARGS__)

// count * size bytes of zeroed memory for `what`, or the program ends and says so. Freed with free().
static void* allocate(size_t count, size_t size, const char* what);

static inline float exp_(float x);                       // e^x; loops over it vectorise, loops over libm's do not
static inline float weight_at(const float* w, size_t i); // w[i], which generation may keep in 16 bits
static uint64_t random_bits(uint64_t key, uint64_t i);   // number i of the stream called key
static double random_uniform(uint64_t key, uint64_t i);  // the same, uniform in (0,1)
static float random_normal(uint64_t key, uint64_t i);    // the same, normal with mean 0 and variance 1
static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

typedef struct Tokenizer Tokenizer;
static bool is_end_of_text(const Tokenizer* t, int token); // the token that stands between documents
static void print_token(const Tokenizer* t, int token);    // its text on stdout, UTF-8 characters never cut in two
static void print_rest(void);                              // what print_token has kept back, at the end
static volatile sig_atomic_t signalled;                    // by Ctrl-C, say: what runs long then ends early

// ====================================================================================================================
// Layers
//
// A GPT is a few kinds of layer, stacked. Each kind is two functions here. X_forward computes the layer's output y from
// its input x and its parameters. X_backward is given dy, how the loss would change with each number of y, and works
// out by the chain rule how it would change with each number of x (dx), which the layer below then gets for its dy, and
// of the parameters (dw, db), which are moved against that when the whole network has been gone through.
//
// Rows are positions: (rows,C) stands for (B,T,C) in every layer but attention, the only one in which a position sees
// others. Gradients of parameters are added to what is there, so that several batches may be summed. Gradients of
// inputs are overwritten, but for layernorm's, which are added: see the model's backward pass.
//
// `#pragma omp parallel for` shares among threads a loop whose turns are independent, `omp simd` lets a sum be taken in
// several lanes at once; without them the code means the same, but for rounding. The multiply and attention, where
// nearly all time goes, are defined here in their plain form. `make PLAIN=1` builds with these; otherwise the room
// "made fast" has versions of them, many times as fast, with the same results but for rounding.

// A matrix in memory: element (i,j) is p[i * row + j * column]; `row` and `column` are the distances from one to the
// next. So the transpose is the same numbers with the two exchanged. `width` below is that of a stored row.
typedef struct {
    const float* p;
    size_t row, column;
} Matrix;

static Matrix matrix(const float* p, size_t width) {
    Matrix m = {p, width, 1};
    return m;
}
static Matrix transposed(const float* p, size_t width) {
    Matrix m = {p, 1, width};
    return m;
}

// c (M,N) = a (M,K) times b (K,N), plus bias (N), plus add (M,N), each of which may be NULL. c's rows are dense. With
// add == c the product is added to what is there.
static void matmul_plain(float* c, Matrix a, Matrix b, const float* bias, const float* add, size_t M, size_t N,
                         size_t K) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            float sum = 0;
            for (size_t k = 0; k < K; k++) sum += a.p[i * a.row + k * a.column] * b.p[k * b.row + j * b.column];
            c[i * N + j] = sum + (bias ? bias[j] : 0) + (add ? add[i * N + j] : 0);
        }
}

// The one that is used: matmul_plain or matmul_fast.
static void matmul(float* c, Matrix a, Matrix b, const float* bias, const float* add, size_t M, size_t N, size_t K);

// sum (n) += sum over rows of x (rows,n). Threads share out the columns, so each sum has one order.
enum { STRIP = 32 }; // columns in a share
static void sum_rows(float* sum, const float* x, size_t rows, size_t n) {
#pragma omp parallel for schedule(static)
    for (size_t j0 = 0; j0 < n; j0 += STRIP) {
        float strip[STRIP] = {0};
        size_t width = min_size(STRIP, n - j0);
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < width; j++) strip[j] += x[i * n + j0 + j];
        for (size_t j = 0; j < width; j++) sum[j0 + j] += strip[j];
    }
}

// Embedding: x (B,T,C) = wte[token] + wpe[position], what the token is and where it stands, each a learned vector
// (Radford et al. 2018, equation 2; learned positions: Gehring et al. 2017, section 3.1).
// wte (V,C), wpe (.,C); the first of the T positions is `start`.
static void embedding_forward(float* x, const int* tokens, const float* wte, const float* wpe, size_t B, size_t T,
                              size_t start, size_t C) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < B * T; i++) {
        size_t token = (size_t)tokens[i] * C, position = (start + i % T) * C;
        for (size_t c = 0; c < C; c++) x[i * C + c] = weight_at(wte, token + c) + weight_at(wpe, position + c);
    }
}

// x is a sum of two vectors, so the gradient of each is dx: dwte[token] += dx, dwpe[position] += dx.
// A token may occur in many rows, so threads share out the channels, not the rows, and each walks all rows in order:
// sums in a fixed order, and no two threads in one place.
static void embedding_backward(float* dwte, float* dwpe, const float* dx, const int* tokens, size_t B, size_t T,
                               size_t C) {
#pragma omp parallel for schedule(static)
    for (size_t c0 = 0; c0 < C; c0 += STRIP)
        for (size_t i = 0; i < B * T; i++) {
            float *token = dwte + (size_t)tokens[i] * C, *position = dwpe + i % T * C;
            for (size_t c = c0; c < min_size(C, c0 + STRIP); c++) {
                token[c] += dx[i * C + c];
                position[c] += dx[i * C + c];
            }
        }
}

// Layer normalisation (Ba, Kiros and Hinton 2016, equation 3, of a row): y = n w + b with n = (x - mean) rstd, rstd =
// 1/sqrt(var + eps), eps = 1e-5, mean and (biased) variance over a row's channels. Whatever the size of x, unless it is
// tiny, n has mean 0 and variance 1, and w and b then give each channel the scale and the zero that suit the layer
// which follows. y, x (rows,C); mean, rstd (rows) are kept for the backward pass; w, b (C).
static void layernorm_forward(float* y, float* mean, float* rstd, const float* x, const float* w, const float* b,
                              size_t rows, size_t C) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < rows; i++) {
        const float* row = x + i * C;
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t c = 0; c < C; c++) sum += row[c];
        float m = sum / (float)C;
#pragma omp simd reduction(+ : squares)
        for (size_t c = 0; c < C; c++) squares += (row[c] - m) * (row[c] - m);
        float r = 1 / sqrtf(squares / (float)C + 1e-5f);
        for (size_t c = 0; c < C; c++) y[i * C + c] = (row[c] - m) * r * w[c] + b[c];
        mean[i] = m;
        rstd[i] = r;
    }
}

// With g = dy w, the gradient with respect to n, and avg(.) the mean over the row's channels:
//     dx += rstd (g - avg(g) - n avg(g n)),    dw += sum over rows of dy n,    db += sum over rows of dy.
// Channel i of x moves channel j of n in three ways. Directly, if i = j, by rstd. Through the mean, which moves by 1/C,
// by -rstd/C. And through the variance: ∂var/∂x_i = 2 (x_i - mean)/C (the mean's own move drops out, as the deviations
// from it sum to 0) and ∂rstd/∂var = -(rstd^3)/2, so ∂rstd/∂x_i = -rstd^2 n_i/C, which moves n_j = (x_j - mean) rstd by
// -rstd n_i n_j/C. Together ∂n_j/∂x_i = rstd ([i = j] - 1/C - n_i n_j/C), and dx_i is the sum over j of g_j ∂n_j/∂x_i.
static void layernorm_backward(float* dx, float* dw, float* db, const float* dy, const float* x, const float* mean,
                               const float* rstd, const float* w, size_t rows, size_t C) {
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
        for (size_t i = 0; i < rows; i++) {
            const float *dyi = dy + i * C, *xi = x + i * C, m = mean[i], r = rstd[i];
            float *dxi = dx + i * C, g_sum = 0, gn_sum = 0;
#pragma omp simd reduction(+ : g_sum, gn_sum)
            for (size_t c = 0; c < C; c++) {
                g_sum += dyi[c] * w[c];
                gn_sum += dyi[c] * w[c] * ((xi[c] - m) * r);
            }
            float g_avg = g_sum / (float)C, gn_avg = gn_sum / (float)C;
            for (size_t c = 0; c < C; c++) dxi[c] += r * (dyi[c] * w[c] - g_avg - (xi[c] - m) * r * gn_avg);
        }
#pragma omp for schedule(static)
        for (size_t c0 = 0; c0 < C; c0 += STRIP) { // as in sum_rows
            float dw_sum[STRIP] = {0}, db_sum[STRIP] = {0};
            size_t n = min_size(STRIP, C - c0);
            for (size_t i = 0; i < rows; i++) {
                const float *dyi = dy + i * C + c0, *xi = x + i * C + c0;
                for (size_t c = 0; c < n; c++) {
                    dw_sum[c] += dyi[c] * ((xi[c] - mean[i]) * rstd[i]);
                    db_sum[c] += dyi[c];
                }
            }
            for (size_t c = 0; c < n; c++) {
                dw[c0 + c] += dw_sum[c];
                db[c0 + c] += db_sum[c];
            }
        }
    }
}

// Linear: y = x W + b, every output a weighted sum of all inputs of its row. With `residual` not NULL it is added:
// the layer's output joins the residual stream (He et al. 2016).
// y, residual (rows,OC); x (rows,IC); w (IC,OC); b (OC).
static void linear_forward(float* y, const float* x, const float* w, const float* b, const float* residual, size_t rows,
                           size_t IC, size_t OC) {
    matmul(y, matrix(x, IC), matrix(w, OC), b, residual, rows, OC, IC);
}

// y_ro = sum over i of x_ri W_io + b_o. The loss sees x_ri through every y_ro of its row, W_io through every row, and
// b_o likewise, so
//     dx_ri  = sum over o of dy_ro W_io,     that is dx = dy W^T,
//     dW_io += sum over r of x_ri dy_ro,     that is dW += x^T dy    (Rumelhart, Hinton and Williams 1986),
//     db_o  += sum over r of dy_ro.
// The residual's gradient is dy itself. dx may be NULL: then nobody wants it.
static void linear_backward(float* dx, float* dw, float* db, const float* dy, const float* x, const float* w,
                            size_t rows, size_t IC, size_t OC) {
    if (dx) matmul(dx, matrix(dy, OC), transposed(w, OC), NULL, NULL, rows, IC, OC);
    matmul(dw, transposed(x, IC), matrix(dy, OC), NULL, dw, IC, OC, rows);
    sum_rows(db, dy, rows, OC);
}

// Attention (Vaswani et al. 2017, section 3.2): every position looks at the positions before it and at itself, and
// takes from each as much as it finds fitting.
//
// A position has three vectors, all made from its row by the linear layer before: a query, a key and a value. q asks, k
// answers, v is handed over. How well key j answers query i is a number, their dot product, which softmax turns into a
// share of 1:
//     score_j = q_i . k_j / sqrt(D),    p_j = e^score_j / sum over j' of e^score_j',    out_i = sum over j of p_j v_j,
// j running over the keys that query i may see. In a GPT they are 0 to i (causal attention): row i of the output
// depends on rows 0 to i of the input and on no later one, so that all positions of a text can be trained on at once,
// each to predict its next token.
//
// Several heads do this side by side, each with D = C/H channels of its own, to look for several things at once. The
// paper's matrices W^Q, W^K and W^V stand side by side in `qkv_w` (C,3C), C columns each, of which head h owns those
// from hD to hD + D-1; so a row of qkv is q, k, v, each with its heads next to one another. The heads' outputs fill a
// row of out in the same way, and that is the paper's Concat: nothing is moved. `att_w`, the linear layer after, is
// W^O.
//
// Why sqrt(D)? If the numbers of q and k are independent, with mean 0 and variance 1, their dot product, a sum of D
// products, has variance D. Such scores make p the nearer to one-hot the larger D is, and there the softmax's
// derivative, which is p_j ([j = j'] - p_j') (below), is nearly 0: for large D the gradient at the scores vanishes, but
// for the few queries whose two best scores are nearly equal. What is left of it meets keys that are sqrt(D) long, so
// that at q it is nearly nothing for one query and many times too large for another (measured for D = 1 to 1024 in
// dev/learn/attention/02_scale.c). Neither is good to learn from.
//
// The weights p form a (T,T) matrix a head, of which a thread holds one row at a time. What the forward pass keeps for
// the backward pass is one number a query and head, lse = log of the sum over j of e^score_j: scores are computed again
// from q and k, which are kept anyway, and then p_j = e^(score_j - lse), without sum or maximum. So memory grows with
// T, while the time still grows with T^2 (Dao et al. 2022).
typedef struct {
    size_t B, T, start; // sequences; positions in each; the first of them that asks
    size_t H, D;        // heads; channels of a head
} Attention;

// The keys that query i may see: first to end - 1. Neither bound falls when i grows (tiles rely on it). Everything
// that computes attention asks here: for a sliding window, say, its width becomes a field of Attention and is used
// here.
typedef struct {
    size_t first, end;
} Range;

static inline Range visible_keys(Attention a, size_t i) {
    Range keys = {0, i + 1};
    (void)a;
    return keys;
}

// qkv (B,T,3C). Outputs are for the Q = T - start positions that ask: out (B,Q,C), lse (B,Q,H). Training has start = 0;
// in generation the rows before start are the key/value cache.
static void attention_forward_plain(float* out, float* lse, const float* qkv, Attention a) {
    size_t D = a.D, C = a.H * D, Q = a.T - a.start;
    float scale = 1 / sqrtf((float)D);
#pragma omp parallel for collapse(2) schedule(static)
    for (size_t b = 0; b < a.B; b++)
        for (size_t h = 0; h < a.H; h++) {
            float* p = (float*)allocate(a.T, sizeof(float), "a row of attention's weights");
            const float *queries = qkv + b * a.T * 3 * C + h * D, *keys = queries + C, *values = keys + C;
            for (size_t i = a.start; i < a.T; i++) {
                size_t row = b * Q + i - a.start;
                const float* q = queries + i * 3 * C;
                float *o = out + row * C + h * D, largest = -INFINITY, sum = 0;
                Range seen = visible_keys(a, i);
                // 1. Scores, which p holds at first. The largest is taken out before e^x, so that nothing
                // overflows; the weights stay the same.
                for (size_t j = seen.first; j < seen.end; j++) {
                    const float* k = keys + j * 3 * C;
                    float qk = 0;
                    for (size_t c = 0; c < D; c++) qk += q[c] * k[c];
                    p[j] = qk * scale;
                    largest = fmaxf(largest, p[j]);
                }
                // 2. Their softmax.
                for (size_t j = seen.first; j < seen.end; j++) {
                    p[j] = exp_(p[j] - largest);
                    sum += p[j];
                }
                for (size_t j = seen.first; j < seen.end; j++) p[j] /= sum;
                lse[row * a.H + h] = largest + logf(sum);
                // 3. The weighted sum of the values.
                for (size_t c = 0; c < D; c++) o[c] = 0;
                for (size_t j = seen.first; j < seen.end; j++) {
                    const float* v = values + j * 3 * C;
                    for (size_t c = 0; c < D; c++) o[c] += p[j] * v[c];
                }
            }
            free(p);
        }
}

// The three steps, differentiated from the last to the first, for one query; o is its out_i, do the gradient of that.
// First the softmax by itself: p_j' = e^score_j' / Z with Z = sum of e^score. The numerator moves with its own score
// only, Z with every one, so by the quotient rule
//     ∂p_j'/∂score_j = [j = j'] e^score_j / Z - e^score_j' e^score_j / Z^2 = p_j' ([j = j'] - p_j).
// Then, backwards:
//     o = sum over j of p_j v_j:     dv_j += p_j do,    dp_j = do . v_j
//     p = softmax(score):            dscore_j = sum over j' of dp_j' ∂p_j'/∂score_j
//                                             = sum over j' of dp_j' p_j' ([j = j'] - p_j)
//                                             = p_j (dp_j - sum over j' of p_j' dp_j')
//     score_j = q . k_j scale:       dq += dscore_j scale k_j,    dk_j += dscore_j scale q
// dqkv (B,T,3C) is overwritten; dout, out (B,T,C), lse (B,T,H). All positions ask: start is 0.
static void attention_backward_plain(float* dqkv, const float* dout, const float* qkv, const float* out,
                                     const float* lse, Attention a) {
    size_t D = a.D, C = a.H * D;
    float scale = 1 / sqrtf((float)D);
    (void)out; // wanted by the fast version: sum over j' of p_j' dp_j' = do . out
    memset(dqkv, 0, a.B * a.T * 3 * C * sizeof(float));
#pragma omp parallel for collapse(2) schedule(static)
    for (size_t b = 0; b < a.B; b++)
        for (size_t h = 0; h < a.H; h++) {
            float* p = (float*)allocate(2 * a.T, sizeof(float), "a row of attention's weights, and its gradient");
            float* dp = p + a.T;
            size_t at = b * a.T * 3 * C + h * D;
            const float *queries = qkv + at, *keys = queries + C, *values = keys + C;
            float *dqueries = dqkv + at, *dkeys = dqueries + C, *dvalues = dkeys + C;
            for (size_t i = 0; i < a.T; i++) {
                size_t row = b * a.T + i;
                const float *q = queries + i * 3 * C, *d_o = dout + row * C + h * D; // `do` is a word of C's
                float *dq = dqueries + i * 3 * C, sum = 0;
                Range seen = visible_keys(a, i);
                // The weights again, from step 1 and lse.
                for (size_t j = seen.first; j < seen.end; j++) {
                    const float* k = keys + j * 3 * C;
                    float qk = 0;
                    for (size_t c = 0; c < D; c++) qk += q[c] * k[c];
                    p[j] = exp_(qk * scale - lse[row * a.H + h]);
                }
                // Back through step 3.
                for (size_t j = seen.first; j < seen.end; j++) {
                    const float* v = values + j * 3 * C;
                    float* dv = dvalues + j * 3 * C;
                    dp[j] = 0;
                    for (size_t c = 0; c < D; c++) {
                        dp[j] += d_o[c] * v[c];
                        dv[c] += p[j] * d_o[c];
                    }
                    sum += p[j] * dp[j];
                }
                // Back through step 2, then step 1.
                for (size_t j = seen.first; j < seen.end; j++) {
                    const float* k = keys + j * 3 * C;
                    float *dk = dkeys + j * 3 * C, dscore = p[j] * (dp[j] - sum);
                    for (size_t c = 0; c < D; c++) {
                        dq[c] += dscore * scale * k[c];
                        dk[c] += dscore * scale * q[c];
                    }
                }
            }
            free(p);
        }
}

// The ones that are used: these two, or their tiled versions.
static void attention_forward(float* out, float* lse, const float* qkv, Attention a);
static void attention_backward(float* dqkv, const float* dout, const float* qkv, const float* out, const float* lse,
                               Attention a);

// GELU (Hendrycks and Gimpel 2016): y = x Phi(x), where Phi(x) is the probability that a normal random number is below
// x: large inputs pass, negative ones are held back, and in between there is no corner. GPT-2 has it in the paper's
// approximation, Phi(x) = (1 + tanh u)/2 with u = sqrt(2/pi) (x + 0.044715 x^3). Since (1 + tanh u)/2 = 1/(1 + e^-2u),
// it needs one exponential, and loses no digits where tanh u is near -1.
static inline float gelu_gate(float x) { return 1 / (1 + exp_(-1.59576912f * (x + 0.044715f * x * x * x))); }

enum { CHUNK = 1 << 12 }; // numbers in a thread's share where every number is treated alike

static void gelu_forward(float* y, const float* x, size_t n) {
#pragma omp parallel for schedule(static)
    for (size_t start = 0; start < n; start += CHUNK) {
        size_t end = min_size(n, start + CHUNK);
#pragma omp simd
        for (size_t i = start; i < end; i++) y[i] = x[i] * gelu_gate(x[i]);
    }
}

// With s = gelu_gate(x), the logistic function of 2u, whose derivative is s (1-s): ∂y/∂x = s + x s (1-s) 2 ∂u/∂x, where
// 2 ∂u/∂x = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2).
// dx may be dy itself.
static void gelu_backward(float* dx, const float* dy, const float* x, size_t n) {
#pragma omp parallel for schedule(static)
    for (size_t start = 0; start < n; start += CHUNK) {
        size_t end = min_size(n, start + CHUNK);
#pragma omp simd
        for (size_t i = start; i < end; i++) {
            float s = gelu_gate(x[i]);
            dx[i] = dy[i] * (s + x[i] * s * (1 - s) * 1.59576912f * (1 + 0.134145f * x[i] * x[i]));
        }
    }
}

// Cross-entropy: the loss of a row is -log p[target] with p = softmax(logits). Divided by log 2 these are the bits that
// it takes to write down the true next token in a code made for p (Shannon 1948, section 9). It is computed as
//     loss = lse - logits[target],    lse = log of the sum of e^logit,
// the largest logit taken out so that nothing overflows. losses, lse (rows); logits (rows,V).
static void cross_entropy_forward(float* losses, float* lse, const float* logits, const int* targets, size_t rows,
                                  size_t V) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < rows; i++) {
        const float* row = logits + i * V;
        float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
        for (size_t v = 0; v < V; v++) largest = row[v] > largest ? row[v] : largest;
#pragma omp simd reduction(+ : sum)
        for (size_t v = 0; v < V; v++) sum += exp_(row[v] - largest);
        lse[i] = largest + logf(sum);
        losses[i] = lse[i] - row[targets[i]];
    }
}

// dlogits = scale (p - [v = target]), since ∂lse/∂logit_v = e^logit_v / sum = p_v: what the model said, less what it
// should have said. It is written over the logits, which nobody reads again: there is no second (rows,V) tensor.
// `scale` is the weight of a row in the loss that is minimised, one over the number of all rows of a step.
static void cross_entropy_backward(float* logits, const float* lse, const int* targets, float scale, size_t rows,
                                   size_t V) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < rows; i++) {
        float *row = logits + i * V, row_lse = lse[i];
        for (size_t v = 0; v < V; v++) row[v] = scale * exp_(row[v] - row_lse);
        row[targets[i]] -= scale;
    }
}

// ====================================================================================================================
// Model
//
// GPT-2 (Radford et al. 2019) is the decoder of the 2017 Transformer with four main differences: there is no
// encoder, and so no second attention that looks at one; layernorm stands before each branch instead of after it,
// and once more at the end; positions are learned vectors instead of sines; and the activation is GELU instead of
// ReLU. Its heart is the residual stream, a row of C numbers for each position, to which every branch adds
// something:
//
//     x = wte[token] + wpe[position]
//     L times:  mid = x   + att_w(attention(qkv_w(ln1(x))))    positions look at one another
//               out = mid + mlp_w(gelu(fc_w(ln2(mid))))        each position by itself
//               x = out
//     logits = lnf(x) wte^T                                    how well would each token fit as the next?
//
// where qkv_w(.) and the like are linear layers. There is no dropout: GPT-2 may have been trained with it, but what
// a trained model computes is the same without.
//
// The model's shape, its parameters and its activations are three tables, in which each thing is named once. All the
// rest walks them: options, sizes, pointers, initialisation, the optimiser, checkpoints and tests.
//
// X stands for what each row is to become: a macro that is given to the table. Given one macro, a row becomes a
// field of a struct, so that X(ONE, wte, ...) and X(EACH, ln1_w, ...) turn into
//     float* wte;    and    float* ln1_w[MAX_LAYERS];
// and in the room "the model in memory" the same rows become initialisers that tell name, shape and first values.
// On the CPU a `real` is a float; on a GPU it may be a number of fewer bits.
//
// The shape: whole numbers that a file must say for its weights to mean anything. A row is an option, a field of Config
// and a line in checkpoints. GPT-2 has the four below, and its weights tell all but the heads. A row that is added for
// something else goes after them, and is to be 0 where the model is GPT-2: what a file does not mention is 0 there.

enum { MAX_LAYERS = 96, MAX_SIZE = 1 << 16 }; // of V, T, C, H and B: no size made of them overflows 64 bits
// clang-format off
// field, option, value if nothing is said, least, most, help
#define CONFIG(X)                                                          \
    X(T, "--context",  64,  1, MAX_SIZE,   "longest sequence in tokens")   \
    X(C, "--channels", 192, 1, MAX_SIZE,   "width of the residual stream") \
    X(H, "--heads",    4,   1, MAX_SIZE,   "attention heads of a block")   \
    X(L, "--layers",   2,   1, MAX_LAYERS, "transformer blocks")
// clang-format on
#define CONFIG_FIELD(field, option, initial, least, most, help) size_t field;
typedef struct {
    size_t V; // of the vocabulary, which the tokenizer brings
    CONFIG(CONFIG_FIELD)
} Config;

// How many of a tensor there are, and when.
typedef enum {
    ONE,      // one for the model
    EACH,     // one for each layer; of activations, where no backward pass follows, the layers share one
    AGAIN,    // like EACH; but with --recompute the layers share one in any case
    CACHE,    // one for each layer always: generation's keys and values
    LOGITS,   // one, but for a single position in generation, or for so many as a device takes at a time
    GRADIENT, // one, shared by all layers, and only in training
} Kind;
#define FIELD_ONE(type, name)      type* name;
#define FIELD_EACH(type, name)     type* name[MAX_LAYERS];
#define FIELD_AGAIN(type, name)    type* name[MAX_LAYERS];
#define FIELD_CACHE(type, name)    type* name[MAX_LAYERS];
#define FIELD_LOGITS(type, name)   type* name;
#define FIELD_GRADIENT(type, name) type* name;

// The two projections into the residual stream begin smaller (see initial_values).
static float residual_std(size_t L) { return 0.02f / sqrtf(2 * (float)L); }

// The parameters, under the names and in the shapes of Hugging Face's GPT-2 files. A tensor starts as mean + std *
// normal. Those with rows, that is matrices and embeddings, decay; biases and layernorms do not. (The code released
// with GPT-2 draws wpe with a std of 0.01. Here it is 0.02 like the rest, as in GPT-1's paper and in transformers.)
// clang-format off
// kind, field, name, rows, columns, mean, std; c is the Config
#define PARAMETERS(X)                                                                                                \
    X(ONE,  wte,   "wte.weight",               c.V,     c.C,     0, 0.02f)             /* tokens; and logits */      \
    X(ONE,  wpe,   "wpe.weight",               c.T,     c.C,     0, 0.02f)             /* positions */               \
    X(EACH, ln1_w, "h.%zu.ln_1.weight",        0,       c.C,     1, 0)                                               \
    X(EACH, ln1_b, "h.%zu.ln_1.bias",          0,       c.C,     0, 0)                                               \
    X(EACH, qkv_w, "h.%zu.attn.c_attn.weight", c.C,     3 * c.C, 0, 0.02f)             /* W^Q, W^K, W^V */           \
    X(EACH, qkv_b, "h.%zu.attn.c_attn.bias",   0,       3 * c.C, 0, 0)                                               \
    X(EACH, att_w, "h.%zu.attn.c_proj.weight", c.C,     c.C,     0, residual_std(c.L)) /* W^O: heads to residual */  \
    X(EACH, att_b, "h.%zu.attn.c_proj.bias",   0,       c.C,     0, 0)                                               \
    X(EACH, ln2_w, "h.%zu.ln_2.weight",        0,       c.C,     1, 0)                                               \
    X(EACH, ln2_b, "h.%zu.ln_2.bias",          0,       c.C,     0, 0)                                               \
    X(EACH, fc_w,  "h.%zu.mlp.c_fc.weight",    c.C,     4 * c.C, 0, 0.02f)             /* the MLP's first matrix */  \
    X(EACH, fc_b,  "h.%zu.mlp.c_fc.bias",      0,       4 * c.C, 0, 0)                                               \
    X(EACH, mlp_w, "h.%zu.mlp.c_proj.weight",  4 * c.C, c.C,     0, residual_std(c.L)) /* its second, to residual */ \
    X(EACH, mlp_b, "h.%zu.mlp.c_proj.bias",    0,       c.C,     0, 0)                                               \
    X(ONE,  lnf_w, "ln_f.weight",              0,       c.C,     1, 0)                                               \
    X(ONE,  lnf_b, "ln_f.bias",                0,       c.C,     0, 0)

// What a forward pass computes, a row for each position, kept where the backward pass reads it; then the gradients that
// the backward pass needs on its way.
// kind, type, field, width; c is the Config
#define ACTIVATIONS(X)                                                                               \
    X(ONE,      real,  embedded,   c.C)      /* token + position */                                  \
    X(AGAIN,    real,  ln1,        c.C)                                                              \
    X(EACH,     float, ln1_mean,   1)                                                                \
    X(EACH,     float, ln1_rstd,   1)                                                                \
    X(CACHE,    real,  qkv,        3 * c.C)  /* queries, keys, values of all heads */                \
    X(EACH,     real,  att,        c.C)      /* the heads' outputs side by side */                   \
    X(EACH,     float, lse,        c.H)      /* log-sum-exp of each head's scores */                 \
    X(EACH,     real,  mid,        c.C)      /* residual stream after attention */                   \
    X(AGAIN,    real,  ln2,        c.C)                                                              \
    X(EACH,     float, ln2_mean,   1)                                                                \
    X(EACH,     float, ln2_rstd,   1)                                                                \
    X(EACH,     real,  fc,         4 * c.C)                                                          \
    X(AGAIN,    real,  gelu,       4 * c.C)                                                          \
    X(EACH,     real,  out,        c.C)      /* residual stream after the MLP: the layer's output */ \
    X(ONE,      real,  lnf,        c.C)                                                              \
    X(ONE,      float, lnf_mean,   1)                                                                \
    X(ONE,      float, lnf_rstd,   1)                                                                \
    X(LOGITS,   real,  logits,     c.V)      /* in the backward pass their gradient */               \
    X(ONE,      float, logits_lse, 1)                                                                \
    X(ONE,      float, losses,     1)                                                                \
    X(GRADIENT, real,  dresidual,  c.C)      /* the residual stream's, on its way down */            \
    X(GRADIENT, real,  dnormed,    c.C)      /* a layernorm's output's */                            \
    X(GRADIENT, real,  dqkv,       3 * c.C)                                                          \
    X(GRADIENT, real,  datt,       c.C)                                                              \
    X(GRADIENT, real,  dfc,        4 * c.C)  /* gelu's output's, then its input's */
// clang-format on

#define PARAMETER_FIELD(kind, field, name, rows, columns, mean, std) FIELD_##kind(float, field)
#define ACTIVATION_FIELD(kind, type, field, width)                   FIELD_##kind(float, field)
typedef struct {
    PARAMETERS(PARAMETER_FIELD)
} Parameters;

typedef struct {
    size_t B, T;       // the most sequences, and positions in each
    size_t logit_rows; // positions of which there are logits at a time; 0: all
    bool training;
    float* block;
    void* extra; // what a GPU keeps besides
    ACTIVATIONS(ACTIVATION_FIELD)
} Activations;

typedef struct {
    char name[64];
    size_t rows, columns; // rows 0: a vector
    float mean, std;
    size_t offset, size; // floats: place in the block, rows * columns
    size_t slot;         // place of its pointer in a Parameters, bytes
    long layer;          // whose it is; -1: no layer's
    // Of many processes each updates a part of a tensor (see "several processes"); one alone updates all of it.
    size_t own, owned; // the part: its first number, how many
    size_t moment;     // its place among AdamW's moments
    size_t arriving;   // place where other processes' gradients of it arrive
} Tensor;

typedef struct {
    Config config;
    Tensor* tensors;
    size_t tensor_count, parameter_count;
    size_t block_size;                 // floats in the weights' block and in the gradients', padded to cache lines
    size_t moment_size, arriving_size; // and in the others: for one process alone, as many and none
    float *weights, *gradients, *moment1, *moment2, *arriving; // all but the weights only in training
    Parameters w, d;                                           // pointers into weights and into gradients
    double loss_sum, loss_count, gradient_norm;
    void* extra; // what a GPU keeps besides
} Model;

// The right column of the two passes says which layer is done, to whoever sets layer_done: a benchmark, which looks at
// the clock, or several processes, which exchange the layer's gradients.
static void (*layer_done)(const char* layer);
static void done(const char* layer) {
    if (layer_done) layer_done(layer);
}

static Attention attention_of(Config c, size_t B, size_t T, size_t start) {
    Attention a = {B, T, start, c.H, c.C / c.H};
    return a;
}

// The whole network. tokens and targets (B,Q): positions start..T-1 of each sequence, Q = T - start. A position's
// target is the token after it. With targets, the mean loss is added to the model's. Without, only the last position's
// logits are computed, which is all that generation needs, and B must be 1. So it must where start > 0: then the rows
// of qkv before start hold what earlier calls computed, and a new token costs the work of one position. `training` is
// true where the backward pass follows: GPT-2 computes the same then, but dropout, say, would not.
static void cpu_forward(Model* model, Activations* a, const int* tokens, const int* targets, size_t B, size_t T,
                        size_t start, bool training) {
    const Parameters* w = &model->w;
    size_t V = model->config.V, C = model->config.C, L = model->config.L, Q = T - start, rows = B * Q;
    Attention shape = attention_of(model->config, B, T, start);
    (void)training;
    // clang-format off
    embedding_forward(a->embedded, tokens, w->wte, w->wpe, B, Q, start, C);                           done("embedding");
    const float* x = a->embedded;
    for (size_t l = 0; l < L; l++) {
        layernorm_forward(a->ln1[l], a->ln1_mean[l], a->ln1_rstd[l], x, w->ln1_w[l], w->ln1_b[l],
                          rows, C);                                                                   done("ln1");
        linear_forward(a->qkv[l] + start * 3 * C, a->ln1[l], w->qkv_w[l], w->qkv_b[l], NULL, rows, C,
                       3 * C);                                                                        done("qkv_w");
        attention_forward(a->att[l], a->lse[l], a->qkv[l], shape);                                    done("attention");
        linear_forward(a->mid[l], a->att[l], w->att_w[l], w->att_b[l], x, rows, C, C);                done("att_w");
        layernorm_forward(a->ln2[l], a->ln2_mean[l], a->ln2_rstd[l], a->mid[l], w->ln2_w[l],
                          w->ln2_b[l], rows, C);                                                      done("ln2");
        linear_forward(a->fc[l], a->ln2[l], w->fc_w[l], w->fc_b[l], NULL, rows, C, 4 * C);            done("fc_w");
        gelu_forward(a->gelu[l], a->fc[l], rows * 4 * C);                                             done("gelu");
        linear_forward(a->out[l], a->gelu[l], w->mlp_w[l], w->mlp_b[l], a->mid[l], rows, 4 * C, C);   done("mlp_w");
        x = a->out[l];
    }
    layernorm_forward(a->lnf, a->lnf_mean, a->lnf_rstd, x, w->lnf_w, w->lnf_b, rows, C);              done("lnf");
    // logits (.,V) = lnf wte^T: the dot product of each row with every token's own embedding (Press and Wolf 2017).
    size_t first = targets ? 0 : rows - 1;
    matmul(a->logits, matrix(a->lnf + first * C, C), transposed(w->wte, C), NULL, NULL, rows - first,
           V, C);                                                                                     done("logits");
    if (!targets) return;
    cross_entropy_forward(a->losses, a->logits_lse, a->logits, targets, rows, V);                     done("loss");
    // clang-format on
    double sum = 0;
    for (size_t i = 0; i < rows; i++) sum += a->losses[i];
    model->loss_sum += sum / (double)rows;
    model->loss_count += 1;
}

// --recompute: what the backward pass of layer l needs, and can have again from what was kept, without a matrix
// multiply (Chen et al. 2016). It is 6 of the 16 C numbers that a layer keeps of a position.
static bool recompute;
static void cpu_recompute(Model* model, Activations* a, size_t l, const float* x, size_t rows) {
    const Parameters* w = &model->w;
    size_t C = model->config.C;
    layernorm_forward(a->ln1[l], a->ln1_mean[l], a->ln1_rstd[l], x, w->ln1_w[l], w->ln1_b[l], rows, C);
    layernorm_forward(a->ln2[l], a->ln2_mean[l], a->ln2_rstd[l], a->mid[l], w->ln2_w[l], w->ln2_b[l], rows, C);
    gelu_forward(a->gelu[l], a->fc[l], rows * 4 * C);
}

// Adds to the gradients those of `share` times the mean loss of the forward pass just made on the same B and T; share
// is one over the number of batches in a step. These are the same calls from the last to the first. Two gradients have
// two sources. The residual stream is read by a branch and by the addition after it, which passes the gradient on
// unchanged; so it keeps one gradient, to which every layernorm on the way down adds its branch's share. And wte is
// used twice, for the logits and for the embedding.
static void cpu_backward(Model* model, Activations* a, const int* tokens, const int* targets, size_t B, size_t T,
                         float share) {
    const Parameters *w = &model->w, *d = &model->d;
    size_t V = model->config.V, C = model->config.C, L = model->config.L, rows = B * T;
    Attention shape = attention_of(model->config, B, T, 0);
    float* dlogits = a->logits; // over which they are written
    // clang-format off
    cross_entropy_backward(dlogits, a->logits_lse, targets, share / (float)rows, rows, V);            done("loss");
    // dlnf = dlogits wte, and dwte += dlogits^T lnf.
    matmul(a->dnormed, matrix(dlogits, V), matrix(w->wte, C), NULL, NULL, rows, C, V);
    matmul(d->wte, transposed(dlogits, V), matrix(a->lnf, C), NULL, d->wte, V, C, rows);              done("logits");
    memset(a->dresidual, 0, rows * C * sizeof(float));
    layernorm_backward(a->dresidual, d->lnf_w, d->lnf_b, a->dnormed, a->out[L - 1], a->lnf_mean,
                       a->lnf_rstd, w->lnf_w, rows, C);                                               done("lnf");
    for (size_t l = L; l-- > 0;) {
        const float* x = l > 0 ? a->out[l - 1] : a->embedded;
        if (recompute) cpu_recompute(model, a, l, x, rows);
        linear_backward(a->dfc, d->mlp_w[l], d->mlp_b[l], a->dresidual, a->gelu[l], w->mlp_w[l],
                        rows, 4 * C, C);                                                              done("mlp_w");
        gelu_backward(a->dfc, a->dfc, a->fc[l], rows * 4 * C);                                        done("gelu");
        linear_backward(a->dnormed, d->fc_w[l], d->fc_b[l], a->dfc, a->ln2[l], w->fc_w[l], rows, C,
                        4 * C);                                                                       done("fc_w");
        layernorm_backward(a->dresidual, d->ln2_w[l], d->ln2_b[l], a->dnormed, a->mid[l],
                           a->ln2_mean[l], a->ln2_rstd[l], w->ln2_w[l], rows, C);                     done("ln2");
        linear_backward(a->datt, d->att_w[l], d->att_b[l], a->dresidual, a->att[l], w->att_w[l],
                        rows, C, C);                                                                  done("att_w");
        attention_backward(a->dqkv, a->datt, a->qkv[l], a->att[l], a->lse[l], shape);                 done("attention");
        linear_backward(a->dnormed, d->qkv_w[l], d->qkv_b[l], a->dqkv, a->ln1[l], w->qkv_w[l], rows,
                        C, 3 * C);                                                                    done("qkv_w");
        layernorm_backward(a->dresidual, d->ln1_w[l], d->ln1_b[l], a->dnormed, x, a->ln1_mean[l],
                           a->ln1_rstd[l], w->ln1_w[l], rows, C);                                     done("ln1");
    }
    embedding_backward(d->wte, d->wpe, a->dresidual, tokens, B, T, C);                                done("embedding");
    // clang-format on
}

// ====================================================================================================================
// Learning
//
// A step, as the training loop makes it:
//     device->forward(model, &activations, inputs, targets, B, T, 0, true);   the mean loss of a batch
//     device->backward(model, &activations, inputs, targets, B, T, 1);        its gradient, for each weight
//     device->update(model, adamw);                                           each weight moves a little against it
// where a `device` is what computes: cpu_forward, cpu_backward and cpu_update, or the GPU's. That is all of learning;
// what follows says where the weights begin, which way is "against", and how little is a little.

// The first values. Biases are 0, layernorms' w are 1, and matrices are small random numbers: equal ones would get
// equal gradients and stay equal for ever. The two projections into the residual stream in each of L layers are smaller
// by sqrt(2L), so that the sum of 2L such branches has the size of one unscaled branch (Radford et al. 2019, section
// 2.3).
static void initial_values(float* w, const Tensor* t, uint64_t key) {
#pragma omp parallel for schedule(static)
    for (size_t j = 0; j < t->size; j++) w[j] = t->std > 0 ? t->mean + t->std * random_normal(key, j) : t->mean;
}

// What an update needs to know.
typedef struct {
    double lr, beta1, beta2, weight_decay, clip; // clip 0: never
    size_t step;                                 // counted from 1
} AdamW;

// The length of x as one vector, summed in 1,024 parts, whatever the number of threads.
static double norm(const float* x, size_t n) {
    enum { PARTS = 1024 };
    double partial[PARTS], sum = 0;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < PARTS; i++) {
        double s = 0;
#pragma omp simd reduction(+ : s)
        for (size_t j = n * i / PARTS; j < n * (i + 1) / PARTS; j++) s += (double)x[j] * x[j];
        partial[i] = s;
    }
    for (size_t i = 0; i < PARTS; i++) sum += partial[i];
    return sqrt(sum);
}

// AdamW (Kingma and Ba 2015, algorithm 1; decay decoupled as by Loshchilov and Hutter 2019, algorithm 2). Each weight
// keeps two moving averages, m of its gradient g and v of its gradient's square:
//     m = b1 m + (1-b1) g,    v = b2 v + (1-b2) g^2,
//     w = (1 - lr decay) w - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + 1e-8).
// where t counts the steps from 1. sqrt(v) is the gradient's usual size, so m / sqrt(v) is about 1 or -1 where
// gradients agree, and small where they do not: a weight moves by lr at most, roughly, however large its gradients
// are. m and v begin at 0 and so are too small at first, by the factors 1-b1^t and 1-b2^t, the sum of the weights
// that t gradients have in the average; hence the divisions. Decay draws the weights of matrices and embeddings
// towards 0 by a share of themselves. g is the clipped gradient: all gradients are scaled so that their common norm
// is at most `clip`, lest one bad batch undo the work of many (Pascanu et al. 2013).
//
// The numbers that are the same for all weights: rate = lr / (1-b1^t), root = 1 / sqrt(1-b2^t), keep = 1 - lr decay
// (vectors do not decay: 1).
typedef struct {
    float b1, a1, b2, a2, rate, root, keep; // a = 1 - b
    double clip;                            // a GPU's kernels read it here
} Factors;

static Factors adamw_factors(AdamW o) {
    double correction1 = 1 - pow(o.beta1, (double)o.step), correction2 = 1 - pow(o.beta2, (double)o.step);
    Factors f = {(float)o.beta1,
                 (float)(1 - o.beta1),
                 (float)o.beta2,
                 (float)(1 - o.beta2),
                 (float)(o.lr / correction1),
                 (float)(1 / sqrt(correction2)),
                 (float)(1 - o.lr * o.weight_decay),
                 o.clip};
    return f;
}

// Updates the tensors from number `first` to before `end`, and leaves their gradients zero for the next step. Numbers
// that are not finite would spoil all weights: no step is made of them, and the run ends with those that it has.
static void adamw(Model* model, size_t first, size_t end, AdamW o) {
    if (!isfinite(model->gradient_norm) || !isfinite(model->loss_sum)) return;
    float clip = o.clip > 0 ? (float)fmin(1, o.clip / (model->gradient_norm + 1e-6)) : 1;
    Factors f = adamw_factors(o);
#pragma omp parallel
    for (size_t i = first; i < end; i++) {
        const Tensor* t = &model->tensors[i];
        float keep = t->rows ? f.keep : 1;
        float* __restrict__ w = model->weights + t->offset + t->own;
        float* __restrict__ d = model->gradients + t->offset + t->own;
        float* __restrict__ m = model->moment1 + t->moment;
        float* __restrict__ v = model->moment2 + t->moment;
#pragma omp for schedule(static) nowait
        for (size_t start = 0; start < t->owned; start += CHUNK) {
            size_t stop = min_size(t->owned, start + CHUNK);
#pragma omp simd
            for (size_t j = start; j < stop; j++) {
                float g = clip * d[j];
                m[j] = f.b1 * m[j] + f.a1 * g;
                v[j] = f.b2 * v[j] + f.a2 * g * g;
                w[j] = keep * w[j] - f.rate * m[j] / (sqrtf(v[j]) * f.root + 1e-8f);
                d[j] = 0;
            }
        }
    }
}

static void cpu_update(Model* model, AdamW o) {
    model->gradient_norm = norm(model->gradients, model->block_size);
    done("norm");
    adamw(model, 0, model->tensor_count, o);
    done("adamw");
}

// The learning rate rises for `warmup` steps from 0, then falls along half a cosine to `least` (Loshchilov and Hutter
// 2017, equation 5):
//     lr_t = peak t / warmup                                     for t <= warmup,
//     lr_t = least + (peak - least) (1 + cos(pi progress)) / 2   after it, progress = (t - warmup) / (steps - warmup).
// It rises because AdamW's averages over past gradients mean little while there are few of those, and it falls because
// steps that were right far from the goal jump over it when it is near. step counts from 1.
static double learning_rate(size_t step, size_t warmup, size_t steps, double peak, double least) {
    if (step <= warmup) return peak * (double)step / (double)warmup;
    double progress = steps > warmup ? fmin(1, (double)(step - warmup) / (double)(steps - warmup)) : 1;
    return least + 0.5 * (peak - least) * (1 + cos(3.141592653589793 * progress));
}

// ====================================================================================================================
// Generation
//
// The model gives a distribution over the next token; one is drawn, appended, and so on. Keys and values of earlier
// positions stay in the activations, so each new token costs one position's work. When the context is full, the older
// half of it is forgotten and the rest computed anew, since positions are counted from the window's first token.

typedef struct {
    double temperature, top_p; // 0: always the likeliest token; top_p 1: no limit
    size_t top_k, tokens;      // top_k 0: no limit
    uint64_t key;              // the stream of random numbers
} Sampling;

typedef struct {
    float p;
    int token;
} Candidate;

static int compare_candidates(const void* a, const void* b) {
    const Candidate *x = (const Candidate*)a, *y = (const Candidate*)b;
    return x->p != y->p ? (x->p < y->p) - (x->p > y->p) : x->token - y->token;
}

// Draws a token: softmax(logits / temperature), of that the top_k likeliest, of those, as shares of what is left,
// the fewest that sum to at least top_p (nucleus sampling, Holtzman et al. 2020). u: uniform in (0,1). c: working
// memory (V).
static int sample_token(const float* logits, size_t V, const Sampling* s, double u, Candidate* c) {
    size_t best = 0, n = 0;
    for (size_t v = 0; v < V; v++) {
        if (!(logits[v] < INFINITY)) die("the model's output is not a number: its weights are damaged");
        if (logits[v] > logits[best]) best = v;
    }
    if (s->temperature == 0) return (int)best;
    double sum = 0, kept = 0;
    for (size_t v = 0; v < V; v++) {
        c[v].p = v == best ? 1.0f : exp_((float)((logits[v] - logits[best]) / s->temperature));
        c[v].token = (int)v;
        sum += c[v].p;
    }
    n = V;
    if (s->top_k || s->top_p < 1) {
        // Tokens that each have under (1 - top_p)/V sum to under 1 - top_p, so none is needed: fewer to sort.
        double least = s->top_k ? 0 : sum * (1 - s->top_p) / (double)V;
        n = 0;
        for (size_t v = 0; v < V; v++)
            if (c[v].p >= least) c[n++] = c[v];
        qsort(c, n, sizeof *c, compare_candidates);
        if (s->top_k && s->top_k < n) {
            n = s->top_k;
            sum = 0;
            for (size_t i = 0; i < n; i++) sum += c[i].p;
        }
        for (size_t i = 0; i < n; i++) {
            kept += c[i].p;
            if (kept >= s->top_p * sum) n = i + 1; // which ends the loop
        }
        sum = kept;
    }
    for (size_t i = 0; i < n; i++)
        if ((u -= c[i].p / sum) < 0) return c[i].token;
    return c[n - 1].token; // rounding
}

// logits (V): what the model says of the token after position T - 1. tokens: those from position `start` on, all before
// them being in the cache. Computed by the device, whose struct stands in the room "the model in memory".
static void next_logits(float* logits, Model* model, Activations* a, const int* tokens, size_t T, size_t start);

// Continues a prompt of n > 0 tokens on stdout. a: activations for one sequence of the model's context.
static void generate(Model* model, Activations* a, const Tokenizer* t, const int* prompt, size_t n, const Sampling* s) {
    size_t V = model->config.V, T = model->config.T, used = min_size(n, T), cached = 0;
    int* window = (int*)allocate(T, sizeof(int), "the context");
    float* logits = (float*)allocate(V, sizeof(float), "logits");
    Candidate* candidates = (Candidate*)allocate(V, sizeof(Candidate), "candidates");
    memcpy(window, prompt + n - used, used * sizeof(int));
    for (size_t i = 0; i < s->tokens && !signalled; i++) {
        next_logits(logits, model, a, window + cached, used, cached);
        int token = sample_token(logits, V, s, random_uniform(s->key, i), candidates);
        if (is_end_of_text(t, token)) break;
        print_token(t, token);
        cached = used;
        if (used == T) {
            used = T / 2;
            cached = 0;
            memmove(window, window + T - used, used * sizeof(int));
        }
        window[used++] = token;
    }
    print_rest();
    free(window);
    free(logits);
    free(candidates);
}

// ====================================================================================================================
// Made fast
//
// From here on nothing new is computed. The multiply and attention of the layers' room follow again, in the form in
// which they are quick, and the exponential, which is quick by being our own.
//
// First the multiply. Nearly all of a step's arithmetic is C = A B, so this is where speed is won. A core's vector
// units can do far more multiplications than its memory system can feed, so each number brought near must be used many
// times:
//
//  - The kernel keeps a tile of MR x NR sums of C in registers and walks along k: per step it loads NR numbers of B,
//    MR numbers of A, and does MR*NR multiply-adds with them.
//  - It reads A and B from panels, copies in exactly the order of use, so that every load is the next one in memory.
//    Copying costs K*(M+N) moves against M*N*K multiply-adds. It also makes any layout of A and B equal: a matrix is
//    a pointer and two strides, and a transpose just swaps them. So y = x W, dx = dy W^T and dW = x^T dy are all this
//    one routine.
//  - Panels are used from cache. Of A's rows and B's columns, the fewer are packed once, all of them, by all threads
//    for all. The others are packed a few at a time by the thread that goes on to use them, and so pass from memory
//    into its second-level cache once. KC steps of k at a time, NC columns of B or MC rows of A fit there; what they are
//    multiplied with passes by, a panel at a time.
//
// The scheme is Goto and van de Geijn's (2008). Vectors are GCC's and Clang's vector extension: a `vec` is LANES
// floats and +, * work on all of them, so one source serves AVX-512, AVX2 and NEON.

#if defined(__AVX512F__) // 32 registers of 16 floats: 16 sums, 2 of B, 1 of A
enum { LANES = 16, MR = 8 };
#elif defined(__AVX__)    // 16 registers of 8 floats: 12 sums, 2 of B, 1 of A
enum { LANES = 8, MR = 6 };
#elif defined(__ARM_NEON) // 32 registers of 4 floats
enum { LANES = 4, MR = 8 };
#else                     // 16 registers of 4 floats: SSE, or whatever there is
enum { LANES = 4, MR = 6 };
#endif
enum { NR = 2 * LANES, KC = 768, MC = 16 * MR, NC = 128, DEEP = 6 * KC, TILE = 64 };
typedef float vec __attribute__((vector_size(LANES * sizeof(float))));

static Matrix block_at(Matrix m, size_t i, size_t j) {
    m.p += i * m.row + j * m.column;
    return m;
}

// tile (MR,NR) = a (MR,depth) times b (depth,NR), whose rows are dense and b_row apart. Always inlined, so that strides
// known to the caller are constants here.
__attribute__((always_inline)) static inline void kernel(size_t depth, Matrix a, const float* __restrict__ b,
                                                         size_t b_row, float* __restrict__ tile) {
    vec sum[MR][2];
    memset(sum, 0, sizeof sum);
    for (size_t k = 0; k < depth; k++, a.p += a.column, b += b_row) {
        vec b0, b1;
        memcpy(&b0, b, sizeof b0);
        memcpy(&b1, b + LANES, sizeof b1);
#pragma GCC unroll 8
        for (size_t i = 0; i < MR; i++) {
            sum[i][0] += a.p[i * a.row] * b0;
            sum[i][1] += a.p[i * a.row] * b1;
        }
    }
    memcpy(tile, sum, sizeof sum);
}

// out[k][i] = in[i][k] for 8 rows i of `in`, each `row` after the last, and k < depth; out's rows are `width` apart. It
// goes by way of a dense tile, in which compilers turn rows into columns by shuffling registers. Eight rows at a time
// also stay in the first-level cache together where they lie a power of two apart.
static inline void turn(float* __restrict__ out, size_t width, const float* __restrict__ in, size_t row, size_t depth) {
    float tile[TILE * 8];
    for (size_t k0 = 0; k0 < depth; k0 += TILE) {
        size_t n = min_size(TILE, depth - k0);
        for (size_t k = 0; k < n; k++)
            for (size_t i = 0; i < 8; i++) tile[k * 8 + i] = in[i * row + k0 + k];
        for (size_t k = 0; k < n; k++) memcpy(out + (k0 + k) * width, tile + k * 8, 8 * sizeof(float));
    }
}

// Packs `count` rows of m, each `depth` long, into panels of `width` rows: out[i / width][k][i % width] = m(i,k), and 0
// after the last row. Always inlined, so that `width` is a constant in its loops.
__attribute__((always_inline)) static inline void pack(float* __restrict__ out, Matrix m, size_t count, size_t width,
                                                       size_t depth) {
    size_t whole = count / width * width;
    if (m.row == 1) { // a column of m is dense: copy it to all panels at once, to read whole cache lines. The next
        // column is far, often in another page, and processors do not foresee that it will be wanted.
        for (size_t k = 0; k < depth; k++)
            for (size_t i = 0; i < whole; i += width) {
                __builtin_prefetch(m.p + i + (k + 16) * m.column);
                memcpy(out + i * depth + k * width, m.p + i + k * m.column, width * sizeof(float));
            }
    } else if (m.column == 1 && width % 16 == 0) {
        for (size_t i = 0; i < whole; i += 8)
            turn(out + i / width * width * depth + i % width, width, m.p + i * m.row, m.row, depth);
    } else {
        for (size_t i = 0; i < whole; i += width)
            for (size_t k = 0; k < depth; k++)
                for (size_t x = 0; x < width; x++) out[i * depth + k * width + x] = m.p[(i + x) * m.row + k * m.column];
    }
    for (size_t k = 0; k < depth && whole < count; k++)
        for (size_t x = 0; x < width; x++)
            out[whole * depth + k * width + x] = whole + x < count ? m.p[(whole + x) * m.row + k * m.column] : 0;
}

// With --precision bf16 the operands of products are bfloat16s: float32s without their lower 16 bits, of the same range
// but with 8 bits of precision for 24, which some processors multiply faster. Numbers are rounded as they are packed;
// what is kept, and every sum, stays float32 (Kalamkar et al. 2019, "A study of BFLOAT16 for deep learning training").
// What is not packed is multiplied in float32: a row by itself, as fast as memory anyway, and attention's tiles.
//
// The processors' instructions take pairs: they add two products to each lane of a vector of sums. So in a panel two
// steps of k share the 32 bits of a float, the first of them in the upper half, and a kernel for pairs is kernel() with
// another instruction and half the steps. Where that is no faster, kernel() itself multiplies the rounded numbers. As a
// product of two bfloat16s is exact in float32, its results are the same bits as AVX512-BF16's, unless a sum is smaller
// than 2^-126, which that takes for 0. BFDOT's differ.
typedef void PairKernel(size_t pairs, const float* a, const float* b, float* tile);

static bool bf16;               // --precision bf16
static PairKernel* pair_kernel; // what then multiplies; NULL: kernel()

#if defined(__AVX512F__) && !defined(__CUDACC__)
#include <immintrin.h>
static const char pairs_name[] = "AVX512-BF16";

// VDPBF16PS: sum += upper half of b * upper half of a, then the same of the lower halves, each rounded to the nearest
// float32 like a fused multiply-add.
__attribute__((target("avx512bf16"))) static void kernel_avx512_bf16(size_t pairs, const float* a, const float* b,
                                                                     float* tile) {
    __m512 sum[MR][2];
    memset(sum, 0, sizeof sum);
    for (size_t k = 0; k < pairs; k++, a += MR, b += NR) {
        __m512bh b0 = (__m512bh)_mm512_loadu_ps(b), b1 = (__m512bh)_mm512_loadu_ps(b + LANES);
#pragma GCC unroll 8
        for (size_t i = 0; i < MR; i++) {
            __m512bh pair = (__m512bh)_mm512_set1_ps(a[i]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], b0, pair);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], b1, pair);
        }
    }
    memcpy(tile, sum, sizeof sum);
}

// The processor's kernel for pairs, or NULL; `faster`: only if it is faster than kernel(). Not so on Intel's
// processors, which start one VDPBF16PS every other cycle, and two multiply-adds every cycle (measured on a Xeon).
static PairKernel* find_pair_kernel(bool faster) {
    return __builtin_cpu_supports("avx512bf16") && !(faster && __builtin_cpu_is("intel")) ? kernel_avx512_bf16 : NULL;
}
#elif defined(__aarch64__) && !defined(__CUDACC__) && (!defined(__clang__) || __clang_major__ >= 16)
#include <arm_neon.h>
static const char pairs_name[] = "BFDOT";

// BFDOT: adds up the two products, and then that and the sum. The last bit of an addition that is not exact becomes 1
// ("rounding to odd"), and what is smaller than 2^-126 is taken for 0.
__attribute__((target("arch=armv8.2-a+bf16"))) static void kernel_neon_bf16(size_t pairs, const float* a,
                                                                            const float* b, float* tile) {
    float32x4_t sum[MR][2];
    memset(sum, 0, sizeof sum);
    for (size_t k = 0; k < pairs; k++, a += MR, b += NR) {
        bfloat16x8_t b0 = vreinterpretq_bf16_f32(vld1q_f32(b)), b1 = vreinterpretq_bf16_f32(vld1q_f32(b + LANES));
#pragma GCC unroll 8
        for (size_t i = 0; i < MR; i++) {
            bfloat16x8_t pair = vreinterpretq_bf16_f32(vdupq_n_f32(a[i]));
            sum[i][0] = vbfdotq_f32(sum[i][0], b0, pair);
            sum[i][1] = vbfdotq_f32(sum[i][1], b1, pair);
        }
    }
    memcpy(tile, sum, sizeof sum);
}

// The processor's kernel for pairs, or NULL.
static PairKernel* find_pair_kernel(bool faster) {
    (void)faster;
    return getauxval(AT_HWCAP2) & HWCAP2_BF16 ? kernel_neon_bf16 : NULL;
}
#else
static const char pairs_name[] = "";
static PairKernel* find_pair_kernel(bool faster) { return (void)faster, (PairKernel*)NULL; }
#endif

static const char* multiplies_bf16(PairKernel* by) { return by ? pairs_name : "float32's instructions"; }

// x rounded to a bfloat16: to the nearest, of two equally near ones to the even one. NaN stays NaN, and what is smaller
// than 2^-126 becomes 0, as the instructions take it.
static inline uint32_t bfloat16_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t size = bits & 0x7FFFFFFFu, rounded = bits + 0x7FFFu + (bits >> 16 & 1);
    rounded = size > 0x7F800000u ? bits | 0x400000u : rounded;
    rounded = size < 0x00800000u ? bits & 0x80000000u : rounded;
    return rounded & 0xFFFF0000u;
}

static inline void put_bits(float* to, uint32_t bits) { memcpy(to, &bits, sizeof bits); }

// Panels as pack() has left them, rounded in place. A panel of pairs takes the first half of its place, rounded up.
__attribute__((always_inline)) static inline void round_panels(float* panels, size_t count, size_t width,
                                                               size_t depth) {
    static const float zeros[NR] = {0}; // the partner of an odd depth's last row
    for (size_t i = 0; i < count; i += width) {
        float* panel = panels + i * depth;
        for (size_t x = 0; x < width * depth && !pair_kernel; x++) put_bits(panel + x, bfloat16_bits(panel[x]));
        for (size_t k = 0; k < depth && pair_kernel; k += 2) {
            const float *first = panel + k * width, *second = k + 1 < depth ? first + width : zeros;
            float* pairs = panel + k / 2 * width;
#pragma omp simd
            for (size_t x = 0; x < width; x++)
                put_bits(pairs + x, bfloat16_bits(first[x]) | bfloat16_bits(second[x]) >> 16);
        }
    }
}

// The first rows and columns of a tile into c, whose rows are `width` apart, plus bias, plus add, laid out like c; bias
// and add may be NULL. add may be c: compilers, which must expect c to change it then, would not make vectors of a
// plain loop, so they are written out.
__attribute__((always_inline)) static inline void store_tile(float* c, size_t width, const float* tile,
                                                             const float* bias, const float* add, size_t rows,
                                                             size_t columns) {
    for (size_t i = 0; i < rows; i++, c += width, tile += NR, add += add ? width : 0) {
        for (size_t x = 0; x < NR && columns == NR; x += LANES) {
            vec sum, more;
            memcpy(&sum, tile + x, sizeof sum);
            if (bias) memcpy(&more, bias + x, sizeof more), sum += more;
            if (add) memcpy(&more, add + x, sizeof more), sum += more;
            memcpy(c + x, &sum, sizeof sum);
        }
        for (size_t x = 0; x < columns && columns < NR; x++) c[x] = tile[x] + (bias ? bias[x] : 0) + (add ? add[x] : 0);
    }
}

// c (rows,columns), rows `width` apart: packed a times packed b, plus bias (columns), plus add (shaped and strided
// like c, may be c itself). The tile's place in c is asked for before its sums are taken, to be near when they are
// done.
static void multiply_packed(float* c, size_t width, const float* a, const float* b, const float* bias, const float* add,
                            size_t rows, size_t columns, size_t depth) {
    float tile[MR * NR] __attribute__((aligned(64)));
    for (size_t i0 = 0; i0 < rows; i0 += MC)
        for (size_t j = 0; j < columns; j += NR)
            for (size_t i = i0; i < rows && i < i0 + MC; i += MR) {
                size_t at = i * width + j, tile_rows = min_size(MR, rows - i);
                for (size_t x = 0; x < tile_rows; x++)
                    for (size_t y = 0; y < NR; y += 16) __builtin_prefetch(c + at + x * width + y, 1);
                if (pair_kernel)
                    pair_kernel((depth + 1) / 2, a + i * depth, b + j * depth, tile);
                else
                    kernel(depth, transposed(a + i * depth, MR), b + j * depth, NR, tile);
                store_tile(c + at, width, tile, bias ? bias + j : NULL, add ? add + at : NULL, tile_rows,
                           min_size(NR, columns - j));
            }
}

// Memory for the duration of one call from outside parallel regions, grown when needed, so that no step allocates.
static float* workspace(size_t floats) {
    static float* block;
    static size_t size;
    if (floats > size) {
        free(block);
        block = (float*)allocate(floats, sizeof(float), "working space");
        size = floats;
    }
    return block;
}

static inline float dot(const float* x, const float* y, size_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

// sum (n) += x (rows) times b (rows,n). Always inlined, so that the loop over a known number of rows is unrolled.
__attribute__((always_inline)) static inline void add_rows(float* sum, const float* x, Matrix b, size_t rows,
                                                           size_t n) {
    for (size_t j = 0; j < n; j++) {
        float s = sum[j];
        for (size_t k = 0; k < rows; k++) s += x[k] * b.p[k * b.row + j];
        sum[j] = s;
    }
}

// Generation reads every weight for every token, and so writes the more tokens a second the less room they take: with
// --precision bf16 it keeps all tensors with rows, being all but biases and layernorms, as bfloat16s. They
// are made float32s again as they are read, by 16 bits of zeros after the 16.
static bool in_16_bits; // they are kept so
static inline float widened(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}
static inline float weight_at(const float* w, size_t i) {
    return in_16_bits ? widened(((const uint16_t*)(const void*)w)[i]) : w[i];
}

// w[i] to w[i + n - 1], where they lie or in `wide`. Widening leaves a processor less time to look ahead, so it is told
// that those which lie `ahead` of them will be wanted; what lies beyond the end is harmless.
static inline const float* weights_from(const float* w, size_t i, size_t n, size_t ahead, float* __restrict__ wide) {
    enum { LINE = 32 }; // numbers in a cache line
    if (!in_16_bits) return w + i;
    const uint16_t* from = (const uint16_t*)(const void*)w + i;
    for (size_t j0 = 0; j0 < n; j0 += LINE) {
        __builtin_prefetch(from + ahead + j0);
        if (n - j0 >= LINE)
            for (size_t j = 0; j < LINE; j++) wide[j0 + j] = widened(from[j0 + j]);
        else
            for (size_t j = j0; j < n; j++) wide[j] = widened(from[j]);
    }
    return wide;
}

// The same for a whole matrix of `size` numbers, to which b is turned; the caller frees them.
static float* widen_matrix(Matrix* b, size_t size) {
    float* wide = (float*)allocate(size, sizeof(float), "a matrix of weights");
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < size; i++) wide[i] = weight_at(b->p, i);
    b->p = wide;
    return wide;
}

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// n is cut into equal parts of at most `most`: the size of a part, rounded up to a multiple of `unit` and never 0.
static size_t even_part(size_t n, size_t most, size_t unit) {
    size_t parts = n > most ? (n + most - 1) / most : 1, part = round_up((n + parts - 1) / parts, unit);
    return part ? part : unit;
}

// The same where threads take parts in turn: the size with which the last of them is done soonest. The last round may
// have only the last part, which is shorter. A smaller size has to win by 3 %: more parts read what all of them need
// more often.
static size_t fair_part(size_t n, size_t most, size_t unit, size_t threads) {
    size_t best = unit, soonest = SIZE_MAX;
    for (size_t part = most < unit ? unit : most / unit * unit; part > most / 2; part -= unit) {
        size_t parts = (n + part - 1) / part, before = (parts - 1) / threads * part; // the last round
        size_t done = before + (parts % threads == 1 % threads ? n - (parts - 1) * part : part);
        if (done < soonest - soonest / 32) best = part, soonest = done;
    }
    return best;
}

// One row times a matrix of weights: every number of B is used once, so this runs at the speed of memory, and packing
// would only add to the traffic. Threads take columns, whole cache lines of them. If they are dense, each is a dot
// product; else rows are, of which four are read side by side, and many columns at a time, since memory is fastest
// where reading goes on where it left off.
static void multiply_row(float* c, Matrix a, Matrix b, const float* bias, const float* add, size_t N, size_t K) {
    enum { COLUMNS = 512, ROWS = 4 };
    size_t threads = (size_t)omp_get_max_threads(), fair = (N + threads - 1) / threads;
    size_t part = fair_part(N, min_size(fair, COLUMNS), 32, threads);
    float* x = workspace(K + threads * K);
    for (size_t k = 0; k < K; k++) x[k] = a.p[k * a.column];
#pragma omp parallel for schedule(static, 1)
    for (size_t j0 = 0; j0 < N; j0 += part) {
        size_t n = min_size(part, N - j0);
        float sum[COLUMNS] = {0}, rows[ROWS * COLUMNS], *column = x + (1 + (size_t)omp_get_thread_num()) * K;
        if (b.row == 1)
            for (size_t j = 0; j < n; j++)
                sum[j] = dot(x, weights_from(b.p, (j0 + j) * b.column, K, 2 * b.column, column), K);
        for (size_t k = 0; k < K && b.row != 1; k += ROWS) {
            size_t at = k * b.row + j0, count = min_size(ROWS, K - k);
            for (size_t i = 0; i < count && in_16_bits; i++)
                weights_from(b.p, at + i * b.row, n, 2 * ROWS * b.row, rows + i * COLUMNS);
            Matrix block = in_16_bits ? matrix(rows, COLUMNS) : matrix(b.p + at, b.row);
            if (count == ROWS)
                add_rows(sum, x + k, block, ROWS, n);
            else
                add_rows(sum, x + k, block, count, n);
        }
        for (size_t j = 0; j < n; j++) c[j0 + j] = sum[j] + (bias ? bias[j0 + j] : 0) + (add ? add[j0 + j] : 0);
    }
}

// One factor: A, whose rows go into panels of MR, or B, whose columns go into panels of NR.
typedef struct {
    Matrix lines;                // A's rows or B's columns, as rows along k
    size_t count, panel, cached; // cached: how many a thread's cache holds, KC long
} Factor;

// Packs `count` lines from i on, `depth` long from k on.
static void pack_lines(float* out, Factor f, size_t i, size_t count, size_t k, size_t depth) {
    Matrix m = block_at(f.lines, i, k);
    if (f.panel == MR) {
        pack(out, m, count, MR, depth);
        if (bf16) round_panels(out, count, MR, depth);
    } else {
        pack(out, m, count, NR, depth);
        if (bf16) round_panels(out, count, NR, depth);
    }
}

// As matmul_plain. The factor with fewer lines is packed whole, for all threads; the other, `parted`, in parts. A piece
// of c comes from one part and the whole, or from a span of the whole where there are too few parts for all threads.
// One thread computes a piece, and its sums run along k in order, in steps whose length depends on K alone; so the bits
// do not depend on the number of threads. For a large K all this is done DEEP steps of k at a time. For example, 256
// rows times (768,3072) on two threads: A is the whole, B goes in 24 parts of 128 columns, a span is all of A, and k
// takes one step of 768. With 64 threads and AVX-512 a part is 32 columns, and a span 128 rows.
static void matmul_fast(float* c, Matrix a, Matrix b, const float* bias, const float* add, size_t M, size_t N,
                        size_t K) {
    if (M == 1) {
        multiply_row(c, a, b, bias, add, N, K);
        return;
    }
    bool a_whole = M < N;
    Factor rows = {a, M, MR, MC}, columns = {{b.p, b.column, b.row}, N, NR, NC};
    Factor whole = a_whole ? rows : columns, parted = a_whole ? columns : rows;
    size_t threads = (size_t)omp_get_max_threads(), fair = (parted.count + 4 * threads - 1) / (4 * threads);
    size_t part = fair_part(parted.count, min_size(fair, parted.cached), parted.panel, threads),
           parts = (parted.count + part - 1) / part;
    size_t spans = 1 + 2 * threads / (parts + 1); // 1 where there are parts enough
    size_t span = even_part(whole.count, (whole.count + spans - 1) / spans, whole.panel);
    size_t longest = even_part(K, KC, 1), deep = DEEP / longest * longest;
    size_t padded = round_up(whole.count, whole.panel);
    float* shared = workspace(padded * min_size(K, deep) + threads * part * longest); // the whole, then a part for each
    for (size_t d0 = 0; d0 == 0 || d0 < K; d0 += deep) {
        size_t steps = min_size(deep, K - d0);
#pragma omp parallel
        {
            float* own = shared + padded * min_size(K, deep) + (size_t)omp_get_thread_num() * part * longest;
#pragma omp for collapse(2) schedule(static)
            for (size_t k = 0; k < steps; k += longest)
                for (size_t i = 0; i < whole.count; i += 2 * whole.panel) {
                    size_t depth = min_size(longest, steps - k), count = min_size(2 * whole.panel, whole.count - i);
                    pack_lines(shared + padded * k + i * depth, whole, i, count, d0 + k, depth);
                }
#pragma omp for collapse(2) schedule(dynamic)
            for (size_t p = 0; p < parted.count; p += part)
                for (size_t s = 0; s < whole.count; s += span) {
                    size_t i = a_whole ? s : p, m = min_size(a_whole ? span : part, M - i);
                    size_t j = a_whole ? p : s, n = min_size(a_whole ? part : span, N - j), at = i * N + j;
                    for (size_t k = 0; k == 0 || k < steps; k += longest) {
                        size_t depth = min_size(longest, steps - k);
                        const float *packed = shared + padded * k + s * depth, *so_far = add ? add + at : NULL;
                        pack_lines(own, parted, p, a_whole ? n : m, d0 + k, depth);
                        if (d0 + k > 0) so_far = c + at;
                        multiply_packed(c + at, N, a_whole ? packed : own, a_whole ? own : packed,
                                        bias && d0 + k == 0 ? bias + j : NULL, so_far, m, n, depth);
                    }
                }
        }
    }
}

// The same for one thread and small matrices that lie in its cache: c (M,N) = a b, or c += a b; c's rows are `width`
// apart, b's, which are dense, b_row. The kernel reads a and b where they are, and in whole tiles: after a's rows and
// b's columns there must be memory up to a multiple of MR and NR, whatever is in it. Work that is known to be in vain
// is left out. If `steps` is not NULL, a's row i is 0 before steps[i].first and from steps[i].end on; if `columns` is
// not, c's row i is not wanted before columns[i].first. These only grow with i. MR rows are computed together, over the
// steps from the first row's first to the last row's end: there the zeros must stand, elsewhere may be anything.
// Inlined, for strides to be constants in the kernel.
__attribute__((always_inline)) static inline void matmul_tile(float* c, size_t width, bool accumulate, Matrix a,
                                                              const float* b, size_t b_row, size_t M, size_t N,
                                                              size_t K, const Range* steps, const Range* columns) {
    float tile[MR * NR] __attribute__((aligned(64)));
    for (size_t j = 0; j < N; j += NR)
        for (size_t i = 0; i < M && (!columns || columns[i].first < j + NR); i += MR) {
            size_t at = i * width + j, rows = min_size(MR, M - i);
            size_t k = steps ? steps[i].first : 0, end = steps ? steps[i + rows - 1].end : K;
            kernel(end > k ? end - k : 0, block_at(a, i, k), b + k * b_row + j, b_row, tile);
            store_tile(c + at, width, tile, NULL, accumulate ? c + at : NULL, rows, min_size(NR, N - j));
        }
}

// Attention in tiles. The plain version walks over all keys and values once for each query, and does one multiply-add
// for each number it loads. Here TILE queries take TILE keys at a time, so that every number loaded is used TILE times,
// by the multiply's kernel. No query has seen all of its keys when a tile is to be summed, so the softmax is kept
// running ("online": Milakov and Gimelshein 2018; in tiles: FlashAttention, Dao et al. 2022, algorithm 1). A query
// keeps the largest score so far, m, and the sums over the keys so far of e^(score - m) and of e^(score - m) v. When a
// later tile raises m by d, both are scaled by e^-d. In the end out is the second sum divided by the first, and
// lse = m + log(first). Tiles that no query sees are not visited.
//
// The keys that any of the queries i0 .. i0 + queries - 1 sees, from where a tile begins.
static Range seen_by_any(Attention a, size_t i0, size_t queries) {
    Range keys = {visible_keys(a, i0).first / TILE * TILE, visible_keys(a, i0 + queries - 1).end};
    return keys;
}

// What these queries see of the tile of keys from j0 on: the ranges of keys, counted from j0, that each query sees, and
// of queries, counted from i0, that see each key.
typedef struct {
    size_t keys; // in the tile
    bool whole;  // every query sees all of them; then there are no ranges
    Range seen[TILE], seen_by[TILE];
} KeyTile;

static KeyTile key_tile(Attention a, size_t i0, size_t queries, size_t j0) {
    Range seen_first = visible_keys(a, i0), seen_last = visible_keys(a, i0 + queries - 1);
    KeyTile t;
    t.keys = min_size(TILE, seen_last.end - j0);
    t.whole = seen_last.first <= j0 && j0 + t.keys <= seen_first.end;
    if (t.whole) return t;
    for (size_t i = 0; i < queries; i++) {
        Range keys = visible_keys(a, i0 + i);
        t.seen[i].first = keys.first > j0 ? min_size(keys.first - j0, t.keys) : 0;
        t.seen[i].end = keys.end > j0 ? min_size(keys.end - j0, t.keys) : 0;
    }
    for (size_t j = 0, first = 0, end = 0; j < t.keys; j++) {
        while (first < queries && t.seen[first].end <= j) first++;
        while (end < queries && t.seen[end].first <= j) end++;
        t.seen_by[j].first = first, t.seen_by[j].end = end;
    }
    return t;
}

// scores (keys,TILE): -infinity where a key is hidden from a query.
static void hide(float* scores, const KeyTile* t) {
    for (size_t j = 0; j < t->keys; j++) {
        for (size_t i = 0; i < t->seen_by[j].first; i++) scores[j * TILE + i] = -INFINITY;
        for (size_t i = t->seen_by[j].end; i < TILE; i++) scores[j * TILE + i] = -INFINITY;
    }
}

// How many queries at the beginning of key j's row of scores do not see it, in whole tiles of NR: these scores have not
// been computed.
static size_t unseen(const KeyTile* t, size_t j) { return t->whole ? 0 : t->seen_by[j].first / NR * NR; }

// A head's rows lie 3C apart, too far for caches and pages to hold many, and the kernel wants its factors in one of two
// forms. So they are copied first: `turned`, tiles of TILE rows, each (D,TILE), which are pack()'s panels, and dense,
// (n,wide), D rounded up to whole panels.
static size_t dense_width(size_t D) { return round_up(D, NR); }

static void copy_rows(float* to, size_t to_row, const float* from, size_t from_row, size_t n, size_t D) {
    for (size_t i = 0; i < n; i++) memcpy(to + i * to_row, from + i * from_row, D * sizeof(float));
}

// A tile of scores has a row for each key and a column for each query, transposed against the formula: so vectors run
// along queries, each with its own maximum and sum. A thread takes a head, or where heads are few a share of its
// queries.
static void attention_forward_tiles(float* out, float* lse, const float* qkv, Attention a) {
    size_t T = a.T, D = a.D, C = a.H * D, Q = T - a.start, wide = dense_width(D), padded = round_up(T, TILE);
    size_t threads = (size_t)omp_get_max_threads(), each = 2 * padded * wide + TILE * (D + wide);
    size_t shares = min_size((Q + TILE - 1) / TILE, 1 + 2 * threads / (a.B * a.H));
    float scale = 1 / sqrtf((float)D), *space = workspace(threads * each);
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (size_t b = 0; b < a.B; b++)
        for (size_t h = 0; h < a.H; h++)
            for (size_t share = 0; share < shares; share++) {
                const float *queries_of = qkv + b * T * 3 * C + h * D, *keys = queries_of + C, *values = keys + C;
                float *k = space + (size_t)omp_get_thread_num() * each, *v = k + padded * wide; // dense
                float *q = v + padded * wide, *o = q + TILE * D;                                // turned, dense
                float s[TILE * TILE + MR] __attribute__((aligned(64))), largest[TILE], sum[TILE], shrink[TILE];
                copy_rows(k, wide, keys, 3 * C, T, D);
                copy_rows(v, wide, values, 3 * C, T, D);
                for (size_t i0 = a.start + share * TILE; i0 < T; i0 += shares * TILE) {
                    size_t queries = min_size(TILE, T - i0), row = b * Q + i0 - a.start;
                    Range seen = seen_by_any(a, i0, queries);
                    pack(q, matrix(queries_of + i0 * 3 * C, 3 * C), queries, TILE, D);
                    for (size_t i = 0; i < TILE; i++) largest[i] = -FLT_MAX, sum[i] = 0;
                    for (size_t j0 = seen.first; j0 < seen.end; j0 += TILE) {
                        KeyTile t = key_tile(a, i0, queries, j0);
                        const Range *steps = t.whole ? NULL : t.seen, *columns = t.whole ? NULL : t.seen_by;
                        // Scores, and the largest so far.
                        matmul_tile(s, TILE, false, matrix(k + j0 * wide, wide), q, TILE, t.keys, TILE, D, NULL,
                                    columns);
                        if (!t.whole) hide(s, &t);
                        memcpy(shrink, largest, sizeof shrink);
                        for (size_t j = 0; j < t.keys; j++)
                            for (size_t i = unseen(&t, j); i < TILE; i++) {
                                float score = s[j * TILE + i] * scale;
                                s[j * TILE + i] = score;
                                largest[i] = score > largest[i] ? score : largest[i];
                            }
                        // Both sums shrink to the new maximum, and grow by this tile's keys.
                        for (size_t i = 0; i < TILE; i++) {
                            shrink[i] = exp_(shrink[i] - largest[i]);
                            sum[i] *= shrink[i];
                        }
                        for (size_t j = 0; j < t.keys; j++) {
                            memset(s + j * TILE, 0, unseen(&t, j) * sizeof(float));
                            for (size_t i = unseen(&t, j); i < TILE; i++) {
                                float p = exp_(s[j * TILE + i] - largest[i]);
                                s[j * TILE + i] = p;
                                sum[i] += p;
                            }
                        }
                        // The sum of values; the first tile overwrites what o holds of queries before.
                        for (size_t i = 0; i < queries && j0 > seen.first; i++)
                            for (size_t c = 0; c < D; c++) o[i * wide + c] *= shrink[i];
                        matmul_tile(o, wide, j0 > seen.first, transposed(s, TILE), v + j0 * wide, wide, queries, D,
                                    t.keys, steps, NULL);
                    }
                    for (size_t i = 0; i < queries; i++) {
                        for (size_t c = 0; c < D; c++) out[(row + i) * C + h * D + c] = o[i * wide + c] / sum[i];
                        lse[(row + i) * a.H + h] = largest[i] + logf(sum[i]);
                    }
                }
            }
}

// Has n floats brought near, where the processor does not foresee that they will be wanted.
static inline void prefetch(const float* x, size_t n) {
    for (size_t i = 0; i < n; i += 16) __builtin_prefetch(x + i);
}

// Only the last position asks, as in generation: it has no other query to share keys with, and reads each once, at the
// speed of memory. That is highest where reading goes on where it left off, so a row of keys or values is read whole,
// all heads of it, and threads share out the rows, KEYS at a time. Such a piece ends, for each head, in the largest
// score, the sum and the sum of values over its keys, and those are put together, in order, as above.
static void attention_forward_last(float* out, float* lse, const float* qkv, Attention a) {
    enum { KEYS = 32 };
    size_t T = a.T, D = a.D, H = a.H, C = H * D, room = C + (2 + KEYS) * H;
    Range seen = visible_keys(a, T - 1);
    size_t pieces = (seen.end - seen.first + KEYS - 1) / KEYS;
    float scale = 1 / sqrtf((float)D), *all = workspace(a.B * pieces * room);
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (size_t b = 0; b < a.B; b++)
            for (size_t piece = 0; piece < pieces; piece++) {
                size_t j0 = seen.first + piece * KEYS, n = min_size(KEYS, seen.end - j0);
                const float *q = qkv + (b * T + T - 1) * 3 * C, *k = qkv + (b * T + j0) * 3 * C + C, *v = k + C;
                float* o = all + (b * pieces + piece) * room;             // (H,D); then (H) largest scores, (H) sums
                float *largest = o + C, *sum = largest + H, *p = sum + H; // p (H,KEYS)
                memset(o, 0, (C + 2 * H) * sizeof(float));
                for (size_t i = 0; i < H * KEYS; i++) p[i] = -INFINITY;
                for (size_t j = 0; j < n; j++)
                    for (size_t h = 0; h < H; h++) {
                        size_t at = j * 3 * C + h * D;
                        p[h * KEYS + j] = scale * dot(q + h * D, k + at, D);
                        prefetch(k + at + 3 * C, D); // what comes next
                        prefetch(v + at, D);         // and what comes then
                    }
                for (size_t h = 0; h < H; h++) {
                    float *row = p + h * KEYS, most = -FLT_MAX, total = 0;
                    for (size_t j = 0; j < KEYS; j++) most = row[j] > most ? row[j] : most;
                    for (size_t j = 0; j < KEYS; j++) row[j] = exp_(row[j] - most);
                    for (size_t j = 0; j < KEYS; j++) total += row[j];
                    largest[h] = most, sum[h] = total;
                }
                for (size_t j = 0; j < n; j++)
                    for (size_t h = 0; h < H; h++)
                        add_rows(o + h * D, p + h * KEYS + j, matrix(v + j * 3 * C + h * D, D), 1, D);
            }
#pragma omp for collapse(2) schedule(static)
        for (size_t b = 0; b < a.B; b++)
            for (size_t h = 0; h < H; h++) {
                const float *first = all + b * pieces * room, *end = first + pieces * room;
                float *o = out + b * C + h * D, m = -FLT_MAX, sum = 0;
                for (const float* piece = first; piece < end; piece += room) m = fmaxf(m, piece[C + h]);
                memset(o, 0, D * sizeof(float));
                for (const float* piece = first; piece < end; piece += room) {
                    float share = exp_(piece[C + h] - m);
                    sum += share * piece[C + H + h];
                    for (size_t c = 0; c < D; c++) o[c] += share * piece[h * D + c];
                }
                for (size_t c = 0; c < D; c++) o[c] /= sum;
                lse[b * H + h] = m + logf(sum);
            }
    }
}

static void attention_forward_fast(float* out, float* lse, const float* qkv, Attention a) {
    (a.T - a.start == 1 ? attention_forward_last : attention_forward_tiles)(out, lse, qkv, a);
}

// As in the plain version, a tile at a time, with two differences. The sum over j' of p_j' dp_j' would need the tiles
// of all keys first; but it is sum over j' of p_j' (do . v_j') = do . sum over j' of p_j' v_j' = do . out, which needs
// none. And `ds` has the scale in it, which both dq and dk want. A thread does a whole head of a sequence, so its sums
// have one order.
static void attention_backward_fast(float* dqkv, const float* dout, const float* qkv, const float* out,
                                    const float* lse, Attention a) {
    size_t T = a.T, D = a.D, C = a.H * D, wide = dense_width(D), padded = round_up(T, TILE);
    size_t each = 4 * padded * wide + TILE * (2 * D + 3 * wide);
    float scale = 1 / sqrtf((float)D), *space = workspace((size_t)omp_get_max_threads() * each);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (size_t b = 0; b < a.B; b++)
        for (size_t h = 0; h < a.H; h++) {
            const float *head = qkv + b * T * 3 * C + h * D, *o = out + b * T * C + h * D,
                        *d_o = dout + b * T * C + h * D;
            float* dhead = dqkv + b * T * 3 * C + h * D;
            float* k = space + (size_t)omp_get_thread_num() * each; // dense, as all but two
            float *v = k + padded * wide, *dk = v + padded * wide, *dv = dk + padded * wide;
            float *qi = dv + padded * wide, *d_oi = qi + TILE * wide, *dqi = d_oi + TILE * wide;
            float *q_turned = dqi + TILE * wide, *d_o_turned = q_turned + TILE * D;
            copy_rows(k, wide, head + C, 3 * C, T, D);
            copy_rows(v, wide, head + 2 * C, 3 * C, T, D);
            memset(dk, 0, 2 * padded * wide * sizeof(float)); // and dv
            for (size_t i0 = 0; i0 < T; i0 += TILE) {
                size_t queries = min_size(TILE, T - i0);
                Range seen = seen_by_any(a, i0, queries);
                float p[TILE * TILE + MR * TILE] __attribute__((aligned(64))),
                    ds[TILE * TILE + MR * TILE] __attribute__((aligned(64)));
                float p_dp[TILE] = {0}, row_lse[TILE] = {0};
                pack(q_turned, matrix(head + i0 * 3 * C, 3 * C), queries, TILE, D);
                pack(d_o_turned, matrix(d_o + i0 * C, C), queries, TILE, D);
                copy_rows(qi, wide, head + i0 * 3 * C, 3 * C, queries, D);
                copy_rows(d_oi, wide, d_o + i0 * C, C, queries, D);
                for (size_t i = 0; i < queries; i++) {
                    p_dp[i] = dot(d_o + (i0 + i) * C, o + (i0 + i) * C, D); // sum over j of p_j dp_j
                    row_lse[i] = lse[(b * T + i0 + i) * a.H + h];
                }
                for (size_t j0 = seen.first; j0 < seen.end; j0 += TILE) {
                    KeyTile t = key_tile(a, i0, queries, j0);
                    const Range *sees = t.whole ? NULL : t.seen, *seen_by = t.whole ? NULL : t.seen_by;
                    size_t at = j0 * wide;
                    matmul_tile(p, TILE, false, matrix(k + at, wide), q_turned, TILE, t.keys, TILE, D, NULL, seen_by);
                    matmul_tile(ds, TILE, false, matrix(v + at, wide), d_o_turned, TILE, t.keys, TILE, D, NULL,
                                seen_by);
                    if (!t.whole) hide(p, &t);
                    for (size_t j = 0; j < t.keys; j++) {
                        memset(p + j * TILE, 0, unseen(&t, j) * sizeof(float));
                        memset(ds + j * TILE, 0, unseen(&t, j) * sizeof(float));
                        for (size_t i = unseen(&t, j); i < TILE; i++) {
                            float *pji = p + j * TILE + i, *dsji = ds + j * TILE + i; // *dsji is dp yet
                            float log_p = *pji * scale - row_lse[i];
                            *pji = exp_(log_p > 0 ? 0 : log_p); // rounding must not make p larger than 1
                            *dsji = *pji * (*dsji - p_dp[i]) * scale;
                        }
                    }
                    matmul_tile(dv + at, wide, true, matrix(p, TILE), d_oi, wide, t.keys, D, queries, seen_by, NULL);
                    matmul_tile(dk + at, wide, true, matrix(ds, TILE), qi, wide, t.keys, D, queries, seen_by, NULL);
                    // The first tile overwrites, as above.
                    matmul_tile(dqi, wide, j0 > seen.first, transposed(ds, TILE), k + at, wide, queries, D, t.keys,
                                sees, NULL);
                }
                copy_rows(dhead + i0 * 3 * C, 3 * C, dqi, wide, queries, D);
            }
            copy_rows(dhead + C, 3 * C, dk, wide, T, D);
            copy_rows(dhead + 2 * C, 3 * C, dv, wide, T, D);
        }
}

// The plain versions or the fast ones. Both are always compiled, so that the tests can compare them.
#ifndef PLAIN
#define PLAIN 0
#endif

static void matmul(float* c, Matrix a, Matrix b, const float* bias, const float* add, size_t M, size_t N, size_t K) {
    float* wide = in_16_bits && (PLAIN || M > 1) ? widen_matrix(&b, K * N) : NULL;
    (PLAIN ? matmul_plain : matmul_fast)(c, a, b, bias, add, M, N, K);
    free(wide);
}

static void attention_forward(float* out, float* lse, const float* qkv, Attention a) {
    (PLAIN ? attention_forward_plain : attention_forward_fast)(out, lse, qkv, a);
}

static void attention_backward(float* dqkv, const float* dout, const float* qkv, const float* out, const float* lse,
                               Attention a) {
    (PLAIN ? attention_backward_plain : attention_backward_fast)(dqkv, dout, qkv, out, lse, a);
}

// e^x to 2 units in the last place, without libm so that loops vectorise and bits do not depend on the library.
// x = n ln2 + r with |r| <= ln2/2, so e^x = 2^n e^r. Adding 1.5 * 2^23 rounds x/ln2 to the integer n, which then
// stands in the low bits of the sum, and from there is shifted into the exponent. ln2 is subtracted in two parts, the
// first with so few bits that n times it is exact. e^r is a polynomial (Taylor's up to r^7, whose next term is
// under 6e-9). Below -87.3 the result is 0, above 88.3 infinity; NaN stays NaN.
static inline float exp_(float x) {
    float clamped = x < -87.3f ? -87.3f : x;
    clamped = clamped > 88.3f ? 88.3f : clamped;
    float shifted = clamped * 1.44269504f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = clamped - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3F800000u;
    float power;
    memcpy(&power, &bits, sizeof power);
    float y = p * power;
    y = x < -87.3f ? 0.0f : y;
    return x > 88.3f ? INFINITY : y;
}

// ====================================================================================================================
// Random numbers
//
// There is no state to save or to pass around: number i of stream `key` is a hash of the two, the finaliser of
// SplitMix64 (Steele, Lea and Flood 2014), which passes the usual statistical tests on consecutive i. A stream's key
// is itself drawn, from the seed, the purpose and, say, the epoch. So weights can be drawn by many threads in any
// order, and a run that resumes at step 700 draws what the uninterrupted run draws there.

enum { STREAM_WEIGHTS = 1 << 8, STREAM_SHUFFLE, STREAM_PHASE, STREAM_SAMPLE };

static uint64_t random_bits(uint64_t key, uint64_t i) {
    uint64_t x = key + (i + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// Uniform in (0,1), 52 bits and a half: never 0, so its logarithm is finite, and never 1.
static double random_uniform(uint64_t key, uint64_t i) {
    return ((double)(random_bits(key, i) >> 12) + 0.5) * (1.0 / 4503599627370496.0);
}

// Normal with mean 0 and variance 1 (Box and Muller 1958).
static float random_normal(uint64_t key, uint64_t i) {
    double radius = sqrt(-2 * log(random_uniform(key, 2 * i)));
    return (float)(radius * cos(6.283185307179586 * random_uniform(key, 2 * i + 1)));
}

// Where element i of 0..n-1 goes in the shuffle named by key: a permutation computed one element at a time, so that
// the windows of a corpus of any size are shuffled without a list of them. Four Feistel rounds (Luby and Rackoff
// 1988) permute the numbers of an even count of bits that covers n; a result of n or more is permuted again until
// it falls below ("cycle walking"), which takes under four turns on average and keeps it a permutation.
static uint64_t shuffled(uint64_t i, uint64_t n, uint64_t key) {
    int half = 1;
    while (half < 31 && (uint64_t)1 << (2 * half) < n) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (uint64_t round = 0; round < 4; round++) {
            uint64_t next = left ^ (random_bits(key + round, right) & mask);
            left = right;
            right = next;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

// ====================================================================================================================
// Errors and files
//
// Whatever goes wrong is said in one line on stderr that names the thing and what to do about it, and the program
// ends with status 1 (2 for a wrong command line); but what would be lost with it is saved first. Files are read
// through mmap with every size checked before it is used, and written without a name, until all of a file is on the
// disk and takes the old one's place.

enum { MAX_PATH = 4096 };

// Of several processes that train one model: which this one is, of how many. Alone unless the room "several processes"
// says otherwise.
static struct {
    int rank, size, neighbour, neighbours; // neighbours: those on this machine, of which it is number `neighbour`
    const char* host;
    void (*end)(int status); // ends all of them
    bool stopping;           // one of them was told to stop, and all know
} world = {0, 1, 0, 1, "", NULL, false};

static void clear_live_line(void);  // the training loop's progress line, wiped before anything else is printed
static const char* (*rescue)(void); // saves what the end of the program would lose, and says how that went

static void wake(int number) { (void)number; }

static void fail(int status, const char* format, ...) {
    static char line[4 * MAX_PATH]; // if the rescue fails, too, that is appended to what it was to rescue from
    size_t n = strlen(line);
    va_list args;
    va_start(args, format);
    vsnprintf(line + n, sizeof line - n, format, args);
    va_end(args);
    if (rescue) {
        const char* (*save)(void) = rescue;
        rescue = NULL;
        strncat(line, "; ", sizeof line - strlen(line) - 1);
        strncat(line, save(), sizeof line - strlen(line) - 1);
    }
    clear_live_line();
    fflush(stdout);
    for (char* p = line; *p; p++) // a name may hold anything
        if ((unsigned char)*p < ' ' || *p == 127) *p = '?';
    if (signalled && status == 1) status = 128 + signalled;
    if (world.size > 1) {
        // What all fail at, the first says for all. The others wait, and the signals with which they are then ended end
        // them silently, after one of Open MPI's that wakes them.
        signal(SIGCONT, wake);
        if (usleep(1000000 * (unsigned)min_size((size_t)world.rank, 3))) _exit(status);
        fprintf(stderr, "train_gpt: rank %d on %s: %s\n", world.rank, world.host, line);
        usleep(200000); // mpirun passes it on
        world.end(status);
    }
    fprintf(stderr, "train_gpt: %s\n", line);
    exit(status);
}

// What is taken for granted without being known is said, once all is well and work begins.
static char notes[4 * MAX_PATH];
__attribute__((format(printf, 1, 2))) static void note(const char* format, ...) {
    char line[2 * MAX_PATH];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    size_t n = strlen(notes);
    if (!strstr(notes, line)) snprintf(notes + n, sizeof notes - n, "train_gpt: %s\n", line);
}

// Whatever is printed is worth a look: a closed pipe or a full disk loses it.
static void check_output(void) {
    if (fflush(stdout) || ferror(stdout)) die("cannot write to standard output: %s", strerror(errno));
}

// count * size bytes of zeroed memory, aligned to cache lines. Large blocks are aligned to huge pages, which Linux
// gives if asked and with which address translation costs less. All threads touch their parts first, for them to lie
// near.
enum { HUGE_PAGE = 1 << 21 };
static void* allocate(size_t count, size_t size, const char* what) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > SIZE_MAX - HUGE_PAGE) die("%s is too large", what);
    size_t unit = bytes < HUGE_PAGE ? 64 : HUGE_PAGE, blocks = bytes ? (bytes + unit - 1) / unit : 1;
    char* p = (char*)aligned_alloc(unit, blocks * unit);
    if (!p) die("no memory for %s (%.1f MB)", what, (double)bytes / 1e6);
    if (unit == HUGE_PAGE) madvise(p, blocks * unit, MADV_HUGEPAGE);
#pragma omp parallel for schedule(static) if (unit == HUGE_PAGE)
    for (size_t i = 0; i < blocks; i++) memset(p + i * unit, 0, unit);
    return p;
}

// The least memory limit of the control groups, of version 1 or 2, that a process is in. list: /proc/self/cgroup, lines
// such as "0::/user/shell" or "7:memory:/docker/3f"; root: where their files are. A limit also holds in all groups
// below, and in a container the path may be that outside of it, so all its prefixes are tried, down to none.
static size_t cgroup_limit(const char* list, const char* root) {
    size_t least = SIZE_MAX, limit;
    char line[MAX_PATH], controller[64], path[MAX_PATH], file[3 * MAX_PATH];
    FILE* groups = fopen(list, "r");
    while (groups && fgets(line, sizeof line, groups)) {
        bool second = sscanf(line, "0::%4095[^\n]", path) == 1;
        if (!second && (sscanf(line, "%*d:%63[^:]:%4095[^\n]", controller, path) != 2 || !strstr(controller, "memory")))
            continue;
        for (char* end = path + strlen(path); end; end = strrchr(path, '/')) {
            *end = 0;
            snprintf(file, sizeof file, second ? "%s%s/memory.max" : "%s/memory%s/memory.limit_in_bytes", root, path);
            FILE* f = fopen(file, "r");
            if (f && fscanf(f, "%zu", &limit) == 1) least = min_size(least, limit);
            if (f) fclose(f);
        }
    }
    if (groups) fclose(groups);
    return least;
}

// Bytes of memory that a program may take: what the system calls available, or a container's limit.
static size_t memory_available(void) {
    size_t available = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE), kb;
    char line[256];
    FILE* f = fopen("/proc/meminfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %zu", &kb) == 1) available = kb * 1024;
    if (f) fclose(f);
    return min_size(available, cgroup_limit("/proc/self/cgroup", "/sys/fs/cgroup"));
}

// A file's name without its folder.
static const char* name_of(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// The folder that a file is in, until the next call.
static const char* folder_of(const char* path) {
    static char folder[MAX_PATH];
    snprintf(folder, sizeof folder, "%s", path);
    return dirname(folder);
}

// folder/name, until the next call.
static const char* path_in(const char* folder, const char* name) {
    static char path[MAX_PATH];
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= MAX_PATH) die("the name %.40s... is too long", folder);
    return path;
}

// A file's bytes, read-only. The mapping is paged in as it is touched, so a shard may be larger than memory.
typedef struct {
    char path[MAX_PATH];
    const uint8_t* data;
    size_t size;
} File;

static File map_file(const char* path, const char* advice) {
    File file = {"", (const uint8_t*)"", 0}; // an empty file cannot be mapped
    struct stat info;
    if (snprintf(file.path, MAX_PATH, "%s", path) >= MAX_PATH) die("the name %.40s... is too long", path);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe without a writer would wait for one
    if (fd < 0 || fstat(fd, &info) < 0) die("cannot open %s: %s%s", path, strerror(errno), advice);
    if (!S_ISREG(info.st_mode)) die("%s is not a regular file%s", path, advice);
    file.size = (size_t)info.st_size;
    if (file.size) {
        void* p = mmap(NULL, file.size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) die("cannot map %s: %s", path, strerror(errno));
        file.data = (const uint8_t*)p;
    }
    close(fd);
    return file;
}

static void unmap_file(File* file) {
    if (file->size) munmap((void*)file->data, file->size);
    file->size = 0;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// A mapped file that somebody cuts off while it is read raises SIGBUS where it is read, a place as good as any to fail.
static void on_cut_file(int number, siginfo_t* info, void* context) {
    size_t at = (size_t)info->si_addr, from, to;
    char line[2 * MAX_PATH], path[MAX_PATH] = "a file";
    (void)context;
    signal(number, SIG_DFL);
    FILE* maps = fopen("/proc/self/maps", "r");
    while (maps && fgets(line, sizeof line, maps))
        if (sscanf(line, "%zx-%zx", &from, &to) == 2 && from <= at && at < to)
            sscanf(line, "%*s %*s %*s %*s %*s %4095[^\n]", path);
    die("%s was cut off by somebody while it was read", path);
}

// A file being written. It has no name until output_replace() gives it that of the file it replaces: whenever a run
// ends, that one is whole, and, where files can be without a name, no half of another is left. What goes wrong is kept
// in `error`, and all that follows does nothing.
typedef struct {
    FILE* stream;
    const char* error;
    bool named; // where files cannot be without a name, it has a temporary one
    char path[MAX_PATH], temporary[2 * MAX_PATH];
} Output;

static void output_failed(Output* out, const char* error) {
    if (!out->error) out->error = error;
}

// Opens it. size: the room that it will take on the disk, which is asked for now; 0 if that is not known yet.
static void output_open(Output* out, const char* path, size_t size) {
    struct stat info;
    memset(out, 0, sizeof *out);
    if (world.rank) output_failed(out, "that is for the first process");
    // What a link leads to is replaced, not the link; a folder cannot be, and a device must not be.
    if (strlen(path) >= MAX_PATH) output_failed(out, strerror(ENAMETOOLONG));
    if (!*path || path[strlen(path) - 1] == '/') output_failed(out, "that is no file's name");
    if (!realpath(path, out->path)) snprintf(out->path, sizeof out->path, "%s", path);
    bool there = !lstat(out->path, &info);
    if (!there && errno != ENOENT) output_failed(out, strerror(errno));
    if (there && !S_ISREG(info.st_mode))
        output_failed(out, S_ISLNK(info.st_mode) ? "it is a link to nothing" : "it is not a regular file");
    if (there && access(out->path, W_OK)) output_failed(out, strerror(errno));
    if (out->error) return;
    const char* folder = folder_of(out->path);
    mode_t mode = there ? info.st_mode & 0777 : 0666;
    snprintf(out->temporary, sizeof out->temporary, "%s/train_gpt.%x.tmp", folder,
             (unsigned)random_bits((uint64_t)getpid(), (uint64_t)(1e9 * seconds())));
    int fd = open(folder, O_TMPFILE | O_WRONLY | O_CLOEXEC, mode);
    if (fd < 0) {
        fd = open(out->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
        out->named = fd >= 0;
    }
    out->stream = fd < 0 ? NULL : fdopen(fd, "wb");
    if (!out->stream || (size && fallocate(fd, 0, 0, (off_t)size) && errno != EOPNOTSUPP && errno != ENOSYS))
        output_failed(out, strerror(errno));
}

static void output_write(Output* out, const void* data, size_t bytes) {
    if (!out->error && fwrite(data, 1, bytes, out->stream) != bytes) output_failed(out, strerror(errno));
}

// Brings what was written to the disk, and under its temporary name.
static void output_close(Output* out) {
    char unnamed[64];
    if (!out->error && (fflush(out->stream) || fsync(fileno(out->stream)))) output_failed(out, strerror(errno));
    if (!out->error && !out->named) {
        snprintf(unnamed, sizeof unnamed, "/proc/self/fd/%d", fileno(out->stream));
        out->named = !linkat(AT_FDCWD, unnamed, AT_FDCWD, out->temporary, AT_SYMLINK_FOLLOW);
        if (!out->named) output_failed(out, strerror(errno));
    }
    if (out->stream && fclose(out->stream)) output_failed(out, strerror(errno));
}

// Puts what was written, if it could be, in the other's place.
static void output_replace(Output* out) {
    output_close(out);
    if (!out->error && rename(out->temporary, out->path)) output_failed(out, strerror(errno));
    if (out->error && out->named) unlink(out->temporary);
    int fd = open(folder_of(out->path), O_RDONLY | O_CLOEXEC); // the new name reaches the disk with its folder
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
}

// The same for what nothing can go on without.
static void output_finish(Output* out) {
    output_replace(out);
    if (out->error) die("cannot write %s: %s; whatever stood there before is untouched", out->path, out->error);
}

static void write_whole(const char* path, const void* data, size_t size) {
    Output out;
    output_open(&out, path, size);
    output_write(&out, data, size);
    output_finish(&out);
}

// A text that is put together in memory: begin_text() gives the stream to write it to, end_text() makes it whole.
typedef struct {
    char* text;
    size_t length;
    FILE* stream;
} Text;

static FILE* begin_text(Text* t) {
    memset(t, 0, sizeof *t);
    t->stream = open_memstream(&t->text, &t->length);
    if (!t->stream) die("no memory for a text");
    return t->stream;
}

static void end_text(Text* t, const char* what) {
    bool failed = ferror(t->stream);
    if (fclose(t->stream) || failed || !t->text) die("no memory for %s", what);
}

// That a file can be written is tried before the work that it is to keep.
static void try_output(const char* path, size_t size) {
    Output out;
    output_open(&out, path, size);
    output_close(&out);
    if (out.named) unlink(out.temporary);
    if (out.error) die("cannot write %s: %s", path, out.error);
}

// The file that a name leads to, until the next call: a link's end, else the name itself.
static const char* resolved(const char* path) {
    static char real[MAX_PATH];
    struct stat info;
    return !lstat(path, &info) && S_ISLNK(info.st_mode) && realpath(path, real) ? real : path;
}

// The first of PATH.old, PATH.old2 and so on that is free, until the next call.
static const char* free_old_name(const char* path) {
    static char old[MAX_PATH + 16];
    struct stat info;
    snprintf(old, sizeof old, "%s.old", path);
    for (int n = 2; !lstat(old, &info); n++) snprintf(old, sizeof old, "%s.old%d", path, n);
    return old;
}

// What is about to be replaced but is another run's gets a second name, NAME.old. It keeps its first until the new file
// takes that, so that the name is never without a file; where a file cannot have two, it loses the first. Returns what
// went wrong, or NULL.
static const char* keep_old(const char* path) {
    const char* old = free_old_name(path);
    return link(path, old) && rename(path, old) ? strerror(errno) : NULL;
}

static bool same_file(const struct stat* a, const struct stat* b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

// Makes a file this process's own until it ends, however it does; ends if it is another's. The sign is a socket that has
// the file's folder and name for its own name and is in no folder, so that nothing is left behind.
static void take_file(const char* path) {
    struct sockaddr_un name = {AF_UNIX, ""};
    struct ucred other = {0, 0, 0};
    struct stat info;
    socklen_t size = sizeof other;
    if (stat(folder_of(path), &info)) return;
    uint64_t key = random_bits((uint64_t)info.st_dev, (uint64_t)info.st_ino);
    for (const char* p = name_of(path); *p; p++) key = random_bits(key, (uint8_t)*p);
    snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "train_gpt %016llx", (unsigned long long)key);
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); // kept open
    if (s < 0 || !bind(s, (struct sockaddr*)&name, sizeof name) || errno != EADDRINUSE) {
        if (s >= 0) listen(s, 64);
        return;
    }
    if (!connect(s, (struct sockaddr*)&name, sizeof name)) getsockopt(s, SOL_SOCKET, SO_PEERCRED, &other, &size);
    if (other.pid == getpid()) fail(2, "--log and --checkpoint are the same file, %s", path);
    die("%s is being written by another train_gpt, process %d", path, (int)other.pid);
}

// ====================================================================================================================
// The model in memory
//
// The tables of the model's room, expanded once more: each tensor's place. Parameters lie in one block, and so do their
// gradients and each of AdamW's moments, at the same offsets; activations lie in another. Offsets are the same on a
// GPU, whose multiply wants the vocabulary padded, so that the two can copy whole blocks and read each other's
// checkpoints; the padding is never written to a file.

// A device is what carries these passes out: the functions of this file, or train_gpt.cu's of the same names. The
// training loop and generation drive either through this struct. `wait` returns when all that was asked for is done;
// loss and gradient norm may be read from the model only then.
typedef struct {
    const char* (*start)(void); // readies the device and describes it
    size_t (*memory_available)(void);
    size_t (*memory)(Config config, size_t B, size_t T, bool training);
    double (*peak)(void);
    void (*create_model)(Model* model, bool training);
    void (*create_activations)(Activations* a, const Model* model, size_t B, size_t T, bool training);
    void (*free_model)(Model* model);
    void (*free_activations)(Activations* a);
    void (*forward)(Model* model, Activations* a, const int* tokens, const int* targets, size_t B, size_t T,
                    size_t start, bool training);
    void (*backward)(Model* model, Activations* a, const int* tokens, const int* targets, size_t B, size_t T,
                     float share);
    void (*update)(Model* model, AdamW o);
    void (*wait)(Model* model);
    void (*to_host)(float* to, const float* from, size_t n); // between the model's blocks and the host
    void (*to_device)(float* to, const float* from, size_t n);
    void (*read_activation)(float* to, const Activations* a, const float* tensor, size_t n); // first n of one of a's
    const char* (*refuses)(Config config); // the first option of a shape that it does not compute; NULL: computes all
} Device;
extern const Device cpu; // this file's
static const Device* device = &cpu;

// AdamW's first moments (which 1) or second (2) of the whole model, laid out as the weights are. Several processes call
// it together, and in the end with 0: till then their gradients' room is taken.
static const float* whole_moments(const Model* model, int which);

static size_t cache_lines(size_t bytes) { return round_up(bytes, 64); }

// The rows that the token embedding has room for, of which the last stay zero.
static size_t padded_V(size_t V) { return round_up(V, 128); }

// Where the part of process r begins in a tensor: parts are equally many cache lines, to within one.
static size_t part_start(size_t size, int r) {
    return min_size(size, (size + 15) / 16 * (size_t)r / (size_t)world.size * 16);
}

// What of each tensor is updated by this process. The gradients that others send for it share a place with other
// layers'.
static void share_out(Model* model) {
    size_t filled[1 + MAX_LAYERS] = {0}; // from layer -1, no layer's, to layer L-1
    model->moment_size = model->arriving_size = 0;
    for (Tensor* t = model->tensors; t < model->tensors + model->tensor_count; t++) {
        t->own = part_start(t->size, world.rank);
        t->owned = part_start(t->size, world.rank + 1) - t->own;
        t->moment = world.size == 1 ? t->offset : model->moment_size;
        model->moment_size = t->moment + cache_lines(t->owned * sizeof(float)) / sizeof(float);
        t->arriving = filled[1 + t->layer];
        filled[1 + t->layer] += t->owned * (size_t)(world.size - 1);
        if (filled[1 + t->layer] > model->arriving_size) model->arriving_size = filled[1 + t->layer];
    }
}

static void describe_parameters(Model* model) {
    const Config c = model->config;
#define PARAMETER_ROW(kind, field, name, rows, columns, mean, std) \
    {kind == EACH ? c.L : 1,                                       \
     {name, rows, columns, mean, std, 0, 0, offsetof(Parameters, field), kind == EACH ? 0 : -1, 0, 0, 0, 0}},
    const struct {
        size_t count;
        Tensor tensor;
    } table[] = {PARAMETERS(PARAMETER_ROW)};
    size_t kinds = sizeof table / sizeof *table;
    model->tensors = (Tensor*)allocate(kinds * c.L, sizeof(Tensor), "the list of tensors");
    model->tensor_count = model->parameter_count = model->block_size = 0;
    for (size_t i = 0; i < kinds; i++)
        for (size_t l = 0; l < table[i].count && table[i].tensor.columns; l++) { // none where there are no columns
            Tensor* t = &model->tensors[model->tensor_count++];
            *t = table[i].tensor;
            snprintf(t->name, sizeof t->name, table[i].tensor.name, l);
            t->slot += l * sizeof(float*);
            t->layer += (long)l;
            t->offset = model->block_size;
            t->size = (t->rows ? t->rows : 1) * t->columns;
            size_t room = t->slot == offsetof(Parameters, wte) ? padded_V(c.V) * c.C : t->size;
            size_t width = in_16_bits && t->rows ? sizeof(uint16_t) : sizeof(float);
            model->block_size += cache_lines(room * width) / sizeof(float);
            model->parameter_count += t->size;
        }
    share_out(model);
}

static void point_parameters(Parameters* p, const Model* model, float* block) {
    for (size_t i = 0; i < model->tensor_count; i++) {
        float* at = block + model->tensors[i].offset;
        memcpy((char*)p + model->tensors[i].slot, &at, sizeof at);
    }
}

// Lays out the activations, from `block` if that is not NULL, with numbers of type `real` in real_size bytes; those of
// width 0 are NULL. Returns the number of bytes.
static size_t lay_out_activations(Activations* a, Config c, size_t real_size, void* block) {
    size_t size = 0;
    enum { BYTES_float = sizeof(float) };
    const size_t BYTES_real = real_size;
#define ACTIVATION_ROW(kind, type, field, width) {kind, BYTES_##type, width, offsetof(Activations, field)},
    const struct {
        Kind kind;
        size_t size, width, slot;
    } table[] = {ACTIVATIONS(ACTIVATION_ROW)};
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        Kind kind = table[i].kind;
        if (kind == GRADIENT && !a->training) continue;
        size_t rows = kind == LOGITS && !a->training ? 1 : a->B * a->T, start = size;
        if (kind == LOGITS && a->logit_rows) rows = min_size(rows, a->logit_rows);
        size_t bytes = cache_lines(rows * table[i].width * table[i].size);
        for (size_t l = 0; l < (kind == EACH || kind == AGAIN || kind == CACHE ? c.L : 1); l++) {
            bool shared = l > 0 && (a->training ? kind == AGAIN && recompute : kind != CACHE);
            char* at = block && bytes ? (char*)block + (shared ? start : size) : NULL;
            memcpy((char*)a + table[i].slot + l * sizeof at, &at, sizeof at);
            if (!shared) size += bytes;
        }
    }
    return size;
}

static void cpu_create_model(Model* model, bool training) {
    describe_parameters(model);
    model->weights = (float*)allocate(model->block_size, sizeof(float), "the parameters");
    point_parameters(&model->w, model, model->weights);
    if (!training) return;
    model->gradients = (float*)allocate(model->block_size, sizeof(float), "the gradients");
    model->moment1 = (float*)allocate(model->moment_size, sizeof(float), "AdamW's first moments");
    model->moment2 = (float*)allocate(model->moment_size, sizeof(float), "AdamW's second moments");
    model->arriving = (float*)allocate(model->arriving_size, sizeof(float), "other processes' gradients");
    point_parameters(&model->d, model, model->gradients);
}

static void cpu_create_activations(Activations* a, const Model* model, size_t B, size_t T, bool training) {
    a->B = B, a->T = T, a->training = training;
    a->block = (float*)allocate(lay_out_activations(a, model->config, sizeof(float), NULL), 1, "the activations");
    lay_out_activations(a, model->config, sizeof(float), a->block);
}

// Bytes that create_model and create_activations take.
static size_t cpu_memory(Config config, size_t B, size_t T, bool training) {
    Model model;
    Activations a;
    memset(&a, 0, sizeof a);
    a.B = B, a.T = T, a.training = training;
    model.config = config;
    describe_parameters(&model);
    free(model.tensors);
    size_t floats = training ? 2 * (model.block_size + model.moment_size) + model.arriving_size : model.block_size;
    return floats * sizeof(float) + lay_out_activations(&a, config, sizeof(float), NULL);
}

static void cpu_free_activations(Activations* a) { free(a->block); }

static void cpu_free_model(Model* model) {
    free(model->tensors);
    free(model->weights);
    free(model->gradients);
    free(model->moment1);
    free(model->moment2);
    free(model->arriving);
}

// The machine's rate of multiply-adds with nothing to load or store, all threads, operations a second; with bfloat16
// that of its kernel for pairs, with panels from the nearest cache.
static double cpu_peak(void) {
    enum { CHAINS = 12, STEPS = 400000 }; // more sums than multiply-adds that are under way at a time
    enum { PAIRS = 128, CALLS = 20000 };
    double best = 0, operations = pair_kernel ? 4.0 * PAIRS * MR * NR * CALLS : 2.0 * CHAINS * STEPS * LANES;
    for (int trial = 0; trial < 3; trial++) {
        double start = seconds();
        float total = 0;
#pragma omp parallel reduction(+ : total)
        {
            float a[PAIRS * MR] = {0}, b[PAIRS * NR] = {0}, tile[MR * NR];
            vec sum[CHAINS], x;
            for (int call = 0; pair_kernel && call < CALLS; call++) pair_kernel(PAIRS, a, b, tile);
            for (int lane = 0; lane < LANES; lane++) x[lane] = 1e-3f * (float)(1 + lane + omp_get_thread_num());
            for (int i = 0; i < CHAINS; i++) sum[i] = x + (float)i;
            for (int step = 0; !pair_kernel && step < STEPS; step++)
#pragma GCC unroll 12
                for (int i = 0; i < CHAINS; i++) sum[i] = sum[i] * x + x;
            for (int i = 0; i < CHAINS; i++) total += sum[i][0];
        }
        double rate = operations * omp_get_max_threads() / (seconds() - start);
        if (total != 0 && rate > best) best = rate; // the sums are wanted, or none would be computed
    }
    return best;
}

static const char* cpu_start(void) {
    static char name[96];
    int n = snprintf(name, sizeof name, "CPU, %d threads", omp_get_max_threads());
    if (bf16) snprintf(name + n, sizeof name - (size_t)n, ", bfloat16 by %s", multiplies_bf16(pair_kernel));
    return name;
}

// The first option by which a model is not GPT-2, which has the rows up to L, or NULL.
static const char* beyond_gpt2(Config c) {
#define BEYOND(field, option, initial, least, most, help) \
    if (offsetof(Config, field) > offsetof(Config, L) && c.field) return option;
    CONFIG(BEYOND)
    return NULL;
}

static void cpu_wait(Model* model) { (void)model; }
static void cpu_copy(float* to, const float* from, size_t n) { memcpy(to, from, n * sizeof(float)); }
static void cpu_read_activation(float* to, const Activations* a, const float* tensor, size_t n) {
    (void)a;
    cpu_copy(to, tensor, n);
}

// clang-format off
const Device cpu = {cpu_start, memory_available, cpu_memory, cpu_peak, cpu_create_model, cpu_create_activations,
                    cpu_free_model, cpu_free_activations, cpu_forward, cpu_backward, cpu_update, cpu_wait,
                    cpu_copy, cpu_copy, cpu_read_activation, NULL};
// clang-format on
static const Device* cuda_device;     // in a program built from train_gpt.cu
static void (*compare_devices)(void); // likewise
static int cuda_number;               // which GPU

static void next_logits(float* logits, Model* model, Activations* a, const int* tokens, size_t T, size_t start) {
    device->forward(model, a, tokens, NULL, 1, T, start, false);
    device->wait(model);
    device->read_activation(logits, a, a->logits, model->config.V);
}

// Mean loss of the forward passes since the last call.
static double take_loss(Model* model) {
    device->wait(model);
    double loss = model->loss_sum / model->loss_count;
    model->loss_sum = model->loss_count = 0;
    return loss;
}

// Floating-point operations of one training step on B sequences of T tokens. A weight of a matrix takes part in one
// multiplication and one addition for each token forward, and in four operations backward, where dx and dW are two
// products of the same size: 6 in all. A layer has 12 C^2 such weights: 3 C^2 in qkv_w, C^2 in att_w, 4 C^2 in fc_w and
// as many in mlp_w; and there is wte (V,C) for the logits. Attention multiplies each query with the T/2 keys that it
// sees on average, and as many weights with values: 2 * C * T/2 multiply-adds for each token and layer. What the
// backward pass computes again is not counted.
static double step_operations(Config c, size_t B, size_t T) {
    double C = (double)c.C, L = (double)c.L, weights = 12 * C * C * L + (double)c.V * C;
    return 6 * (weights + C * L * (double)T) * (double)(B * T);
}

static void initialize(Model* model, uint64_t seed) {
    uint64_t stream = random_bits(seed, STREAM_WEIGHTS);
    for (size_t i = 0; i < model->tensor_count; i++) {
        const Tensor* t = &model->tensors[i];
        float* w = (float*)allocate(t->size, sizeof(float), "a tensor's first values");
        initial_values(w, t, random_bits(stream, i));
        device->to_device(model->weights + t->offset, w, t->size);
        free(w);
    }
}

// ====================================================================================================================
// Tokenizer
//
// A token is a string of bytes, and its number is its rank. To encode, text is cut into pieces by GPT-2's pattern
//     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// a piece begins as single bytes, and as long as two neighbours together are a token, the pair that makes the token
// of the lowest rank is joined, the leftmost first (byte-pair encoding: Sennrich, Haddow and Birch 2016; GPT-2:
// Radford et al. 2019). The file, tokenizer.bin, is described in prepare_data.py. It brings the ranges of Unicode's
// letters, numbers and white space along, so that none stand here.

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the files are little-endian, and so must the machine be"
#endif

enum { HEADER = 256, TOKENIZER_MAGIC = 20261121, SHARD_MAGIC = 20240520 };
enum { OTHER, LETTER, NUMBER, SPACE };
enum { BROKEN = 0x110000, UNFINISHED, CHARACTERS }; // bytes that are no character
enum { SLOTS = 4 * MAX_SIZE };

struct Tokenizer {
    File file;     // a copy of it
    uint64_t mark; // its fingerprint
    size_t V;
    int end_of_text; // the token between documents, or -1
    const uint32_t* offsets;
    const uint8_t* strings;
    uint8_t* classes; // of each character of Unicode
    uint32_t* slots;  // hash table from a string to its token + 1
};

static uint64_t fingerprint(const uint8_t* data, size_t n) { // FNV-1a
    uint64_t hash = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++) hash = (hash ^ data[i]) * 0x100000001B3u;
    return hash;
}

typedef struct {
    const uint8_t* p;
    size_t n;
} Bytes;

static Bytes token_string(const Tokenizer* t, int token) {
    Bytes s = {t->strings + t->offsets[token], t->offsets[token + 1] - t->offsets[token]};
    return s;
}

// The slot of the token with this string, or the empty slot where it would stand.
static uint32_t* find_slot(const Tokenizer* t, const uint8_t* s, size_t n) {
    for (uint64_t i = fingerprint(s, n) % SLOTS;; i = (i + 1) % SLOTS) {
        if (!t->slots[i]) return &t->slots[i];
        Bytes token = token_string(t, (int)t->slots[i] - 1);
        if (token.n == n && !memcmp(token.p, s, n)) return &t->slots[i];
    }
}

static int find_token(const Tokenizer* t, const uint8_t* s, size_t n) { return (int)*find_slot(t, s, n) - 1; }

// The tokenizer in these bytes, which are copied: to an address that suits numbers, and because the file at `path` may
// become another while a run that saves it goes on.
static Tokenizer read_tokenizer(const char* path, const uint8_t* data, size_t size) {
    Tokenizer t;
    int32_t header[HEADER];
    memset(&t, 0, sizeof t);
    memcpy(header, data, min_size(size, sizeof header));
    if (size < sizeof header || header[0] != TOKENIZER_MAGIC || header[1] != 1)
        die("%s is not a tokenizer made by prepare_data.py, or is cut off", path);
    int64_t V = header[3], S = header[4], R = header[5];
    if (V < 256 || V > MAX_SIZE || S < V || R < 0 || header[6] < -1 || header[6] >= V ||
        size != sizeof header + 12 * (uint64_t)R + 4 * (uint64_t)(V + 1) + (uint64_t)S)
        die("%s is damaged: its header does not fit its size", path);
    snprintf(t.file.path, MAX_PATH, "%s", path);
    t.file.size = size;
    t.file.data = (const uint8_t*)memcpy(allocate(size, 1, "the tokenizer"), data, size);
    t.mark = fingerprint(t.file.data, size);
    const uint32_t* ranges = (const uint32_t*)(t.file.data + sizeof header);
    t.V = (size_t)V;
    t.end_of_text = header[6];
    t.offsets = ranges + 3 * R;
    t.strings = (const uint8_t*)(t.offsets + V + 1);
    t.classes = (uint8_t*)allocate(CHARACTERS, 1, "the tokenizer");
    for (const uint32_t* r = ranges; r < t.offsets; r += 3) {
        if (r[0] > r[1] || r[1] >= BROKEN || (r > ranges && r[0] <= r[-2]) || r[2] < LETTER || r[2] > SPACE)
            die("%s is damaged: its Unicode ranges are out of order", path);
        memset(t.classes + r[0], (int)r[2], r[1] - r[0] + 1);
    }
    for (size_t i = 0; i < t.V; i++)
        if (t.offsets[0] != 0 || t.offsets[i + 1] <= t.offsets[i] || t.offsets[t.V] != S)
            die("%s is damaged: its tokens' offsets are out of order", path);
    t.slots = (uint32_t*)allocate(SLOTS, sizeof *t.slots, "the tokenizer");
    for (size_t i = 0; i < t.V; i++) {
        Bytes s = token_string(&t, (int)i);
        if ((int)i == t.end_of_text) continue; // never made by joining
        uint32_t* slot = find_slot(&t, s.p, s.n);
        if (*slot) die("%s is damaged: tokens %u and %zu are the same", path, *slot - 1, i);
        *slot = (uint32_t)i + 1;
    }
    for (int byte = 0; byte < 256; byte++) {
        uint8_t s = (uint8_t)byte;
        if (find_token(&t, &s, 1) < 0) die("%s is damaged: no token for byte %d", path, byte);
    }
    return t;
}

static Tokenizer load_tokenizer(const char* path) {
    char advice[2 * MAX_PATH];
    snprintf(advice, sizeof advice, "; `python3 prepare_data.py --out %s` makes it from text", folder_of(path));
    File file = map_file(path, advice);
    Tokenizer t = read_tokenizer(path, file.data, file.size);
    unmap_file(&file);
    return t;
}

// Length of the UTF-8 character at s, of n > 0 bytes, and its code point. A byte that begins none is a character of its
// own with a code of no class: UNFINISHED if more bytes could make it one, else BROKEN, as overlong forms and surrogates
// are.
static size_t utf8_character(const uint8_t* s, size_t n, uint32_t* code) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t length = s[0] < 0x80 ? 1 : s[0] < 0xC0 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : s[0] < 0xF8 ? 4 : 0;
    uint32_t c = length == 1 ? s[0] : s[0] & (0x7Fu >> length);
    for (size_t i = 1; i < length; i++) {
        *code = i == n ? UNFINISHED : BROKEN;
        if (i == n || (s[i] & 0xC0) != 0x80) return 1;
        c = c << 6 | (s[i] & 0x3F);
    }
    *code = BROKEN;
    if (length == 0 || c < least[length] || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) return 1;
    *code = c;
    return length;
}

// The class of the character at s, whose length is put in *length.
static int character_class(const Tokenizer* t, const uint8_t* s, size_t n, size_t* length) {
    uint32_t code;
    *length = utf8_character(s, n, &code);
    return t->classes[code];
}

// Length of the first piece of text that GPT-2's pattern, above, cuts off; its alternatives are tried in order.
static size_t piece_length(const Tokenizer* t, const uint8_t* s, size_t n) {
    static const char* const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    for (size_t i = 0; s[0] == '\'' && i < sizeof endings / sizeof *endings; i++) {
        size_t letters = strlen(endings[i]);
        if (letters < n && !memcmp(s + 1, endings[i], letters)) return 1 + letters;
    }
    size_t length, last = 0, end = s[0] == ' ' && n > 1 ? 1 : 0;
    int first = character_class(t, s + end, n - end, &length);
    for (; end < n && character_class(t, s + end, n - end, &length) == first; end += length) last = length;
    // White space before a word leaves its last character to the word, unless there is only one.
    return first != SPACE || end == n || end == last ? end : end - last;
}

// Two neighbouring parts of a piece that make a token are a join: one number, the token * 2^32 + the byte where the
// first part begins, so that the least is the one to do next. The piece's n bytes are the leaves of a tree: tree[n + i]
// is the join of the part that begins at byte i, or UINT64_MAX if there is none, and above them tree[k] is the lesser of
// tree[2k] and tree[2k + 1]. So tree[1] is the least of all.

// A part of the piece s begins at byte i if size[i] > 0. Looks anew whether the one at `left` and the next make a token.
static void set_join(const Tokenizer* t, const uint8_t* s, size_t n, const uint32_t* size, uint64_t* tree,
                     size_t left) {
    size_t right = left + size[left], k = n + left;
    int token = size[left] && right < n ? find_token(t, s + left, size[left] + size[right]) : -1;
    tree[k] = token < 0 ? UINT64_MAX : (uint64_t)token << 32 | left;
    for (; k > 1; k /= 2) tree[k / 2] = tree[k] < tree[k ^ 1] ? tree[k] : tree[k ^ 1];
}

// size and tree are working memory, for n and 2n.
static size_t encode_piece(const Tokenizer* t, const uint8_t* s, size_t n, uint32_t* size, uint64_t* tree,
                           int* tokens) {
    size_t made = 0;
    for (size_t i = 0; i < n; i++) size[i] = 1;
    memset(tree, 0xFF, 2 * n * sizeof *tree); // no joins yet
    for (size_t i = 0; i < n; i++) set_join(t, s, n, size, tree, i);
    while (tree[1] < UINT64_MAX) {
        size_t left = tree[1] & UINT32_MAX, right = left + size[left];
        size[left] += size[right];
        size[right] = 0;
        set_join(t, s, n, size, tree, right);
        set_join(t, s, n, size, tree, left);
        while (left > 0 && !size[--left]) continue; // to the part before, if there is one
        set_join(t, s, n, size, tree, left);
    }
    for (size_t i = 0; i < n; i += size[i]) tokens[made++] = find_token(t, s + i, size[i]);
    return made;
}

// Encodes n bytes, any bytes. tokens has room for n. Returns the number of tokens.
static size_t encode(const Tokenizer* t, const uint8_t* text, size_t n, int* tokens) {
    uint32_t* size = NULL;
    uint64_t* tree = NULL;
    size_t room = 0, made = 0;
    if (n >= UINT32_MAX / 4) die("a text of more than 1 GB cannot be encoded at once");
    for (size_t at = 0, length; at < n; at += length) {
        length = piece_length(t, text + at, n - at);
        if (length > room) {
            room = 2 * length;
            free(size), free(tree);
            size = (uint32_t*)allocate(room, sizeof *size, "encoding");
            tree = (uint64_t*)allocate(2 * room, sizeof *tree, "encoding");
        }
        made += encode_piece(t, text + at, length, size, tree, tokens + made);
    }
    free(size), free(tree);
    return made;
}

// Prints bytes as they come, but never a part of a UTF-8 character: an unfinished one waits for its other bytes. What
// is no UTF-8 is shown as the replacement character.
typedef struct {
    uint8_t bytes[4];
    size_t count;
} Utf8Printer;

static void utf8_print(Utf8Printer* p, const uint8_t* s, size_t n, bool last) {
    while (n || p->count) {
        if (n && p->count < 4) {
            p->bytes[p->count++] = *s++;
            n--;
        }
        uint32_t code;
        size_t length = utf8_character(p->bytes, p->count, &code);
        if (code == UNFINISHED && n) continue;
        if (code == UNFINISHED && !last) return;
        if (code >= BROKEN)
            fputs("\xEF\xBF\xBD", stdout);
        else
            fwrite(p->bytes, 1, length, stdout);
        p->count -= length;
        memmove(p->bytes, p->bytes + length, p->count);
    }
}

static Utf8Printer generated;

static bool is_end_of_text(const Tokenizer* t, int token) { return token == t->end_of_text; }

static void print_token(const Tokenizer* t, int token) {
    Bytes s = token_string(t, token);
    utf8_print(&generated, s.p, s.n, false);
    check_output();
}

static void print_rest(void) { utf8_print(&generated, NULL, 0, true); }

// ====================================================================================================================
// Data loader
//
// A shard is a file of tokens: 256 int32 of header (20240520, 1, number of tokens, and in two words the fingerprint of
// its tokenizer.bin, or 0), then uint16 each. Shards are cut into windows of T tokens, whose targets are the same tokens
// one further on. An epoch visits every window once, in an order of its own and with the cuts shifted by an amount of
// its own. All of that is computed from the seed and the number of windows taken so far, which is therefore the
// loader's whole state.

typedef struct {
    File file;
    const uint16_t* tokens;
    size_t count, windows;
} Shard;

typedef struct {
    Shard* shards;
    size_t shard_count, token_count, windows, T, V;
} Data;

static Shard open_shard(const char* path, size_t T) {
    Shard s;
    s.file = map_file(path, "");
    const int32_t* header = (const int32_t*)s.file.data;
    if (s.file.size < HEADER * 4 || header[0] != SHARD_MAGIC || header[1] != 1)
        die("%s is not a file of tokens, or is cut off", path);
    if (header[2] < 0 || s.file.size != HEADER * 4 + 2 * (uint64_t)header[2])
        die("%s is damaged: its header says %d tokens, its size says %zu", path, header[2],
            (s.file.size - HEADER * 4) / 2);
    s.tokens = (const uint16_t*)(s.file.data + HEADER * 4);
    s.count = (size_t)header[2];
    size_t cuts = s.count ? (s.count - 1) / T : 0;
    s.windows = cuts > 1 ? cuts - 1 : cuts; // one is kept back as room for the shift
    return s;
}

// pattern: a file, or if there is none of that name a glob that matches several; T: tokens in a window.
static Data open_data(const char* pattern, size_t T, size_t V) {
    Data d = {NULL, 0, 0, 0, T, V};
    glob_t found;
    bool file = !access(pattern, F_OK); // whatever glob() would make of its name
    if (glob(file ? "" : pattern, GLOB_NOCHECK, NULL, &found)) die("no memory to look for %s", pattern);
    d.shard_count = found.gl_pathc;
    d.shards = (Shard*)allocate(d.shard_count, sizeof(Shard), "the list of shards");
    for (size_t i = 0; i < d.shard_count; i++) {
        d.shards[i] = open_shard(file ? pattern : found.gl_pathv[i], T);
        d.windows += d.shards[i].windows;
        d.token_count += d.shards[i].count;
    }
    globfree(&found);
    if (!d.windows)
        die("%s: %zu tokens are too few for a context of %zu (it needs one more than that): more text, or a smaller "
            "--context",
            pattern, d.token_count, T);
    return d;
}

// What tells texts apart: their tokens, of which a large one has 1,024 pieces looked at.
static uint64_t data_mark(const Data* d) {
    enum { PIECES = 1024, PIECE = 4096 };
    uint64_t mark = 0;
    for (const Shard* s = d->shards; s < d->shards + d->shard_count; s++) {
        size_t size = 2 * s->count, step = size / PIECES > PIECE ? size / PIECES : PIECE;
        for (size_t at = 0; at < size; at += step)
            mark = random_bits(mark, fingerprint((const uint8_t*)s->tokens + at, min_size(PIECE, size - at)));
    }
    return mark;
}

// Window `index` of all shards, cut with the shift that `key` names (0: none). inputs, targets (T).
static void load_window(const Data* d, size_t index, uint64_t key, int* inputs, int* targets) {
    const Shard* s = d->shards;
    while (index >= s->windows) index -= (s++)->windows;
    size_t most = s->count - 1 - s->windows * d->T; // by how much the cuts may be shifted
    size_t start = index * d->T + (key ? random_bits(key, (uint64_t)(s - d->shards)) % (most + 1) : 0);
    for (size_t i = 0; i <= d->T; i++) {
        int token = s->tokens[start + i];
        if ((size_t)token >= d->V)
            die("%s: token %zu is %d, but the vocabulary has %zu: not made with this tokenizer", s->file.path,
                start + i, token, d->V);
        if (i < d->T) inputs[i] = token;
        if (i > 0) targets[i - 1] = token;
    }
}

// The training windows number `taken` to taken + B - 1 since the run began. inputs, targets (B,T).
static void load_batch(const Data* d, uint64_t seed, uint64_t taken, size_t B, int* inputs, int* targets) {
    for (size_t b = 0; b < B; b++) {
        uint64_t epoch = (taken + b) / d->windows, i = (taken + b) % d->windows;
        uint64_t order = random_bits(random_bits(seed, STREAM_SHUFFLE), epoch);
        uint64_t shift = random_bits(random_bits(seed, STREAM_PHASE), epoch) | 1;
        load_window(d, (size_t)shuffled(i, d->windows, order), shift, inputs + b * d->T, targets + b * d->T);
    }
}

// ====================================================================================================================
// Checkpoint
//
// A safetensors file: the length of a JSON text as uint64, the text, then the tensors' bytes. The text is an object:
//     {"__metadata__": {"key": "value", ...}, "name": {"dtype": "F32", "shape": [..], "data_offsets": [from, to]}, ...}
// with offsets counted from the end of the text, and no byte between tensors unaccounted for. A training checkpoint
// has the weights under Hugging Face's names, AdamW's moments as adam.m.NAME and adam.v.NAME, and in its metadata
// the options, the step and the place in the data: all that --resume needs to go on bit for bit. Its tokenizer.bin is in
// it as a tensor of bytes, for a model to write with no other file, whatever has become of the text.

// JSON is read into a flat list: a pair for each string, number and word, whose key is the way to it. So of the text
// {"a": {"b": [5, true]}} come the pairs a/b/0 = 5 and a/b/1 = true. What is too long is cut off.
enum { MAX_PAIRS = 1 << 16, MAX_DIMENSIONS = 4 };
typedef struct {
    char key[128], value[64];
} Pair;

typedef struct {
    Pair* pairs; // in the order of their keys
    size_t count;
    const char *path, *text, *p; // while it is read: the file; its text, with a zero after it; what comes next
} Json;

__attribute__((noreturn)) static void json_fail(const Json* j, const char* what) {
    die("%s is damaged: %s at byte %zu of its JSON", j->path, what, (size_t)(j->p - j->text));
}

// If c is the next character after white space, takes it.
static bool json_take(Json* j, char c) {
    j->p += strspn(j->p, " \n\t\r");
    if (*j->p != c) return false;
    j->p++;
    return true;
}

// Names here are plain: escapes other than \" \\ \/ are kept as they stand.
static void json_string(Json* j, char* out, size_t room) {
    size_t n = 0;
    if (!json_take(j, '"')) json_fail(j, "'\"' missing");
    for (; *j->p != '"'; j->p++) {
        if (*j->p == '\\' && j->p[1] && strchr("\"\\/", j->p[1])) j->p++;
        if (!*j->p) json_fail(j, "a string does not end");
        if (n + 1 < room) out[n++] = *j->p;
    }
    j->p++;
    out[n] = 0;
}

// Adds the pairs of the value that comes next, to which `key` leads. Two prefixes are left out: of metadata, and of
// names in a model that was saved with its head.
static void json_value(Json* j, const char* key, int depth) {
    char name[96], inner[256];
    bool object = json_take(j, '{');
    if (depth > 64) json_fail(j, "too deep a nesting");
    if (object || json_take(j, '[')) {
        char close = object ? '}' : ']';
        size_t n = 0;
        if (json_take(j, close)) return;
        do {
            snprintf(name, sizeof name, "%zu", n++);
            if (object) json_string(j, name, sizeof name);
            if (object && !json_take(j, ':')) json_fail(j, "':' missing");
            snprintf(inner, sizeof inner, "%.127s%s%s", key, *key ? "/" : "", name);
            json_value(j, inner, depth + 1);
        } while (json_take(j, ','));
        if (!json_take(j, close)) json_fail(j, object ? "'}' missing" : "']' missing");
        return;
    }
    if (j->count == MAX_PAIRS) json_fail(j, "too long a list");
    Pair* pair = &j->pairs[j->count++];
    size_t n = strspn(j->p, "+-.0123456789abcdefghijklmnopqrstuvwxyzE");
    key += !strncmp(key, "__metadata__/", 13) ? 13 : !strncmp(key, "transformer.", 12) ? 12 : 0;
    snprintf(pair->key, sizeof pair->key, "%.127s", key);
    snprintf(pair->value, sizeof pair->value, "%.*s", (int)min_size(n, sizeof pair->value - 1), j->p);
    if (!n && *j->p != '"') json_fail(j, "a value is missing");
    if (!n) json_string(j, pair->value, sizeof pair->value);
    j->p += n;
}

static int compare_pairs(const void* a, const void* b) { return strcmp(((const Pair*)a)->key, ((const Pair*)b)->key); }

// The file's `length` bytes at data, which must be an object.
static Json read_json(const char* path, const uint8_t* data, size_t length) {
    char* text = (char*)allocate(length + 1, 1, path);
    memcpy(text, data, length);
    Pair* pairs = (Pair*)allocate(min_size(length / 2, MAX_PAIRS), sizeof(Pair), path); // a value and what is before it
    Json j = {pairs, 0, path, text, text};
    if (*text != '{') json_fail(&j, "'{' missing");
    json_value(&j, "", 0);
    json_take(&j, ' ');
    if (j.p != text + length) json_fail(&j, "something follows the object");
    free(text);
    qsort(j.pairs, j.count, sizeof(Pair), compare_pairs);
    for (size_t i = 1; i < j.count; i++)
        if (!compare_pairs(&j.pairs[i - 1], &j.pairs[i])) die("%s is damaged: it has %s twice", path, j.pairs[i].key);
    return j;
}

__attribute__((format(printf, 2, 3))) static const Pair* find_pair(const Json* j, const char* key, ...) {
    Pair wanted;
    va_list args;
    va_start(args, key);
    vsnprintf(wanted.key, sizeof wanted.key, key, args);
    va_end(args);
    return (const Pair*)bsearch(&wanted, j->pairs, j->count, sizeof(Pair), compare_pairs);
}

static uint64_t whole_number(const char* path, const Pair* pair) {
    char* end;
    errno = 0;
    uint64_t number = strtoull(pair->value, &end, 10);
    if (*pair->value < '0' || *pair->value > '9' || *end || errno)
        die("%s is damaged: its %s is '%s', not a whole number", path, pair->key, pair->value);
    return number;
}

typedef struct {
    char name[96];
    const char* type;
    size_t dimensions, shape[MAX_DIMENSIONS], from, to;
    const uint8_t* data;
} Entry;

typedef struct {
    File file;
    size_t entry_count;
    Entry* entries;
    Json json;
} Checkpoint;

static size_t type_size(const char* type) {
    return !strcmp(type, "F32") ? 4 : !strcmp(type, "F16") || !strcmp(type, "BF16") ? 2 : 0;
}

// The rest of the entry of the tensor e->name. Its bytes must be as many as its shape says, and none of them another's.
static void read_entry(const Checkpoint* c, Entry* e, size_t data_size) {
    const char *path = c->file.path, *name = e->name;
    const Pair *type = find_pair(&c->json, "%s/dtype", name), *from = find_pair(&c->json, "%s/data_offsets/0", name);
    const Pair *to = find_pair(&c->json, "%s/data_offsets/1", name), *length;
    if (!type || !from || !to) die("%s is damaged: tensor %s has no dtype or data_offsets", path, name);
    e->type = type->value;
    e->from = whole_number(path, from);
    e->to = whole_number(path, to);
    size_t bytes = type_size(e->type);
    for (; (length = find_pair(&c->json, "%s/shape/%zu", name, e->dimensions)); e->dimensions++) {
        if (e->dimensions == MAX_DIMENSIONS) die("%s: tensor %s has over %d dimensions", path, name, MAX_DIMENSIONS);
        size_t n = e->shape[e->dimensions] = whole_number(path, length);
        if (__builtin_mul_overflow(bytes, n, &bytes)) die("%s: tensor %s is too large", path, name);
    }
    bool misplaced = e->from > e->to || e->to > data_size;
    for (const Entry* other = c->entries; other < e; other++)
        misplaced = misplaced || (e->from < other->to && other->from < e->to);
    if (misplaced) die("%s is damaged: the place of tensor %s is wrong", path, name);
    if (bytes && bytes != e->to - e->from) die("%s is damaged: tensor %s has the wrong size", path, name);
}

static Checkpoint open_file(const char* path, const char* advice) {
    Checkpoint c;
    memset(&c, 0, sizeof c);
    c.file = map_file(path, advice);
    uint64_t length = 0;
    if (c.file.size >= 8) memcpy(&length, c.file.data, 8);
    if (c.file.size < 10 || length > c.file.size - 8 || length > 100000000 || c.file.data[8] != '{') {
        if (c.file.size >= 2 && (!memcmp(c.file.data, "PK", 2) || !memcmp(c.file.data, "\x80\x02", 2)))
            die("%s is in Python's own format, which may run programs: python3 dev/check/to_safetensors.py %s", path,
                path);
        die("%s is not a safetensors file, or is cut off", path);
    }
    size_t size = c.file.size - 8 - length, used = 0;
    c.json = read_json(path, c.file.data + 8, length);
    c.entries = (Entry*)allocate(c.json.count, sizeof(Entry), "the list of tensors");
    for (size_t i = 0; i < c.json.count; i++) {
        Entry* e = &c.entries[c.entry_count];
        char last[8] = "";
        if (sscanf(c.json.pairs[i].key, "%95[^/]/%7s", e->name, last) < 2 || strcmp(last, "dtype")) continue;
        read_entry(&c, e, size);
        e->data = c.file.data + 8 + length + e->from;
        used += e->to - e->from;
        c.entry_count++;
    }
    if (used != size) die("%s is damaged: %zu bytes belong to no tensor", path, size - used);
    return c;
}

// A model in several files, as transformers saves large ones: {"weight_map": {"name": "file", ...}} says which tensor
// is in which. Each file is opened once, and all their tensors are put into one list, which points into them: they stay
// open.
static Checkpoint open_index(const char* path, const char* advice) {
    Checkpoint c;
    memset(&c, 0, sizeof c);
    c.file = map_file(path, advice);
    c.json = read_json(c.file.path, c.file.data, c.file.size);
    for (const Pair* pair = c.json.pairs; pair < c.json.pairs + c.json.count; pair++) {
        if (strncmp(pair->key, "weight_map/", 11)) continue;
        if (strchr(pair->value, '/')) die("%s names a file in another folder: %s", c.file.path, pair->value);
        const Pair* first = c.json.pairs; // to name this file
        while (strncmp(first->key, "weight_map/", 11) || strcmp(first->value, pair->value)) first++;
        if (first < pair) continue;
        Checkpoint part = open_file(path_in(folder_of(c.file.path), pair->value), "");
        c.entries = (Entry*)realloc(c.entries, (c.entry_count + part.entry_count + 1) * sizeof(Entry));
        if (!c.entries) die("no memory for the list of tensors");
        memcpy(c.entries + c.entry_count, part.entries, part.entry_count * sizeof(Entry));
        c.entry_count += part.entry_count;
    }
    for (const Entry* e = c.entries; e < c.entries + c.entry_count; e++)
        for (const Entry* other = c.entries; other < e; other++)
            if (!strcmp(e->name, other->name)) die("%s: tensor %s is in two files", c.file.path, e->name);
    return c;
}

static Checkpoint open_checkpoint(const char* path, const char* advice) {
    return (strstr(path, ".index.json") ? open_index : open_file)(path, advice);
}

static void close_checkpoint(Checkpoint* c) {
    free(c->entries);
    free(c->json.pairs);
    unmap_file(&c->file);
}

static const char* metadata(const Checkpoint* c, const char* key) {
    const Pair* pair = find_pair(&c->json, "%s", key);
    return pair ? pair->value : NULL;
}

static uint64_t metadata_number(const Checkpoint* c, const char* key) {
    return whole_number(c->file.path, find_pair(&c->json, "%s", key));
}

static const Entry* find_entry(const Checkpoint* c, const char* prefix, const char* name) {
    size_t n = strlen(prefix);
    for (size_t i = 0; i < c->entry_count; i++)
        if (!strncmp(c->entries[i].name, prefix, n) && !strcmp(c->entries[i].name + n, name)) return &c->entries[i];
    return NULL;
}

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 5.9604644775390625e-8f; // 2^-24
    uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static bool all_finite(const float* x, size_t n) {
    bool finite = true;
    for (size_t i = 0; i < n; i++) finite &= fabsf(x[i]) <= FLT_MAX;
    return finite;
}

// Copies `count` numbers of a file's tensor, from number `first` on, to `to` on the device, or rounded to 16 bits here.
static void load_tensor(const Checkpoint* c, const Entry* e, size_t first, size_t count, float* to, bool round) {
    float buffer[4096];
    size_t width = type_size(e->type);
    const uint8_t* from = e->data + first * width;
    for (size_t i = 0, n; i < count; i += n) {
        n = min_size(4096, count - i);
        for (size_t j = 0; j < n; j++) {
            uint32_t bits = 0;
            memcpy(&bits, from + (i + j) * width, width);
            if (e->type[0] == 'B') bits <<= 16;
            if (!strcmp(e->type, "F16"))
                buffer[j] = half_to_float((uint16_t)bits);
            else
                memcpy(&buffer[j], &bits, sizeof bits);
        }
        if (!all_finite(buffer, n)) die("%s: tensor %s holds numbers that are not finite", c->file.path, e->name);
        if (round)
            for (size_t j = 0; j < n; j++) ((uint16_t*)(void*)to)[i + j] = (uint16_t)(bfloat16_bits(buffer[j]) >> 16);
        else
            device->to_device(to + i, buffer, n);
    }
}

// Fills a block of the model (weights, or this process's part of moments under their prefix) from a file. Embeddings of
// more positions or tokens than the model has are cut.
static void load_block(const Checkpoint* c, const Model* model, const char* prefix, float* block) {
    for (size_t i = 0; i < model->tensor_count; i++) {
        const Tensor* t = &model->tensors[i];
        const Entry* e = find_entry(c, prefix, t->name);
        if (!e) die("%s has no tensor %s%s: not a GPT-2, or not a training checkpoint", c->file.path, prefix, t->name);
        if (!type_size(e->type))
            die("%s: tensor %s is of type %s, not F32, F16 or BF16", c->file.path, e->name, e->type);
        size_t columns = e->dimensions ? e->shape[e->dimensions - 1] : 0, rows = e->dimensions > 1 ? e->shape[0] : 0;
        bool cut = (!strcmp(t->name, "wpe.weight") || !strcmp(t->name, "wte.weight")) && rows > t->rows;
        if (e->dimensions != (t->rows ? 2 : 1) || columns != t->columns || (rows != t->rows && !cut))
            die("%s: tensor %s has not the shape (%zu,%zu) of this model", c->file.path, e->name, t->rows, t->columns);
        if (*prefix)
            load_tensor(c, e, t->own, t->owned, block + t->moment, false);
        else
            load_tensor(c, e, 0, t->size, block + t->offset, in_16_bits && t->rows);
    }
}

// That a file holds nothing that this model would have to compute with and does not know of. Mask buffers carry no
// information; a head must be the token embedding again.
static void check_foreign(const Checkpoint* c, const Model* model) {
    const Entry* wte = find_entry(c, "", "wte.weight");
    for (size_t i = 0; i < c->entry_count; i++) {
        const Entry* e = &c->entries[i];
        const char *name = e->name, *part = strstr(name, ".attn.");
        bool known = !strncmp(name, "adam.", 5) || !strcmp(name, "tokenizer.bin") ||
                     (part && (!strcmp(part, ".attn.bias") || !strcmp(part, ".attn.masked_bias")));
        for (size_t k = 0; k < model->tensor_count && !known; k++) known = !strcmp(name, model->tensors[k].name);
        bool head = !strcmp(name, "lm_head.weight");
        if (head && (e->to - e->from != wte->to - wte->from || memcmp(e->data, wte->data, e->to - e->from)))
            die("%s: its head is not its token embedding, as GPT-2's is", c->file.path);
        if (!known && !head) die("%s has a tensor %s, which a GPT-2 has not", c->file.path, e->name);
    }
}

// The head count in the config.json beside a weights file, or 0. It may ask for nothing that this model would compute
// otherwise.
static size_t heads_from_config(const char* weights, size_t C) {
    const char* path = path_in(folder_of(weights), "config.json");
    if (access(path, R_OK)) return 0;
    File file = map_file(path, "");
    Json j = read_json(file.path, file.data, file.size);
    size_t heads = 0;
    for (const Pair* pair = j.pairs; pair < j.pairs + j.count; pair++) {
        const char *key = pair->key, *value = pair->value;
        bool same = true;
        if (!strcmp(key, "n_head")) heads = whole_number(file.path, pair);
        if (!strcmp(key, "activation_function"))
            same = !strcmp(value, "gelu_new") || !strcmp(value, "gelu_pytorch_tanh");
        if (!strcmp(key, "layer_norm_epsilon")) same = strtod(value, NULL) == 1e-5;
        if (!strcmp(key, "scale_attn_weights")) same = !strcmp(value, "true");
        if (!strcmp(key, "scale_attn_by_inverse_layer_idx")) same = !strcmp(value, "false");
        if (!strcmp(key, "n_inner")) same = !strcmp(value, "null") || strtod(value, NULL) == 4 * (double)C;
        if (!same) die("%s: %s is %s, which this program does not compute", file.path, key, value);
    }
    free(j.pairs);
    unmap_file(&file);
    return heads;
}

// The model that a file holds. Sizes are those of its tensors, whatever the metadata says. Heads leave no trace there:
// metadata, config.json, or D = 64 as in GPT-2.
static Config read_config(const Checkpoint* c) {
    Config config;
    const char* path = c->file.path;
    memset(&config, 0, sizeof config);
#define SAVED_FIELD(field, option, initial, least, most, help)                                                         \
    if (metadata(c, option)) {                                                                                         \
        double said = (double)(config.field = metadata_number(c, option));                                             \
        if (said < (least) || said > (most)) die("%s: %s is %.0f, not %d to %d", path, option, said, (least), (most)); \
    }
    CONFIG(SAVED_FIELD)
    const Entry *wte = find_entry(c, "", "wte.weight"), *wpe = find_entry(c, "", "wpe.weight");
    if (!wte || !wpe || wte->dimensions != 2 || wpe->dimensions != 2 || wte->shape[1] != wpe->shape[1])
        die("%s is not a GPT-2: it lacks wte.weight (V,C) or wpe.weight (T,C)", path);
    config.V = wte->shape[0];
    config.C = wte->shape[1];
    config.T = wpe->shape[0];
    config.L = 0;
    for (char name[32]; snprintf(name, sizeof name, "h.%zu.ln_1.weight", config.L), find_entry(c, "", name); config.L++)
        if (config.L == MAX_LAYERS) die("%s has more than %d layers", path, MAX_LAYERS);
    if (!metadata(c, "--heads")) config.H = heads_from_config(path, config.C);
    if (!config.H) {
        config.H = config.C / 64;
        note("%s does not say how many heads it has, nor does a config.json: %zu are taken, as in GPT-2", path,
             config.H);
    }
    if (!config.V || config.V > MAX_SIZE || !config.C || config.C > MAX_SIZE || !config.T || config.T > MAX_SIZE ||
        !config.L || !config.H || config.C % config.H)
        die("%s: impossible sizes: vocabulary %zu, channels %zu, context %zu, layers %zu, heads %zu", path, config.V,
            config.C, config.T, config.L, config.H);
    return config;
}

// Writes weights, and with `training` the moments. more_metadata: JSON pairs that go into the metadata, each
// beginning with a comma. tokenizer: the file that goes with it, or NULL. Returns what went wrong, or NULL; numbers that
// are not finite are never saved.
static const char* save_checkpoint(const char* path, const Model* model, bool training, const char* more_metadata,
                                   const File* tokenizer) {
    static const char* const prefixes[] = {"", "adam.m.", "adam.v."};
    Text text;
    FILE* f = begin_text(&text);
    size_t at = 0, n = model->tensor_count, count = training ? 3 * n : n;
    fprintf(f, "{\"__metadata__\":{\"format\":\"pt\"%s}", more_metadata);
    for (size_t i = 0; i < count; i++) {
        const Tensor* t = &model->tensors[i % n];
        fprintf(f, ",\"%s%s\":{\"dtype\":\"F32\",\"shape\":[", prefixes[i / n], t->name);
        if (t->rows) fprintf(f, "%zu,", t->rows);
        fprintf(f, "%zu],\"data_offsets\":[%zu,%zu]}", t->columns, at, at + 4 * t->size);
        at += 4 * t->size;
    }
    if (tokenizer) {
        fprintf(f, ",\"tokenizer.bin\":{\"dtype\":\"U8\",\"shape\":[%zu],\"data_offsets\":[%zu,%zu]}", tokenizer->size,
                at, at + tokenizer->size);
        at += tokenizer->size;
    }
    fprintf(f, "}%*s", (int)(7 - ftell(f) % 8), ""); // tensors begin at a multiple of 8 bytes
    end_text(&text, "the checkpoint's header");
    Output out;
    uint64_t header = text.length;
    output_open(&out, path, 8 + header + at);
    output_write(&out, &header, sizeof header);
    output_write(&out, text.text, header);
    free(text.text);
    static float buffer[16384];
    const float* block = model->weights;
    for (size_t i = 0; i < count && (!out.error || world.size > 1); i++) { // the others wait for a process that fails
        const Tensor* t = &model->tensors[i % n];
        if (i > 0 && i % n == 0) block = whole_moments(model, (int)(i / n));
        for (size_t j = 0, part; j < t->size; j += part) {
            part = min_size(16384, t->size - j);
            device->to_host(buffer, block + t->offset + j, part);
            if (!all_finite(buffer, part)) output_failed(&out, "the model holds numbers that are not finite");
            output_write(&out, buffer, part * sizeof(float));
        }
    }
    if (training) whole_moments(model, 0);
    if (tokenizer) output_write(&out, tokenizer->data, tokenizer->size);
    output_replace(&out);
    return out.error;
}

static void export_text(Text* t, const char* directory, const char* name) {
    end_text(t, name);
    write_whole(path_in(directory, name), t->text, t->length);
    free(t->text);
}

// A token in the alphabet of GPT-2's vocabulary files: a letter for each byte, itself where that can be seen, else one
// from U+0100 on. With `json` what JSON does not take as it is comes escaped.
static void write_letters(FILE* f, const uint8_t* s, size_t n, bool json) {
    for (const uint8_t* end = s + n; s < end; s++) {
        unsigned b = *s, letter = b < 33     ? 256 + b
                                  : b < 127  ? b
                                  : b < 161  ? 256 + 33 + (b - 127)
                                  : b == 173 ? 256 + 33 + 34
                                             : b;
        if (json && (b == '"' || b == '\\')) putc('\\', f);
        if (letter < 128)
            putc((int)letter, f);
        else
            putc((int)(0xC0 | letter >> 6), f), putc((int)(0x80 | (letter & 63)), f);
    }
}

static void write_vocabulary(FILE* f, const Tokenizer* t) {
    for (size_t i = 0; i < t->V; i++) {
        Bytes s = token_string(t, (int)i);
        fputs(i ? ",\n\"" : "{\n\"", f);
        write_letters(f, s.p, s.n, true);
        fprintf(f, "\": %zu", i);
    }
    fputs("\n}", f);
}

// All pairs of tokens that make a token, those of the lowest rank first: what encode() joins.
static void write_merges(FILE* f, const Tokenizer* t, bool json) {
    const char* between = "\n";
    for (size_t i = 0; i < t->V; i++) {
        Bytes s = token_string(t, (int)i);
        for (size_t cut = 1; cut < s.n && (int)i != t->end_of_text; cut++) {
            if (find_token(t, s.p, cut) < 0 || find_token(t, s.p + cut, s.n - cut) < 0) continue;
            if (json) fprintf(f, "%s\"", between);
            write_letters(f, s.p, cut, json);
            putc(' ', f);
            write_letters(f, s.p + cut, s.n - cut, json);
            fputs(json ? "\"" : "\n", f);
            between = ",\n";
        }
    }
}

// The tokenizer's files, by which AutoTokenizer.from_pretrained encodes as encode() does, but for the end of text,
// which transformers takes for the token wherever it stands in a text.
static void export_tokenizer(const char* directory, const Tokenizer* t, Config c) {
    Text text;
    FILE* f = begin_text(&text);
    Bytes s = {NULL, 0};
    if (t->end_of_text >= 0) s = token_string(t, t->end_of_text);
    const char* end = (const char*)s.p;
    int n = (int)s.n;
    write_vocabulary(f, t);
    export_text(&text, directory, "vocab.json");
    f = begin_text(&text);
    fputs("#version: 0.2\n", f);
    write_merges(f, t, false);
    export_text(&text, directory, "merges.txt");
    f = begin_text(&text);
    fputs("{\n\"version\": \"1.0\", \"truncation\": null, \"padding\": null,\n\"added_tokens\": [", f);
    if (n)
        fprintf(f,
                "{\"id\": %d, \"content\": \"%.*s\", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, "
                "\"normalized\": false, \"special\": true}",
                t->end_of_text, n, end);
    fputs("],\n\"normalizer\": null,\n"
          "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, "
          "\"use_regex\": true},\n\"post_processor\": null,\n"
          "\"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, "
          "\"use_regex\": true},\n\"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": null, "
          "\"continuing_subword_prefix\": null, \"end_of_word_suffix\": null, \"fuse_unk\": false, "
          "\"byte_fallback\": false,\n\"vocab\": ",
          f);
    write_vocabulary(f, t);
    fputs(",\n\"merges\": [", f);
    write_merges(f, t, true);
    fputs("]}\n}\n", f);
    export_text(&text, directory, "tokenizer.json");
    f = begin_text(&text);
    fputs("{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"clean_up_tokenization_spaces\": false,\n"
          "  \"model_input_names\": [\"input_ids\", \"attention_mask\"],\n",
          f);
    if (n) fprintf(f, "  \"bos_token\": \"%.*s\",\n  \"eos_token\": \"%.*s\",\n", n, end, n, end);
    fprintf(f, "  \"model_max_length\": %zu\n}\n", c.T);
    export_text(&text, directory, "tokenizer_config.json");
}

// That a file which an export would replace is one of an export, and begins so; a model's has a number before.
static void check_exported(const char* path, const void* start, size_t size) {
    if (access(path, F_OK)) return;
    File file = map_file(path, "");
    if (!memmem(file.data, min_size(file.size, sizeof(uint64_t) + size), start, size))
        die("%s is not of an earlier export and would be replaced: export to another folder", path);
    unmap_file(&file);
}

// A folder that transformers' from_pretrained opens. t: NULL if there is none that belongs to the model. Nothing in it is
// replaced but what an earlier export wrote.
static void export_model(const char* directory, const Model* model, const Tokenizer* t) {
    static const char* const starts[][2] = {
        {"model.safetensors", "{\"__metadata__\":{\"format\":\"pt\",\"--heads\":"},
        {"config.json", "{\n  \"architectures\": [\"GPT2LMHeadModel\"],\n  \"model_type\": \"gpt2\",\n"},
        {"generation_config.json", "{\n  \"bos_token_id\": "},
        {"vocab.json", "{\n\""},
        {"merges.txt", "#version: 0.2\n"},
        {"tokenizer.json", "{\n\"version\": \"1.0\", \"truncation\": null"},
        {"tokenizer_config.json", "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n"}};
    const char* beyond = beyond_gpt2(model->config);
    if (beyond) die("a model made with %s is not one that transformers' GPT-2 computes", beyond);
    if (mkdir(directory, 0777) && errno != EEXIST) die("cannot make the folder %s: %s", directory, strerror(errno));
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++)
        check_exported(path_in(directory, starts[i][0]), starts[i][1], strlen(starts[i][1]));
    if (t && access(path_in(directory, "vocab.json"), F_OK)) // else of an earlier export, and not that of a text
        check_exported(path_in(directory, "tokenizer.bin"), t->file.data, t->file.size);
    char more[128];
    int n = snprintf(more, sizeof more, ",\"--heads\":\"%zu\"", model->config.H);
    if (t) snprintf(more + n, sizeof more - (size_t)n, ",\"tokenizer\":\"%016llx\"", (unsigned long long)t->mark);
    const char* error = save_checkpoint(path_in(directory, "model.safetensors"), model, false, more, NULL);
    if (error) die("cannot write %s/model.safetensors: %s; whatever stood there before is untouched", directory, error);
    Config c = model->config;
    char end_of_text[16] = "null";
    if (t && t->end_of_text >= 0) snprintf(end_of_text, sizeof end_of_text, "%d", t->end_of_text);
    if (!t && c.V == 50257) snprintf(end_of_text, sizeof end_of_text, "50256"); // GPT-2's own
    Text text;
    fprintf(begin_text(&text),
            "%s  \"vocab_size\": %zu,\n"
            "  \"n_positions\": %zu,\n  \"n_ctx\": %zu,\n  \"n_embd\": %zu,\n  \"n_layer\": %zu,\n  \"n_head\": %zu,\n"
            "  \"activation_function\": \"gelu_new\",\n  \"layer_norm_epsilon\": 1e-05,\n"
            "  \"bos_token_id\": %s,\n  \"eos_token_id\": %s,\n  \"tie_word_embeddings\": true,\n"
            "  \"torch_dtype\": \"float32\"\n}\n",
            starts[1][1], c.V, c.T, c.T, c.C, c.L, c.H, end_of_text, end_of_text);
    export_text(&text, directory, "config.json");
    fprintf(begin_text(&text), "{\n  \"bos_token_id\": %s,\n  \"eos_token_id\": %s\n}\n", end_of_text, end_of_text);
    export_text(&text, directory, "generation_config.json");
    if (!t) return;
    export_tokenizer(directory, t, c);
    write_whole(path_in(directory, "tokenizer.bin"), t->file.data, t->file.size);
}

// ====================================================================================================================
// Command line
//
// One table of options drives reading them, the help text, the suggestion for a misspelt one, and what a checkpoint
// remembers of the run that wrote it.

static struct {
    const char *data, *train, *val, *preset, *init, *log, *checkpoint, *export_to, *prompt, *tokenize, *device,
        *attention, *html, *eval, *precision;
    Config model;
    size_t steps, batch, accumulate, warmup, seed, val_every, val_batches, sample_every, save_every, tokens, top_k,
        layer, head, stride;
    double lr, min_lr, weight_decay, beta1, beta2, clip, temperature, top_p;
    bool resume, compare, memory, ablate, live, json, help, version;
} opt;

// Kept in checkpoints; a row of CONFIG; to be given again with a checkpoint.
enum { SAVED = 1, SHAPE = 2, GIVEN_AGAIN = 4 };

typedef struct {
    const char *group, *name, *argument, *initial, *help;
    size_t* whole; // where the value goes: one of these four is not NULL
    double* real;
    const char** text;
    bool* flag;
    double least, most;
    int use;
    bool given;
} Option;

// The end of an option's row. A text that is SAVED must be one of a few plain words, known to this program.
#define WHOLE(value, least, most, use) value, NULL, NULL, NULL, least, most, use, false
#define REAL(value, least, most, use)  NULL, value, NULL, NULL, least, most, use, false
#define TEXT(value, use)               NULL, NULL, value, NULL, 0, 0, use, false
#define FLAG(value)                    NULL, NULL, NULL, value, 0, 0, 0, false
#define CONFIG_OPTION(field, option, initial, least, most, help) \
    {"", option, "N", #initial, help, WHOLE(&opt.model.field, least, most, SAVED | SHAPE)},

// clang-format off
static Option options[] = {
    {"data", "--data", "DIR", "data", "has train.bin, val.bin, tokenizer.bin", TEXT(&opt.data, GIVEN_AGAIN)},
    {"", "--train", "GLOB", NULL, "shards to train on, instead of DIR/train.bin", TEXT(&opt.train, GIVEN_AGAIN)},
    {"", "--val", "GLOB", NULL, "shards to validate on, instead of DIR/val.bin", TEXT(&opt.val, GIVEN_AGAIN)},
    {"model", "--preset", "NAME", NULL, "gpt2, gpt2-medium, gpt2-large or gpt2-xl", TEXT(&opt.preset, 0)},
    {"", "--init", "PATH", NULL, "start from GPT-2 weights, a file or its folder", TEXT(&opt.init, 0)},
    CONFIG(CONFIG_OPTION)
    {"training", "--steps", "N", "4500", "optimiser steps", WHOLE(&opt.steps, 1, 1e12, SAVED)},
    {"", "--batch", "N", "8", "sequences in a batch", WHOLE(&opt.batch, 1, MAX_SIZE, SAVED)},
    {"", "--accumulate", "N", "1", "batches in a step", WHOLE(&opt.accumulate, 1, 1 << 20, SAVED)},
    {"", "--precision", "NAME", NULL, "linear layers multiply in fp32 or bf16 [fp32]", TEXT(&opt.precision, SAVED)},
    {"", "--recompute", NULL, NULL, "compute norms and GELU twice, to save memory", FLAG(&recompute)},
    {"", "--lr", "X", "2e-3", "highest learning rate", REAL(&opt.lr, 0, 1e3, SAVED)},
    {"", "--min-lr", "X", NULL, "learning rate of the last step [lr/50]", REAL(&opt.min_lr, 0, 1e3, SAVED)},
    {"", "--warmup", "N", NULL, "steps in which the rate rises [steps/20]", WHOLE(&opt.warmup, 0, 1e12, SAVED)},
    {"", "--weight-decay", "X", "0.1", "AdamW's decay of matrices and embeddings", REAL(&opt.weight_decay, 0, 1e3, SAVED)},
    {"", "--beta1", "X", "0.9", "AdamW's memory of the gradient", REAL(&opt.beta1, 0, 0.999999, SAVED)},
    {"", "--beta2", "X", "0.99", "AdamW's memory of its square", REAL(&opt.beta2, 0, 0.999999, SAVED)},
    {"", "--clip", "X", "1", "largest norm of the gradient (0: no limit)", REAL(&opt.clip, 0, 1e30, SAVED)},
    {"", "--seed", "N", "1337", "of weights, shuffling and sampling", WHOLE(&opt.seed, 0, 1e15, SAVED)},
    {"progress", "--val-every", "N", "500", "steps between validations (0: at the end)", WHOLE(&opt.val_every, 0, 1e12, SAVED)},
    {"", "--val-batches", "N", "100", "batches in a validation, at most", WHOLE(&opt.val_batches, 1, 1e9, SAVED)},
    {"", "--sample-every", "N", "1000", "steps between samples (0: at the end)", WHOLE(&opt.sample_every, 0, 1e12, SAVED)},
    {"", "--save-every", "N", "1000", "steps between checkpoints (0: at the end)", WHOLE(&opt.save_every, 0, 1e12, SAVED)},
    {"", "--log", "FILE", NULL, "write one CSV row a step", TEXT(&opt.log, GIVEN_AGAIN)},
    {"files", "--checkpoint", "FILE", "gpt.safetensors", "where the model is kept", TEXT(&opt.checkpoint, GIVEN_AGAIN)},
    {"", "--resume", NULL, NULL, "go on from the checkpoint, bit for bit", FLAG(&opt.resume)},
    {"", "--export", "DIR", NULL, "write the model for transformers, and end", TEXT(&opt.export_to, 0)},
    {"generate", "--generate", "TEXT", NULL, "continue TEXT with the model that was trained", TEXT(&opt.prompt, 0)},
    {"", "--tokens", "N", "256", "tokens to generate (to look at: 128)", WHOLE(&opt.tokens, 0, 1e12, 0)},
    {"", "--temperature", "X", "0.8", "below 1 bolder; 0: always the likeliest", REAL(&opt.temperature, 0, 1e3, 0)},
    {"", "--top-k", "N", "0", "draw from the N likeliest (0: all)", WHOLE(&opt.top_k, 0, MAX_SIZE, 0)},
    {"", "--top-p", "X", "1", "draw from the likeliest that sum to X", REAL(&opt.top_p, 1e-9, 1, 0)},
    {"look", "--attention", "TEXT", NULL, "show what each head attends to in TEXT", TEXT(&opt.attention, 0)},
    {"", "--layer", "N", NULL, "layer, from 0, of the map [the clearest]", WHOLE(&opt.layer, 0, MAX_LAYERS, 0)},
    {"", "--head", "N", NULL, "the head, from 0", WHOLE(&opt.head, 0, MAX_SIZE, 0)},
    {"", "--html", "FILE", "attention.html", "a page for a browser", TEXT(&opt.html, 0)},
    {"", "--ablate", NULL, NULL, "measure what the loss is without each head", FLAG(&opt.ablate)},
    {"", "--live", NULL, NULL, "put the model into the page: type, and see", FLAG(&opt.live)},
    {"measure", "--eval", "FILE", NULL, "perplexity and bits a byte of a text, and end", TEXT(&opt.eval, 0)},
    {"", "--stride", "N", NULL, "tokens between windows [context/2]", WHOLE(&opt.stride, 1, MAX_SIZE, 0)},
    {"", "--json", NULL, NULL, "print it as JSON", FLAG(&opt.json)},
    {"other", "--device", "NAME", NULL, "cpu, cuda or cuda:N [cuda, if built for it]", TEXT(&opt.device, GIVEN_AGAIN)},
    {"", "--compare", NULL, NULL, "time steps on CPU and GPU (or --device)", FLAG(&opt.compare)},
    {"", "--memory", NULL, NULL, "list the batches that fit in some memories", FLAG(&opt.memory)},
    {"", "--tokenize", "FILE", NULL, "print the tokens of a text, one a line, and end", TEXT(&opt.tokenize, 0)},
    {"", "--help", NULL, NULL, "this text", FLAG(&opt.help)},
    {"", "--version", NULL, NULL, "the program's version", FLAG(&opt.version)},
};
enum { OPTIONS = sizeof options / sizeof *options };

// Sizes: Radford et al. 2019; learning rates: Brown et al. 2020, table 2.1.
enum { PRESETS = 4, PRESET_OPTIONS = 7 };
static const char* const presets[1 + PRESETS][PRESET_OPTIONS] = {
    {"--preset",    "--layers", "--heads", "--channels", "--context", "--lr",   "--batch"},
    {"gpt2",        "12",       "12",      "768",        "1024",      "6e-4",   "4"},
    {"gpt2-medium", "24",       "16",      "1024",       "1024",      "3e-4",   "4"},
    {"gpt2-large",  "36",       "20",      "1280",       "1024",      "2.5e-4", "4"},
    {"gpt2-xl",     "48",       "25",      "1600",       "1024",      "2e-4",   "4"},
};
// clang-format on

static void print_help(void) {
    puts("train_gpt: trains and runs a GPT-2.\n\n"
         "  ./train_gpt                          train on data/, all defaults\n"
         "  ./train_gpt --resume --steps 9000    go on, for longer\n"
         "  ./train_gpt --generate \"ROMEO:\"      continue a prompt from the checkpoint\n"
         "  ./train_gpt --init gpt2/ --generate \"Hello\"   the same from GPT-2's weights\n");
    for (const Option* o = options; o < options + OPTIONS; o++) {
        char left[64];
        snprintf(left, sizeof left, "%s %s", o->name, o->argument ? o->argument : "");
        printf("  %-9s %-18s %s", o->group, left, o->help);
        if (o->initial) printf(" [%s]", o->initial);
        putchar('\n');
    }
    printf("\n--precision bf16 multiplies by %s here.\n", multiplies_bf16(find_pair_kernel(true)));
    puts("OMP_NUM_THREADS sets the number of threads; the result is the same for any.\n"
         "mpirun -n 8 ./train_gpt_mpi trains with eight processes (make train_gpt_mpi);\n"
         "--batch is that of all.");
}

static Option* find_option(const char* name) {
    for (int i = 0; i < OPTIONS; i++)
        if (!strcmp(options[i].name, name)) return &options[i];
    return NULL;
}

static bool given(const char* name) { return find_option(name)->given; }

// Whether no more than so many insertions, deletions and replacements of a character turn a into b (Levenshtein).
static bool alike(const char* a, const char* b, int edits) {
    while (*a && *a == *b) a++, b++;
    if (!*a && !*b) return true;
    return edits > 0 && ((*a && alike(a + 1, b, edits - 1)) || (*b && alike(a, b + 1, edits - 1)) ||
                         (*a && *b && alike(a + 1, b + 1, edits - 1)));
}

__attribute__((noreturn)) static void unknown_option(const char* name) {
    for (int edits = 1; edits <= 3; edits++)
        for (const Option* o = options; o < options + OPTIONS; o++)
            if (alike(name, o->name, edits))
                fail(2, "unknown option %s; did you mean %s? (--help lists all)", name, o->name);
    fail(2, "unknown option %s (--help lists all)", name);
}

// where: what an error is blamed on. status: 2 for the command line, 1 for a checkpoint.
static void set_option(Option* o, const char* text, int status, const char* where) {
    if (o->text && strcmp(o->argument, "TEXT")) { // a name, then
        if (!*text) fail(status, "%s%s needs a name", where, o->name);
        for (const char* p = text; *p; p++)
            if ((unsigned char)*p < ' ' || *p == 127)
                fail(status, "%s%s: control characters in '%s'", where, o->name, text);
    }
    if (o->text) *o->text = text;
    if (o->flag) *o->flag = true;
    if (o->text || o->flag) return;
    char* end;
    errno = 0;
    double value = o->whole ? (double)strtol(text, &end, 10) : strtod(text, &end);
    if (end == text || *end || errno || !(value >= o->least && value <= o->most))
        fail(status, "%s%s takes a %snumber from %g to %g, not '%s'", where, o->name, o->whole ? "whole " : "",
             o->least, o->most, text);
    if (o->whole) *o->whole = (size_t)value; // exact: none may be above 2^53
    if (o->real) *o->real = value;
}

static void set_default(const char* name, const char* text) {
    Option* o = find_option(name);
    if (!o->given) set_option(o, text, 2, "");
}

// What is computed from other options, where it is not given; a checkpoint keeps it only if it was.
static void derive_options(void) {
    if (!given("--min-lr")) opt.min_lr = opt.lr / 50;
    if (!given("--warmup")) opt.warmup = opt.steps / 20;
    if (opt.min_lr > opt.lr) fail(2, "--min-lr %g is above --lr %g", opt.min_lr, opt.lr);
}

// The precision asked for. From here on its name is one of ours: a checkpoint's is gone when the file is closed.
static void choose_precision(int status, const char* where) {
    bf16 = opt.precision && !strcmp(opt.precision, "bf16");
    if (opt.precision && !bf16 && strcmp(opt.precision, "fp32"))
        fail(status, "%s--precision is fp32 or bf16, not '%s'", where, opt.precision);
    if (PLAIN && bf16) fail(status, "%sa program built with PLAIN=1 multiplies in float32 only", where);
    opt.precision = bf16 ? "bf16" : "fp32";
    pair_kernel = bf16 ? find_pair_kernel(true) : NULL;
}

static void parse_command_line(int argc, char** argv) {
    for (int i = 0; i < OPTIONS; i++)
        if (options[i].initial) set_option(&options[i], options[i].initial, 2, "");
    const Option* last = NULL;
    for (int i = 1; i < argc; i++) {
        // Both `--name value` and `--name=value`.
        char name[64];
        const char *equals = strchr(argv[i], '='), *value = equals ? equals + 1 : NULL;
        snprintf(name, sizeof name, "%.*s", equals ? (int)(equals - argv[i]) : 63, argv[i]);
        if (!strcmp(name, "-h")) snprintf(name, sizeof name, "--help");
        if (name[0] != '-' && last && !strcmp(last->argument, "GLOB"))
            fail(2, "'%s' is no option: %s takes one pattern, in quotes if it has * or ?", argv[i], last->name);
        if (name[0] != '-') fail(2, "'%s' is no option (--help lists all)", argv[i]);
        Option* o = find_option(name);
        if (!o) unknown_option(name);
        if (o->flag && value) fail(2, "%s takes no value", name);
        if (!o->flag && !value && (++i == argc || !(value = argv[i]))) fail(2, "%s needs a value", name);
        if (!equals && !o->flag && find_option(value))
            fail(2, "%s needs a value, and %s is an option (%s=%s if it is meant)", name, value, name, value);
        set_option(o, value, 2, "");
        o->given = true;
        last = o->flag ? NULL : o;
    }
    if (opt.preset) {
        int i = 1;
        while (i <= PRESETS && strcmp(presets[i][0], opt.preset)) i++;
        if (i > PRESETS) fail(2, "--preset is gpt2, gpt2-medium, gpt2-large or gpt2-xl, not '%s'", opt.preset);
        for (int k = 1; k < PRESET_OPTIONS; k++) set_default(presets[0][k], presets[i][k]);
    }
    if ((opt.init || opt.resume) && opt.preset)
        fail(2, "%s brings the model's shape along: leave out --preset", opt.init ? "--init" : "--resume");
    if (opt.init && opt.resume) fail(2, "--init begins a run and --resume continues one: give one of them");
    if (opt.init) set_default("--lr", "3e-5"); // fine-tuning: small steps away from what was learned
    if (!opt.resume) derive_options();         // else when the checkpoint's are known
    bool on_gpu = opt.device && strcmp(opt.device, "cpu");
    char number[4] = "0", more;
    if (on_gpu && strcmp(opt.device, "cuda") && sscanf(opt.device, "cuda:%3[0-9]%c", number, &more) != 1)
        fail(2, "--device is cpu, cuda or cuda:N, not '%s'", opt.device);
    if ((on_gpu || opt.compare) && !cuda_device)
        fail(2, "this program is the CPU's; `make train_gpt_cu` builds the GPU's");
    if (opt.device) device = on_gpu ? cuda_device : &cpu;
    choose_precision(2, "");
    if (given("--precision") && cuda_device && device == cuda_device && !opt.compare)
        fail(2, "--precision is for --device cpu; the GPU's is that of `make train_gpt_cu PRECISION=...`");
    cuda_number = atoi(number);
}

// ====================================================================================================================
// Several processes
//
// One model is trained by several processes, on one machine or on many, that send each other messages through MPI:
// `make train_gpt_mpi` builds the first half of this room, `make train_gpt` the few lines of the second. Who takes part
// is in `world` (errors and files), what is whose in share_out() (the model in memory).
//
// Data parallelism: the gradient of a batch's loss is the mean of its windows' gradients. So each of N processes has
// all weights, takes B/N windows of every batch and computes their mean gradient; the mean of these is the batch's. All
// take the same step from the same weights, which are therefore the same everywhere again.
//
// Each does one N-th of that step (ZeRO, stage 1: Rajbhandari et al. 2020): every tensor is cut into N parts, and part
// r is updated by process r, which alone keeps its moments. Twice they must talk to each other:
//
//     reduce-scatter   each sends every other its gradient of the other's part, and adds up what it gets for its own
//     all-gather       each sends every other the new weights of its own part
//
// Either way a process sends (N-1)/N of P numbers, and nothing less than both leaves everybody with the whole sum. A
// layer's gradients travel while the layer below is computed; a tensor's weights while the next ones are updated. Sums
// are taken in the order of processes: the same bits for any number of threads and with any MPI. Another number of
// processes has another order, and the same loss but for rounding; README says what the same bits would cost.

#ifdef WITH_MPI
static struct {
    Model* model;
    MPI_Request* requests; // (tensors,N-1,2)
    const Device* alone;   // what each of them computes on
    void (*send_layer)(long), (*gather)(const Model*, const float*), (*use_nccl)(Device*); // the last sets the others
    long layer;     // the one under way, from the last to the first
    size_t batches; // of the step under way
    double squares; // of the summed gradients
} exchange;

static MPI_Request* requests_of(size_t i) { return exchange.requests + i * 2 * (size_t)(world.size - 1); }
static void end_exchange(size_t i) { MPI_Waitall(2 * (world.size - 1), requests_of(i), MPI_STATUSES_IGNORE); }

// Begins to exchange tensor i of a block: a reduce-scatter where `in` is for what arrives, an all-gather with NULL.
static void begin_exchange(const Model* model, float* block, size_t i, float* in) {
    const Tensor* t = &model->tensors[i];
    MPI_Request* request = requests_of(i);
    for (int k = 1; k < world.size; k++) {
        int r = (world.rank + k) % world.size, tag = (int)i; // not all to the same one at once
        int part = (int)(part_start(t->size, r + 1) - part_start(t->size, r)), owned = (int)t->owned;
        float *theirs = block + t->offset + part_start(t->size, r), *own = block + t->offset + t->own;
        float* row = in ? in + (size_t)(k - 1) * t->owned : theirs;
        MPI_Irecv(row, in ? owned : part, MPI_FLOAT, r, tag, MPI_COMM_WORLD, request++);
        MPI_Isend(in ? theirs : own, in ? part : owned, MPI_FLOAT, r, tag, MPI_COMM_WORLD, request++);
    }
}

// The own part's gradient becomes the sum of all processes', what was sent away becomes 0.
static void add_up(const Model* model, const Tensor* t) {
    float *d = model->gradients + t->offset, *own = d + t->own, *arriving = model->arriving + t->arriving;
#pragma omp parallel for schedule(static)
    for (size_t start = 0; start < t->size; start += CHUNK) {
        float sum[CHUNK] = {0};
        size_t end = min_size(t->size, start + CHUNK), last = min_size(end, t->own + t->owned);
        for (int r = 0; r < world.size; r++) {
            int k = (r - world.rank + world.size) % world.size; // as in begin_exchange()
            const float* x = k ? arriving + (size_t)(k - 1) * t->owned : own;
            for (size_t j = start > t->own ? start : t->own; j < last; j++) sum[j - start] += x[j - t->own];
        }
        memcpy(d + start, sum, (end - start) * sizeof(float));
    }
    exchange.squares += pow(norm(own, t->owned), 2);
}

// Ends the exchange of the layer before, which lies above, then begins this one's.
static void send_layer(long layer) {
    const Model* m = exchange.model;
    for (size_t i = 0; i < m->tensor_count; i++)
        if (m->tensors[i].layer == layer + 1) end_exchange(i), add_up(m, &m->tensors[i]);
    for (size_t i = 0; i < m->tensor_count; i++)
        if (m->tensors[i].layer == layer) begin_exchange(m, m->gradients, i, m->arriving + m->tensors[i].arriving);
}

static void on_done(const char* name) {
    int ignored;
    if (!strcmp(name, "ln1")) exchange.send_layer(--exchange.layer); // the last of a layer's backward pass
    MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_WORLD, &ignored, MPI_STATUS_IGNORE); // MPI works while in a call
}

static void shared_backward(Model* model, Activations* a, const int* tokens, const int* targets, size_t B, size_t T,
                            float share) {
    exchange.layer = (long)model->config.L;
    layer_done = ++exchange.batches == opt.accumulate ? on_done : NULL;
    exchange.alone->backward(model, a, tokens, targets, B, T, share / (float)world.size);
    layer_done = NULL;
}

// x (n) becomes the sum of all processes' x.
static void sum_over_processes(double* x, int n) {
    double* all = (double*)allocate((size_t)(world.size * n), sizeof(double), "sums");
    MPI_Allgather(x, n, MPI_DOUBLE, all, n, MPI_DOUBLE, MPI_COMM_WORLD);
    memset(x, 0, (size_t)n * sizeof(double));
    for (int i = 0; i < world.size * n; i++) x[i % n] += all[i];
    free(all);
}

static void shared_update(Model* model, AdamW o) {
    send_layer(-1); // what is no layer's, as embeddings
    send_layer(-2); // there is none: only ends that one
    double sums[] = {exchange.squares, model->loss_sum / world.size, (double)(signalled != 0)};
    sum_over_processes(sums, 3);
    model->gradient_norm = sqrt(sums[0]), model->loss_sum = sums[1], world.stopping = sums[2] > 0;
    exchange.squares = 0, exchange.batches = 0;
    for (size_t i = 0; i < model->tensor_count; i++)
        adamw(model, i, i + 1, o), begin_exchange(model, model->weights, i, NULL);
    for (size_t i = 0; i < model->tensor_count; i++) end_exchange(i);
}

static uint64_t first_says(uint64_t x) { // to all
    MPI_Bcast(&x, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
    return x;
}

// The gradients' block, which is zero between steps, takes in all processes' moments or, with NULL, becomes zero again.
static void gather(const Model* model, const float* moments) {
    if (!moments) memset(model->gradients, 0, model->block_size * sizeof(float));
    for (size_t i = 0; moments && i < model->tensor_count; i++) {
        const Tensor* t = &model->tensors[i];
        memcpy(model->gradients + t->offset + t->own, moments + t->moment, t->owned * sizeof(float));
        begin_exchange(model, model->gradients, i, NULL);
        end_exchange(i);
    }
}

static const float* whole_moments(const Model* model, int which) {
    const float* moments[] = {NULL, model->moment1, model->moment2};
    if (world.size > 1) exchange.gather(model, moments[which]);
    return world.size > 1 ? model->gradients : moments[which];
}

// From here on the device trains this model together with the other processes'.
static void train_together(Model* model) {
    static Device together;
    size_t messages = 2 * (size_t)(world.size - 1) * model->tensor_count;
    exchange.requests = (MPI_Request*)allocate(messages, sizeof(MPI_Request), "messages"), exchange.model = model;
    exchange.alone = device, exchange.send_layer = send_layer, exchange.gather = gather;
    together = *device, together.backward = shared_backward, together.update = shared_update;
    if (device == cuda_device) exchange.use_nccl(&together);
    device = &together;
}
#else
static void sum_over_processes(double* x, int n) { (void)x, (void)n; }
static uint64_t first_says(uint64_t x) { return x; }
static const float* whole_moments(const Model* m, int which) { return which == 1 ? m->moment1 : m->moment2; }
static void train_together(Model* model) { (void)model; }
#endif

// ====================================================================================================================
// Training loop

static bool live;                       // stdout is a terminal
static volatile sig_atomic_t line_open; // its last line is the progress line

// The columns of the terminal as it is now.
static size_t terminal_columns(void) {
    struct winsize size;
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) || !size.ws_col ? 80 : size.ws_col;
}

static void clear_live_line(void) {
    if (line_open) fputs("\r\033[K", stdout);
    line_open = false;
}

// The first signal is answered at once, and the run saved after the step under way; the second ends the program. Not so
// a hang-up, of which a terminal that is closed may send two.
static void on_signal(int number) {
    static const char answer[] = "train_gpt: finishing the step, then saving; again: leave without saving\n";
    int error = errno;
    signal(number, number == SIGHUP ? SIG_IGN : SIG_DFL);
    ssize_t ignored = line_open ? write(STDOUT_FILENO, "\r\033[K", 4) : 0;
    if (!signalled && world.size == 1) ignored += write(STDERR_FILENO, answer, sizeof answer - 1);
    (void)ignored; // nobody may be there
    line_open = false;
    signalled = number;
    errno = error;
}

static void catch_signals(void) { // glibc's signal() restarts output under way
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    signal(SIGXCPU, on_signal);
    if (signal(SIGHUP, on_signal) == SIG_IGN) signal(SIGHUP, SIG_IGN); // nohup
}

static const char* data_path(const char* name) { return path_in(opt.data, name); }

// Where --init points: a file, or in a folder the model.safetensors, or the index of several.
static const char* weights_path(void) {
    static const char* const names[] = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                                        "pytorch_model.bin.index.json", "model.safetensors"};
    const char* path = opt.init;
    struct stat info;
    if (!stat(path, &info) && S_ISDIR(info.st_mode))
        for (int i = 0; i < 5 && (i == 0 || access(path, R_OK)); i++) path = path_in(opt.init, names[i]);
    return path;
}

// What a model is wanted for. Training also samples: the activations of one more sequence, being what memory() grows by
// from none to one. Ablation needs gradients, but no samples. To score batches, training's activations are needed beside
// a model that is there already.
typedef enum { FOR_USE, FOR_TRAINING, FOR_ABLATION, FOR_SCORES } Purpose;
static size_t memory_needed(Config config, size_t B, Purpose what) {
    size_t needed = device->memory(config, B, config.T, what != FOR_USE);
    if (what == FOR_TRAINING)
        needed += device->memory(config, 1, config.T, false) - device->memory(config, 0, config.T, false);
    return what == FOR_SCORES ? needed - device->memory(config, 0, config.T, true) : needed;
}

// The largest batch below `too_many` that takes no more than so many bytes, or 0.
static size_t largest_batch(Config config, size_t too_many, Purpose what, size_t bytes) {
    size_t fits = 0;
    while (too_many - fits > 1) {
        size_t middle = fits + (too_many - fits) / 2;
        if (memory_needed(config, middle, what) <= bytes)
            fits = middle;
        else
            too_many = middle;
    }
    return fits;
}

static void check_memory(Config config, size_t B, Purpose what) {
    size_t available = device->memory_available() / (size_t)world.neighbours, needed = memory_needed(config, B, what);
    if (what == FOR_TRAINING)
        printf("memory     %.1f MB needed, %.0f MB available\n", (double)needed / 1e6, (double)available / 1e6);
    if (needed <= available) return;
    size_t fits = largest_batch(config, B, what, available);
    char advice[64] = "a smaller --context or model may fit";
    if (fits) snprintf(advice, sizeof advice, "--batch %zu would fit", fits * (size_t)world.size);
    die("this takes %.0f MB of memory and %.0f MB are available: %s", (double)needed / 1e6, (double)available / 1e6,
        advice);
}

static void print_config(Config c) {
    printf("model      vocabulary %zu", c.V);
#define PRINT(field, option, initial, least, most, help) \
    if (c.field) printf(", %s %zu", &option[2], c.field);
    CONFIG(PRINT)
}

// The largest batch of the presets that fits in so many GiB, of which some are the system's or the driver's.
static void run_memory(void) {
    static const int sizes[] = {8, 12, 16, 24, 80};
    enum { SIZES = sizeof sizes / sizeof *sizes };
    const size_t GiB = 1 << 30, reserve = GiB / 4 * 3;
    size_t T = given("--context") ? opt.model.T : 1024;
    printf("Sequences of %zu tokens in a batch, training in GiB of memory, less 0.75.\n\n%-12s %10s %9s", T, "",
           "parameters", "a token");
    for (int i = 0; i < SIZES; i++) printf("%9d GiB", sizes[i]);
    puts("");
    for (int i = 0; i < 2 * PRESETS; i++) {
        const char* const* preset = presets[1 + i / 2];
        recompute = i % 2;
        for (int k = 1; k <= 3; k++) set_option(find_option(presets[0][k]), preset[k], 2, "");
        Config c = opt.model;
        c.V = 50257, c.T = T;
        Model model;
        model.config = c;
        describe_parameters(&model);
        size_t some = 4096 / T + 1; // more tokens than --recompute has logits of at a time
        size_t window = memory_needed(c, some + 1, FOR_TRAINING) - memory_needed(c, some, FOR_TRAINING);
        printf("%-12s %8.0f M %6.2f MB", recompute ? "  recompute" : preset[0], (double)model.parameter_count / 1e6,
               (double)window / (double)T / 1e6);
        for (int k = 0; k < SIZES; k++) {
            size_t fits = largest_batch(c, MAX_SIZE + 1, FOR_TRAINING, (size_t)sizes[k] * GiB - reserve);
            printf(fits ? "%13zu" : "            -", fits);
        }
        puts("");
        free(model.tensors);
    }
}

// The model's shape: the options', or that of the file from which it comes, which the options then may not contradict;
// but a model from --init may be used with a shorter context than it was trained with.
static Config choose_config(const Tokenizer* t, const Checkpoint* from) {
    Config config = opt.model;
    if (from) {
        const char* path = from->file.path;
        for (const Pair* p = from->json.pairs; p < from->json.pairs + from->json.count; p++)
            if (!strncmp(p->key, "--", 2) && !find_option(p->key))
                die("%s was made with %s %s, which this program does not know", path, p->key, p->value);
        config = read_config(from);
        if (opt.init && given("--context")) {
            if (opt.model.T > config.T)
                die("--context %zu is longer than the %zu positions of %s", opt.model.T, config.T, path);
            config.T = opt.model.T;
        }
#define FITS(field, option, initial, least, most, help)                                                           \
    if (given(option) && opt.model.field != config.field)                                                         \
        die("%s %zu does not fit %s, which was trained with %zu: leave the option out, or start anew without it", \
            option, opt.model.field, path, config.field);
        CONFIG(FITS)
        if (t && opt.init && t->V < config.V && config.V - t->V <= t->V / 50) // some are extended, or padded
            note("%s has a vocabulary of %zu: the first %zu are taken to be those of %s", path, config.V, t->V,
                 t->file.path);
        else if (t && t->V != config.V)
            die("%s has a vocabulary of %zu, but %s has %zu tokens: prepare the data with the model's tokenizer "
                "(prepare_data.py --tokenizer)",
                path, config.V, t->file.path, t->V);
    }
    if (t) config.V = t->V;
    opt.model = config; // for the next checkpoint
    if (config.C % config.H) fail(2, "--channels %zu is not divisible by --heads %zu", config.C, config.H);
    const char* refused = device->refuses ? device->refuses(config) : NULL;
    if (refused) die("this device does not compute a model with %s: --device cpu does", refused);
    return config;
}

// The tokenizer of the model in a file: the one of --data if given, else the one within the file, else the one beside
// it, else the data's. Returns false if there is none, which is refused where it is needed; one that is not the model's
// is refused always.
static bool find_tokenizer(const Checkpoint* c, Tokenizer* t, bool needed) {
    const Entry* e = find_entry(c, "", "tokenizer.bin");
    const char *wanted = metadata(c, "tokenizer"), *path = c->file.path;
    const char* file = path_in(folder_of(path), "tokenizer.bin");
    bool beside = !access(file, F_OK);
    if (!given("--data") && !e && !beside && !needed) return false;
    if (given("--data") || !beside) file = data_path("tokenizer.bin");
    if (e && !given("--data"))
        *t = read_tokenizer(path, e->data, e->to - e->from);
    else
        *t = load_tokenizer(file);
    if (wanted && strtoull(wanted, NULL, 16) != t->mark)
        die("%s was trained with another tokenizer than %s: %s", path, t->file.path,
            e ? "leave out --data, or prepare the text there with the model's"
              : "--data names the folder with its own");
    if (!wanted && !e && t->V != 50257)
        note("%s does not say which tokenizer it was trained with: %s is taken", path, t->file.path);
    return true;
}

// The model of a checkpoint, or of --init, ready to be used, with room for gradients if it is `training`; and its
// tokenizer. Returns whether it has one.
static bool load_for_use(Model* model, Tokenizer* t, bool needed, bool training) {
    Checkpoint c = open_checkpoint(opt.init ? weights_path() : opt.checkpoint,
                                   "; `./train_gpt` trains a model, --init takes one from elsewhere");
    memset(model, 0, sizeof *model);
    bool found = find_tokenizer(&c, t, needed);
    model->config = choose_config(found ? t : NULL, &c);
    device->start();
    check_memory(model->config, 1, training ? FOR_ABLATION : FOR_USE);
    device->create_model(model, training);
    load_block(&c, model, "", model->weights);
    check_foreign(&c, model);
    close_checkpoint(&c);
    fputs(notes, stderr);
    return found;
}

// Lets a model go on from a text, or begin one if that is empty. stream: the random numbers that it draws.
static void continue_text(Model* model, Activations* a, const Tokenizer* t, const char* text, size_t tokens,
                          uint64_t stream) {
    size_t n = strlen(text);
    int* prompt = (int*)allocate(n + 1, sizeof(int), "the prompt");
    size_t count = encode(t, (const uint8_t*)text, n, prompt);
    if (!count) prompt[count++] = t->end_of_text >= 0 ? t->end_of_text : find_token(t, (const uint8_t*)"\n", 1);
    Sampling s = {opt.temperature, opt.top_p, opt.top_k, tokens, stream};
    generate(model, a, t, prompt, count, &s);
    free(prompt);
}

// What a way to use the program holds is given back by the end of it.
static void run_generate(void) {
    static Model model;
    static Activations a;
    static Tokenizer t;
    in_16_bits = bf16;
    load_for_use(&model, &t, true, false);
    device->create_activations(&a, &model, 1, model.config.T, false);
    fputs(opt.prompt, stdout);
    fflush(stdout);
    continue_text(&model, &a, &t, opt.prompt, opt.tokens, random_bits(opt.seed, STREAM_SAMPLE));
    putchar('\n');
}

static void run_tokenize(void) {
    static Tokenizer t;
    if (given("--checkpoint")) {
        Checkpoint c = open_checkpoint(opt.checkpoint, "");
        find_tokenizer(&c, &t, true);
        fputs(notes, stderr);
    } else
        t = load_tokenizer(data_path("tokenizer.bin"));
    File file = map_file(opt.tokenize, "");
    int* tokens = (int*)allocate(file.size, sizeof(int), "tokens");
    size_t n = encode(&t, file.data, file.size, tokens);
    for (size_t i = 0; i < n; i++) printf("%d\n", tokens[i]);
    free(tokens);
}

// A text in windows of the model's context, each beginning --stride tokens after the last. A window scores the tokens
// that the one before did not reach, so that all but the text's first token are scored once, and all but the first
// window's have context - stride tokens before them at least.
static void run_eval(void) {
    static Model model;
    static Tokenizer t;
    static Activations a;
    load_for_use(&model, &t, true, false);
    File file = map_file(opt.eval, "");
    int* tokens = (int*)allocate(file.size + 1, sizeof(int), "tokens");
    size_t n = encode(&t, file.data, file.size, tokens), T = model.config.T, rows = T - 1;
    size_t stride = given("--stride") ? opt.stride : (T + 1) / 2;
    if (n < 2 || T < 2) die("--eval takes a text, and a context, of at least two tokens");
    if (stride >= T)
        fail(2, "--stride %zu: with a context of %zu at most %zu, or tokens are left out", stride, T, T - 1);
    size_t B = min_size(opt.batch, (n + stride - 1) / stride), reached = 1, begin = 0, bytes = 0;
    check_memory(model.config, B, FOR_SCORES);
    device->create_activations(&a, &model, B, rows, true);
    int *inputs = (int*)allocate(2 * B * rows, sizeof(int), "a batch"), *targets = inputs + B * rows;
    float* losses = (float*)allocate(B * rows, sizeof(float), "losses");
    double sum = 0;
    while (reached < n) {
        size_t first = begin;
        for (size_t i = 0; i < B * rows; i++) { // beyond the text's end any token will do: nobody before it sees it
            size_t at = first + i / rows * stride + i % rows;
            inputs[i] = tokens[min_size(at, n - 1)], targets[i] = tokens[min_size(at + 1, n - 1)];
        }
        device->forward(&model, &a, inputs, targets, B, rows, 0, false);
        take_loss(&model);
        device->read_activation(losses, &a, a.losses, B * rows);
        for (size_t b = 0; b < B && reached < n; b++, begin += stride)
            for (; reached < min_size(begin + T, n); reached++) {
                bytes += token_string(&t, tokens[reached]).n;
                sum += losses[b * rows + reached - 1 - begin];
            }
    }
    double loss = sum / (double)(n - 1);
    const char* format = opt.json
                             ? "{\"tokens\": %zu, \"bytes\": %zu, \"context\": %zu, \"stride\": %zu, \"loss\": %.9g, "
                               "\"perplexity\": %.9g, \"bits_per_byte\": %.9g}\n"
                             : "%zu tokens of %zu bytes, context %zu, stride %zu: loss %.4f, perplexity %.3f, "
                               "%.4f bits a byte\n";
    printf(format, n - 1, bytes, T, stride, loss, exp(loss), sum / log(2) / (double)bytes);
    free(tokens), free(inputs), free(losses);
}

static void run_export(void) {
    static Model model;
    static Tokenizer t;
    bool found = load_for_use(&model, &t, false, false);
    export_model(opt.export_to, &model, found ? &t : NULL);
    printf("%s opens with transformers' AutoModelForCausalLM.from_pretrained(\"%s\")", opt.export_to, opt.export_to);
    puts(found ? ", and with AutoTokenizer's" : "; no tokenizer was written: --data names the folder of the model's");
}

enum { CURVE = 64 }; // columns of the loss curve

// All that a training run holds.
typedef struct {
    Tokenizer tokenizer;
    Data train, val;
    uint64_t text_mark, val_mark; // what tells these from other texts
    Model model;
    Activations a, sampler; // a batch; one sequence, to sample from
    int *inputs, *targets;  // (B,T)
    size_t B, T;
    size_t first, step, saved;      // steps done: when the run began or went on, now, and in the checkpoint
    uint64_t taken, next;           // training windows taken by the steps done; the one that is to be loaded next
    bool batch_loaded;              // inputs and targets hold that and those after it
    bool diverged;                  // the loss is no number any more
    double loss;                    // the last step's
    double val_loss, bits_per_byte; // the last validation's
    size_t val_count;               // windows in a validation
    double val_bytes;               // bytes of text that their targets stand for
    double peak;                    // operations a second
    double train_sum[CURVE], train_count[CURVE], val_at[CURVE]; // the loss curve's columns
    char checkpoint[MAX_PATH], log_path[MAX_PATH];              // the files themselves, not links to them
    struct stat own;                                            // the checkpoint, if this run wrote it or began from it
    double retry;                                               // when to try again to save; 0: no attempt has failed
    FILE* log;
    size_t log_kept; // bytes of the log that is there, if it is this run's
} Run;

static double rate_at(size_t step) { return learning_rate(step, opt.warmup, opt.steps, opt.lr, opt.min_lr); }

// Whether a file that stands where the checkpoint goes is of another run, or was put there by somebody.
static bool is_foreign(const Run* run) {
    struct stat now;
    return !stat(run->checkpoint, &now) &&
           !(same_file(&now, &run->own) && !memcmp(&now.st_mtim, &run->own.st_mtim, sizeof now.st_mtim));
}

// What a checkpoint says of the run, beside the model: pairs of JSON, each with a comma before it.
static Text describe_run(const Run* run) {
    Text text;
    FILE* f = begin_text(&text);
    fprintf(f, ",\"step\":\"%zu\",\"windows\":\"%llu\",\"loss\":\"%.9g\"", run->step, (unsigned long long)run->taken,
            run->loss);
    fprintf(f, ",\"tokenizer\":\"%016llx\",\"tokens\":\"%zu\",\"text\":\"%016llx\",\"val_text\":\"%016llx\"",
            (unsigned long long)run->tokenizer.mark, run->train.token_count, (unsigned long long)run->text_mark,
            (unsigned long long)run->val_mark);
    for (const Option* o = options; o < options + OPTIONS; o++) {
        if (!(o->use & SAVED) || (!o->initial && !o->given)) continue;
        if (o->use & SHAPE && !*o->whole) continue; // as in GPT-2
        fprintf(f, ",\"%s\":", o->name);
        if (o->text)
            fprintf(f, "\"%s\"", *o->text);
        else
            fprintf(f, "\"%.17g\"", o->whole ? (double)*o->whole : *o->real);
    }
    end_text(&text, "what the checkpoint says of the run");
    return text;
}

// Returns what went wrong, or NULL. All processes collect what the first writes, and know how that went. Nothing is
// replaced by a model whose loss, which is computed once more, is no number.
static const char* save_run(Run* run) {
    const char* error = NULL;
    if (!world.rank) {
        device->forward(&run->model, &run->a, run->inputs, run->targets, 1, run->T, 0, false);
        if (!isfinite(take_loss(&run->model))) error = "the model's loss is not a number any more";
        if (!error && is_foreign(run)) error = keep_old(run->checkpoint);
        if (!error) stat(run->checkpoint, &run->own); // what is there now has another name, too
    }
    if (first_says(!error)) {
        Text text = describe_run(run);
        error = save_checkpoint(run->checkpoint, &run->model, true, text.text, &run->tokenizer.file);
        free(text.text);
        if (!error) stat(run->checkpoint, &run->own);
    }
    if (!first_says(!error)) return world.rank ? "the first process cannot write it" : error;
    run->saved = run->step;
    return NULL;
}

// Takes over the options of the run that wrote the checkpoint; those given now replace them. What that run did not know
// keeps its first value, and the model's shape is for choose_config.
static void resume_options(Run* run, const Checkpoint* c) {
    if (!metadata(c, "step") || !metadata(c, "windows") || !metadata(c, "tokens"))
        die("%s holds no run to resume; --init starts a new one from its weights", c->file.path);
    for (Option* o = options; o < options + OPTIONS; o++) {
        const char* value = metadata(c, o->name);
        if (!(o->use & SAVED) || o->use & SHAPE || !value || o->given) continue;
        set_option(o, value, 1, "the checkpoint is damaged: ");
        o->given = true;
    }
    choose_precision(1, "the checkpoint is damaged: ");
    derive_options();
    run->step = metadata_number(c, "step");
    run->taken = metadata_number(c, "windows");
    run->loss = metadata(c, "loss") ? strtod(metadata(c, "loss"), NULL) : NAN;
    if (run->step > opt.steps)
        die("%s has done %zu steps, more than --steps %zu asks for in all", c->file.path, run->step, opt.steps);
    if (run->step == opt.steps)
        die("%s has done all of its %zu steps; --steps with a larger number goes on", c->file.path, opt.steps);
}

static const char log_title[] = "step,loss,val_loss,lr,grad_norm,ms,tokens_per_s\n";

// The log that is there is only read, since what is no log must not become one. It is the resumed run's if it has a row
// for the checkpoint's last step with the loss that the checkpoint gives that.
static void find_log(Run* run) {
    struct stat info, stream;
    snprintf(run->log_path, sizeof run->log_path, "%s", resolved(opt.log));
    take_file(run->log_path);
    if (stat(run->log_path, &info)) return;
    if (same_file(&info, &run->own)) fail(2, "--log and --checkpoint are the same file, %s", opt.log);
    for (int i = STDOUT_FILENO; i <= STDERR_FILENO; i++)
        if (!fstat(i, &stream) && same_file(&stream, &info))
            fail(2, "--log %s is where the program prints to: give it a file of its own", opt.log);
    File log = map_file(run->log_path, "");
    size_t title = strlen(log_title);
    if (log.size && (log.size < title || memcmp(log.data, log_title, title)))
        die("%s is no log of a training run: give --log another name", opt.log);
    if (!opt.resume || log.size <= title) {
        unmap_file(&log);
        return;
    }
    char step[32], row[64];
    snprintf(step, sizeof step, "\n%zu,", run->step);
    snprintf(row, sizeof row, "%s%.9g,", step, run->loss);
    const char* end = (const char*)memrchr(log.data, '\n', log.size); // what is behind it is half a row
    const char* there = (const char*)memmem(log.data, (size_t)(end - (const char*)log.data), step, strlen(step));
    if (there && !isnan(run->loss) && strncmp(there, row, strlen(row)))
        die("%s is the log of another run than %s: give --log another name", opt.log, opt.checkpoint);
    if (there)
        run->log_kept =
            1 + (size_t)((const char*)memchr(there + 1, '\n', (size_t)(end - there)) - (const char*)log.data);
    else
        note("%s has no row of step %zu, after which %s was saved: it is kept as %s", opt.log, run->step,
             opt.checkpoint, free_old_name(run->log_path));
    unmap_file(&log);
}

// Begins the log, after another run's was put aside; or goes on with this run's, from which, in place, later steps are
// cut off, as they are done again.
static void open_log(Run* run) {
    struct stat old;
    if (!run->log_kept) {
        Output out;
        output_open(&out, run->log_path, 0);
        output_write(&out, log_title, strlen(log_title));
        bool rows = !stat(run->log_path, &old) && (size_t)old.st_size > strlen(log_title);
        if (rows && !out.error) output_failed(&out, keep_old(run->log_path));
        output_finish(&out);
    }
    run->log = fopen(run->log_path, "a");
    if (!run->log || (run->log_kept && ftruncate(fileno(run->log), (off_t)run->log_kept)))
        die("cannot write %s: %s", opt.log, strerror(errno));
}

// The checkpoint may take another's place, which is then kept, but no other file's.
static void find_checkpoint(Run* run) {
    if (opt.resume) stat(run->checkpoint, &run->own);
    if (opt.resume || access(run->checkpoint, F_OK)) return;
    uint64_t length = 0;
    File there = map_file(run->checkpoint, "");
    if (there.size > 8) memcpy(&length, there.data, 8);
    if (there.size < 9 || there.data[8] != '{' || length > 100000000)
        die("%s is not a safetensors file: give --checkpoint another name, for it not to be replaced", opt.checkpoint);
    unmap_file(&there);
}

// Saves what a run would lose if it ended now, and says what has become of it. One of several processes cannot, but all
// of them diverge at once.
static Run* rescued;
static const char* rescue_run(void) {
    static char line[4 * MAX_PATH];
    char kept[2 * MAX_PATH] = "";
    const char* error = NULL;
    Run* run = rescued;
    if (run->saved != run->step) {
        if (run->diverged && is_foreign(run))
            snprintf(kept, sizeof kept, ", the one before in %s", free_old_name(run->checkpoint));
        error = world.size > 1 && !run->diverged ? "it takes all processes, and this one ends" : save_run(run);
    }
    if (error)
        snprintf(line, sizeof line, "the steps after %zu cannot be saved: %s", run->saved, error);
    else if (run->step == run->first)
        snprintf(line, sizeof line, "nothing is changed");
    else
        snprintf(line, sizeof line, "saved after step %zu in %s, --resume goes on%s", run->step, opt.checkpoint, kept);
    return line;
}

// The i-th of the windows that are validated on, spread evenly over the text, into row b of the batch.
static void load_val_window(Run* run, size_t i, size_t b) {
    size_t T = run->T, window = i * run->val.windows / run->val_count;
    run->batch_loaded = false;
    load_window(&run->val, window, 0, run->inputs + b * T, run->targets + b * T);
}

static uint64_t file_mark(const char* path) {
    File file = map_file(path, "");
    uint64_t mark = fingerprint(file.data, file.size);
    unmap_file(&file);
    return mark;
}

// The shards of a text, which must have been made with this tokenizer: the one that they name, or that is beside them.
static Data open_text(const char* pattern, size_t T, const Tokenizer* t) {
    Data d = open_data(pattern, T, t->V);
    for (const Shard* s = d.shards; s < d.shards + d.shard_count; s++) {
        uint64_t mark;
        memcpy(&mark, s->file.data + 3 * sizeof(int32_t), sizeof mark);
        const char* beside = path_in(folder_of(s->file.path), "tokenizer.bin");
        if (!mark && !access(beside, F_OK)) mark = file_mark(beside);
        if (mark && mark != t->mark)
            die("%s was not made with the tokenizer of %s: prepare the text again, with that one", s->file.path,
                t->file.path);
        if (!mark && t->V != 50257)
            note("%s does not say which tokenizer made it: %s is taken", s->file.path, t->file.path);
    }
    return d;
}

// The text to learn from, and room for a batch of it.
static void open_texts(Run* run, const Checkpoint* resumed) {
    run->train = open_text(opt.train ? opt.train : data_path("train.bin"), run->T, &run->tokenizer);
    run->val = open_text(opt.val ? opt.val : data_path("val.bin"), run->T, &run->tokenizer);
    if (resumed && run->train.token_count != metadata_number(resumed, "tokens"))
        die("%s was trained on %s tokens, but there are %zu now: other data", resumed->file.path,
            metadata(resumed, "tokens"), run->train.token_count);
    run->text_mark = data_mark(&run->train), run->val_mark = data_mark(&run->val);
    const char* text = resumed ? metadata(resumed, "text") : NULL;
    if (text && strtoull(text, NULL, 16) != run->text_mark)
        die("%s was trained on another text of %zu tokens", resumed->file.path, run->train.token_count);
    text = resumed ? metadata(resumed, "val_text") : NULL;
    if (text && strtoull(text, NULL, 16) != run->val_mark)
        die("%s was validated on another text than %s", resumed->file.path, run->val.shards->file.path);
    run->inputs = (int*)allocate(2 * run->B * run->T, sizeof(int), "a batch");
    run->targets = run->inputs + run->B * run->T;
    run->val_count = min_size(run->val.windows, opt.val_batches * opt.batch);
    for (size_t i = 0; i < run->val_count; i++) {
        load_val_window(run, i, 0);
        for (size_t t = 0; t < run->T; t++) run->val_bytes += (double)token_string(&run->tokenizer, run->targets[t]).n;
    }
}

static void create_model(Run* run, const Checkpoint* from) {
    Model* model = &run->model;
    device->create_model(model, true);
    device->create_activations(&run->a, model, run->B, run->T, true);
    device->create_activations(&run->sampler, model, 1, run->T, false);
    if (!from) initialize(model, opt.seed);
    if (from) load_block(from, model, "", model->weights);
    if (opt.resume) load_block(from, model, "adam.m.", model->moment1);
    if (opt.resume) load_block(from, model, "adam.v.", model->moment2);
    if (from) check_foreign(from, model);
}

// That all processes are about to do the same. Of weights, each tensor's first ones are looked at.
static void check_same(const Run* run) {
    static const char* const names[] = {"program",          "command line",        "tokenizer",
                                        "text to train on", "text to validate on", "weights to start from"};
    uint64_t marks[] = {file_mark("/proc/self/exe"), 0, run->tokenizer.mark, run->text_mark, run->val_mark, 0};
    for (const Option* o = options; o < options + OPTIONS; o++) {
        double value = o->whole ? (double)*o->whole : o->real ? *o->real : o->flag ? *o->flag : 0;
        marks[1] = random_bits(marks[1], fingerprint((const uint8_t*)&value, sizeof value));
        if (o->text && *o->text && o->use & SAVED)
            marks[1] = random_bits(marks[1], fingerprint((const uint8_t*)*o->text, strlen(*o->text)));
    }
    for (const Tensor* t = run->model.tensors; t < run->model.tensors + run->model.tensor_count; t++) {
        float w[1024];
        if (t->size > INT_MAX) die("%s is too large for MPI, which counts in int", t->name);
        size_t n = min_size(1024, t->size);
        device->to_host(w, run->model.weights + t->offset, n);
        marks[5] = random_bits(marks[5], fingerprint((const uint8_t*)w, n * sizeof *w));
    }
    for (int i = 0; i < 6; i++)
        if (first_says(marks[i]) != marks[i])
            die("the %s here is not that of rank 0: all processes need the same", names[i]);
}

// Everything that can fail for a reason that the user can mend is tried here, before the first step.
static void start_run(Run* run) {
    memset(run, 0, sizeof *run);
    Checkpoint file, *from = opt.init || opt.resume ? &file : NULL;
    // Before it is read: the run that writes it now may end and leave a newer one.
    snprintf(run->checkpoint, sizeof run->checkpoint, "%s", resolved(opt.checkpoint));
    if (!world.rank) take_file(run->checkpoint);
    if (from) {
        file = open_checkpoint(opt.init ? weights_path() : opt.checkpoint, "");
        find_tokenizer(from, &run->tokenizer, true);
    } else
        run->tokenizer = load_tokenizer(data_path("tokenizer.bin"));
    Config config = run->model.config = choose_config(&run->tokenizer, from);
    if (opt.resume) resume_options(run, from);
    if (opt.batch % (size_t)world.size)
        fail(2, "--batch %zu cannot be shared out equally among %d processes", opt.batch, world.size);
    run->B = opt.batch / (size_t)world.size;
    run->T = config.T;
    run->first = run->saved = run->step;
    run->next = run->taken;
    if (!world.rank) find_checkpoint(run);
    if (opt.log && !world.rank) find_log(run);
    open_texts(run, opt.resume ? from : NULL);
    printf("data       %zu tokens to train on, %zu to validate, vocabulary %zu\n", run->train.token_count,
           run->val.token_count, config.V);
    const char* machine = device->start();
    check_memory(config, run->B, FOR_TRAINING);
    run->peak = device->peak();
    sum_over_processes(&run->peak, 1);
    create_model(run, from);
    if (world.size > 1) {
        check_same(run);
        train_together(&run->model);
    }
    if (from) close_checkpoint(from);
    if (!world.rank) try_output(run->checkpoint, 3 * sizeof(float) * run->model.parameter_count);
    print_config(config);
    printf(": %zu parameters\n", run->model.parameter_count);
    printf("machine    ");
    if (world.size > 1) printf("%d processes, each ", world.size);
    printf("%s, %.0f GFLOP/s at most\n", machine, run->peak / world.size / 1e9);
    printf("training   steps %zu to %zu of %zu x %zu x %zu tokens, checkpoint in %s", run->step + 1, opt.steps,
           opt.accumulate, opt.batch, run->T, opt.checkpoint);
    if (is_foreign(run)) printf("; the one there is kept as %s", free_old_name(run->checkpoint));
    puts("\n");
    check_output();
    if (!world.rank) fputs(notes, stderr);
    // Nothing was changed so far.
    rescued = run;
    rescue = rescue_run;
    catch_signals();
    if (opt.log && !world.rank) open_log(run);
}

// Mean loss over the validation windows, always the same, spread evenly over the text. Also in bits per byte of text,
// which unlike the loss compares between tokenizers. Returns false if it was told to stop; several processes, of which
// not all were, go on to the end.
static bool validate(Run* run) {
    double loss = 0;
    for (size_t i = (size_t)world.rank * run->B, n; i < run->val_count; i += opt.batch) {
        if (signalled && world.size == 1) return false;
        n = min_size(run->B, run->val_count - i);
        for (size_t b = 0; b < n; b++) load_val_window(run, i + b, b);
        device->forward(&run->model, &run->a, run->inputs, run->targets, n, run->T, 0, false);
        loss += take_loss(&run->model) * (double)n;
    }
    sum_over_processes(&loss, 1);
    run->val_loss = loss / (double)run->val_count;
    run->bits_per_byte = loss * (double)run->T / run->val_bytes / 0.6931471805599453;
    return true;
}

// Sampling draws from a stream of the step's own, so that a resumed run draws the same.
static void show_sample(Run* run, size_t tokens) {
    if (!tokens || world.rank) return;
    clear_live_line();
    puts("---");
    continue_text(&run->model, &run->sampler, &run->tokenizer, "", tokens,
                  random_bits(random_bits(opt.seed, STREAM_SAMPLE), run->step));
    puts("\n---");
}

// The loss over the steps as a small picture: * training (mean over a column's steps), o validation.
static void draw_curve(const Run* run) {
    enum { HEIGHT = 12 };
    double low = INFINITY, high = -INFINITY, train[CURVE], val[CURVE]; // NAN where there is none
    for (size_t x = 0; x < CURVE; x++) {
        train[x] = run->train_sum[x] / run->train_count[x];
        val[x] = run->val_at[x] ? run->val_at[x] : NAN;
        low = fmin(low, fmin(train[x], val[x])); // which pass over NAN
        high = fmax(high, fmax(train[x], val[x]));
    }
    if (!(high > low) || (live && terminal_columns() <= 9 + 1 + CURVE)) return;
    double rows_per_nat = (HEIGHT - 1) / (high - low);
    char picture[HEIGHT][CURVE];
    memset(picture, ' ', sizeof picture);
    for (size_t x = 0; x < CURVE; x++) {
        if (!isnan(train[x])) picture[lround((high - train[x]) * rows_per_nat)][x] = '*';
        if (!isnan(val[x])) picture[lround((high - val[x]) * rows_per_nat)][x] = 'o';
    }
    putchar('\n');
    for (int y = 0; y < HEIGHT; y++) printf("  %6.3f |%.*s\n", high - y / rows_per_nat, CURVE, picture[y]);
    printf("         +----------------------------------------------------------------\n"
           "          step %-6zu       loss: * training, o validation %14s %zu\n",
           run->first + 1, "step", run->step);
}

static void load_next_batch(Run* run) {
    uint64_t own = run->next + (uint64_t)world.rank * run->B; // of `batch` windows
    if (!run->batch_loaded) load_batch(&run->train, opt.seed, own, run->B, run->inputs, run->targets);
    run->batch_loaded = true;
}

// The model may have gone wrong before it was seen, so what was saved before is kept: it counts as another's from here
// on, and die() saves this step's beside it.
__attribute__((noreturn)) static void diverged(Run* run, size_t step, const char* what, double loss) {
    run->diverged = true;
    memset(&run->own, 0, sizeof run->own);
    die("at step %zu the %s is %f and the gradient's norm %f: a smaller --lr or --clip may help, or another --seed",
        step, what, loss, run->model.gradient_norm);
}

// One step: `accumulate` batches forward and backward, one update. Returns the mean loss. The next batch is loaded
// before this step's result is waited for: a GPU computes meanwhile.
static double train_step(Run* run) {
    Model* model = &run->model;
    for (size_t i = 0; i < opt.accumulate; i++) {
        load_next_batch(run);
        run->next += opt.batch;
        run->batch_loaded = false;
        device->forward(model, &run->a, run->inputs, run->targets, run->B, run->T, 0, true);
        device->backward(model, &run->a, run->inputs, run->targets, run->B, run->T, 1 / (float)opt.accumulate);
    }
    size_t step = run->step + 1;
    if (step < opt.steps) load_next_batch(run);
    AdamW o = {rate_at(step), opt.beta1, opt.beta2, opt.weight_decay, opt.clip, step};
    device->update(model, o);
    double loss = take_loss(model);
    if (!isfinite(loss) || !isfinite(model->gradient_norm)) diverged(run, step, "loss", loss);
    run->step = step, run->taken = run->next, run->loss = loss;
    return loss;
}

static double tokens_per_step(const Run* run) { return (double)opt.accumulate * (double)opt.batch * (double)run->T; }

static void log_step(Run* run, double loss, double step_seconds, bool validated) {
    if (!run->log) return;
    fprintf(run->log, "%zu,%.9g,", run->step, loss);
    if (validated) fprintf(run->log, "%.9g", run->val_loss);
    fprintf(run->log, ",%.9g,%.9g,%.3f,%.0f\n", rate_at(run->step), run->model.gradient_norm, step_seconds * 1e3,
            tokens_per_step(run) / step_seconds);
    if (fflush(run->log)) die("cannot write %s: %s", opt.log, strerror(errno));
}

// step_seconds: a moving average. On a terminal one line is written over again and again, with what was validated
// above it; elsewhere about twenty lines tell of the run. What is most worth knowing comes first in a line.
static void report(Run* run, double loss, double step_seconds, bool validated) {
    size_t every = opt.steps > 20 ? opt.steps / 20 : 1;
    double rate = (double)opt.accumulate * step_operations(run->model.config, opt.batch, run->T) / step_seconds;
    if (rate > run->peak) run->peak = rate; // something else ran while it was measured
    if (!live && !validated && run->step % every && run->step != run->first + 1) return;
    char line[512], progress[128] = "";
    if (validated) {
        snprintf(progress, sizeof progress, "  val %.4f  %.3f bits/byte", run->val_loss, run->bits_per_byte);
    } else if (live) {
        size_t left = (size_t)(step_seconds * (double)(opt.steps - run->step) + 0.5);
        int cells = (int)(run->step * 10 / opt.steps);
        size_t unit = left < 3600 ? 60 : 3600; // minutes and seconds, or hours and minutes
        snprintf(progress, sizeof progress, "  %zu:%02zu%s left  [%.*s%.*s]", left / unit, left % unit * 60 / unit,
                 unit == 60 ? "" : " h", cells, "##########", 10 - cells, "..........");
    }
    snprintf(line, sizeof line, "step %*zu/%zu  loss %.4f%s  %.0f tok/s  %.1f ms  lr %.2e  norm %.2f  %.0f%% of peak",
             live ? 1 : 5, run->step, opt.steps, loss, progress, tokens_per_step(run) / step_seconds,
             step_seconds * 1e3, rate_at(run->step), run->model.gradient_norm, 100 * rate / run->peak);
    // What does not fit is left out, and the last column free, since some terminals do not show it at once.
    size_t columns = live ? terminal_columns() : sizeof line;
    for (size_t n = strlen(line); strlen(line) >= columns; n--)
        if (n == 0 || !strncmp(line + n, "  ", 2)) line[n] = 0;
    clear_live_line();
    fputs(line, stdout);
    line_open = live && !validated;
    if (!line_open) putchar('\n');
    check_output();
}

static bool due(size_t step, size_t every) { return step == opt.steps || (every && step % every == 0); }

// The program's name, what is `asked` of it, and the options that a command about this run's model needs too, ready for
// a shell: what is not plain stands in '...'.
static void print_command(const char* asked) {
    if (world.size > 1 && *asked) printf("mpirun -n %d ", world.size);
    printf("./train_gpt%s%s", cuda_device ? "_cu" : *world.host ? "_mpi" : "", asked);
    const char* letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./,:+=@%";
    for (const Option* o = options; o < options + OPTIONS; o++) {
        if (!(o->use & GIVEN_AGAIN) || !o->given) continue;
        const char* value = *o->text;
        bool plain = !value[strspn(value, letters)]; // a name is never empty
        printf(plain ? " %s " : " %s '", o->name);
        for (; *value; value++) printf(*value == '\'' ? "'\\''" : "%c", *value);
        if (!plain) putchar('\'');
    }
}

// Saves the run when that is due. If it cannot be, training goes on, and saving is tried again after ten times as long
// as it took to fail.
static void save_when_due(Run* run) {
    bool again = run->retry > 0 && first_says(seconds() >= run->retry);
    if (!due(run->step, opt.save_every) && !again) return;
    double start = seconds();
    const char* error = save_run(run);
    if (error && !run->retry) {
        clear_live_line();
        printf("step %zu: cannot write %s: %s; training goes on, and saving is tried again\n", run->step,
               opt.checkpoint, error);
    }
    run->retry = error ? seconds() + 10 * (seconds() - start) : 0;
}

// The last save is tried until it succeeds where somebody is there to make room, else three times.
static void save_last(Run* run) {
    const char* error = NULL;
    for (int i = 0; run->saved != run->step && (error = save_run(run)) && (live || i < 2); i++) {
        if (live && i == 0) {
            clear_live_line();
            printf("cannot write %s: %s; this is tried again every second until you have made room\n", opt.checkpoint,
                   error);
            fflush(stdout);
        }
        sleep(1);
    }
    rescue = NULL;
    if (run->saved != run->step)
        die("cannot write %s: %s; what was learned after step %zu is lost", opt.checkpoint, error, run->saved);
}

// Open MPI's mpirun, when it is told to stop, gives the processes one second to finish the step and save.
static void warn_of_haste(double step_seconds) {
    if (step_seconds > 1 && world.rank == 0 && getenv("OMPI_COMM_WORLD_SIZE") &&
        !getenv("OMPI_MCA_odls_base_sigkill_timeout"))
        fputs("train_gpt: a step takes longer than mpirun waits after Ctrl-C, and nothing would be saved then; to "
              "mend that: export OMPI_MCA_odls_base_sigkill_timeout=30\n",
              stderr);
}

static void run_training(void) {
    static Run run;
    start_run(&run);
    double begin = seconds(), average = 0;
    bool validated = false;
    while (run.step < opt.steps && !(world.size > 1 ? world.stopping : signalled)) {
        double start = seconds(), loss = train_step(&run), duration = seconds() - start;
        average = average ? 0.9 * average + 0.1 * duration : duration;
        size_t column = (run.step - 1 - run.first) * CURVE / (opt.steps - run.first); // of the loss curve
        run.train_sum[column] += loss;
        run.train_count[column]++;
        validated = due(run.step, opt.val_every) && validate(&run);
        if (validated) run.val_at[column] = run.val_loss;
        if (validated && !isfinite(run.val_loss)) diverged(&run, run.step, "validation loss", run.val_loss);
        if (run.step == run.first + 1) warn_of_haste(duration);
        log_step(&run, loss, duration, validated);
        report(&run, loss, average, validated);
        save_when_due(&run);
        if (due(run.step, opt.sample_every) || run.step == opt.sample_every / 10) // the first after seconds
            show_sample(&run, run.step == opt.steps ? opt.tokens : 96);
    }
    if (world.stopping && !signalled) signalled = SIGTERM; // another process was
    clear_live_line();
    save_last(&run);
    if (signalled && run.step < opt.steps) {
        if (run.step == run.first)
            puts("stopped before the first step: nothing is changed");
        else {
            printf("stopped after step %zu, saved in %s; `", run.step, opt.checkpoint);
            print_command(" --resume");
            puts("` goes on from there");
        }
        fflush(stdout); // what was said is of no use where nobody listens any more
        exit(128 + signalled);
    }
    draw_curve(&run);
    printf("\n%.1f s. ", seconds() - begin);
    if (validated) printf("Validation loss %.4f, %.3f bits per byte. ", run.val_loss, run.bits_per_byte);
    printf("The model is in %s; to let it write:\n    ", opt.checkpoint);
    print_command("");
    puts(" --generate \"The\"");
    if (run.log && fclose(run.log)) die("cannot write %s: %s", opt.log, strerror(errno));
}

// ====================================================================================================================
// Looking at attention
//
// --attention TEXT shows what every head of a model attends to in a text: a table of numbers, the map of one head, and
// with --html a page with all of them. Weights tell where a head looks, not whether that matters; --ablate measures it.

// p (T,T): the weights of one head, e^(score - lse) from what the forward pass keeps; 0 where a key is hidden.
// qkv (T,3C), lse (T,H): of one sequence.
static void attention_weights(float* p, const float* qkv, const float* lse, Attention a, size_t h) {
    size_t C = a.H * a.D;
    memset(p, 0, a.T * a.T * sizeof(float));
    for (size_t i = 0; i < a.T; i++) {
        Range seen = visible_keys(a, i);
        const float* q = qkv + i * 3 * C + h * a.D;
        for (size_t j = seen.first; j < seen.end; j++) {
            const float* k = qkv + j * 3 * C + C + h * a.D;
            p[i * a.T + j] = expf(dot(q, k, a.D) / sqrtf((float)a.D) - lse[i * a.H + h]);
        }
    }
}

// What is said of a head: means over the queries from the second on. The last two are means over the queries whose
// token stood in the text before: the weight on those earlier copies, and on what followed them (NAN if there are
// none). A head that puts much there can continue a pattern which it sees for the second time ("induction head",
// Olsson et al. 2022).
enum { ENTROPY, DISTANCE, ITSELF, PREVIOUS, FIRST, SAME, INDUCTION, NUMBERS };
typedef struct {
    double is[NUMBERS];
    const char* pattern;
    double loss, gate; // by how much the text's loss rises without the head; what its gradient predicts of that
} HeadView;

// n > 1 tokens.
static HeadView describe_head(const float* p, const int* tokens, size_t n) {
    HeadView head;
    memset(&head, 0, sizeof head);
    double copies = 0, *is = head.is, even_entropy = 0, even_distance = 0, queries = (double)(n - 1);
    for (size_t i = 1; i < n; i++) {
        bool copied = false;
        for (size_t j = 0; j <= i; j++) {
            double w = p[i * n + j];
            is[ENTROPY] -= w > 0 ? w * log2(w) : 0;
            is[DISTANCE] += w * (double)(i - j);
            if (j < i && tokens[j] == tokens[i]) {
                copied = true;
                is[SAME] += w;
                is[INDUCTION] += p[i * n + j + 1];
            }
        }
        is[ITSELF] += p[i * n + i];
        is[PREVIOUS] += p[i * n + i - 1];
        is[FIRST] += p[i * n];
        copies += copied;
        even_entropy += log2((double)(i + 1)); // of weights that are all the same
        even_distance += (double)i / 2;
    }
    for (int k = 0; k < NUMBERS; k++) is[k] /= k == SAME || k == INDUCTION ? copies : queries;
    head.pattern = is[FIRST] > 0.5                                 ? "first"
                   : is[PREVIOUS] > 0.5                            ? "previous"
                   : is[ITSELF] > 0.5                              ? "itself"
                   : is[SAME] > 0.5                                ? "same"
                   : is[INDUCTION] > 0.5                           ? "induction"
                   : is[ENTROPY] > 0.95 * even_entropy / queries   ? "uniform"
                   : is[DISTANCE] < 0.25 * even_distance / queries ? "local"
                   : is[ENTROPY] > 0.75 * even_entropy / queries   ? "broad"
                                                                   : "";
    return head;
}

// All that is shown of a text.
typedef struct {
    Model model;
    Tokenizer tokenizer;
    Activations a;
    size_t n, L, H;
    const int *tokens, *targets; // (n); a target is the next token, and the last one's is not counted
    float *qkv, *lse, *weights;  // (L,n,3C), (L,n,H), (L,H,n,n)
    float* logits;               // (n,V)
    HeadView* heads;             // (L,H)
    size_t layer, head;          // which map is drawn
    double loss, correlation;    // of the text; of the measured and the predicted rise of the loss
} View;

static float* view_weights(const View* v, size_t l, size_t h) { return v->weights + (l * v->H + h) * v->n * v->n; }

// Mean loss of the tokens after the first.
static double text_loss(View* v) {
    device->forward(&v->model, &v->a, v->tokens, v->targets, 1, v->n - 1, 0, false);
    return take_loss(&v->model);
}

// What the view's model computes of n > 1 tokens. There is room for one more. The activations are those of training,
// which has every layer's and the logits of all positions, though the pass is not.
static void look_at(View* v, const int* tokens, size_t n) {
    Config c = v->model.config;
    v->n = n, v->L = c.L, v->H = c.H, v->tokens = tokens, v->targets = tokens + 1;
    v->qkv = (float*)allocate(c.L * n * 3 * c.C, sizeof(float), "queries and keys");
    v->lse = (float*)allocate(c.L * n * c.H, sizeof(float), "log-sum-exps");
    v->weights = (float*)allocate(c.L * c.H * n * n, sizeof(float), "attention's weights");
    v->logits = (float*)allocate(n * c.V, sizeof(float), "logits");
    v->heads = (HeadView*)allocate(c.L * c.H, sizeof(HeadView), "the table of heads");
    device->create_activations(&v->a, &v->model, 1, n, true);
    device->forward(&v->model, &v->a, v->tokens, v->targets, 1, n, 0, false);
    take_loss(&v->model);
    for (size_t l = 0; l < c.L; l++) {
        float *qkv = v->qkv + l * n * 3 * c.C, *lse = v->lse + l * n * c.H;
        device->read_activation(qkv, &v->a, v->a.qkv[l], n * 3 * c.C);
        device->read_activation(lse, &v->a, v->a.lse[l], n * c.H);
        for (size_t h = 0; h < c.H; h++) {
            attention_weights(view_weights(v, l, h), qkv, lse, attention_of(c, 1, n, 0), h);
            v->heads[l * c.H + h] = describe_head(view_weights(v, l, h), tokens, n);
        }
    }
    device->read_activation(v->logits, &v->a, v->a.logits, n * c.V);
    v->loss = text_loss(v);
}

// Spearman's correlation of the heads' loss and gate: of the ranks. Equal values, which do not occur, would all get the
// lowest of theirs.
static double rank_correlation(const HeadView* heads, size_t count) {
    double squares = 0, n = (double)count;
    for (size_t i = 0; i < count; i++) {
        double ranks = 0;
        for (size_t k = 0; k < count; k++) ranks += (heads[k].loss < heads[i].loss) - (heads[k].gate < heads[i].gate);
        squares += ranks * ranks;
    }
    return count > 1 ? 1 - 6 * squares / (n * (n * n - 1)) : NAN;
}

// A head's output always the same, its mean over the text: W^O's rows of the head become 0, and what they make of the
// mean goes into the bias. So nothing has to be changed inside the network.
//
// The gradient's answer to the same question: put a gate g before the difference between the head's output and its
// mean. Then W^O's rows w are scaled by g, and the bias gains (1 - g) mean w; so dloss/dg = sum of dw w - db mean w, and
// taking the gate from 1 to 0 should raise the loss by -dloss/dg, if it were a straight line.
static void ablate(View* v) {
    Config c = v->model.config;
    size_t D = c.C / c.H;
    float *w = (float*)allocate(2 * (c.C + 1) * c.C, sizeof(float), "a layer's weights"), *b = w + c.C * c.C;
    float *dw = b + c.C, *db = dw + c.C * c.C, *att = (float*)allocate(v->n * c.C, sizeof(float), "heads' outputs");
    float *zeros = (float*)allocate(D * c.C + c.C, sizeof(float), "a head's weights"), *bias = zeros + D * c.C;
    double* means = (double*)allocate(v->L * c.C, sizeof(double), "heads' means");
    device->forward(&v->model, &v->a, v->tokens, v->targets, 1, v->n - 1, 0, true);
    device->backward(&v->model, &v->a, v->tokens, v->targets, 1, v->n - 1, 1);
    take_loss(&v->model);
    for (size_t l = 0; l < v->L; l++) {
        device->read_activation(att, &v->a, v->a.att[l], (v->n - 1) * c.C);
        for (size_t i = 0; i < (v->n - 1) * c.C; i++) means[l * c.C + i % c.C] += att[i] / (double)(v->n - 1);
    }
    for (size_t l = 0; l < v->L; l++) {
        device->to_host(w, v->model.w.att_w[l], c.C * c.C);
        device->to_host(b, v->model.w.att_b[l], c.C);
        device->to_host(dw, v->model.d.att_w[l], c.C * c.C);
        device->to_host(db, v->model.d.att_b[l], c.C);
        for (size_t h = 0; h < v->H; h++) {
            HeadView* head = &v->heads[l * v->H + h];
            float *rows = w + h * D * c.C, *drows = dw + h * D * c.C;
            memcpy(bias, b, c.C * sizeof(float));
            for (size_t d = 0; d < D; d++)
                for (size_t o = 0; o < c.C; o++) {
                    double moved = means[l * c.C + h * D + d] * rows[d * c.C + o];
                    bias[o] += (float)moved;
                    head->gate -= (double)drows[d * c.C + o] * rows[d * c.C + o] - db[o] * moved;
                }
            device->to_device(v->model.w.att_w[l] + h * D * c.C, zeros, D * c.C);
            device->to_device(v->model.w.att_b[l], bias, c.C);
            head->loss = text_loss(v) - v->loss;
            device->to_device(v->model.w.att_w[l] + h * D * c.C, rows, D * c.C);
        }
        device->to_device(v->model.w.att_b[l], b, c.C);
    }
    v->correlation = rank_correlation(v->heads, v->L * v->H);
    free(w), free(att), free(zeros), free(means);
}

// The first characters of a token's text for a map's edge, each by itself, and their number. Each must be one column
// wide: code points of which that is not certain become '?'.
enum { LABEL = 10 };
static size_t label(const View* v, size_t i, char shown[LABEL][5]) {
    size_t count = 0, length;
    Bytes s = token_string(&v->tokenizer, v->tokens[i]);
    for (size_t at = 0; at < s.n && count < LABEL; at += length) {
        uint32_t code;
        length = utf8_character(s.p + at, s.n - at, &code);
        bool narrow = (code > 0x20 && code < 0x7F) || (code > 0xA0 && code < 0x300 && code != 0xAD) ||
                      (code >= 0x370 && code < 0x483) || (code >= 0x48A && code < 0x530);
        const char* other = code == ' ' ? "\xC2\xB7" : code == '\n' ? "\xE2\x86\xB5" : "?"; // a middle dot, an arrow
        snprintf(shown[count++], 5, "%.*s", narrow ? (int)length : 4, narrow ? (const char*)s.p + at : other);
    }
    return count;
}

// Breaks lines at spaces.
__attribute__((format(printf, 1, 2))) static void print_wrapped(const char* format, ...) {
    char line[600], *text = line;
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (size_t columns = terminal_columns(), at = 0, length; *text; text += length) {
        length = strcspn(text + 1, " ") + 1;
        bool fits = at + length <= columns;
        printf("%s%.*s", fits ? "" : "\n", (int)(length - !fits), text + !fits);
        at = fits ? at + length : length - 1;
    }
    putchar('\n');
}

// The map of the chosen head: a row a query, a column a key, darker for more. As many keys as fit.
static void print_map(const View* v) {
    const char* const shades[] = {" ", "\xE2\x96\x91", "\xE2\x96\x92", "\xE2\x96\x93", "\xE2\x96\x88"};
    const float* p = view_weights(v, v->layer, v->head);
    char shown[LABEL][5];
    size_t columns = terminal_columns(), fit = columns > LABEL + 4 ? columns - LABEL - 4 : 1,
           wide = 2 * v->n <= fit ? 2 : 1;
    size_t keys = min_size(v->n, fit / wide), height = 0;
    char part[80] = "";
    if (keys < v->n) snprintf(part, sizeof part, "; the first %zu of %zu tokens, as many as fit", keys, v->n);
    putchar('\n');
    print_wrapped("layer %zu, head %zu: each row a token that asks, each column one that is looked at%s", v->layer,
                  v->head, part);
    putchar('\n');
    for (size_t j = 0; j < keys; j++) height = label(v, j, shown) > height ? label(v, j, shown) : height;
    for (size_t row = 0; row < height; row++) { // the keys, read downwards
        printf("%*s", LABEL + 2, "");
        for (size_t j = 0; j < keys; j++) {
            size_t above = height - label(v, j, shown);
            printf("%s%s", row < above ? " " : shown[row - above], wide == 2 ? " " : "");
        }
        putchar('\n');
    }
    for (size_t i = 0; i < keys; i++) {
        size_t count = label(v, i, shown);
        printf("%*s", (int)(LABEL - count), "");
        for (size_t k = 0; k < count; k++) fputs(shown[k], stdout);
        fputs(" |", stdout);
        for (size_t j = 0; j <= i; j++) {
            double w = p[i * v->n + j];
            const char* shade = shades[w < 0.05 ? 0 : w < 0.2 ? 1 : w < 0.4 ? 2 : w < 0.7 ? 3 : 4];
            printf("%s%s", shade, wide == 2 ? shade : "");
        }
        putchar('\n');
    }
    puts("\nup to 5, 20, 40, 70, 100 %: ' ' \xE2\x96\x91 \xE2\x96\x92 \xE2\x96\x93 \xE2\x96\x88");
}

// As many columns as fit, the pattern last.
static void print_heads(const View* v) {
    static const char* const titles[] = {"bits", "back", "self", "prev", "first", "same", "induc", "loss+", "gate+"};
    enum { NAMES = 10, PATTERN = 12, WIDTH = 6, ALL = NUMBERS + 2 };
    size_t columns = terminal_columns(), fit = columns > NAMES + PATTERN ? (columns - NAMES - PATTERN) / WIDTH : 0;
    size_t cells = min_size(opt.ablate ? (size_t)ALL : (size_t)NUMBERS, fit);
    printf("layer head");
    for (size_t k = 0; k < cells; k++) printf("%*s", k < NUMBERS ? 6 : 7, titles[k]);
    putchar('\n');
    for (size_t i = 0; i < v->L * v->H; i++) {
        const HeadView* head = &v->heads[i];
        printf("%5zu %4zu", i / v->H, i % v->H);
        for (size_t k = 0; k < cells; k++)
            if (k >= NUMBERS)
                printf("%7.3f", k == NUMBERS ? head->loss : head->gate);
            else if (k < ITSELF)
                printf(k == ENTROPY ? "%6.2f" : "%6.1f", head->is[k]);
            else
                printf(isnan(head->is[k]) ? "     -" : "%5.0f%%", 100 * head->is[k]);
        printf(*head->pattern ? " %s\n" : "\n", head->pattern);
    }
    putchar('\n');
    print_wrapped(
        "bits: entropy of a query's weights; back: mean distance looked back; then the share of weight on the "
        "token itself, the one before, the first one, an earlier copy of itself, and what followed that copy");
    if (opt.ablate)
        print_wrapped("loss+: rise of the text's loss (%.4f) with the head's output set to its mean; gate+: what its "
                      "gradient predicts of that; rank correlation of the two: %.2f",
                      v->loss, v->correlation);
}

// The page: dev/view/attention.html, with the numbers as JSON in place of one word of it.
#define PAGE_MARK "<meta name=\"generator\" content=\"train_gpt\">"
#define PAGE_DATA "@DATA@" // of the data in the template

// A JSON string that is safe within a page's script: what could end that is escaped, what is no UTF-8 replaced.
static void write_text(FILE* f, Bytes s) {
    putc('"', f);
    for (size_t at = 0, length; at < s.n; at += length) {
        uint32_t code;
        length = utf8_character(s.p + at, s.n - at, &code);
        if (code >= BROKEN)
            fputs("\\ufffd", f);
        else if (code < 0x20 || code == 0x7F || strchr("\"\\<>&", (int)min_size(code, 0x80)))
            fprintf(f, "\\u%04x", code);
        else
            fwrite(s.p + at, 1, length, f);
    }
    putc('"', f);
}

static void write_base64(FILE* f, const void* data, size_t n) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const uint8_t* s = (const uint8_t*)data;
    putc('"', f);
    for (size_t i = 0; i < n; i += 3) {
        uint32_t three = (uint32_t)s[i] << 16 | (i + 1 < n ? (uint32_t)s[i + 1] << 8 : 0) | (i + 2 < n ? s[i + 2] : 0);
        for (size_t k = 0; k < 4; k++) putc(i + k <= n ? digits[three >> (18 - 6 * k) & 63] : '=', f);
    }
    putc('"', f);
}

// To the nearest half-precision number, ties to even.
static uint16_t float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    float size = fabsf(x);
    if (!(size < 65520)) return isnan(x) ? 0x7E00 : sign | 0x7C00;
    if (size < 6.103515625e-5f) return sign | (uint16_t)lrintf(size * 16777216.0f); // in steps of 2^-24
    bits = (bits & 0x7FFFFFFF) - (112u << 23);
    bits += 0xFFF + (bits >> 13 & 1);
    return sign | (uint16_t)(bits >> 13);
}

// Everything that the page needs to compute the model itself: all weights in half precision, and the tokenizer's file.
static void write_live(FILE* f, const View* v) {
    float* w = (float*)allocate(v->model.block_size, sizeof(float), "the weights");
    uint16_t* half = (uint16_t*)allocate(v->model.block_size, sizeof(uint16_t), "the weights in half precision");
    device->to_host(w, v->model.weights, v->model.block_size);
    fputs(",\n\"live\":{\"weights\":{", f);
    for (size_t i = 0; i < v->model.tensor_count; i++) {
        const Tensor* t = &v->model.tensors[i];
        for (size_t j = 0; j < t->size; j++) half[j] = float_to_half(w[t->offset + j]);
        fprintf(f, "%s\n\"%s\":", i ? "," : "", t->name);
        write_base64(f, half, t->size * sizeof *half);
    }
    fputs("},\n\"tokenizer\":", f);
    write_base64(f, v->tokenizer.file.data, v->tokenizer.file.size);
    fputs("}", f);
    free(w), free(half);
}

// After each position: the true next token's rank and bits, and the likeliest, which are taken out of the logits.
static void write_next(FILE* f, const View* v) {
    enum { SHOWN = 10 };
    size_t V = v->model.config.V;
    fputs(",\n\"next\":[", f);
    for (size_t i = 0; i < v->n; i++) {
        float *row = v->logits + i * V, largest = row[0];
        double sum = 0;
        size_t rank = 1;
        for (size_t t = 0; t < V; t++) largest = fmaxf(largest, row[t]);
        for (size_t t = 0; t < V; t++) {
            sum += exp((double)row[t] - largest);
            rank += row[t] > row[v->targets[i]];
        }
        fprintf(f, "%s\n{", i ? "," : "");
        if (i + 1 < v->n)
            fprintf(f, "\"rank\":%zu,\"bits\":%.6g,", rank, (log(sum) + largest - row[v->targets[i]]) / log(2));
        fputs("\"top\":[", f);
        for (size_t k = 0; k < min_size(SHOWN, V); k++) {
            size_t best = 0;
            for (size_t t = 0; t < V; t++)
                if (row[t] > row[best]) best = t;
            fprintf(f, "%s[%.6g,", k ? "," : "", exp((double)row[best] - largest) / sum);
            write_text(f, token_string(&v->tokenizer, (int)best));
            fputs("]", f);
            row[best] = -INFINITY;
        }
        fputs("]}", f);
    }
    fputs("]", f);
}

// Weights of all heads in 8 bits (so wrong by at most 1/510), row by row up to the diagonal; the chosen head's scores
// q . k, of hidden keys too, and log-sum-exps as they are, from which the page computes its weights anew.
static void write_data(FILE* f, const View* v) {
    Config c = v->model.config;
    size_t n = v->n, D = c.C / c.H, count = 0;
    uint8_t* bytes = (uint8_t*)allocate(v->L * v->H * n * n, 1, "weights in 8 bits");
    float *scores = (float*)allocate(n * n + n, sizeof(float), "scores"), *lse = scores + n * n;
    fputs("{\"model\":", f);
    const char *path = opt.init ? opt.init : opt.checkpoint, *name = name_of(path);
    if (!*name) name = path; // else not the folders: pages are given away
    Bytes shown = {(const uint8_t*)name, strlen(name)};
    write_text(f, shown);
    fprintf(f, ",\"V\":%zu,\"T\":%zu,\"C\":%zu,\"H\":%zu,\"L\":%zu,\"n\":%zu,\"loss\":%.9g,\n\"tokens\":[", c.V, c.T,
            c.C, c.H, c.L, n, v->loss);
    for (size_t i = 0; i < n; i++) {
        if (i) putc(',', f);
        write_text(f, token_string(&v->tokenizer, v->tokens[i]));
    }
    fputs("],\n\"ids\":[", f);
    for (size_t i = 0; i < n; i++) fprintf(f, "%s%d", i ? "," : "", v->tokens[i]);
    fputs("],\n\"heads\":[", f);
    for (size_t i = 0; i < v->L * v->H; i++) {
        const HeadView* head = &v->heads[i];
        fprintf(f, "%s\n{\"pattern\":\"%s\",\"numbers\":[", i ? "," : "", head->pattern);
        for (int k = 0; k < NUMBERS; k++)
            fprintf(f, isnan(head->is[k]) ? "%snull" : "%s%.6g", k ? "," : "", head->is[k]);
        fputs("]", f);
        if (opt.ablate) fprintf(f, ",\"loss\":%.6g,\"gate\":%.6g", head->loss, head->gate);
        fputs("}", f);
    }
    fputs("]", f);
    if (opt.ablate && !isnan(v->correlation)) fprintf(f, ",\"correlation\":%.6g", v->correlation);
    for (size_t i = 0; i < v->L * v->H * n; i++)
        for (size_t j = 0; j <= i % n; j++) bytes[count++] = (uint8_t)lrintf(255 * fminf(1, v->weights[i * n + j]));
    fputs(",\n\"weights\":", f);
    write_base64(f, bytes, count);
    const float *q = v->qkv + v->layer * n * 3 * c.C + v->head * D, *k = q + c.C;
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j < n; j++) scores[i * n + j] = dot(q + i * 3 * c.C, k + j * 3 * c.C, D);
        lse[i] = v->lse[(v->layer * n + i) * v->H + v->head];
    }
    fprintf(f, ",\n\"chosen\":{\"layer\":%zu,\"head\":%zu,\"scores\":", v->layer, v->head);
    write_base64(f, scores, n * n * sizeof(float));
    fputs(",\"lse\":", f);
    write_base64(f, lse, n * sizeof(float));
    fputs("}", f);
    write_next(f, v);
    if (opt.live) write_live(f, v);
    fputs("}", f);
    free(bytes), free(scores);
}

// That a page may be written: what it would replace must be one already, and not the template itself.
static void check_page(const char* path) {
    try_output(path, 0);
    if (access(path, F_OK)) return;
    File old = map_file(path, "");
    if (old.size && (!memmem(old.data, min_size(old.size, 1000), PAGE_MARK, strlen(PAGE_MARK)) ||
                     memmem(old.data, old.size, PAGE_DATA, strlen(PAGE_DATA))))
        die("%s is not a page of this program, and is not overwritten: --html with another name", path);
    unmap_file(&old);
}

// The template, or an empty file: then there will be no page, which is said, or refused if it was asked for.
static File open_template(void) {
    static const char here[] = "dev/view/attention.html";
    File file = {"", (const uint8_t*)"", 0};
    char program[MAX_PATH];
    if (!realpath("/proc/self/exe", program)) program[0] = 0;
    const char* beside = path_in(folder_of(program), here);
    const char* searched = access(beside, R_OK) && !access(here, R_OK) ? here : beside;
    if (access(searched, R_OK)) {
        if (given("--html") || opt.live)
            die("cannot make a page: its template is not at %s, where dev/view stands beside the program", searched);
        print_wrapped("(no page: its template is not at %s)\n", searched);
        return file;
    }
    file = map_file(searched, "");
    if (!memmem(file.data, file.size, PAGE_DATA, strlen(PAGE_DATA)))
        die("%s is not the template of the page: it lacks %s", searched, PAGE_DATA);
    return file;
}

static void write_page(const View* v, File file, const char* path) {
    const char *begin = (const char*)file.data, *end = begin + file.size;
    const char* at = (const char*)memmem(begin, file.size, PAGE_DATA, strlen(PAGE_DATA));
    if (!at) return;
    check_page(path);
    Text text;
    FILE* f = begin_text(&text);
    fwrite(begin, 1, (size_t)(at - begin), f);
    write_data(f, v);
    at += strlen(PAGE_DATA);
    fwrite(at, 1, (size_t)(end - at), f);
    end_text(&text, "the page");
    write_whole(path, text.text, text.length);
    printf("\nAll heads, for a browser (%.1f MB):\n%s\n", (double)text.length / 1e6, path);
    free(text.text);
}

// The head whose map is shown: the one asked for, or that of least entropy which does not look at the first token.
static void choose_head(View* v) {
    v->layer = opt.layer, v->head = opt.head;
    double least = INFINITY;
    for (size_t i = 0; i < v->L * v->H; i++) {
        size_t l = i / v->H, h = i % v->H;
        if ((given("--layer") && l != opt.layer) || (given("--head") && h != opt.head)) continue;
        double entropy = v->heads[i].is[ENTROPY] + (strcmp(v->heads[i].pattern, "first") ? 0 : 1e3);
        if (entropy < least) least = entropy, v->layer = l, v->head = h;
    }
}

static void run_attention(void) {
    static View v;
    File template_file = open_template();
    if (template_file.size) check_page(opt.html);
    load_for_use(&v.model, &v.tokenizer, true, opt.ablate);
    Config c = v.model.config;
    if (beyond_gpt2(c)) die("--attention shows what GPT-2 computes, not a model made with %s", beyond_gpt2(c));
    if (opt.layer >= c.L) fail(2, "--layer %zu: the model has layers 0 to %zu", opt.layer, c.L - 1);
    if (opt.head >= c.H) fail(2, "--head %zu: the model has heads 0 to %zu", opt.head, c.H - 1);
    size_t bytes = strlen(opt.attention), most = min_size(given("--tokens") ? opt.tokens : 128, c.T);
    int* tokens = (int*)allocate(bytes + 1, sizeof(int), "the text");
    size_t count = encode(&v.tokenizer, (const uint8_t*)opt.attention, bytes, tokens), n = min_size(count, most);
    if (n < 2) die("--attention takes a text of at least two tokens");
    if (n < count)
        print_wrapped("the first %zu of the text's %zu tokens (%s)\n", n, count,
                      n == c.T ? "the model's context" : "--tokens allows for more");
    size_t page = c.L * c.H * n * n * 2 / 3, weights = 2 * v.model.parameter_count; // bytes
    if (page > 20000000) printf("a page of all heads will have some %.0f MB\n\n", (double)page / 1e6);
    if (opt.live && weights > 20000000)
        die("--live puts the weights into the page, which %.0f MB are too many for: at most 20 MB",
            (double)weights / 1e6);
    c.T = n;
    check_memory(c, 1, FOR_SCORES);
    look_at(&v, tokens, n);
    if (opt.ablate) ablate(&v);
    choose_head(&v);
    print_heads(&v);
    print_map(&v);
    write_page(&v, template_file, opt.html);
}

// ====================================================================================================================
// The program

// Each way to use the program, which options mean something there (NULL: whatever is given), and what does it.
// Training, which has no name, takes all but what is for looking or measuring.
#define LOOKS    " --layer --head --html --ablate --live "
#define MEASURES " --stride --json "
static void run_compare(void) { compare_devices(); }
static void print_version(void) { puts("train_gpt " VERSION); }
typedef struct {
    const char *name, *takes;
    void (*run)(void);
} Way;
static const Way ways[] = {
    {"--help", NULL, print_help},
    {"--version", NULL, print_version},
    {"--memory", " --context --device ", run_memory},
    {"--tokenize", " --data --checkpoint ", run_tokenize},
    {"--export", " --data --init --checkpoint --context --device ", run_export},
    {"--generate",
     " --data --init --checkpoint --context --device --precision --seed --tokens --temperature --top-k --top-p ",
     run_generate},
    {"--attention", " --data --init --checkpoint --context --device --tokens" LOOKS, run_attention},
    {"--eval", " --data --init --checkpoint --context --device --batch --precision" MEASURES, run_eval},
    {"--compare",
     " --init --preset --device --precision --recompute --seed --batch --accumulate --lr --beta1 --beta2 "
     "--weight-decay --clip ",
     run_compare}};

// The way that was asked for, or NULL. An option that changes nothing is a misunderstanding, and said.
static const Way* chosen_way(void) {
    const Way* way = NULL;
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        if (!given(ways[i].name)) continue;
        if (way) fail(2, "%s or %s: give one of them", way->name, ways[i].name);
        way = &ways[i];
        if (!way->takes) return way;
    }
    for (const Option* o = options; o < options + OPTIONS; o++) {
        char name[64];
        snprintf(name, sizeof name, " %s ", o->name);
        // What takes --init is about a model, whose shape is given or may be repeated.
        bool takes = way ? strstr(way->takes, name) || !strcmp(o->name, way->name) ||
                               (o->use & SHAPE && strstr(way->takes, " --init "))
                         : !strstr(LOOKS MEASURES, name);
        if (!o->given || takes) continue;
        if (way) fail(2, "%s has no effect with %s", o->name, way->name);
        fail(2, "%s has no effect without %s", o->name, strstr(LOOKS, name) ? "--attention" : "--eval");
    }
    if (way && opt.init && given("--checkpoint")) fail(2, "--checkpoint has no effect with --init and %s", way->name);
    static const char* const chances[] = {"--top-k", "--top-p", "--seed"};
    for (int i = 0; i < (way ? 3 : 2) && !opt.temperature; i++) // training draws more than text
        if (given(chances[i])) fail(2, "%s has no effect with --temperature 0", chances[i]);
    return way;
}

// Tests call it under this name.
static int train_gpt(int argc, char** argv) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_cut_file;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &action, NULL);
    signal(SIGPIPE, SIG_IGN); // a closed pipe is an error like any other,
    signal(SIGXFSZ, SIG_IGN); // and so is a file larger than the user's limit
    // A standard stream that is closed must not become the first file opened, or what is printed would go there; and
    // one that does not wait for its reader would lose it.
    int fd = open("/dev/null", O_RDONLY);
    while (fd >= 0 && fd <= STDERR_FILENO) fd = open("/dev/null", O_RDONLY);
    close(fd);
    for (fd = STDOUT_FILENO; fd <= STDERR_FILENO; fd++) fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    omp_set_num_threads((int)min_size((size_t)omp_get_max_threads(), 256 + 4 * (size_t)omp_get_num_procs()));
    parse_command_line(argc, argv);
    const Way* way = chosen_way();
    uint64_t what = 2 * (uint64_t)(way != NULL) + (device == &cpu);
    if (first_says(what) != what) fail(2, "the command line here is not that of rank 0: all processes need the same");
    if (way) { // one does it
        if (world.rank) return 0;
        world.size = world.neighbours = 1;
    }
    live = isatty(STDOUT_FILENO) && world.size == 1;
    (way ? way->run : run_training)();
    check_output();
    return 0;
}

// Two things must be known to OpenMP's library before main begins, so the program restarts itself to set them.
//
// How long a thread that waits for others spins before it sleeps: GCC's default of milliseconds is ruinous when the
// machine runs anything else besides, since the spinning thread holds the core that the one it waits for needs
// (measured: 30 times slower). A limit of microseconds costs an idle machine 2 %.
//
// How large the threads' stacks are: attention keeps its tiles there.
static void prepare_threads(char** argv) {
    enum { ENOUGH = 1 << 20 };
    char path[MAX_PATH], unit = 'K';
    struct rlimit stack;
    bool again = false;
    // Threads that are bound to cores are so already, and the new start would inherit the first one's single core.
    if (!getenv("GOMP_SPINCOUNT") && !getenv("OMP_WAIT_POLICY") && !getenv("OMP_PROC_BIND") && !getenv("OMP_PLACES") &&
        !getenv("GOMP_CPU_AFFINITY"))
        again = !setenv("GOMP_SPINCOUNT", "1000", 1);
    if (getrlimit(RLIMIT_STACK, &stack)) stack.rlim_cur = stack.rlim_max = ENOUGH;
    if (stack.rlim_cur < ENOUGH && stack.rlim_cur < stack.rlim_max) { // the main thread's own
        stack.rlim_cur = stack.rlim_max < ENOUGH ? stack.rlim_max : ENOUGH;
        again = !setrlimit(RLIMIT_STACK, &stack) || again;
    }
    const char* given = getenv("OMP_STACKSIZE");
    unsigned long long size = stack.rlim_cur / 1024;
    if (given) sscanf(given, "%llu %c", &size, &unit);
    size = strchr("bB", unit) ? size : strchr("mMgG", unit) ? size << 20 : size << 10;
    if (size < ENOUGH) again = !setenv("OMP_STACKSIZE", "1M", 1) || again;
    // Not if it is the loader's process, which was called by its name: that would restart the loader.
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    if (!again || n <= 0 || !getauxval(AT_BASE)) return;
    path[n] = 0;
    execv(path, argv); // returns only if it fails, and then all goes on as it is
}

#ifndef NO_MAIN
#ifdef WITH_MPI
// Who the others are. What is printed is printed by the first.
static void end_all(int status) { MPI_Abort(MPI_COMM_WORLD, status); }
static void leave(void) { MPI_Finalize(); }

// Another MPI's mpirun, or srun without this one's PMI, starts processes that find themselves alone. The first of the
// names that is set tells. A Slurm job's script, which may well run a program alone, has no SLURM_STEP_NUM_TASKS.
static void refuse_to_be_alone(void) {
    static const char* const names[][2] = {{"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"},
                                           {"PMI_SIZE", "PMI_RANK"},
                                           {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID"}};
    size_t i = 0;
    while (i < 2 && !getenv(names[i][0])) i++;
    const char *size = getenv(names[i][0]), *rank = getenv(names[i][1]);
    if (!size || !rank || atoi(size) < 2) return;
    if (atoi(rank)) sleep(3), _exit(1); // the first says it for all
    die("these %d processes do not find each other: use the mpirun of the MPI that this program was built with, or "
        "srun --mpi=pmix",
        atoi(size));
}

static void join_processes(void) {
    static char host[MPI_MAX_PROCESSOR_NAME];
    int level, length;
    cpu_set_t cores;
    MPI_Comm near;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level);
    atexit(leave);
    MPI_Comm_rank(MPI_COMM_WORLD, &world.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world.size);
    MPI_Get_processor_name(host, &length);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &near);
    MPI_Comm_size(near, &world.neighbours);
    MPI_Comm_rank(near, &world.neighbour);
    CPU_ZERO(&cores);
    sched_getaffinity(0, sizeof cores, &cores);
    MPI_Allreduce(MPI_IN_PLACE, &cores, sizeof cores, MPI_BYTE, MPI_BOR, near); // those of all neighbours
    MPI_Comm_free(&near);
    world.host = host, world.end = end_all;
    if (world.size == 1) refuse_to_be_alone();
    int known = CPU_COUNT(&cores), threads = known / world.neighbours;
    if (known && !getenv("OMP_NUM_THREADS") && !getenv("OMP_PROC_BIND") && threads < omp_get_max_threads())
        omp_set_num_threads(threads > 1 ? threads : 1);
    if (world.rank && !freopen("/dev/null", "w", stdout)) die("cannot open /dev/null");
}
#else
static void join_processes(void) {}
#endif

int main(int argc, char** argv) {
    prepare_threads(argv);
    join_processes();
    return train_gpt(argc, argv);
}
#endif
