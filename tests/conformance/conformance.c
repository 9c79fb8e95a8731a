/* Runs golden files on the engine: conformance [--instruction-set NAME] FILE... README.md describes the files.
 *
 * Every case runs twice, in memory of the engine's and in memory of ours that is exactly as large as the engine asks
 * for. Plain C99, without a JSON parser or anything else that a small device lacks.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "evensong.h"

enum { MOST_PORTS = 255, GUARD = 64 };
static const unsigned char CANARY = 0xa5;

typedef struct reader {
    const unsigned char *next, *end;
} reader;

static const char* current = ""; /* the case at hand */
static int failures = 0, cases = 0, runs = 0;

static void fail(const char* what, uint32_t number, double got, double expected) {
    if (++failures <= 20) printf("%s: %s %u: got %.9g, expected %.9g\n", current, what, number, got, expected);
}

static void give_up(const char* why) {
    fprintf(stderr, "conformance: %s%s%s\n", current, *current ? ": " : "", why);
    exit(2);
}

static const unsigned char* take(reader* r, size_t size) {
    const unsigned char* data = r->next;
    if ((size_t)(r->end - r->next) < size) give_up("the file ends too early");
    r->next += size;
    return data;
}

static uint64_t number(reader* r, int bytes) {
    const unsigned char* data = take(r, (size_t)bytes);
    uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) value |= (uint64_t)data[i] << (8 * i);
    return value;
}

static float real(reader* r) {
    const uint32_t bits = (uint32_t)number(r, 4);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* A copy in memory of its own, aligned, so that reading beyond its end can be found out. */
static void* copy(const void* data, size_t size) {
    void* memory = malloc(size ? size : 1);
    if (!memory) give_up("no memory");
    return memcpy(memory, data, size);
}

/* ------------------------------------------------------------------------------------------------------- comparing */

static float element(const unsigned char* data, size_t i) {
    float value;
    memcpy(&value, data + 4 * i, 4);
    return value;
}

static double as_number(int dtype, const unsigned char* data, size_t i) {
    int32_t value;
    if (dtype == EVENSONG_FLOAT32) return element(data, i);
    if (dtype == EVENSONG_INT8) return (int8_t)data[i];
    if (dtype == EVENSONG_UINT8) return data[i];
    memcpy(&value, data + 4 * i, 4);
    return value;
}

/* Reads one result and compares it with `actual`, of `size` bytes; with NULL it only reads. */
static void compare(reader* r, const char* what, uint32_t which, const unsigned char* actual, size_t size) {
    const int dtype = (int)number(r, 1);
    const float tolerance = real(r);
    const size_t bytes = (size_t)number(r, 4);
    const unsigned char* expected = take(r, bytes);
    const size_t item = dtype == EVENSONG_FLOAT32 || dtype == EVENSONG_INT32 ? 4 : 1;
    double largest = 1;
    if (!actual) return;
    if (bytes != size) {
        fail(what, which, (double)size, (double)bytes);
        return;
    }
    for (size_t i = 0; tolerance > 0 && i < bytes / item; ++i) {
        const double magnitude = fabs(element(expected, i));
        if (isfinite(magnitude) && magnitude > largest) largest = magnitude;
    }
    for (size_t i = 0; i < bytes / item; ++i) {
        if (memcmp(actual + item * i, expected + item * i, item) == 0) continue;
        const double got = as_number(dtype, actual, i), wanted = as_number(dtype, expected, i);
        if (isnan(got) && isnan(wanted)) continue;
        if (tolerance > 0 && fabs(got - wanted) <= tolerance * largest) continue;
        fail(what, which, got, wanted);
        return; /* the first element says enough */
    }
}

/* --------------------------------------------------------------------------------------------------------- running */

static void run_once(reader* r, evensong_engine* engine, uint32_t which) {
    const uint32_t program = (uint32_t)number(r, 4), batch = (uint32_t)number(r, 4);
    evensong_options options = {0};
    options.learning_rate = real(r);
    options.step = number(r, 8);
    options.seed = number(r, 8);
    const evensong_status wanted = (evensong_status)number(r, 4);
    evensong_buffer inputs[MOST_PORTS], outputs[MOST_PORTS];
    char message[200];

    const uint32_t input_count = (uint32_t)number(r, 1);
    for (uint32_t i = 0; i < input_count; ++i) {
        inputs[i].size = (size_t)number(r, 4);
        inputs[i].data = copy(take(r, inputs[i].size), inputs[i].size);
    }
    const uint32_t output_count = evensong_port_count(engine, program, 1);
    unsigned char* guarded[MOST_PORTS];
    for (uint32_t i = 0; i < output_count; ++i) {
        outputs[i].size = evensong_port_bytes(engine, program, 1, i, batch);
        guarded[i] = (unsigned char*)malloc(outputs[i].size + 2 * GUARD);
        if (!guarded[i]) give_up("no memory");
        memset(guarded[i], CANARY, outputs[i].size + 2 * GUARD);
        outputs[i].data = guarded[i] + GUARD;
    }

    const evensong_status status = evensong_run(engine, program, batch, inputs, input_count, outputs, output_count,
                                                &options, message, sizeof message);
    ++runs;
    if (status != wanted) fail("status of run", which, status, wanted);
    if (status != EVENSONG_OK && !message[0]) fail("message of run", which, 0, 1);
    const uint32_t results = (uint32_t)number(r, 1);
    for (uint32_t i = 0; i < results; ++i) {
        compare(r, "output", i, status == EVENSONG_OK ? (unsigned char*)outputs[i].data : NULL, outputs[i].size);
    }
    for (uint32_t i = 0; i < output_count; ++i) {
        for (size_t k = 0; k < GUARD; ++k) {
            if (guarded[i][k] != CANARY || guarded[i][GUARD + outputs[i].size + k] != CANARY) {
                fail("bytes around output", i, 0, 1);
                break;
            }
        }
        free(guarded[i]);
    }
    for (uint32_t i = 0; i < input_count; ++i) free(inputs[i].data);
}

/* Everything behind the artifact. */
static void run_all(reader* r, evensong_engine* engine) {
    size_t state_bytes, slot_bytes;
    const uint32_t run_count = (uint32_t)number(r, 2);
    for (uint32_t i = 0; i < run_count; ++i) run_once(r, engine, i);
    const unsigned char* state = (const unsigned char*)evensong_state(engine, &state_bytes);
    const unsigned char* slots = (const unsigned char*)evensong_slots(engine, &slot_bytes);
    const uint32_t places = (uint32_t)number(r, 2);
    for (uint32_t i = 0; i < places; ++i) {
        const int is_state = number(r, 1) == 1;
        const size_t offset = (size_t)number(r, 8), size = is_state ? state_bytes : slot_bytes;
        reader peek = *r;
        take(&peek, 5);
        const size_t bytes = (size_t)number(&peek, 4);
        if (offset > size || bytes > size - offset) give_up("a place outside its region");
        compare(r, is_state ? "place in state" : "place in slots", i, (is_state ? state : slots) + offset, bytes);
    }
}

static void run_case(reader* r, const char* instruction_set) {
    char name[256] = "", message[200];
    const size_t length = (size_t)number(r, 2);
    const unsigned char* text = take(r, length);
    memcpy(name, text, length < 255 ? length : 255);
    current = name;
    ++cases;
    const evensong_status wanted = (evensong_status)number(r, 4);
    const size_t size = (size_t)number(r, 4);
    void* artifact = copy(take(r, size), size);
    const reader rest = *r;

    evensong_engine* engine = NULL;
    evensong_status status = evensong_open_on(instruction_set, artifact, size, 0, &engine, message, sizeof message);
    if (status != wanted) {
        printf("%s\n", message);
        fail("status of opening", 0, status, wanted);
        exit(1);
    }
    if (status != EVENSONG_OK) {
        take(r, 4); /* neither runs nor places */
        free(artifact);
        return;
    }
    run_all(r, engine);
    evensong_close(engine);

    size_t needed = 0;
    *r = rest;
    if (evensong_memory_needed(artifact, size, 0, &needed, message, sizeof message) != EVENSONG_OK) give_up(message);
    unsigned char* memory = (unsigned char*)malloc(needed + 128);
    if (!memory) give_up("no memory");
    unsigned char* start = memory + (64 - (uintptr_t)memory % 64);
    memset(start, CANARY, needed + 1);
    status = evensong_open_in(start, needed, instruction_set, artifact, size, 0, &engine, message, sizeof message);
    if (status != EVENSONG_OK) give_up(message);
    free(artifact); /* not borrowed: the engine has what it needs */
    run_all(r, engine);
    if (evensong_memory_bytes(engine) > needed || start[needed] != CANARY) fail("bytes behind the memory", 0, 0, 1);
    evensong_close(engine);
    free(memory);
}

static void run_file(const char* path, const char* instruction_set) {
    FILE* file = fopen(path, "rb");
    if (!file) give_up(path);
    fseek(file, 0, SEEK_END);
    const long size = ftell(file);
    rewind(file);
    unsigned char* bytes = (unsigned char*)malloc(size > 0 ? (size_t)size : 1);
    if (!bytes || fread(bytes, 1, (size_t)size, file) != (size_t)size) give_up(path);
    fclose(file);
    reader r = {bytes, bytes + size};
    current = path;
    if (memcmp(take(&r, 4), "EVGC", 4) != 0 || number(&r, 4) != 1) give_up("not a golden file of this version");
    for (uint32_t left = (uint32_t)number(&r, 4); left > 0; --left) run_case(&r, instruction_set);
    if (r.next != r.end) give_up("bytes are left over");
    current = "";
    free(bytes);
}

int main(int count, char** arguments) {
    const char* instruction_set = NULL;
    int first = 1;
    if (count > 2 && strcmp(arguments[1], "--instruction-set") == 0) {
        instruction_set = arguments[2];
        first = 3;
    }
    if (evensong_abi_version() != EVENSONG_ABI_VERSION) give_up("the library is another version than its header");
    for (int i = first; i < count; ++i) run_file(arguments[i], instruction_set);
    printf("%s: %d cases, %d runs, %d failures\n", instruction_set ? instruction_set : evensong_instruction_set(),
           cases, runs, failures);
    return failures || !cases ? 1 : 0;
}
