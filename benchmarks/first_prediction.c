/* Start to first prediction: first_prediction ARTIFACT prints the milliseconds from main() to the first prediction;
 * first_prediction ARTIFACT RUNS starts itself so many times and prints the least of those, and the least wall time
 * from before a process starts until after it has ended. */
#define _POSIX_C_SOURCE 200809L
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "evensong.h"

extern char** environ;

static double milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

static void* buffer(size_t size) {
    void* memory = calloc(1, size);
    if (!memory) abort();
    return memory;
}

static double predict(const char* path) {
    const double start = milliseconds();
    FILE* file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) abort();
    const size_t size = (size_t)ftell(file);
    rewind(file);
    void* bytes = buffer(size);
    if (fread(bytes, 1, size, file) != size) abort();

    evensong_engine* engine;
    if (evensong_open(bytes, size, 0, &engine, NULL, 0)) abort();
    const uint32_t program = (uint32_t)evensong_find_program(engine, "predict");
    evensong_buffer input = {0}, output = {0};
    input.size = evensong_port_bytes(engine, program, 0, 0, 1);
    output.size = evensong_port_bytes(engine, program, 1, 0, 1);
    input.data = buffer(input.size);
    output.data = buffer(output.size);
    const evensong_options options = {.step = 1};
    if (evensong_run(engine, program, 1, &input, 1, &output, 1, &options, NULL, 0)) abort();
    return milliseconds() - start;
}

int main(int count, char** arguments) {
    if (count < 3) {
        printf("%.4f\n", predict(arguments[1]));
        return 0;
    }
    double least_inside = 1e9, least_outside = 1e9;
    for (int runs = atoi(arguments[2]); runs > 0; --runs) {
        char text[32] = "";
        char* child_arguments[] = {arguments[0], arguments[1], NULL};
        int ends[2], status;
        pid_t child;
        posix_spawn_file_actions_t actions;
        if (pipe(ends)) abort();
        posix_spawn_file_actions_init(&actions);
        posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
        const double start = milliseconds();
        if (posix_spawn(&child, arguments[0], &actions, NULL, child_arguments, environ)) abort();
        if (waitpid(child, &status, 0) != child || status) abort();
        const double outside = milliseconds() - start;
        if (read(ends[0], text, sizeof text - 1) <= 0) abort();
        const double inside = atof(text);
        close(ends[0]);
        close(ends[1]);
        posix_spawn_file_actions_destroy(&actions);
        least_inside = inside < least_inside ? inside : least_inside;
        least_outside = outside < least_outside ? outside : least_outside;
    }
    printf("%.4f %.4f\n", least_inside, least_outside);
    return 0;
}
