// The little of a C library that the engine needs, for targets without one: WebAssembly.
//
// vsnprintf knows what the engine's messages use: %s, %u, %zu, %llu, %08x and %%.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

namespace {

struct Text {
    char* data;
    size_t capacity, size = 0;

    void add(char c) {
        if (size + 1 < capacity) data[size] = c;
        ++size;
    }
    void add(uint64_t value, uint32_t base, uint32_t least_digits) {
        char digits[20];
        uint32_t count = 0;
        do {
            digits[count++] = "0123456789abcdef"[value % base];
            value /= base;
        } while (value || count < least_digits);
        while (count) add(digits[--count]);
    }
};

}  // namespace

extern "C" {

int vsnprintf(char* text, size_t capacity, const char* format, va_list arguments) {
    Text out = {text, capacity};
    for (; *format; ++format) {
        if (*format != '%') {
            out.add(*format);
            continue;
        }
        const char* start = ++format;
        while (*format == 'l' || *format == 'z' || *format == '0' || *format == '8') ++format;
        const bool is_long_long = format - start == 2 && *start == 'l', is_size = *start == 'z';
        if (*format == 's') {
            for (const char* s = va_arg(arguments, const char*); *s; ++s) out.add(*s);
        } else if (*format == 'u' || *format == 'x') {
            const uint64_t value = is_long_long ? va_arg(arguments, unsigned long long)
                                   : is_size    ? va_arg(arguments, size_t)
                                                : va_arg(arguments, unsigned);
            out.add(value, *format == 'x' ? 16 : 10, *start == '0' ? 8 : 1);
        } else {
            out.add(*format);
        }
    }
    if (capacity) text[out.size < capacity ? out.size : capacity - 1] = 0;
    return int(out.size);
}

int snprintf(char* text, size_t capacity, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int size = vsnprintf(text, capacity, format, arguments);
    va_end(arguments);
    return size;
}

// The compiler makes one instruction of each: these are for calls by name.
void* memcpy(void* to, const void* from, size_t size) { return __builtin_memcpy(to, from, size); }
void* memmove(void* to, const void* from, size_t size) { return __builtin_memmove(to, from, size); }
void* memset(void* to, int value, size_t size) { return __builtin_memset(to, value, size); }

int memcmp(const void* a, const void* b, size_t size) {
    const unsigned char *left = static_cast<const unsigned char*>(a), *right = static_cast<const unsigned char*>(b);
    for (size_t i = 0; i < size; ++i) {
        if (left[i] != right[i]) return left[i] - right[i];
    }
    return 0;
}

int strcmp(const char* a, const char* b) {
    while (*a && *a == *b) ++a, ++b;
    return static_cast<unsigned char>(*a) - static_cast<unsigned char>(*b);
}

}  // extern "C"
