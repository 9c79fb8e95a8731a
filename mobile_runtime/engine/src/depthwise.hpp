// Depthwise convolution: every channel has its own kernel, so vectors run over channels and there is no matrix product.
#pragma once

#include "patches.hpp"

namespace evensong {
namespace EVENSONG_ISA {

// `memory` holds workspace::depthwise_elements() of the grid.
void depthwise_forward(const Convolution& conv, const float* x, const float* w, Epilogue epilogue, float* y,
                       float* memory);
// For the input's pixels of one phase of the stride, see backward_axis(); some taps meet them.
void depthwise_grad_input(const Convolution& conv, const Axis& h, const Axis& w, const float* dy, const float* weights,
                          const Target& target, float* memory);
void depthwise_grad_weight(const Convolution& conv, const float* dy, const float* x, float* dw, float* memory);

}  // namespace EVENSONG_ISA
}  // namespace evensong
