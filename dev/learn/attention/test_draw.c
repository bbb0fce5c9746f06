// test_draw.c: pictures of awkward things: NaN, infinity, nothing but zeros, one cell, more cells than columns, labels
// that are long, not ASCII, or markup. What goes to the terminal must fit 80 columns, what goes to files must be SVG
// without a NaN for a coordinate. Ends with "N passed, N failed", and with status 1 if any failed.

#include "draw.h"

static int passed, failed;

static void expect(bool holds, const char* what) {
    if (holds)
        passed++;
    else
        failed++, fprintf(stderr, "FAILED: %s\n", what);
}

static char* text_of(const char* path) {
    static char text[16 << 20];
    FILE* f = fopen(path, "r");
    size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;
    if (f) fclose(f);
    text[n] = 0;
    return text;
}

// Every < ends with > before the next, every & begins an entity, every coordinate is a number.
static void check_svg(const char* name) {
    char path[1100];
    snprintf(path, sizeof path, "%s%s.svg", draw_folder, name);
    const char* text = text_of(path);
    bool inside = false, whole = strncmp(text, "<svg ", 5) == 0 && strstr(text, "</svg>\n");
    for (const char* c = text; *c; c++) {
        if (*c == '<') whole = whole && !inside, inside = true;
        if (*c == '>') inside = false;
        if (*c == '&') whole = whole && (!strncmp(c, "&amp;", 5) || !strncmp(c, "&lt;", 4) || !strncmp(c, "&gt;", 4));
        if (inside && (!strncmp(c, "nan", 3) || !strncmp(c, "inf", 3))) whole = false;
    }
    expect(whole && !inside, name);
    remove(path);
}

// The widest line of what has been printed so far, in characters, without colours.
static int widest(const char* path) {
    int most = 0, width = 0;
    for (const char* c = text_of(path); *c; c++) {
        if (*c == '\033')
            c = strchr(c, 'm');
        else if (*c == '\n')
            width = 0;
        else if ((*c & 0xC0) != 0x80)
            most = ++width > most ? width : most;
    }
    return most;
}

static void draw_everything(void) {
    static float x[300 * 300], ramp[300];
    static const char* const labels[4] = {"<&>\"'", "été, à côté", "a label that is longer than its margin", ""};
    for (int i = 0; i < 300 * 300; i++) x[i] = sinf((float)i);
    for (int i = 0; i < 300; i++) ramp[i] = (float)i - 3;
    const float strange[16] = {NAN,    INFINITY, -INFINITY, 0, -1e30f, 1e-30f, 123456, -0.004f,
                               0.996f, -9.96f,   1,         2, 3,      4,      5,      6};
    const float zeros[4] = {0, 0, 0, 0};
    draw_heat("t_strange", "<strange> & \"odd\"", strange, 4, 4, labels, labels);
    draw_heat("t_zeros", "zeros", zeros, 2, 2, NULL, NULL);
    draw_heat("t_one", NULL, ramp + 5, 1, 1, NULL, labels);
    for (int n = 1; n <= 300; n += n < 45 ? 1 : 51) draw_heat("t_wide", "many", x, 3, n, labels, NULL);
    draw_heat("t_large", "large", x, 300, 300, NULL, NULL);
    draw_bars("t_bars", "a title & more", strange, 4, labels);
    draw_bars("t_flat", "zeros", zeros, 4, labels);
    Series series[4] = {{"ramp", 300, ramp, x, false},
                        {"strange <&>", 16, strange, ramp, true},
                        {labels[2], 1, ramp, ramp, false},
                        {"none", 0, ramp, x, true}};
    for (int log = 0; log < 4; log++)
        draw_curves("t_curves", "curves", &(Axes){"x <", "y &", log & 1, log & 2, log == 0}, series, 4);
    draw_curves("t_nothing", NULL, &(Axes){.x = "", .y = ""}, series + 3, 1);
    claim(true, "a claim with %s words that go on, and on, and on, beyond the end of a line of %d columns", "many", 80);
}

int main(int count, char** arguments) {
    static const char* const names[] = {"t_strange", "t_zeros", "t_one",    "t_wide",   "t_large",
                                        "t_bars",    "t_flat",  "t_curves", "t_nothing"};
    (void)count;
    lesson_begins(arguments[0]);
    char path[1100];
    snprintf(path, sizeof path, "%stest_draw.txt", draw_folder);
    if (!freopen(path, "w", stdout)) return perror(path), 1;
    for (int colours = 0; colours < 2; colours++) {
        draw_colours = colours;
        draw_everything();
    }
    expect(lesson_ends() == 0, "no claim has failed");
    claim(false, "this one fails");
    expect(lesson_ends() == 1, "a claim has failed");
    fflush(stdout);
    expect(widest(path) <= 80, "all lines fit 80 columns");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) check_svg(names[i]);
    remove(path);
    fprintf(stderr, "%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
