/* What the engine uses of <stdio.h>, for targets without a C library. */
#pragma once
#include <stdarg.h>
#include <stddef.h>

extern "C" {
int snprintf(char* text, size_t capacity, const char* format, ...);
int vsnprintf(char* text, size_t capacity, const char* format, va_list arguments);
}
