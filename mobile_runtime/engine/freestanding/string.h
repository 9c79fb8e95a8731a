/* What the engine uses of <string.h>, for targets without a C library. */
#pragma once
#include <stddef.h>

extern "C" {
void* memcpy(void* to, const void* from, size_t size);
void* memmove(void* to, const void* from, size_t size);
void* memset(void* to, int value, size_t size);
int memcmp(const void* a, const void* b, size_t size);
int strcmp(const char* a, const char* b);
}
