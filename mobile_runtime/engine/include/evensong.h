/* The C face of the engine: load an artifact, run its programs. Format: docs/artifact.md; how to link: docs/targets.md;
 * an example: mobile_runtime/examples/c/.
 *
 * Ownership
 * - Memory comes from calloc, in evensong_open alone, or wholly from you (evensong_open_in). No other function
 *   allocates.
 * - The engine keeps no pointer of yours after a call returns, with two exceptions: the artifact's bytes under
 *   EVENSONG_BORROW, and the memory of evensong_open_in, both until evensong_close.
 * - Pointers that you get (names, evensong_state, evensong_slots) are valid until evensong_close.
 *
 * Errors
 * - Every function that can fail returns an evensong_status. On failure it writes one sentence, zero-terminated and cut
 *   to `message_capacity`, into `message` (which may be NULL) and changes nothing else; evensong_run says below what
 *   a run that fails half-way leaves behind.
 * - The artifact may be hostile. evensong_open refuses every artifact that could make a kernel leave its memory. Every
 *   other pointer must be what this header says: a wrong one is undefined behaviour.
 *
 * Threads
 * - An engine may be used by one thread at a time; two engines share nothing. There is no global state.
 *
 * Versions
 * - EVENSONG_ABI_VERSION changes with every change of this header that a compiled program could notice. A library that
 *   may be another than the one you compiled against must be asked first: evensong_abi_version.
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

#define EVENSONG_ABI_VERSION 3

enum { EVENSONG_MAX_RANK = 6 }; /* dimensions of a tensor */

typedef struct evensong_engine evensong_engine;

typedef enum evensong_status {
    EVENSONG_OK = 0,
    EVENSONG_CORRUPT = 1,  /* the bytes are damaged: length, magic or checksum */
    EVENSONG_ARTIFACT = 2, /* whole, but breaks a rule of the format, or needs another version of the engine */
    EVENSONG_PROGRAM = 3,  /* an operation's operands do not fit it */
    EVENSONG_ARGUMENT = 4, /* the caller's mistake: wrong program, batch, buffer size or alignment */
    EVENSONG_EXAMPLE = 5,  /* a label or an embedding id is out of range, or an input is not finite */
    EVENSONG_DIVERGED = 6, /* a loss, a gradient or an updated weight is NaN or infinite */
    EVENSONG_MEMORY = 7    /* the system has no memory left, or the caller gave too little */
} evensong_status;

/* Element types, as in the artifact. */
typedef enum evensong_dtype {
    EVENSONG_FLOAT32 = 1,
    EVENSONG_INT8 = 2,
    EVENSONG_UINT8 = 3,
    EVENSONG_INT32 = 4
} evensong_dtype;

/* EVENSONG_ABI_VERSION of the library; refuse to call anything else when it differs from yours. */
EVENSONG_API uint32_t evensong_abi_version(void);

/* The best instruction set of this CPU that the library has kernels for: "avx512", "avx2", "sse2", "dotprod", "neon",
 * ... */
EVENSONG_API const char* evensong_instruction_set(void);

/* ---------------------------------------------------------------------------------------------- opening and closing */

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

/* The same in memory of yours: `memory` starts at a multiple of 64 and has at least evensong_memory_needed bytes, which
 * the engine owns until evensong_close. `instruction_set` is NULL for the best. A library built with EVENSONG_NO_HEAP
 * has only this way and needs no malloc. */
EVENSONG_API evensong_status evensong_open_in(void* memory, size_t memory_size, const char* instruction_set,
                                              const void* bytes, size_t size, uint32_t flags, evensong_engine** engine,
                                              char* message, size_t message_capacity);

/* Bytes that evensong_open_in will ask for, with the same flags, on this platform. It checks the artifact's length and
 * checksum, but nothing else: of an artifact that evensong_open_in will refuse, the number means nothing. */
EVENSONG_API evensong_status evensong_memory_needed(const void* bytes, size_t size, uint32_t flags, size_t* needed,
                                                    char* message, size_t message_capacity);

/* Frees everything. After evensong_open_in there is nothing to free, but the memory is yours again. NULL is allowed. */
EVENSONG_API void evensong_close(evensong_engine* engine);

/* The artifact's manifest, JSON in UTF-8 without a zero at the end: model, task, labels (docs/artifact.md). It points
 * into `bytes`; no engine is needed. */
EVENSONG_API evensong_status evensong_manifest(const void* bytes, size_t size, const char** manifest,
                                               size_t* manifest_size, char* message, size_t message_capacity);

/* ----------------------------------------------------------------------------------------------------------- memory */

typedef struct evensong_memory {
    /* What the artifact declares, in bytes: `evensong compile --show-memory` prints the same. */
    size_t constants;  /* frozen weights; not held by the engine under EVENSONG_BORROW */
    size_t state;      /* variables */
    size_t slots;      /* optimiser state */
    size_t arena;      /* scratch for tensors: the largest of any program */
    size_t workspace;  /* scratch for packed operands: the largest of any program */
    size_t statistics; /* a second copy of running statistics, to undo a step that diverges */
    /* What comes on top: the engine itself and its description of the programs. */
    size_t description;
} evensong_memory;

EVENSONG_API void evensong_memory_info(const evensong_engine* engine, evensong_memory* memory);

/* Bytes that the engine holds: all of the above, rounded up to multiples of 64. Runs use no other memory but less than
 * 32 KB of stack. */
EVENSONG_API size_t evensong_memory_bytes(const evensong_engine* engine);

/* The live STATE region (variables) and SLOTS region (optimiser state); the caller may read and write them between
 * runs. A checkpoint is a copy of both and the number of steps done. */
EVENSONG_API void* evensong_state(evensong_engine* engine, size_t* size);
EVENSONG_API void* evensong_slots(evensong_engine* engine, size_t* size);

/* --------------------------------------------------------------------------------------------------------- programs */

/* Programs are numbered from 0. `predict` takes the model's inputs and gives its output; `evaluate` and `train` take
 * the inputs and then the target, and give `loss` (one float32) and `correct` (one int32). */
EVENSONG_API uint32_t evensong_program_count(const evensong_engine* engine);

/* The index of a program by its name, or -1. */
EVENSONG_API int32_t evensong_find_program(const evensong_engine* engine, const char* name);

typedef struct evensong_program {
    const char* name; /* UTF-8 */
    uint32_t max_batch;
    uint32_t inputs, outputs; /* number of ports */
    size_t arena_bytes, workspace_bytes;
} evensong_program;

/* EVENSONG_ARGUMENT if there is no such program. */
EVENSONG_API evensong_status evensong_program_info(const evensong_engine* engine, uint32_t program,
                                                   evensong_program* info);

/* The most examples that a program takes in one run, or 0 if there is no such program. */
EVENSONG_API uint32_t evensong_max_batch(const evensong_engine* engine, uint32_t program);

typedef struct evensong_port {
    const char* name; /* UTF-8 */
    evensong_dtype dtype;
    int32_t batched; /* 1: `dims` are those of one example, and several lie one behind the other; 0: of the whole */
    uint32_t rank;
    uint32_t dims[EVENSONG_MAX_RANK]; /* row-major; images are [height, width, channels] behind the batch */
    float scale;                      /* of int8 values: real = (stored - zero_point) * scale */
    int32_t zero_point;
} evensong_port;

/* An input port, or with `output` not 0 an output port. EVENSONG_ARGUMENT if there is none. */
EVENSONG_API evensong_status evensong_port_info(const evensong_engine* engine, uint32_t program, int32_t output,
                                                uint32_t port, evensong_port* info);

/* Number of input or output ports of a program, and the bytes of one of them for `batch` examples; 0 if there is none.
 */
EVENSONG_API uint32_t evensong_port_count(const evensong_engine* engine, uint32_t program, int32_t output);
EVENSONG_API size_t evensong_port_bytes(const evensong_engine* engine, uint32_t program, int32_t output, uint32_t port,
                                        uint32_t batch);

/* -------------------------------------------------------------------------------------------------------- variables */

/* Variables are numbered from 0, in the artifact's order, and have the names and shapes of the author's model. */
EVENSONG_API uint32_t evensong_variable_count(const evensong_engine* engine);

/* The index of a variable by its name, or -1. */
EVENSONG_API int32_t evensong_find_variable(const evensong_engine* engine, const char* name);

typedef struct evensong_variable {
    const char* name; /* UTF-8 */
    evensong_dtype dtype;
    int32_t trainable; /* 1: an optimiser updates it; 0: running statistics */
    uint32_t rank;
    uint32_t dims[EVENSONG_MAX_RANK]; /* of the author's array, row-major */
    size_t bytes;
} evensong_variable;

/* EVENSONG_ARGUMENT if there is no such variable. */
EVENSONG_API evensong_status evensong_variable_info(const evensong_engine* engine, uint32_t variable,
                                                    evensong_variable* info);

/* Copies a variable from and to an array of yours in the author's layout; `size` is exactly its `bytes`. Values are
 * taken as they are. */
EVENSONG_API evensong_status evensong_read_variable(const evensong_engine* engine, uint32_t variable, void* data,
                                                    size_t size, char* message, size_t message_capacity);
EVENSONG_API evensong_status evensong_write_variable(evensong_engine* engine, uint32_t variable, const void* data,
                                                     size_t size, char* message, size_t message_capacity);

/* The optimiser leaves these variables alone from now on; replaces the earlier choice. Indices are the artifact's
 * order. */
EVENSONG_API evensong_status evensong_freeze(evensong_engine* engine, const uint32_t* variables, size_t count,
                                             char* message, size_t message_capacity);

/* ---------------------------------------------------------------------------------------------------------- running */

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
