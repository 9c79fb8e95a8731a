/* What the engine uses of <stdlib.h>, for compilers that come without headers. */
#pragma once
#include <stddef.h>

extern "C" {
void* calloc(size_t count, size_t size);
void free(void* memory);
}
