// Every kernel of one instruction set in one table; with EVENSONG_DENSE_ONLY those whose time goes into matrix
// products.
#include "kernel.hpp"
#include "vec.hpp"

namespace evensong {
namespace EVENSONG_ISA {

void register_linear(Kernel* table);
void register_conv(Kernel* table);
void register_sequence(Kernel* table);
void register_conv_weight(Kernel* table);
void register_pool(Kernel* table);
void register_norm(Kernel* table);
void register_elementwise(Kernel* table);
void register_move(Kernel* table);
void register_loss(Kernel* table);
void register_optimizer(Kernel* table);
void register_int8(Kernel* table);
void register_int8_train(Kernel* table);
void register_int8_gradient(Kernel* table);
void register_input(Kernel* table);

void register_all(Kernel* table);
bool all_finite(const float* values, size_t count);

void register_all(Kernel* table) {
    register_linear(table);
    register_conv(table);
    register_conv_weight(table);
    register_int8(table);
    register_int8_gradient(table);
#ifndef EVENSONG_DENSE_ONLY
    register_sequence(table);
    register_pool(table);
    register_norm(table);
    register_elementwise(table);
    register_move(table);
    register_loss(table);
    register_optimizer(table);
    register_int8_train(table);
    register_input(table);
#endif
}

// x * 0 is zero for every finite x, and NaN for every other.
bool all_finite(const float* values, size_t count) {
    Floats sums[4] = {};
    size_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
        EVENSONG_UNROLL
        for (size_t j = 0; j < 4; ++j) sums[j] += load(values + i + j * kLanes) * 0.0f;
    }
    for (; i < count; i += kLanes) sums[0] += load_upto(values + i, count - i) * 0.0f;
    return sum_lanes(sums[0] + sums[1] + sums[2] + sums[3]) == 0.0f;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
