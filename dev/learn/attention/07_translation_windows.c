// 07_translation_windows.c: looking how far? Luong's local attention, and GNMT.
//
// The attention of 07_translation_luong.c looks at all words. Luong et al. (2015) also let it see only the words within D
// of a centre: of the same place as the word to be written (local-m, monotonic), or of a predicted one (local-p), here
// with the score general. GNMT (Wu et al. 2016), with which Google Translate left phrase tables, looks everywhere again:
// it is Bahdanau's attention in a stack of layers. The task is that of 07_translation.c, training that of
// 07_translation_luong.c, so the tables can be compared; all get the same number of parameters.
//
// What to look at:
//   1. local-m for long sentences: a translation has other words and more of them, so it drifts from the diagonal. Its
//      window has 9 words, local-p's 21, as in the paper: it needs room to find out where to look.
//   2. local-p predicts where to look; is it as good in long sentences as where all is seen?
//   3. a stack of layers: does it learn as much? (It needs twice the others' learning rate for that, which it is given.)

#include "07_translation.h"

enum { LOCAL_M_, LOCAL_P_, GNMT, MODELS };

int main(int count, char** arguments) {
    (void)count;
    lesson_begins(arguments[0]);
    Model models[MODELS] = {
        {.name = "local-m, general", .reach = LOCAL_M, .D = 4},
        {.name = "local-p, general", .reach = LOCAL_P, .D = 10},
        {.name = "GNMT", .create = gnmt_new, .logits = gnmt, .size = 38, .rate = 8e-3f},
    };
    for (int i = 0; i < GNMT; i++) {
        models[i].create = luong_new, models[i].logits = luong;
        models[i].score = GENERAL, models[i].size = 52, models[i].rate = 4e-3f;
    }
    Quality q[MODELS];
    learn_and_test(models, MODELS, q, 1800, 16, 0);
    report("07_translation_windows", models, q, MODELS);
    claim_equal_sizes(models, MODELS);

    static const char* const wanted[] = {"pas", "rouge"};
    putchar('\n');
    draw_alignment("07_alignment_local_m", "local-m", &models[LOCAL_M_], sentence_with(wanted, 2, 1));
    const Quality* near = &q[LOCAL_M_];
    int last = LENGTHS - 1;
    claim(q[LOCAL_P_].bleu[last] > 85, "local-p finds out by itself where to look: BLEU for 40 words is %.0f",
          q[LOCAL_P_].bleu[last]);
    claim(near->exact[0] > 90 && near->bleu[last] > 85 && near->exact[last] < near->exact[0],
          "a window of 9 words is nearly enough, and drifts off in long sentences: local-m %.0f %% exact for 5 words, "
          "%.0f for 40",
          near->exact[0], near->exact[last]);
    claim(q[GNMT].bleu[last] > 90 && q[GNMT].bleu[last] > 0.95f * q[GNMT].bleu[0],
          "GNMT looks everywhere, and its curve is flat: BLEU %.0f for 5 words and %.0f for 40", q[GNMT].bleu[0],
          q[GNMT].bleu[last]);
    for (int i = 0; i < MODELS; i++) tape_free(models[i].t);
    return lesson_ends();
}

// Three changes to try:
//   1. .D = 4 for local-p, too: it learns nothing at all in this time (BLEU 3 to 10). At first it predicts the middle of
//      the sentence, the right word is mostly outside of that window, and nothing outside has a gradient.
//   2. .D = 2 for local-m, a window of 5 words: 78 % of the sentences of 25 words are exactly right, half of those of 40.
//      With .D = 10, one of 21, all of 25 words are, but of 40 words fewer than with 9: there it drifts further.
//   3. .rate = 4e-3f for GNMT as for the others: it is less than half way in this time. A sixth of the sentences of 25
//      words is exactly right, of those of 40 none, though their BLEU is 67.
