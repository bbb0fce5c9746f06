// scale.c: what it costs this machine's MPI to move numbers, for scale.py's model of a step.
//
//     mpicc -O2 dev/bench/scale.c -o build/scale && mpirun -n 2 build/scale 124439808 1048576
//
// Arguments: how many floats to move, and in pieces of how many. Prints one object of JSON:
//     alpha_us      a message of no bytes, to and fro between the first two processes, halved
//     beta_GBps     bytes a second of messages of half a piece, likewise
//     gamma_GBps    bytes a second of MPI_Reduce_local, which adds one array to another, all processes at once
//     reduce_scatter_ms, exchange_ms, all_gather_ms    all floats, piece after piece, all processes taking part;
//                   exchange: a reduce-scatter in two steps, MPI_Alltoall and a sum in the order of ranks
//     pieces_ms, places_ms    a layer of gpt2, of which the first two processes send each other half of every tensor:
//                   in a message for each, or all in one, as a derived type of twelve places
// Medians of some rounds. Each goes through all of the memory, as training does, so that caches do not help.
// An MPI call that fails ends the program.

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROUNDS = 5, EMPTY = 1000, MOST = 1024 }; // rounds; empty messages in one; processes

static int rank, processes, counts[MOST], floats, piece;
static float *x, *y; // floats each

static int by_size(const void* a, const void* b) {
    double p = *(const double*)a, q = *(const double*)b;
    return (p > q) - (p < q);
}

static void message(float* data, int n) {
    for (int turn = 0; turn < 2; turn++)
        if (rank == turn)
            MPI_Send(data, n, MPI_FLOAT, 1 - turn, 0, MPI_COMM_WORLD);
        else if (rank == 1 - turn)
            MPI_Recv(data, n, MPI_FLOAT, turn, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
}

enum { C = 768, TENSORS = 12, LAYER = 12 * C * C + 13 * C };
static const int sizes[TENSORS] = {C, C, 3 * C* C, 3 * C, C* C, C, C, C, 4 * C* C, 4 * C, 4 * C* C, C};
static MPI_Datatype halves; // the second process's, of a layer's tensors one after the other, or the first one's

static void describe_halves(void) {
    int lengths[TENSORS], places[TENSORS];
    for (int i = 0, at = 0; i < TENSORS; at += sizes[i++])
        lengths[i] = sizes[i] / 2, places[i] = at + (rank ? 0 : sizes[i] / 2);
    MPI_Type_indexed(TENSORS, lengths, places, MPI_FLOAT, &halves);
    MPI_Type_commit(&halves);
}

static void exchange_layer(float* layer, int at_once) {
    MPI_Request requests[2 * TENSORS], *request = requests;
    float* in = y;
    if (rank > 1) return;
    if (at_once) {
        MPI_Irecv(in, LAYER / 2, MPI_FLOAT, 1 - rank, 0, MPI_COMM_WORLD, request++);
        MPI_Isend(layer, 1, halves, 1 - rank, 0, MPI_COMM_WORLD, request++);
    }
    for (int i = 0; i < TENSORS && !at_once; i++) {
        MPI_Irecv(in, sizes[i] / 2, MPI_FLOAT, 1 - rank, i, MPI_COMM_WORLD, request++);
        MPI_Isend(layer + (rank ? 0 : sizes[i] / 2), sizes[i] / 2, MPI_FLOAT, 1 - rank, i, MPI_COMM_WORLD, request++);
        in += sizes[i] / 2, layer += sizes[i];
    }
    MPI_Waitall((int)(request - requests), requests, MPI_STATUSES_IGNORE);
}

typedef enum { EMPTY_MESSAGES, MESSAGES, ADDITIONS, REDUCE_SCATTER, EXCHANGE, ALL_GATHER, PIECES, PLACES } What;

static void round_of(What what) {
    int share = piece / processes;
    for (int i = 0; what == EMPTY_MESSAGES && i < EMPTY; i++) message(x, 0);
    for (int at = 0; what >= PIECES && at + LAYER <= floats; at += LAYER) exchange_layer(x + at, what == PLACES);
    for (int at = 0; what != EMPTY_MESSAGES && what < PIECES && at + piece <= floats; at += piece) {
        if (what == MESSAGES) message(x + at, piece / 2);
        if (what == ADDITIONS) MPI_Reduce_local(x + at, y + at, piece, MPI_FLOAT, MPI_SUM);
        if (what == REDUCE_SCATTER) MPI_Reduce_scatter(x + at, y + at, counts, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
        if (what == EXCHANGE) {
            MPI_Alltoall(x + at, share, MPI_FLOAT, y, share, MPI_FLOAT, MPI_COMM_WORLD);
            for (int i = 0; i < share; i++) {
                float sum = 0;
                for (int r = 0; r < processes; r++) sum += y[r * share + i];
                x[at + i] = sum;
            }
        }
        if (what == ALL_GATHER)
            MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, x + at, share, MPI_FLOAT, MPI_COMM_WORLD);
    }
}

// Seconds of a round, of the slowest process.
static double measure(What what) {
    double times[ROUNDS];
    for (int i = -1; i < ROUNDS; i++) { // the first is a trial
        MPI_Barrier(MPI_COMM_WORLD);
        double begin = MPI_Wtime();
        round_of(what);
        double mine = MPI_Wtime() - begin;
        MPI_Allreduce(&mine, &times[i < 0 ? 0 : i], 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    }
    qsort(times, ROUNDS, sizeof *times, by_size);
    return times[ROUNDS / 2];
}

int main(int argc, char** argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &processes);
    floats = argc == 3 ? atoi(argv[1]) : 0, piece = argc == 3 ? atoi(argv[2]) : 0;
    if (processes > MOST || piece < processes || piece > floats || piece % processes) {
        if (rank == 0) fputs("usage: mpirun -n N scale FLOATS PIECE, a multiple of N; N is at most 1024\n", stderr);
        MPI_Finalize();
        return 2;
    }
    x = (float*)malloc((size_t)floats * sizeof *x), y = (float*)malloc((size_t)floats * sizeof *y);
    if (!x || !y) {
        fprintf(stderr, "scale: no memory for two times %d floats\n", floats);
        MPI_Abort(MPI_COMM_WORLD, 1);
        return 1;
    }
    for (int i = 0; i < floats; i++) x[i] = y[i] = 1; // touched, so that it is there
    for (int i = 0; i < processes; i++) counts[i] = piece / processes;
    double alpha = 0, beta = 0, bytes = (double)(floats / piece) * piece * sizeof(float);
    if (processes > 1) alpha = measure(EMPTY_MESSAGES) / EMPTY / 2, beta = measure(MESSAGES);
    double gamma = measure(ADDITIONS), scatter = measure(REDUCE_SCATTER), exchange = measure(EXCHANGE);
    double gather = measure(ALL_GATHER), pieces = 0, places = 0;
    if (processes > 1 && floats >= LAYER) {
        describe_halves();
        pieces = measure(PIECES) / (floats / LAYER), places = measure(PLACES) / (floats / LAYER);
    }
    if (rank == 0)
        printf("{\"processes\": %d, \"floats\": %d, \"piece\": %d, \"alpha_us\": %.3g, \"beta_GBps\": %.3g, "
               "\"gamma_GBps\": %.3g, \"reduce_scatter_ms\": %.4g, \"exchange_ms\": %.4g, \"all_gather_ms\": %.4g, "
               "\"pieces_ms\": %.4g, \"places_ms\": %.4g}\n",
               processes, floats, piece, 1e6 * alpha, beta > 0 ? bytes / beta / 1e9 : 0, bytes / gamma / 1e9,
               1e3 * scatter, 1e3 * exchange, 1e3 * gather, 1e3 * pieces, 1e3 * places);
    free(x), free(y);
    if (places > 0) MPI_Type_free(&halves);
    MPI_Finalize();
    return 0;
}
