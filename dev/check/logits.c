// logits.c: the logits of a model for given tokens, for dev/check/check_transformers.py, which builds it.
//
//     logits MODEL.safetensors < tokens       tokens as numbers between white space, at most the model's context
//     logits FOLDER < tokens                  the model.safetensors in a folder
//
// Prints a line of V numbers for each position.

#define NO_MAIN
#include "../../train_gpt.c"

int main(int argc, char** argv) {
    if (argc != 2) fail(2, "usage: logits MODEL < tokens");
    opt.init = argv[1];
    Model model;
    Tokenizer t;
    load_for_use(&model, &t, false, false);
    size_t V = model.config.V, T = model.config.T, n = 0;
    int* tokens = (int*)allocate(T, sizeof(int), "tokens");
    for (int token; scanf("%d", &token) == 1; n++) {
        if (n == T) die("more tokens than the model's context of %zu", T);
        if (token < 0 || (size_t)token >= V) die("token %d is not among the model's %zu", token, V);
        tokens[n] = token;
    }
    if (!n) die("no tokens on standard input");
    // With targets the logits of all positions are computed, not just the last one's; which targets does not matter.
    Activations a;
    memset(&a, 0, sizeof a);
    device->create_activations(&a, &model, 1, n, true);
    device->forward(&model, &a, tokens, tokens, 1, n, 0, false);
    device->wait(&model);
    float* logits = (float*)allocate(n * V, sizeof(float), "logits");
    device->read_activation(logits, &a, a.logits, n * V);
    for (size_t i = 0; i < n * V; i++) printf("%.9g%c", logits[i], (i + 1) % V ? ' ' : '\n');
    check_output();
    return 0;
}
