// draw.h: heat maps, curves and bars, in the terminal and as SVG; and claims, which a lesson makes and which must hold.
//
//     lesson_begins(argv[0]);                            pictures go beside the program: build/attention/NAME.svg
//     draw_heat("name", "title", x, m, n, rows, cols);   a matrix, with labels
//     draw_bars("name", "title", values, n, labels);
//     draw_curves("name", "title", &(Axes){.x = "step", .y = "loss"}, series, count);
//     claim(a < b, "a %.2f is below b %.2f", a, b);
//     return lesson_ends();                              1 if a claim failed
//
// In a terminal the pictures have 256 colours; where the output is no terminal, or NO_COLOR is set, they are made of
// characters. Everything fits into 80 columns. A NULL name draws no file, a NULL list of labels stands for 0, 1, 2...
#pragma once
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DRAW_FUNCTION static __attribute__((unused))

static char draw_folder[1024] = "";
static bool draw_colours;
static int claims_made, claims_failed;

// To be called first, with argv[0]: finds out where pictures go, and whether there are colours to draw with.
DRAW_FUNCTION void lesson_begins(const char* program) {
    const char* slash = strrchr(program, '/');
    if (slash) snprintf(draw_folder, sizeof draw_folder, "%.*s", (int)(slash - program + 1), program);
    draw_colours = isatty(STDOUT_FILENO) && !getenv("NO_COLOR");
}

// The number of characters, not of bytes, in UTF-8: continuation bytes are 10xxxxxx.
static int text_length(const char* text) {
    int count = 0;
    for (; *text; text++) count += (*text & 0xC0) != 0x80;
    return count;
}

// Says whether what the lesson claims is so, in lines of at most 80 columns. A lesson goes on after a claim that
// failed, and ends with status 1.
__attribute__((unused, format(printf, 2, 3))) static bool claim(bool holds, const char* format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    const char* colour = !draw_colours ? "" : holds ? "\033[32m" : "\033[1;31m";
    printf("%s%s%s", colour, holds ? "claim holds:" : "CLAIM FAILS:", draw_colours ? "\033[0m" : "");
    int column = 12;
    for (char* word = strtok(text, " "); word; word = strtok(NULL, " ")) {
        int length = text_length(word);
        if (column + 1 + length > 80) printf("\n%*s", column = 12, "");
        printf(" %s", word), column += 1 + length;
    }
    putchar('\n');
    fflush(stdout);
    claims_made++, claims_failed += !holds;
    return holds;
}

// The status for main to return.
DRAW_FUNCTION int lesson_ends(void) {
    printf("\n%d of %d claims hold\n", claims_made - claims_failed, claims_made);
    return claims_failed ? 1 : 0;
}

// ====================================================================================================================
// Text and colours

// The bytes that the first `count` characters take.
static int text_bytes(const char* text, int count) {
    int bytes = 0;
    while (text[bytes] && (count > 0 || (text[bytes] & 0xC0) == 0x80)) count -= (text[++bytes] & 0xC0) != 0x80;
    return bytes;
}

// At most `width` characters, padded to it; to the right where width is negative.
static void put_text(const char* text, int width) {
    int limit = abs(width), length = text_length(text);
    if (length > limit) length = limit;
    if (width < 0) printf("%*s", limit - length, "");
    printf("%.*s", text_bytes(text, length), text);
    if (width > 0) printf("%*s", limit - length, "");
}

// Label i of a list; of no list, the number i.
static const char* label_at(const char* const* labels, int i) {
    static char number[16];
    if (labels) return labels[i];
    snprintf(number, sizeof number, "%d", i);
    return number;
}

static int longest_label(const char* const* labels, int count) {
    int longest = 0;
    for (int i = 0; i < count; i++) {
        int length = text_length(label_at(labels, i));
        if (length > longest) longest = length;
    }
    return longest;
}

// A value from -1 over 0 to 1 as a colour from red over white to blue.
static void shade(float t, int rgb[3]) {
    static const float ends[5][3] = {{165, 15, 21}, {246, 132, 100}, {255, 255, 255}, {100, 165, 215}, {8, 48, 107}};
    t = isnan(t) ? 0.0f : fminf(fmaxf(t, -1.0f), 1.0f) * 2.0f + 2.0f;
    int below = t >= 4.0f ? 3 : (int)t;
    for (int c = 0; c < 3; c++)
        rgb[c] = (int)(ends[below][c] + (t - (float)below) * (ends[below + 1][c] - ends[below][c]));
}

static bool is_dark(const int rgb[3]) { return 3 * rgb[0] + 6 * rgb[1] + rgb[2] < 1400; }

// The nearest colour of a terminal's 6 x 6 x 6 cube as background, with black or white letters on it.
static void terminal_shade(const int rgb[3]) {
    int cube = 16;
    for (int c = 0, unit = 36; c < 3; c++, unit /= 6)
        cube += unit * (rgb[c] < 48 ? 0 : rgb[c] < 115 ? 1 : (rgb[c] - 35) / 40);
    printf("\033[48;5;%d;38;5;%dm", cube, is_dark(rgb) ? 231 : 16);
}

// What tells the series of a plot apart: colours that most colour-blind readers can tell apart (Okabe and Ito 2008),
// and letters. The terminal's numbers are the nearest of its cube.
enum { MAX_SERIES = 8 };
static const char* const series_colour[MAX_SERIES] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                                      "#e69f00", "#56b4e9", "#000000", "#999999"};
static const int series_terminal[MAX_SERIES] = {25, 166, 36, 175, 178, 74, 245, 248};
static const char series_letter[MAX_SERIES + 1] = "ox+*#%@&";

// ====================================================================================================================
// SVG

static FILE* svg_open(const char* name, int width, int height, const char* title) {
    char path[1200];
    snprintf(path, sizeof path, "%s%s.svg", draw_folder, name);
    FILE* f = fopen(path, "w");
    if (!f) {
        fprintf(stderr, "cannot write %s\n", path);
        exit(1);
    }
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" "
            "font-family=\"system-ui,sans-serif\" font-size=\"13\" fill=\"#222\">\n"
            "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
            width, height, width, height);
    if (title) {
        fprintf(f, "<text x=\"16\" y=\"26\" font-size=\"15\" font-weight=\"600\">");
        for (; *title; title++) fprintf(f, *title == '&' ? "&amp;" : *title == '<' ? "&lt;" : "%c", *title);
        fprintf(f, "</text>\n");
    }
    return f;
}

static void svg_close(FILE* f, const char* name) {
    fprintf(f, "</svg>\n");
    if (fclose(f)) perror(name);
    printf("picture: %s%s.svg\n", draw_folder, name);
}

// Text with its anchor (start, middle, end) at (x, y), turned by `turn` degrees.
static void svg_text(FILE* f, float x, float y, const char* anchor, int turn, const char* colour, const char* text) {
    fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" fill=\"%s\"", x, y, anchor, colour);
    if (turn) fprintf(f, " transform=\"rotate(%d %.1f %.1f)\"", turn, x, y);
    fprintf(f, ">");
    for (; *text; text++) fprintf(f, *text == '&' ? "&amp;" : *text == '<' ? "&lt;" : "%c", *text);
    fprintf(f, "</text>\n");
}

// ====================================================================================================================
// Heat maps

// The largest magnitude, which is drawn in the darkest shade, and never 0; *negative: whether any value is below 0.
static float largest(const float* x, int count, bool* negative) {
    float most = 0;
    *negative = false;
    for (int i = 0; i < count; i++) {
        if (isfinite(x[i])) most = fmaxf(most, fabsf(x[i]));
        *negative |= x[i] < 0;
    }
    return most > 0 ? most : 1;
}

// Three digits at most, for a cell: .07, .94, 12.5, -3.
static const char* short_number(float x) {
    static char text[32];
    float size = fabsf(x);
    if (size < 0.995f && size >= 0.005f)
        snprintf(text, sizeof text, "%s.%02.0f", x < 0 ? "-" : "", 100 * size);
    else if (size < 9.95f && x != roundf(x))
        snprintf(text, sizeof text, size < 0.005f ? "0" : "%.1f", x);
    else
        snprintf(text, sizeof text, size < 99999 ? "%.0f" : "%.0e", x);
    return text;
}

static void heat_in_terminal(const float* x, int m, int n, const char* const* rows, const char* const* cols,
                             float most) {
    static const char* const blocks[6] = {" ", "·", "░", "▒", "▓", "█"};
    int margin = longest_label(rows, m), room, width = 2, step = 1;
    if (margin > 16) margin = 16;
    room = 79 - margin - 1;
    bool numbers = n * 6 <= room;
    if (numbers)
        width = n * 8 <= room ? 8 : 6;
    else if (n * 2 > room)
        width = 1, step = (n + room - 1) / room;
    if (numbers) {
        printf("%*s", margin + 1, "");
        for (int j = 0; j < n; j++) {
            int length = text_length(label_at(cols, j));
            if (length > width - 1) length = width - 1;
            put_text("", width - length - (width - length) / 2);
            put_text(label_at(cols, j), length);
            put_text("", (width - length) / 2);
        }
        putchar('\n');
    } else if (step == 1 && cols) { // too narrow for words beside one another: letter below letter
        int high = longest_label(cols, n);
        for (int letter = 0; letter < high; letter++) {
            printf("%*s", margin + 1, "");
            for (int j = 0; j < n; j++) {
                const char* label = cols[j];
                int skip = letter - (high - text_length(label));
                put_text(skip < 0 ? "" : label + text_bytes(label, skip), 1);
                put_text("", width - 1);
            }
            putchar('\n');
        }
    }
    for (int i = 0; i < m; i += step) {
        put_text(label_at(rows, i), -margin);
        putchar(' ');
        for (int j = 0; j < n; j += step) {
            float sum = 0; // where the map is wider than the page, a cell shows the mean of a square
            int count = 0, rgb[3];
            for (int r = i; r < i + step && r < m; r++)
                for (int c = j; c < j + step && c < n; c++) sum += x[r * n + c], count++;
            float value = sum / (float)count, t = value / most;
            shade(t, rgb);
            if (draw_colours) {
                terminal_shade(rgb);
                put_text(numbers ? short_number(value) : "", numbers ? -width + 2 : width);
                printf("%s\033[0m", numbers ? "  " : "");
            } else {
                const char* block = blocks[isnan(t) ? 0 : (int)(fminf(fabsf(t), 1) * 5 + 0.5f)];
                int shades = numbers ? width / 2 - 2 : width; // beside a number, or in its place
                if (numbers) put_text(short_number(value), -width + shades);
                for (int k = 0; k < shades; k++) printf("%s", k == 0 && t < -0.1f && !numbers ? "-" : block);
            }
        }
        putchar('\n');
    }
}

static void heat_as_svg(const char* name, const char* title, const float* x, int m, int n, const char* const* rows,
                        const char* const* cols, float most) {
    int wide = n <= 14 ? 46 : n <= 40 ? 18 : n <= 80 ? 9 : 640 / n > 2 ? 640 / n : 2, high = n <= 14 ? 30 : wide;
    int left = 24 + 8 * longest_label(rows, m), long_cols = longest_label(cols, n);
    bool turned = long_cols * 8 > wide;
    int top = 50 + (turned ? 6 + 6 * long_cols : 16), every = high >= 13 ? 1 : (15 + high) / high, rgb[3];
    int width = left + n * wide + 24 + (turned ? 6 * long_cols : 0),
        title_width = title ? 32 + 10 * text_length(title) : 0;
    FILE* f = svg_open(name, width > title_width ? width : title_width, top + m * high + 20, title);
    for (int j = 0; j < n; j += every)
        svg_text(f, (float)(left + j * wide) + 0.5f * (float)wide + (turned ? 4 : 0), (float)top - 8,
                 turned ? "start" : "middle", turned ? -45 : 0, "#222", label_at(cols, j));
    for (int i = 0; i < m; i++) {
        if (i % every == 0)
            svg_text(f, (float)left - 8, (float)(top + i * high) + 0.5f * (float)high + 5, "end", 0, "#222",
                     label_at(rows, i));
        for (int j = 0; j < n; j++) {
            shade(x[i * n + j] / most, rgb);
            fprintf(f, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"#%02x%02x%02x\"/>\n", left + j * wide,
                    top + i * high, wide - (wide > 4), high - (high > 4), (unsigned)rgb[0], (unsigned)rgb[1],
                    (unsigned)rgb[2]);
            if (n <= 14)
                svg_text(f, (float)(left + j * wide + wide / 2), (float)(top + i * high + high / 2 + 5), "middle", 0,
                         is_dark(rgb) ? "#fff" : "#222", short_number(x[i * n + j]));
        }
    }
    fprintf(f, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"none\" stroke=\"#ccc\"/>\n", left - 1,
            top - 1, n * wide + 1, m * high + 1);
    svg_close(f, name);
}

// A matrix x (m,n), row labels at the left, column labels above. White is 0 and the darkest shade the largest
// magnitude; where there are negative values, those are red (in characters: marked with -).
DRAW_FUNCTION void draw_heat(const char* name, const char* title, const float* x, int m, int n, const char* const* rows,
                             const char* const* cols) {
    bool negative;
    float most = largest(x, m * n, &negative);
    if (title) printf("%s\n", title);
    heat_in_terminal(x, m, n, rows, cols, most);
    if (name) heat_as_svg(name, title, x, m, n, rows, cols, most);
}

// ====================================================================================================================
// Bars

// Values (n), none negative, as bars with their labels at the left and their numbers behind.
DRAW_FUNCTION void draw_bars(const char* name, const char* title, const float* values, int n,
                             const char* const* labels) {
    bool negative;
    float most = largest(values, n, &negative);
    int margin = longest_label(labels, n);
    if (margin > 30) margin = 30;
    if (title) printf("%s\n", title);
    for (int i = 0; i < n; i++) {
        float length = fminf(fmaxf(values[i], 0) / most, 1) * (float)(66 - margin);
        put_text(label_at(labels, i), -margin);
        printf(" %s", draw_colours ? "\033[38;5;25m" : "");
        for (int k = 0; k < (int)(length + 0.5f); k++) printf("█");
        printf("%s %.3g\n", draw_colours ? "\033[0m" : "", values[i]);
    }
    if (!name) return;
    int left = 28 + 8 * longest_label(labels, n), title_width = title ? 32 + 10 * text_length(title) : 0;
    int width = left + 400 + 90;
    FILE* f = svg_open(name, width > title_width ? width : title_width, 60 + 26 * n, title);
    for (int i = 0; i < n; i++) {
        char number[32];
        float length = fminf(fmaxf(values[i], 0) / most, 1) * 400, y = 46 + 26 * (float)i;
        snprintf(number, sizeof number, "%.3g", values[i]);
        svg_text(f, (float)left - 8, y + 14, "end", 0, "#222", label_at(labels, i));
        fprintf(f, "<rect x=\"%d\" y=\"%.1f\" width=\"%.1f\" height=\"19\" fill=\"%s\"/>\n", left, y, fmaxf(length, 1),
                series_colour[0]);
        svg_text(f, (float)left + length + 6, y + 14, "start", 0, "#222", number);
    }
    svg_close(f, name);
}

// ====================================================================================================================
// Curves and points

// A series of a plot: (x, y) pairs joined by lines, or, with `dots`, left as points. A NaN interrupts the line.
typedef struct {
    const char* label;
    int n;
    const float *x, *y;
    bool dots;
} Series;

// The names of the axes, and which of them are logarithmic (values that are not positive are then left out). `zero`
// makes the y axis begin at 0.
typedef struct {
    const char *x, *y;
    bool log_x, log_y, zero;
} Axes;

typedef struct {
    float low, high;
    bool log;
} Range;

static float along(const Range* range, float value) { // 0 at the low end of the axis, 1 at the high end, NaN if nowhere
    if (range->log && !(value > 0)) return NAN;
    float v = range->log ? log10f(value) : value;
    return (v - range->low) / (range->high - range->low);
}

static float value_at(const Range* range, float t) {
    float v = range->low + t * (range->high - range->low);
    return range->log ? powf(10, v) : v;
}

static Range range_of(const Series* series, int count, bool of_y, bool log, bool zero) {
    Range range = {INFINITY, -INFINITY, log};
    for (int s = 0; s < count; s++)
        for (int i = 0; i < series[s].n; i++) {
            float value = of_y ? series[s].y[i] : series[s].x[i];
            if (log) value = value > 0 ? log10f(value) : NAN;
            if (isfinite(value)) range.low = fminf(range.low, value), range.high = fmaxf(range.high, value);
        }
    if (zero && !log && range.low > 0) range.low = 0;
    if (count > 0 && series[0].dots) { // room around a cloud
        float room = 0.04f * (range.high - range.low);
        range.low -= room, range.high += room;
    }
    if (!(range.high >= range.low)) range.low = 0, range.high = 1;
    if (range.high == range.low) range.low -= 0.5f, range.high += 0.5f;
    return range;
}

enum { PLOT_WIDTH = 66, PLOT_HEIGHT = 16 };

static void curves_in_terminal(const Axes* axes, const Series* series, int count, const Range* rx, const Range* ry) {
    unsigned char grid[PLOT_HEIGHT][PLOT_WIDTH] = {{0}}; // series + 1
    for (int s = 0; s < count; s++)
        for (int i = 0; i < series[s].n; i++) {
            float x1 = along(rx, series[s].x[i]), y1 = along(ry, series[s].y[i]), x0 = x1, y0 = y1;
            if (i > 0 && !series[s].dots) x0 = along(rx, series[s].x[i - 1]), y0 = along(ry, series[s].y[i - 1]);
            if (!isfinite(x0 + y0)) x0 = x1, y0 = y1;
            if (!isfinite(x1 + y1)) continue;
            for (int k = 0; k <= 2 * PLOT_WIDTH; k++) {
                float t = (float)k / (2 * PLOT_WIDTH), x = x0 + t * (x1 - x0), y = y0 + t * (y1 - y0);
                grid[(int)((1 - y) * (PLOT_HEIGHT - 1) + 0.5f)][(int)(x * (PLOT_WIDTH - 1) + 0.5f)] =
                    (unsigned char)(s + 1);
            }
        }
    for (int row = 0; row < PLOT_HEIGHT; row++) {
        if (row % 5 == 0)
            printf("%9.3g |", value_at(ry, 1 - (float)row / (PLOT_HEIGHT - 1)));
        else
            printf("%9s |", "");
        for (int col = 0; col < PLOT_WIDTH; col++) {
            int s = grid[row][col] - 1;
            if (s >= 0 && draw_colours)
                printf("\033[38;5;%dm%c\033[0m", series_terminal[s], series_letter[s]);
            else
                putchar(s < 0 ? ' ' : series_letter[s]);
        }
        putchar('\n');
    }
    printf("%9s +", "");
    for (int col = 0; col < PLOT_WIDTH; col++) putchar('-');
    printf("\n%10s %-9.4g%*s%-10.4g%*s%9.4g\n", "", value_at(rx, 0), PLOT_WIDTH / 2 - 14, "", value_at(rx, 0.5f),
           PLOT_WIDTH / 2 - 14, "", value_at(rx, 1));
    printf("%10s x: %s%s, y: %s%s\n", "", axes->x, axes->log_x ? " (log)" : "", axes->y, axes->log_y ? " (log)" : "");
    for (int s = 0; s < count; s++)
        if (series[s].label && draw_colours)
            printf("%10s \033[38;5;%dm%c\033[0m %s\n", "", series_terminal[s], series_letter[s], series[s].label);
        else if (series[s].label)
            printf("%10s %c %s\n", "", series_letter[s], series[s].label);
}

// Round numbers for an axis: steps of 1, 2 or 5 times a power of ten; on a logarithmic axis powers of ten, with 2 and 5
// between them where the axis is short. Returns how many (at most 24).
static int ticks_of(const Range* range, float* ticks) {
    int count = 0;
    float span = range->high - range->low;
    if (range->log) {
        for (int e = (int)floorf(range->low); e <= (int)ceilf(range->high); e += span > 10 ? 3 : 1)
            for (int k = 0; k < (span < 2.5f ? 3 : 1) && count < 24; k++) {
                float t = along(range, (k == 0 ? 1.0f : k == 1 ? 2.0f : 5.0f) * powf(10, (float)e));
                if (t > -1e-4f && t < 1.0001f) ticks[count++] = value_at(range, t);
            }
        return count;
    }
    float unit = powf(10, floorf(log10f(span / 5))), step = unit;
    if (span / step > 7) step = 2 * unit;
    if (span / step > 7) step = 5 * unit;
    if (span / step > 7) step = 10 * unit;
    for (float k = ceilf(range->low / step - 1e-4f); k * step <= range->high + 1e-4f * span && count < 24; k++)
        ticks[count++] = k * step + 0.0f; // without this, 0 could be -0
    return count;
}

static void curves_as_svg(const char* name, const char* title, const Axes* axes, const Series* series, int count,
                          const Range* rx, const Range* ry) {
    enum { LEFT = 72, TOP = 48, WIDE = 460, HIGH = 300 };
    int longest = 0;
    for (int s = 0; s < count; s++)
        if (series[s].label && text_length(series[s].label) > longest) longest = text_length(series[s].label);
    int width = LEFT + WIDE + 24 + (longest ? 24 + 8 * longest : 0),
        title_width = title ? 32 + 10 * text_length(title) : 0;
    FILE* f = svg_open(name, width > title_width ? width : title_width, TOP + HIGH + 62, title);
    float ticks[24];
    char number[32];
    for (int k = 0, n = ticks_of(rx, ticks); k < n; k++) {
        float x = LEFT + WIDE * along(rx, ticks[k]);
        fprintf(f, "<path d=\"M%.1f %dV%d\" stroke=\"#e6e6e6\"/>\n", x, TOP, TOP + HIGH);
        snprintf(number, sizeof number, "%.4g", ticks[k]);
        svg_text(f, x, TOP + HIGH + 20, "middle", 0, "#555", number);
    }
    for (int k = 0, n = ticks_of(ry, ticks); k < n; k++) {
        float y = TOP + HIGH * (1 - along(ry, ticks[k]));
        fprintf(f, "<path d=\"M%d %.1fH%d\" stroke=\"#e6e6e6\"/>\n", LEFT, y, LEFT + WIDE);
        snprintf(number, sizeof number, "%.4g", ticks[k]);
        svg_text(f, LEFT - 8, y + 4, "end", 0, "#555", number);
    }
    fprintf(f, "<path d=\"M%d %dV%dH%d\" stroke=\"#888\" fill=\"none\"/>\n", LEFT, TOP, TOP + HIGH, LEFT + WIDE);
    svg_text(f, LEFT + WIDE / 2.0f, TOP + HIGH + 46, "middle", 0, "#222", axes->x);
    svg_text(f, 18, TOP + HIGH / 2.0f, "middle", -90, "#222", axes->y);
    for (int s = 0, line = 0; s < count; s++) {
        const char* colour = series_colour[s];
        if (!series[s].dots)
            fprintf(f, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"2\" stroke-linejoin=\"round\" d=\"", colour);
        bool pen_down = false;
        for (int i = 0; i < series[s].n; i++) {
            float x = LEFT + WIDE * along(rx, series[s].x[i]), y = TOP + HIGH * (1 - along(ry, series[s].y[i]));
            bool there = isfinite(x + y);
            if (there && series[s].dots)
                fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\" fill-opacity=\"0.75\"/>\n", x, y,
                        colour);
            else if (there)
                fprintf(f, "%c%.1f %.1f", pen_down ? 'L' : 'M', x, y);
            pen_down = there;
        }
        if (!series[s].dots) fprintf(f, "\"/>\n");
        if (!series[s].label) continue;
        float y = TOP + 8 + 22 * (float)line++;
        fprintf(f, "<circle cx=\"%d\" cy=\"%.1f\" r=\"5\" fill=\"%s\"/>\n", LEFT + WIDE + 20, y, colour);
        svg_text(f, LEFT + WIDE + 32, y + 5, "start", 0, "#222", series[s].label);
    }
    svg_close(f, name);
}

// Up to MAX_SERIES curves or clouds of points in one plot.
DRAW_FUNCTION void draw_curves(const char* name, const char* title, const Axes* axes, const Series* series, int count) {
    Range rx = range_of(series, count, false, axes->log_x, false),
          ry = range_of(series, count, true, axes->log_y, axes->zero);
    if (title) printf("%s\n", title);
    curves_in_terminal(axes, series, count, &rx, &ry);
    if (name) curves_as_svg(name, title, axes, series, count, &rx, &ry);
}
