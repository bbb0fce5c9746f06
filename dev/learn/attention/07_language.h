// 07_language.h: a small English, and its French, in which the known difficulties of translation occur and the right
// alignment of words is known.
//
//     the big red dress             la grande robe rouge          colours change places, and agree in gender
//     I love you                    je t' aime                    pronouns move, and shrink before a vowel
//     look it up                    cherchez -le                  two words, apart, are one; the pronoun is hung on
//     she does not see the potato   elle ne voit pas la pomme de terre       two words around one; one word is three
//     because he waits for us       parce qu' il nous attend      the first half needs to know what comes next
//     the cat in front of the door  le chat devant la porte       three words are one
//
// English and French are written at the same time, by one set of rules, so every French word knows which English words
// it comes from. Sentences are clauses, joined until they have the length asked for, up to LONGEST words.

#pragma once
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "tape.h"

enum { LONGEST = 40, ROOM = 64, WORDS = 256 };
enum { PAD, BEGIN, END }; // the first three words of each vocabulary

typedef struct {
    const char* word[WORDS];
    int count;
} Vocabulary;

static Vocabulary english = {{"", "<s>", "</s>"}, 3}, french = {{"", "<s>", "</s>"}, 3};

typedef struct {
    int n, m; // English words, French words with END
    int en[ROOM], fr[ROOM];
    uint64_t from[ROOM]; // bit j: French word i comes from English word j
} Sentence;

// The number of a word, which is new or known.
static int number_of(Vocabulary* v, const char* word) {
    int i = 0;
    while (i < v->count && (v->word[i][0] != word[0] || strcmp(v->word[i], word))) i++; // the first letter: most differ
    insist(i < WORDS, "more than %d words", WORDS);
    if (i == v->count) v->word[v->count++] = word;
    return i;
}

// Adds an English word; returns its bit.
static uint64_t say(Sentence* s, const char* word) {
    insist(s->n < ROOM, "a sentence too long");
    s->en[s->n] = number_of(&english, word);
    return (uint64_t)1 << s->n++;
}

// Adds a French word that comes from these English ones.
static void dire(Sentence* s, const char* word, uint64_t from) {
    insist(s->m < ROOM - 1, "a sentence too long");
    s->from[s->m] = from;
    s->fr[s->m++] = number_of(&french, word);
}

// ---- words ---------------------------------------------------------------------------------------------------------

static const struct {
    const char* en;
    const char* fr[3]; // one word or three
    int feminine;
} noun[] = {{"book", {"livre"}, 0},
            {"garden", {"jardin"}, 0},
            {"cat", {"chat"}, 0},
            {"dog", {"chien"}, 0},
            {"king", {"roi"}, 0},
            {"bridge", {"pont"}, 0},
            {"boat", {"bateau"}, 0},
            {"hat", {"chapeau"}, 0},
            {"dress", {"robe"}, 1},
            {"house", {"maison"}, 1},
            {"woman", {"femme"}, 1},
            {"queen", {"reine"}, 1},
            {"car", {"voiture"}, 1},
            {"letter", {"lettre"}, 1},
            {"door", {"porte"}, 1},
            {"lamp", {"lampe"}, 1},
            {"railway", {"chemin", "de", "fer"}, 0},
            {"potato", {"pomme", "de", "terre"}, 1}};

// Determiners and adjectives: masculine, feminine. Sizes stand before the French noun, colours behind it.
static const char* const determiner[][3] = {
    {"the", "le", "la"}, {"a", "un", "une"}, {"my", "mon", "ma"}, {"this", "ce", "cette"}};
static const char* const size_word[][3] = {
    {"big", "grand", "grande"}, {"small", "petit", "petite"}, {"old", "vieux", "vieille"}, {"nice", "beau", "belle"}};
static const char* const colour_word[][3] = {{"red", "rouge", "rouge"},
                                             {"green", "vert", "verte"},
                                             {"black", "noir", "noire"},
                                             {"white", "blanc", "blanche"},
                                             {"heavy", "lourd", "lourde"}};
static const char* const place[][2] = {{"in", "dans"}, {"with", "avec"}, {"under", "sous"}, {"behind", "derrière"}};

enum { I, YOU, HE, SHE, WE, THEY, PERSONS };
static const char* const subject[PERSONS][2] = {{"I", "je"},     {"you", "tu"},  {"he", "il"},
                                                {"she", "elle"}, {"we", "nous"}, {"they", "ils"}};
static const char* const object[PERSONS][3] = {{"me", "me", "-moi"}, {"you", "te", ""},       {"him", "le", "-le"},
                                               {"her", "la", "-la"}, {"us", "nous", "-nous"}, {"them", "les", "-les"}};

// Plain form, that of he, she and it, and a particle; je, tu, il, nous, ils, and the imperative.
static const struct {
    const char *plain, *third, *particle;
    bool apart; // "look it up", but "look at it"
    const char* fr[6];
} verb[] = {{"love", "loves", NULL, 0, {"aime", "aimes", "aime", "aimons", "aiment", "aimez"}},
            {"see", "sees", NULL, 0, {"vois", "vois", "voit", "voyons", "voient", "voyez"}},
            {"take", "takes", NULL, 0, {"prends", "prends", "prend", "prenons", "prennent", "prenez"}},
            {"find", "finds", NULL, 0, {"trouve", "trouves", "trouve", "trouvons", "trouvent", "trouvez"}},
            {"look", "looks", "up", 1, {"cherche", "cherches", "cherche", "cherchons", "cherchent", "cherchez"}},
            {"look", "looks", "at", 0, {"regarde", "regardes", "regarde", "regardons", "regardent", "regardez"}},
            {"switch", "switches", "off", 1, {"éteins", "éteins", "éteint", "éteignons", "éteignent", "éteignez"}},
            {"listen", "listens", "to", 0, {"écoute", "écoutes", "écoute", "écoutons", "écoutent", "écoutez"}},
            {"wait", "waits", "for", 0, {"attends", "attends", "attend", "attendons", "attendent", "attendez"}}};

static const char* const joint[][3] = {
    {"and", "et", NULL}, {"but", "mais", NULL}, {"because", "parce", "que"}, {"while", "pendant", "que"}};

// ---- rules ---------------------------------------------------------------------------------------------------------

#define ANY(list) random_below(seed, (int)(sizeof(list) / sizeof *(list)))

// the big red dress: la grande robe rouge
static void noun_phrase(Sentence* s, uint64_t* seed, bool with_place) {
    int d = ANY(determiner), n = ANY(noun), gender = 1 + noun[n].feminine;
    int a = random_below(seed, 3) ? -1 : ANY(size_word), c = random_below(seed, 2) ? -1 : ANY(colour_word);
    uint64_t det = say(s, determiner[d][0]), big = a < 0 ? 0 : say(s, size_word[a][0]);
    uint64_t red = c < 0 ? 0 : say(s, colour_word[c][0]), thing = say(s, noun[n].en);
    dire(s, determiner[d][gender], det);
    if (big) dire(s, size_word[a][gender], big);
    for (int i = 0; i < 3 && noun[n].fr[i]; i++) dire(s, noun[n].fr[i], thing);
    if (red) dire(s, colour_word[c][gender], red);
    if (!with_place || random_below(seed, 3)) return;
    int p = random_below(seed, 5);
    if (p < 4)
        dire(s, place[p][1], say(s, place[p][0]));
    else {
        uint64_t in_front_of = say(s, "in");
        in_front_of |= say(s, "front"), in_front_of |= say(s, "of");
        dire(s, "devant", in_front_of);
    }
    noun_phrase(s, seed, false);
}

// I do not look it up: je ne le cherche pas;  look it up: cherchez -le
static void clause(Sentence* s, uint64_t* seed, bool may_order) {
    int who = random_below(seed, PERSONS), v = ANY(verb);
    bool order = may_order && random_below(seed, 5) == 0, by_noun = !order && random_below(seed, 3) == 0;
    bool negated = !order && random_below(seed, 4) == 0;
    if (by_noun)
        noun_phrase(s, seed, true), who = HE;
    else if (!order)
        dire(s, subject[who][1], say(s, subject[who][0]));
    bool third = who == HE || who == SHE;
    int form = order ? 5 : who == I || who == YOU ? who : third ? 2 : who == WE ? 3 : 4;

    uint64_t not_ = 0;
    if (negated) not_ = say(s, third ? "does" : "do"), not_ |= say(s, "not");
    uint64_t action = say(s, third && !negated && !order ? verb[v].third : verb[v].plain);

    int whom = random_below(seed, PERSONS + 1); // PERSONS: it
    bool self = whom == who || (order && whom == YOU);
    bool by_pronoun = !self && random_below(seed, 2);
    if (!by_pronoun) {
        if (verb[v].particle) action |= say(s, verb[v].particle);
        if (negated) dire(s, "ne", not_);
        dire(s, verb[v].fr[form], action);
        if (negated) dire(s, "pas", not_);
        noun_phrase(s, seed, true);
        return;
    }
    if (verb[v].particle && !verb[v].apart) action |= say(s, verb[v].particle);
    uint64_t it = say(s, whom == PERSONS ? "it" : object[whom][0]);
    if (verb[v].particle && verb[v].apart) action |= say(s, verb[v].particle);
    if (negated) dire(s, "ne", not_);
    if (!order) dire(s, whom == PERSONS ? "le" : object[whom][1], it);
    dire(s, verb[v].fr[form], action);
    if (order) dire(s, whom == PERSONS ? "-le" : object[whom][2], it);
    if (negated) dire(s, "pas", not_);
}

// je, ne, me, te, le, la, que lose their vowel before another: j' aime, qu' il.
static void elide(Sentence* s) {
    static const char* const pairs[][2] = {{"je", "j'"}, {"ne", "n'"}, {"me", "m'"},  {"te", "t'"},
                                           {"le", "l'"}, {"la", "l'"}, {"que", "qu'"}};
    for (int i = 0; i + 1 < s->m; i++) {
        bool vowel = strchr("aeiou\xC3", french.word[s->fr[i + 1]][0]); // 0xC3 begins é in UTF-8
        for (int p = 0; p < 7 && vowel; p++)
            if (!strcmp(french.word[s->fr[i]], pairs[p][0])) {
                s->fr[i] = number_of(&french, pairs[p][1]);
                break;
            }
    }
}

// A sentence of exactly n English words (3 <= n <= LONGEST), and its translation.
static Sentence sentence_of(int n, uint64_t* seed) {
    for (;;) {
        Sentence s = {.n = 0};
        clause(&s, seed, true);
        while (s.n < n - 1 && s.n < ROOM - 24) {
            int j = ANY(joint);
            uint64_t and = say(&s, joint[j][0]);
            for (int i = 1; i < 3 && joint[j][i]; i++) dire(&s, joint[j][i], and);
            clause(&s, seed, j < 2);
        }
        if (s.n != n - 1) continue;
        dire(&s, ".", say(&s, "."));
        elide(&s);
        s.from[s.m] = s.from[s.m - 1]; // the end comes from the full stop
        s.fr[s.m++] = END;
        return s;
    }
}

static void print_words(const char* before, const Vocabulary* v, const int* words, int n) {
    printf("%s", before);
    for (int i = 0; i < n && words[i] != END; i++) printf(" %s", v->word[words[i]]);
    putchar('\n');
}
