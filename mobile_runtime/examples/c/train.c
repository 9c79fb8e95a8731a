/* Training on a device in plain C: three spirals, from untrained weights to a classifier. See README.md.
 *
 * All memory that the engine uses is one block, whose size the artifact tells: no malloc behind your back.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "evensong.h"

enum { ARMS = 3, POINTS = 300, EPOCHS = 60, HELD_OUT = 60, ALIGNMENT = 64 };

typedef struct examples {
    float points[POINTS][2];
    int32_t arms[POINTS];
} examples;

typedef struct result {
    float loss;
    int32_t correct;
} result;

static char message[256]; /* the engine's words, should it refuse something */

static void stop(const char* what) {
    fprintf(stderr, "%s: %s\n", what, message);
    exit(1);
}

/* The whole file, at a multiple of 64, so that the engine can use frozen weights where they lie. */
static void* read_file(const char* path, size_t* size) {
    FILE* file = fopen(path, "rb");
    if (!file) {
        perror(path);
        exit(1);
    }
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    char* memory = malloc(*size + ALIGNMENT);
    if (!memory) abort();
    memory += ALIGNMENT - (uintptr_t)memory % ALIGNMENT; /* held until the program ends */
    if (fread(memory, 1, *size, file) != *size) abort();
    fclose(file);
    return memory;
}

/* Three arms that wind around each other, with a little noise; shuffled, the same ones each time. */
static void make_spirals(examples* all) {
    uint32_t state = 1;
    for (int i = 0; i < POINTS; ++i) {
        float random[3];
        for (int k = 0; k < 3; ++k) {
            state = state * 1664525u + 1013904223u;
            random[k] = (float)(state >> 8) / 16777216.0f;
        }
        const int arm = i % ARMS;
        const float radius = 0.1f + 0.9f * random[0];
        const float angle = 4.0f * radius + 2.0944f * (float)arm + 0.2f * (random[1] - 0.5f);
        all->points[i][0] = radius * cosf(angle);
        all->points[i][1] = radius * sinf(angle);
        all->arms[i] = arm;
    }
}

static uint32_t find_program(const evensong_engine* engine, const char* name) {
    const int32_t index = evensong_find_program(engine, name);
    if (index < 0) stop(name);
    return (uint32_t)index;
}

/* One run of `train` or `evaluate` on examples [first, first + count). */
static result run(evensong_engine* engine, uint32_t program, examples* all, int first, int count, float learning_rate,
                  uint64_t step) {
    result got = {NAN, 0};
    const evensong_buffer inputs[] = {{all->points[first], (size_t)count * sizeof all->points[0]},
                                      {&all->arms[first], (size_t)count * sizeof all->arms[0]}};
    const evensong_buffer outputs[] = {{&got.loss, sizeof got.loss}, {&got.correct, sizeof got.correct}};
    const evensong_options options = {.learning_rate = learning_rate, .step = step, .seed = 1};
    if (evensong_run(engine, program, (uint32_t)count, inputs, 2, outputs, 2, &options, message, sizeof message))
        stop("run");
    return got;
}

static void print_ports(const evensong_engine* engine, uint32_t program) {
    evensong_program about;
    evensong_port port;
    evensong_program_info(engine, program, &about);
    printf("%s: at most %u examples;", about.name, (unsigned)about.max_batch);
    for (uint32_t side = 0; side < 2; ++side) {
        for (uint32_t i = 0; i < (side ? about.outputs : about.inputs); ++i) {
            evensong_port_info(engine, program, (int32_t)side, i, &port);
            printf(" %s%s [", side ? "-> " : "", port.name);
            for (uint32_t axis = 0; axis < port.rank; ++axis) printf(axis ? ", %u" : "%u", (unsigned)port.dims[axis]);
            printf("]%s", port.batched ? " each" : "");
        }
    }
    printf("\n");
}

static int print_memory(const evensong_engine* engine, size_t block) {
    evensong_memory m;
    evensong_memory_info(engine, &m);
    const size_t declared = m.state + m.slots + m.arena + m.workspace + m.statistics;
    const size_t held = evensong_memory_bytes(engine);
    printf(
        "memory: the artifact declares %zu bytes (variables %zu, optimiser %zu, arena %zu, workspace %zu), the engine\n"
        "  describes it in %zu; it holds %zu of the %zu that it was given\n",
        declared, m.state, m.slots, m.arena, m.workspace, m.description, held, block);
    return held <= block && held <= declared + m.description + 6 * ALIGNMENT; /* each part is rounded up */
}

int main(int count, char** arguments) {
    static examples all;
    size_t size, needed;
    if (evensong_abi_version() != EVENSONG_ABI_VERSION) return fprintf(stderr, "another version of the library\n"), 1;
    void* artifact = read_file(count > 1 ? arguments[1] : "spirals.evsg", &size);

    /* On a microcontroller the block would be `static _Alignas(64) char memory[...]`. */
    if (evensong_memory_needed(artifact, size, EVENSONG_BORROW, &needed, message, sizeof message)) stop("artifact");
    char* memory = malloc(needed + ALIGNMENT);
    if (!memory) abort();
    char* block = memory + (ALIGNMENT - (uintptr_t)memory % ALIGNMENT);
    evensong_engine* engine;
    if (evensong_open_in(block, needed, NULL, artifact, size, EVENSONG_BORROW, &engine, message, sizeof message))
        stop("artifact");

    const uint32_t train = find_program(engine, "train"), evaluate = find_program(engine, "evaluate");
    const uint32_t predict = find_program(engine, "predict");
    const int batch = (int)evensong_max_batch(engine, train), training = POINTS - HELD_OUT;
    printf("instruction set: %s\n", evensong_instruction_set());
    print_ports(engine, train);
    print_ports(engine, predict);

    make_spirals(&all);
    uint64_t step = 0;
    for (int epoch = 1; epoch <= EPOCHS; ++epoch) {
        float loss = 0;
        for (int first = 0; first < training; first += batch) {
            const int live = training - first < batch ? training - first : batch;
            loss += run(engine, train, &all, first, live, 0.1f, ++step).loss * (float)live;
        }
        if (epoch % 20 == 0) printf("epoch %d: loss %.3f\n", epoch, loss / (float)training);
    }

    int correct = 0;
    for (int first = training; first < POINTS; first += batch) {
        const int live = POINTS - first < batch ? POINTS - first : batch;
        correct += run(engine, evaluate, &all, first, live, 0, 1).correct;
    }
    printf("held out: %d of %d right\n", correct, HELD_OUT);

    float point[2] = {all.points[training][0], all.points[training][1]}, scores[ARMS];
    const evensong_buffer input = {point, sizeof point}, output = {scores, sizeof scores};
    const evensong_options options = {.step = 1};
    if (evensong_run(engine, predict, 1, &input, 1, &output, 1, &options, message, sizeof message)) stop("predict");
    int best = 0;
    for (int arm = 1; arm < ARMS; ++arm) best = scores[arm] > scores[best] ? arm : best;
    printf("(%.2f, %.2f) lies on arm %d; it is arm %d\n", point[0], point[1], best, (int)all.arms[training]);

    const int within = print_memory(engine, needed);
    evensong_close(engine);
    free(memory);
    return within && correct >= 9 * HELD_OUT / 10 ? 0 : 1;
}
