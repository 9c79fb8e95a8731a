/* The C face of the engine: load an artifact, run its programs. Format: docs/artifact.md.
 *
 * Rules
 * - Nothing here allocates but evensong_open; nothing here keeps a pointer of yours after it returns, with one
 * exception: the artifact's bytes under EVENSONG_BORROW.
 * - Every function that can fail returns an evensong_status. On failure it writes one sentence, zero-terminated and cut
 *   to `message_capacity`, into `message` (which may be NULL) and changes nothing else.
 * - An engine may be used by one thread at a time; two engines share nothing.
 * - The artifact may be hostile. evensong_open refuses every artifact that could make a kernel leave its memory.
 */
#ifndef EVENSONG_H
#define EVENSONG_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EVENSONG_API __declspec(dllexport)
#else
#define EVENSONG_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define EVENSONG_ABI_VERSION 2

typedef struct evensong_engine evensong_engine;

typedef enum evensong_status {
    EVENSONG_OK = 0,
    EVENSONG_CORRUPT = 1,  /* the bytes are damaged: length, magic or checksum */
    EVENSONG_ARTIFACT = 2, /* whole, but breaks a rule of the format, or needs another version of the engine */
    EVENSONG_PROGRAM = 3,  /* an operation's operands do not fit it */
    EVENSONG_ARGUMENT = 4, /* the caller's mistake: wrong program, batch, buffer size or alignment */
    EVENSONG_EXAMPLE = 5,  /* a label or an embedding id is out of range, or an input is not finite */
    EVENSONG_DIVERGED = 6, /* a loss, a gradient or an updated weight is NaN or infinite */
    EVENSONG_MEMORY = 7    /* the system has no memory left */
} evensong_status;

/* EVENSONG_ABI_VERSION of the library; refuse to call anything else when it differs from yours. */
EVENSONG_API uint32_t evensong_abi_version(void);

/* The best instruction set of this CPU that the library has kernels for: "avx512", "avx2", "sse2", "neon", ... */
EVENSONG_API const char* evensong_instruction_set(void);

enum {
    EVENSONG_BORROW = 1 /* keep using the constants inside `bytes`: they must stay unchanged until evensong_close, and
                           start at a multiple of 64. Otherwise the engine copies what it needs and the bytes may go. */
};

/* Checks an artifact and allocates all that its programs will ever need. On success *engine must go to evensong_close.
 */
EVENSONG_API evensong_status evensong_open(const void* bytes, size_t size, uint32_t flags, evensong_engine** engine,
                                           char* message, size_t message_capacity);

/* As evensong_open, on the named instruction set (for tests); NULL takes the best. A set that this CPU lacks is
 * refused. */
EVENSONG_API evensong_status evensong_open_on(const char* instruction_set, const void* bytes, size_t size,
                                              uint32_t flags, evensong_engine** engine, char* message,
                                              size_t message_capacity);

/* Frees everything, also the memory that the functions below point to. NULL is allowed. */
EVENSONG_API void evensong_close(evensong_engine* engine);

/* Bytes that the engine holds: what the artifact declares, plus its description of the programs. */
EVENSONG_API size_t evensong_memory_bytes(const evensong_engine* engine);

/* The live STATE region (variables) and SLOTS region (optimiser state); the caller may read and write them between
 * runs. */
EVENSONG_API void* evensong_state(evensong_engine* engine, size_t* size);
EVENSONG_API void* evensong_slots(evensong_engine* engine, size_t* size);

/* The index of a program by its name, or -1. */
EVENSONG_API int32_t evensong_find_program(const evensong_engine* engine, const char* name);

/* The most examples that a program takes in one run, or 0 if there is no such program. */
EVENSONG_API uint32_t evensong_max_batch(const evensong_engine* engine, uint32_t program);

/* Number of input or output ports of a program, and the bytes of one of them for `batch` examples; 0 if there is none.
 */
EVENSONG_API uint32_t evensong_port_count(const evensong_engine* engine, uint32_t program, int32_t output);
EVENSONG_API size_t evensong_port_bytes(const evensong_engine* engine, uint32_t program, int32_t output, uint32_t port,
                                        uint32_t batch);

/* The optimiser leaves these variables alone from now on; replaces the earlier choice. Indices are the artifact's
 * order. */
EVENSONG_API evensong_status evensong_freeze(evensong_engine* engine, const uint32_t* variables, size_t count,
                                             char* message, size_t message_capacity);

typedef struct evensong_buffer {
    void* data;  /* aligned for its element type; inputs are only read */
    size_t size; /* in bytes, exactly evensong_port_bytes */
} evensong_buffer;

enum {
    EVENSONG_CHECK_INPUTS = 1 /* refuse float32 inputs that hold NaN or infinity, before anything runs */
};

typedef struct evensong_options {
    float learning_rate; /* finite and >= 0; only training programs look at it */
    uint32_t flags;      /* EVENSONG_CHECK_INPUTS or 0 */
    uint64_t step;       /* of the optimiser, from 1 */
    uint64_t seed;       /* drives dropout together with `step` */
} evensong_options;

/* Runs one program on `batch` examples, 1 <= batch <= evensong_max_batch. Output buffers overlap no other buffer.
 *
 * On EVENSONG_EXAMPLE, and on EVENSONG_DIVERGED because of the loss, variables and optimiser state are as before the
 * run, provided that the program updates nothing before its loss (programs from evensong.mobile_runtime.compile are
 * like that). A gradient that overflows although the loss was finite, or an updated weight that leaves the range of
 * float32, may be found after other weights were updated, since updates stand between the operations of the backward
 * pass: restore your copy of STATE and SLOTS then. To tell the two apart, set the loss's output to NaN before the run:
 * it is finite afterwards only if the loss was. All other output buffers hold anything. */
EVENSONG_API evensong_status evensong_run(evensong_engine* engine, uint32_t program, uint32_t batch,
                                          const evensong_buffer* inputs, uint32_t input_count,
                                          const evensong_buffer* outputs, uint32_t output_count,
                                          const evensong_options* options, char* message, size_t message_capacity);

#ifdef __cplusplus
}
#endif

#endif
