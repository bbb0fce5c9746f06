// train_gpt_attention.c: the attention that train_gpt.c trains and writes with, for 10_flash.c. It has a file of its
// own because both train_gpt.c and attention.h call theirs attention_forward.

#pragma GCC diagnostic ignored "-Wunused-function"
#define NO_MAIN
#include "../../../train_gpt.c"

size_t train_gpt_attention(float* out, float* lse, const float* qkv, int T, int D);

// out (T,D), lse (T) from qkv (T,3D): one causal head, on as many threads as OpenMP has. Returns how many bytes a
// thread has for itself beside these: keys, values, queries and sums, turned or dense, a tile's scores, and a product.
size_t train_gpt_attention(float* out, float* lse, const float* qkv, int T, int D) {
    Attention a = {.B = 1, .T = (size_t)T, .start = 0, .H = 1, .D = (size_t)D};
    attention_forward_fast(out, lse, qkv, a);
    size_t wide = dense_width(a.D), copies = 2 * round_up(a.T, TILE) * wide + TILE * (a.D + wide);
    return (copies + TILE * TILE + MR + 3 * TILE + MR * NR) * sizeof(float) + sizeof(KeyTile);
}
