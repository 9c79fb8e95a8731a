// Does each operation fit its operands? One row of a table per operation, read by one small interpreter.
//
// A rule such as "f*MI fOI fO? > f*MO | a" says: the first input is float32, its last dimension is I and the product of
// the others is M; the second is [O, I]; the third, if there, is [O]; the output is [..., O] with the same product M;
// the attribute is an activation. Every letter stands for one size in the whole rule, together with whether that size
// shrinks with the batch, so that what fits for max_batch fits for every smaller batch. The grammar:
//
//   operand    dtype, then its shape, then ? if optional;  dtype: f float32, b int8, u uint8, i int32,
//              j uint8 or int32, v float32 or uint8, x any (all x of a rule agree)
//   shape      letters: the dimensions in turn;  *X in front: the product of the leading ones;  #X: the product of all;
//              #number: exactly so many elements
//   attribute  s 1..32768 (stride, dilation, kernel)   p 0..32768 (padding)   n any >= 0   . any   b 0 or 1   q int8
//              a fused activation   k activation   f finite

#include "model.hpp"
#include "opcodes.h"
#include "workspace.hpp"

namespace evensong {
namespace {

struct Size {
    uint64_t count = 0;  // 0: not bound yet
    bool batched = false;
};

// One operation under check.
struct Context {
    const Program& program;
    const Op& op;
    Size sizes[26];
    DType any_dtype;
    bool any_bound = false;

    Context(const Program& program, const Op& op) : program(program), op(op) {}
    const Tensor& operand(uint32_t index) const { return program.tensors[op.operands[index]]; }
    const Tensor& input(uint32_t index) const { return operand(index); }
    const Tensor& output(uint32_t index) const { return operand(op.inputs + index); }
    uint64_t operator[](char letter) const { return sizes[letter - 'A'].count; }
    bool batched(char letter) const { return sizes[letter - 'A'].batched; }
    int64_t attribute(uint32_t index) const { return op.attributes[index].i; }
};

// ------------------------------------------------------------------------------------------------- rules beyond
// letters Each returns what is wrong, or null.

using Check = const char* (*)(const Context&);

constexpr int64_t kMostCoordinate = 1 << 30;  // kernels compute coordinates in 32 bits

// P outputs of windows of `reach` inputs over H inputs.
bool coordinates_fit(uint64_t inputs, uint64_t outputs, int64_t reach, int64_t stride, int64_t padding) {
    return inputs < uint64_t(kMostCoordinate) && outputs < uint64_t(kMostCoordinate) &&
           int64_t(outputs) * stride + reach + padding < kMostCoordinate;
}

const char* check_convolution(const Context& c) {
    uint64_t groups = uint64_t(c.attribute(6));
    if (c['C'] != c['D'] * groups || c['O'] % groups) return "its groups do not divide its channels";
    int64_t reach_h = int64_t(c['K']) * c.attribute(4), reach_w = int64_t(c['L']) * c.attribute(5);
    if (c['K'] > 32768 || c['L'] > 32768 || !coordinates_fit(c['H'], c['P'], reach_h, c.attribute(0), c.attribute(2)) ||
        !coordinates_fit(c['W'], c['Q'], reach_w, c.attribute(1), c.attribute(3))) {
        return "its window is too large";
    }
    return nullptr;
}

const char* check_matmul(const Context& c) {
    int64_t transpose = c.attribute(0);
    uint64_t rows = c[transpose == 1 ? 'D' : 'C'], depth = c[transpose == 1 ? 'C' : 'D'];
    uint64_t columns = c[transpose == 2 ? 'E' : 'F'], other = c[transpose == 2 ? 'F' : 'E'];
    if (transpose > 2 || depth != other || rows != c['M'] || columns != c['N']) return "the matrices do not fit";
    for (const char* letter = "CDEFMN"; *letter; ++letter) {
        if (c.batched(*letter)) return "it goes over the batch";
    }
    return nullptr;
}

const char* check_pool(const Context& c) {
    for (int axis = 0; axis < 2; ++axis) {
        int64_t kernel = c.attribute(axis), stride = c.attribute(2 + axis), padding = c.attribute(4 + axis);
        uint64_t inputs = c[axis ? 'W' : 'H'], outputs = c[axis ? 'Q' : 'P'];
        if (!coordinates_fit(inputs, outputs, kernel, stride, padding)) return "its window is too large";
        if (2 * padding > kernel) return "its padding is more than half of its window";
        if (int64_t(outputs - 1) * stride - padding >= int64_t(inputs)) return "its last window lies outside the input";
    }
    bool is_gradient = c.op.code == op::MAX_POOL2D_GRAD || c.op.code == op::G_MAX_POOL2D;
    bool is_maximum = c.op.code == op::MAX_POOL2D || c.op.code == op::QMAX_POOL2D;
    if (is_gradient || (is_maximum && c.op.outputs == 2)) {
        const Tensor& index = is_maximum ? c.output(1) : c.input(1);
        bool small = c.attribute(0) * c.attribute(1) <= 256;
        if (index.dtype != (small ? DType::kU8 : DType::kI32)) return "its index has the wrong dtype";
    }
    return nullptr;
}

// R is a row that repeats within N, for every batch.
const char* check_row(const Context& c) {
    if (c['N'] == c['R'] && c.batched('N') == c.batched('R')) return nullptr;
    uint64_t unit = c.batched('N') ? c['N'] / c.program.max_batch : c['N'];
    return c.batched('R') || unit % c['R'] ? "the second operand is not a row of the first" : nullptr;
}

const char* check_recurrent(const Context& c) {
    uint64_t parts = c.op.code == op::GRU || c.op.code == op::GRU_GRAD ? 3 : 4;
    return c['G'] == parts * c['H'] ? nullptr : "its gates are not as many parts as they should be";
}

const char* check_layer_norm(const Context& c) {
    bool fits = c['N'] == c['R'] * c['G'] && c.batched('N') == c.batched('R') && !c.batched('G');
    return fits ? nullptr : "its rows do not fit gamma";
}

const char* check_group_norm(const Context& c) {
    return c['C'] % c['G'] == 0 ? nullptr : "its groups do not divide its channels";
}

const char* check_reduce(const Context& c) {
    uint64_t axis = uint64_t(c.attribute(0)), inner = uint64_t(c.attribute(1));
    if (!axis || !inner || c['R'] % inner || c['N'] != c['R'] * axis) return "its axis does not fit";
    if (c.batched('N') != c.batched('R')) return "only one side is batched";
    return c.batched('N') && c['R'] / inner % c.program.max_batch ? "it reduces over the batch" : nullptr;
}

const char* check_probability(const Context& c) {
    float p = c.op.attributes[0].f;
    return p >= 0 && p < 1 ? nullptr : "its probability is not in [0, 1)";
}

const char* check_mask(const Context& c) {
    if (c['B'] != (c['C'] + 7) / 8 || c.batched('B') || c.batched('C')) return "its mask has not one bit an element";
    bool wrong = c.op.code == op::ACTIVATION_MASK && c.attribute(0) == activation::NONE;
    return wrong ? "its activation has no mask" : nullptr;
}

const char* check_transpose(const Context& c) {
    const Tensor &x = c.input(0), &y = c.output(0);
    if (x.rank != y.rank || x.batched != y.batched) return "its ranks differ";
    uint32_t seen = 0;
    for (uint32_t axis = 0; axis < kMaxRank; ++axis) {
        int64_t from = c.attribute(axis);
        if (axis >= x.rank) {
            if (from != -1) return "unused places of its permutation are not -1";
            continue;
        }
        if (from < 0 || from >= int64_t(x.rank) || y.dims[axis] != x.dims[from]) return "its permutation does not fit";
        seen |= 1u << from;
    }
    if (seen != (1u << x.rank) - 1) return "its permutation takes an axis twice";
    return x.batched && c.attribute(0) != 0 ? "it moves the batch" : nullptr;
}

// `part` is `whole` but along `axis`.
bool differs_only_along(const Tensor& part, const Tensor& whole, int64_t axis) {
    if (part.rank != whole.rank || part.dtype != whole.dtype || part.batched != whole.batched) return false;
    if (axis >= int64_t(whole.rank) || (axis == 0 && whole.batched)) return false;
    for (int64_t i = 0; i < int64_t(whole.rank); ++i) {
        if (i != axis && part.dims[i] != whole.dims[i]) return false;
    }
    return true;
}

const char* check_concat(const Context& c) {
    int64_t axis = c.attribute(0);
    const Tensor& y = c.output(0);
    uint64_t joined = 0;
    for (uint32_t i = 0; i < c.op.inputs; ++i) {
        if (!differs_only_along(c.input(i), y, axis)) return "its parts do not fit";
        joined += c.input(i).dims[axis];
    }
    return joined == y.dims[axis] ? nullptr : "its parts do not add up";
}

const char* check_slice(const Context& c) {
    int64_t axis = c.attribute(0);
    bool gradient = c.op.code == op::SLICE_GRAD;
    const Tensor &part = gradient ? c.input(0) : c.output(0), &whole = gradient ? c.output(0) : c.input(0);
    if (!differs_only_along(part, whole, axis)) return "its part does not fit";
    return uint64_t(c.attribute(1)) + part.dims[axis] <= whole.dims[axis] ? nullptr : "it reaches past the end";
}

const char* check_quantized(const Context& c) {
    for (uint32_t i = 0; i < uint32_t(c.op.inputs) + c.op.outputs; ++i) {
        const Tensor& tensor = c.operand(i);
        if (tensor.dtype != DType::kI8) continue;
        if (tensor.zero_point < -128 || tensor.zero_point > 127) return "a zero point is not an int8";
        bool scale_counts = c.op.code == op::QUANTIZE || c.op.code == op::DEQUANTIZE;
        if (scale_counts &&
            !(tensor.scale > 0 && __builtin_isfinite(tensor.scale) && __builtin_isfinite(1 / tensor.scale))) {
            return "a scale is not positive and finite";
        }
    }
    return nullptr;
}

constexpr uint64_t kMostDepth = 1 << 16;  // products of two int8 that an int32 holds, and twice as many

const char* check_quantized_linear(const Context& c) {
    return c['I'] > kMostDepth ? "it adds up too many products for 32 bits" : check_quantized(c);
}

const char* check_quantized_convolution(const Context& c) {
    if (c['K'] * c['L'] * c['D'] > kMostDepth) return "it adds up too many products for 32 bits";
    const char* wrong = check_convolution(c);
    return wrong ? wrong : check_quantized(c);
}

const char* check_quantized_pool(const Context& c) {
    const char* wrong = check_pool(c);
    return wrong ? wrong : check_quantized(c);
}

const char* check_lookup(const Context& c) {
    if (c.op.inputs > 1 && c['T'] != 2) return "its table has not two columns";
    return c.attribute(1) && c.attribute(0) + c.attribute(1) <= int64_t(1) << 31 ? nullptr : "its bins are no ids";
}

const char* check_tokenize(const Context& c) {
    bool fits = c.attribute(2) <= 2 && c.attribute(3) >= 1 && c.attribute(3) <= 4;
    return fits ? nullptr : "it splits in an unknown way";
}

const char* check_resize(const Context& c) { return c.attribute(0) <= 2 ? nullptr : "its mode is unknown"; }

const char* check_crop(const Context& c) {
    bool fits = int64_t(c['P']) <= int64_t(c['H']) + 2 * c.attribute(1) &&
                int64_t(c['Q']) <= int64_t(c['W']) + 2 * c.attribute(2);
    return fits ? nullptr : "its window is larger than the image";
}

const char* check_byte_table(const Context& c) { return c['T'] == 256 ? nullptr : "its table has not 256 columns"; }

// Int8 training. Attributes that index the table of scales (T), or that of gradients (S), which has two entries each.
bool is_scale(const Context& c, uint32_t index) { return uint64_t(c.attribute(index)) < c['T']; }
bool is_gradient(const Context& c, uint32_t index) { return uint64_t(c.attribute(index)) < c['S'] / 2; }
constexpr const char* kOutsideTable = "an index lies outside its table";
constexpr const char* kTooManyProducts = "it adds up too many products for 32 bits";

const char* check_zero_points(const Context& c) {
    for (uint32_t i = 0; i < uint32_t(c.op.inputs) + c.op.outputs; ++i) {
        const Tensor& tensor = c.operand(i);
        if (tensor.dtype == DType::kI8 && (tensor.zero_point < -128 || tensor.zero_point > 127))
            return "a zero point is not an int8";
    }
    return nullptr;
}
const char* check_prepare(const Context& c) {
    if (!is_scale(c, 0) || !is_scale(c, 1)) return kOutsideTable;
    return c['I'] > kMostDepth ? kTooManyProducts : nullptr;
}
const char* check_observe(const Context& c) {
    if (!is_scale(c, 0)) return kOutsideTable;
    if (c.attribute(1) != 127 && c.attribute(1) != 255) return "its limit is neither 127 nor 255";
    return check_zero_points(c);
}
const char* check_scaled(const Context& c) { return is_scale(c, 0) ? check_zero_points(c) : kOutsideTable; }
const char* check_scaled_sum(const Context& c) {
    return is_scale(c, 0) && is_scale(c, 1) && is_scale(c, 2) ? check_zero_points(c) : kOutsideTable;
}
const char* check_gradient(const Context& c) { return is_gradient(c, 0) ? nullptr : kOutsideTable; }
const char* check_gradient_row(const Context& c) {
    return is_gradient(c, 0) && is_gradient(c, 1) ? check_row(c) : kOutsideTable;
}
const char* check_gradient_sum(const Context& c) {
    return is_gradient(c, 0) && is_gradient(c, 1) && is_gradient(c, 2) ? nullptr : kOutsideTable;
}
const char* check_bias_gradient(const Context& c) {
    if (!is_gradient(c, 0)) return kOutsideTable;
    return c['M'] > kMostDepth ? kTooManyProducts : nullptr;
}
const char* check_linear_input(const Context& c) {
    if (!is_gradient(c, 0) || !is_gradient(c, 1)) return kOutsideTable;
    return c['O'] > kMostDepth ? kTooManyProducts : nullptr;
}
const char* check_convolution_input(const Context& c) {
    if (!is_gradient(c, 7) || !is_gradient(c, 8)) return kOutsideTable;
    if (const char* wrong = check_convolution(c)) return wrong;
    return c['O'] * c['K'] * c['L'] > kMostDepth ? kTooManyProducts : nullptr;
}
const char* check_update(const Context& c, uint32_t from, uint64_t rows) {
    if (!is_gradient(c, from) || !is_scale(c, from + 1)) return kOutsideTable;
    if (rows > kMostDepth) return kTooManyProducts;
    if (c.op.inputs > 6 && c['R'] != c.input(0).elements) return "its residual does not fit the weight";
    return check_zero_points(c);
}
const char* check_linear_update(const Context& c) { return check_update(c, 0, c['M']); }
const char* check_convolution_update(const Context& c) {
    const char* wrong = check_convolution(c);
    return wrong ? wrong : check_update(c, 7, c['N'] * c['P'] * c['Q']);
}
const char* check_pool_gradient(const Context& c) {
    if (c.attribute(2) < c.attribute(0) || c.attribute(3) < c.attribute(1)) return "its windows overlap";
    return check_pool(c);
}

// ------------------------------------------------------------------------------------------------- workspace, in bytes

using Workspace = uint64_t (*)(const Context&);

uint64_t packed_panel(uint64_t depth) { return 4 * workspace::kPanel * workspace::smaller(depth, workspace::kDepth); }

uint64_t linear_workspace(const Context& c) { return c['M'] <= workspace::kDotRows ? 0 : packed_panel(c['I']); }
uint64_t linear_grad_input_workspace(const Context& c) { return packed_panel(c['O']); }
uint64_t linear_grad_weight_workspace(const Context& c) {
    return 4 * workspace::linear_grad_weight_elements(c['M'], c['O'], c['I']);
}

uint64_t recurrent_workspace(const Context& c) { return 4 * workspace::recurrent_elements(c['N'], c['G'], c['H']); }
uint64_t recurrent_grad_workspace(const Context& c) {
    return 4 * workspace::recurrent_grad_elements(c['N'], c['G'], c['H']);
}

uint64_t matmul_workspace(const Context& c) {
    return 4 * workspace::matmul_elements(c.attribute(0) == 1 ? c['C'] : c['D'], c['N'], c.attribute(0) == 2);
}
uint64_t attention_workspace(const Context& c) { return 4 * workspace::attention_elements(c['S'], c['D']); }
uint64_t attention_grad_workspace(const Context& c) {
    return 4 * workspace::attention_grad_elements(c['S'], c['D'], c['E']);
}

uint64_t group_norm_workspace(const Context& c) { return 4 * workspace::kChannelSums * c['C']; }

bool is_depthwise(const Context& c) { return c['D'] == 1 && uint64_t(c.attribute(6)) == c['O']; }

uint64_t depthwise_workspace(const Context& c, bool backward) {
    workspace::GridAxis axes[2];
    for (uint32_t i = 0; i < 2; ++i) {
        const uint64_t stride = uint64_t(c.attribute(i)), dilation = uint64_t(c.attribute(4 + i)), taps = c["KL"[i]];
        axes[i] = {c["PQ"[i]], stride, taps, dilation};
        if (!backward) continue;  // else the grid is that of the first phase of the stride
        const uint64_t common = workspace::greatest_common_divisor(stride, dilation);
        axes[i] = {(c["HW"[i]] + stride - 1) / stride, 1, workspace::phase_taps(taps, stride, dilation),
                   dilation / common};
    }
    return 4 * workspace::depthwise_elements(c['N'], c['O'], axes[0], axes[1]);
}

uint64_t patches_and_weights(uint64_t depth, uint64_t pixels, uint64_t columns) {
    return workspace::round_up(workspace::weight_elements(depth, columns), 64) +
           workspace::patch_elements(depth, pixels);
}

uint64_t convolution_workspace(const Context& c) {
    if (is_depthwise(c)) return depthwise_workspace(c, false);
    return 4 *
           patches_and_weights(c['K'] * c['L'] * c['D'], c['N'] * c['P'] * c['Q'], c['O'] / uint64_t(c.attribute(6)));
}
uint64_t quantized_convolution_workspace(const Context& c) {
    uint64_t depth = c['K'] * c['L'] * c['D'];
    if (is_depthwise(c)) return 4 * c['O'] * (depth + 1);
    return workspace::int8_product_bytes(depth, c['O'] / uint64_t(c.attribute(6)));
}

uint64_t phase_depth(const Context& c) {
    uint64_t taps = workspace::phase_taps(c['K'], uint64_t(c.attribute(0)), uint64_t(c.attribute(4))) *
                    workspace::phase_taps(c['L'], uint64_t(c.attribute(1)), uint64_t(c.attribute(5)));
    return taps * (c['O'] / uint64_t(c.attribute(6)));
}

uint64_t convolution_grad_input_workspace(const Context& c) {
    if (is_depthwise(c)) return depthwise_workspace(c, true);
    return 4 * patches_and_weights(phase_depth(c), c['N'] * c['H'] * c['W'], c['D']);
}

uint64_t convolution_grad_weight_workspace(const Context& c) {
    uint64_t depth = c['K'] * c['L'] * c['D'];
    if (is_depthwise(c)) return depthwise_workspace(c, false);
    return 4 * workspace::patch_elements(depth, c['N'] * c['P'] * c['Q']);
}

uint64_t int8_linear_input_workspace(const Context& c) { return workspace::int8_product_bytes(c['O'], c['I']); }
uint64_t int8_linear_update_workspace(const Context& c) { return workspace::gradient_step_bytes(c['O'], c['I']); }
uint64_t int8_convolution_input_workspace(const Context& c) {
    if (is_depthwise(c)) return 4 * c['O'] * c['K'] * c['L'];
    return workspace::int8_product_bytes(phase_depth(c), c['D']);
}
uint64_t int8_convolution_update_workspace(const Context& c) {
    if (is_depthwise(c)) return 4 * c['O'] * c['K'] * c['L'];
    return workspace::gradient_step_bytes(c['O'] / uint64_t(c.attribute(6)), c['K'] * c['L'] * c['D']);
}

uint64_t quantized_linear_workspace(const Context& c) { return workspace::int8_product_bytes(c['I'], c['O']); }

// ------------------------------------------------------------------------------------------------- the table

struct Rule {
    uint16_t code;
    char operands[64];
    Check check = nullptr;
    char work[8] = "";  // product of these sizes (digits: attributes) is the amount of work; else the elements
    Workspace workspace = nullptr;
};

constexpr Rule kRules[] = {
    {op::LINEAR, "f*MI fOI fO? > f*MO | a", nullptr, "MIO", linear_workspace},
    {op::LINEAR_GRAD_INPUT, "f*MO fOI > f*MI", nullptr, "MIO", linear_grad_input_workspace},
    {op::LINEAR_GRAD_WEIGHT, "f*MO f*MI > fOI fO?", nullptr, "MIO", linear_grad_weight_workspace},
    {op::ACTIVATION_MASK, "f*MC > u*MB | a", check_mask},
    {op::MASK_GRAD, "f*MC u*MB > f*MC", check_mask},
    {op::LINEAR_UPDATE, "fOI f*MO f*MI > | f", nullptr, "MIO", linear_grad_weight_workspace},
    {op::CONV2D, "fNHWC fOKLD fO? > fNPQO | ssppsssa", check_convolution, "NPQOKLD", convolution_workspace},
    {op::CONV2D_GRAD_INPUT, "fNPQO fOKLD > fNHWC | ssppsss", check_convolution, "NPQOKLD",
     convolution_grad_input_workspace},
    {op::CONV2D_GRAD_WEIGHT, "fNPQO fNHWC > fOKLD fO? | ssppsss", check_convolution, "NPQOKLD",
     convolution_grad_weight_workspace},
    {op::MATMUL, "f*BCD f*BEF > f*BMN | n", check_matmul, "BCDN", matmul_workspace},
    {op::ATTENTION, "fNTHD fNSHD fNSHE > fNTHE fNTH? | bf", nullptr, "NTSHD", attention_workspace},
    {op::ATTENTION_GRAD, "fNTHE fNTHD fNSHD fNSHE fNTH > fNTHD fNSHD fNSHE | bf", nullptr, "NTSHD",
     attention_grad_workspace},
    {op::MAX_POOL2D, "fNHWC > fNPQC jNPQC? | sssspp", check_pool, "NPQC01"},
    {op::MAX_POOL2D_GRAD, "fNPQC jNPQC > fNHWC | sssspp", check_pool},
    {op::AVG_POOL2D, "fNHWC > fNPQC | ssssppb", check_pool, "NPQC01"},
    {op::AVG_POOL2D_GRAD, "fNPQC > fNHWC | ssssppb", check_pool, "NPQC01"},
    {op::GRU, "fNTG fGH fG > fNTG fNTH | b", check_recurrent, "NTGH", recurrent_workspace},
    {op::GRU_GRAD, "fNTH fNTG fNTH fGH fG > fNTG fNTH fGH? fG? | b", check_recurrent, "NTGH", recurrent_grad_workspace},
    {op::LSTM, "fNTG fGH fG > fNTG fNTH | b", check_recurrent, "NTGH", recurrent_workspace},
    {op::LSTM_GRAD, "fNTH fNTG fNTH fGH > fNTG fNTH fGH? fG? | b", check_recurrent, "NTGH", recurrent_grad_workspace},
    {op::BATCH_NORM_TRAIN, "f*MC fC fC fC fC > f*MC fC fC | ff"},
    {op::BATCH_NORM_GRAD, "f*MC f*MC fC fC fC > f*MC fC fC"},
    {op::BATCH_NORM_EVAL, "f*MC fC fC fC fC > f*MC | f"},
    {op::BATCH_NORM_EVAL_GRAD, "f*MC f*MC fC fC fC > f*MC fC? fC? | f"},
    {op::LAYER_NORM, "f#N f#G f#G > f#N f#R f#R | f", check_layer_norm},
    {op::LAYER_NORM_GRAD, "f#N f#N f#G f#R f#R > f#N f#G f#G", check_layer_norm},
    {op::GROUP_NORM, "fNLC fC fC > fNLC fNG fNG | f", check_group_norm, "", group_norm_workspace},
    {op::GROUP_NORM_GRAD, "fNLC fNLC fC fNG fNG > fNLC fC fC", check_group_norm, "", group_norm_workspace},
    {op::RMS_NORM, "f#N f#G > f#N f#R | f", check_layer_norm},
    {op::RMS_NORM_GRAD, "f#N f#N f#G f#R > f#N f#G", check_layer_norm},
    {op::UNARY, "f#N > f#N | k"},
    {op::UNARY_GRAD, "f#N f#N > f#N | k"},
    {op::ADD, "f#N f#R > f#N", check_row},
    {op::SUB, "f#N f#R > f#N", check_row},
    {op::MUL, "f#N f#R > f#N", check_row},
    {op::SCALE, "f#N > f#N | ff"},
    {op::SUM_ROWS, "f#N > f#R", check_row},
    {op::REDUCE_MEAN, "f#N > f#R | nn", check_reduce},
    {op::REDUCE_MEAN_GRAD, "f#R > f#N | nn", check_reduce},
    {op::DROPOUT, "f#N > f#N u#N | f.", check_probability},
    {op::DROPOUT_GRAD, "f#N u#N > f#N | f", check_probability},
    {op::FILL, "> f#N | f"},
    {op::MAXIMUM, "f#N f#R > f#N", check_row},
    {op::MINIMUM, "f#N f#R > f#N", check_row},
    {op::STEP, "f#N f#R > f#N | f", check_row},
    {op::TRANSPOSE, "x#N > x#N | ......", check_transpose},
    {op::CONCAT, "x#A > x#N | n", check_concat},
    {op::SLICE, "x#A > x#N | nn", check_slice},
    {op::SLICE_GRAD, "x#N > x#A | nn", check_slice},
    {op::COPY, "x#N > x#N"},
    {op::EMBEDDING, "i#N fVD > f*ND"},
    {op::EMBEDDING_GRAD, "f*ND i#N > fVD"},
    {op::SOFTMAX, "f*MC > f*MC"},
    {op::SOFTMAX_GRAD, "f*MC f*MC > f*MC"},
    {op::LOG_SOFTMAX, "f*MC > f*MC"},
    {op::LOG_SOFTMAX_GRAD, "f*MC f*MC > f*MC"},
    {op::CROSS_ENTROPY, "f*MC i#M > f#1 i#1 f*MC?"},
    {op::MSE, "f#N f#N > f#1 i#1 f#N?"},
    {op::BCE_WITH_LOGITS, "f#N f#N > f#1 i#1 f#N?"},
    {op::SGD, "f#N f#N f#N? > | ffb"},
    {op::ADAM, "f#N f#N f#N f#N > | ffffb"},
    {op::QUANTIZE, "f#N > b#N", check_quantized},
    {op::DEQUANTIZE, "b#N > f#N", check_quantized},
    {op::QLINEAR, "b*MI bOI iO fO > b*MO | qq", check_quantized_linear, "MIO", quantized_linear_workspace},
    {op::QCONV2D, "bNHWC bOKLD iO fO > bNPQO | ssppsssqq", check_quantized_convolution, "NPQOKLD",
     quantized_convolution_workspace},
    {op::QADD, "b#N b#N > b#N | ffqq", check_quantized},
    {op::QMAX_POOL2D, "bNHWC > bNPQC jNPQC? | sssspp", check_quantized_pool, "NPQC01"},
    {op::QAVG_POOL2D, "bNHWC > bNPQC | ssssppbf", check_quantized_pool, "NPQC01"},
    {op::QLUT, "b#N b#256 > b#N"},
    {op::Q_PREPARE, "bOI fO f#T fO? > iO fO | nnq", check_prepare},
    {op::Q_OBSERVE, "b#N f#T > | nn", check_observe},
    {op::Q_ADAPT, "f#T f#T > | ff"},
    {op::Q_QUANTIZE, "f#N f#T > b#N | n", check_scaled},
    {op::Q_DEQUANTIZE, "b#N f#T > f#N | n", check_scaled},
    {op::Q_ADD, "b#N b#N f#T > b#N | nnnqq", check_scaled_sum},
    {op::G_QUANTIZE, "f#N f#S > b#N | n.", check_gradient},
    {op::G_DEQUANTIZE, "b#N f#S > f#N | n", check_gradient},
    {op::G_MASK, "b#N b#N > b#N | .."},
    {op::G_SCALE, "b#N f#R f#S > b#N | nn.", check_gradient_row},
    {op::G_ADD, "b#N b#N f#S > b#N | nnn.", check_gradient_sum},
    {op::G_BIAS, "b*MO fO f#S > fO | n", check_bias_gradient},
    {op::G_LINEAR_INPUT, "b*MO bOI f#S > b*MI | nn.", check_linear_input, "MIO", int8_linear_input_workspace},
    {op::G_CONV2D_INPUT, "bNPQO bOKLD f#S > bNHWC | ssppsssnn.", check_convolution_input, "NPQOKLD",
     int8_convolution_input_workspace},
    {op::G_LINEAR_UPDATE, "bOI b*MO b*MI fO f#T f#S b#R? > | nnf.", check_linear_update, "MIO",
     int8_linear_update_workspace},
    {op::G_CONV2D_UPDATE, "bOKLD bNPQO bNHWC fO f#T f#S b#R? > | ssppsssnnf.", check_convolution_update, "NPQOKLD",
     int8_convolution_update_workspace},
    {op::G_MAX_POOL2D, "bNPQC jNPQC > bNHWC | sssspp", check_pool_gradient},
    {op::CAST, "j#N > f#N"},
    {op::ONE_HOT, "i*MW > f*MC | .b"},
    {op::BUCKETIZE, "f#N fK > i#N | b"},
    {op::LOOKUP, "i#N iKT? > i#N | .n.", check_lookup},
    {op::TOKENIZE, "u*MB > i*MT | bbnn.", check_tokenize},
    {op::RESIZE2D, "vNHWC > fNPQC | n", check_resize},
    {op::RESIZE2D_GRAD, "fNPQC > fNHWC | n", check_resize},
    {op::CROP2D, "xNHWC > xNPQC | bppbb.", check_crop},
    {op::QLUT_U8, "u*MC bCT > b*MC", check_byte_table},
};

// ------------------------------------------------------------------------------------------------- the interpreter

bool is_letter(char c) { return c >= 'A' && c <= 'Z'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

bool bind(Context* c, char letter, uint64_t count, bool batched) {
    Size& size = c->sizes[letter - 'A'];
    if (!size.count) size = Size{count, batched};
    return size.count == count && size.batched == batched;
}

bool dtype_fits(Context* c, char expected, DType dtype) {
    switch (expected) {
        case 'f':
            return dtype == DType::kF32;
        case 'b':
            return dtype == DType::kI8;
        case 'u':
            return dtype == DType::kU8;
        case 'i':
            return dtype == DType::kI32;
        case 'j':
            return dtype == DType::kU8 || dtype == DType::kI32;
        case 'v':
            return dtype == DType::kF32 || dtype == DType::kU8;
        default:
            if (!c->any_bound) c->any_dtype = dtype;
            c->any_bound = true;
            return dtype == c->any_dtype;
    }
}

// Matches one tensor with one operand's pattern and moves past the pattern.
bool operand_fits(Context* c, const Tensor& tensor, const char** pattern) {
    const char* p = *pattern;
    bool fits = dtype_fits(c, *p++, tensor.dtype);
    if (*p == '#') {
        ++p;
        if (is_letter(*p)) {
            fits = fits && bind(c, *p++, tensor.elements, tensor.batched);
        } else {
            uint64_t count = 0;
            for (; is_digit(*p); ++p) count = count * 10 + uint64_t(*p - '0');
            fits = fits && tensor.elements == count && !tensor.batched;
        }
    } else {
        bool product = *p == '*';
        if (product) ++p;
        uint32_t letters = 0;
        while (is_letter(p[letters])) ++letters;
        uint32_t leading = product && tensor.rank + 1 >= letters ? tensor.rank + 1 - letters : product ? 0 : 1;
        fits = fits && (product ? tensor.rank + 1 >= letters : tensor.rank == letters);
        uint32_t axis = 0;
        for (uint32_t i = 0; i < letters && fits; ++i) {
            uint32_t axes = i == 0 ? leading : 1;
            uint64_t count = 1;
            bool batched = tensor.batched && axis == 0 && axes > 0;
            for (uint32_t end = axis + axes; axis < end; ++axis) count *= tensor.dims[axis];
            fits = bind(c, p[i], count, batched);
        }
        p += letters;
    }
    if (*p == '?') ++p;
    *pattern = p;
    return fits;
}

bool attribute_fits(char kind, Attribute attribute) {
    int32_t i = attribute.i;
    switch (kind) {
        case 's':
            return i >= 1 && i <= 32768;
        case 'p':
            return i >= 0 && i <= 32768;
        case 'n':
            return i >= 0;
        case 'b':
            return i == 0 || i == 1;
        case 'q':
            return i >= -128 && i <= 127;
        case 'a':
            return i >= activation::NONE && i <= activation::RELU6;
        case 'k':
            return i > activation::NONE && i <= activation::RECIPROCAL;
        case 'f':
            return __builtin_isfinite(attribute.f);
        default:
            return true;
    }
}

bool same_place(const Tensor& a, const Tensor& b) {
    return a.region == b.region && a.offset == b.offset && a.bytes == b.bytes && a.batched == b.batched;
}

// Writes go to the arena, to outputs, and by `updates` to persistent memory; nothing is overwritten that is still read.
const char* check_memory(const Context& c, const Signature& signature) {
    uint32_t operands = uint32_t(c.op.inputs) + c.op.outputs;
    for (uint32_t i = 0; i < operands; ++i) {
        const Tensor& written = c.operand(i);
        bool is_output = i >= c.op.inputs, is_update = !is_output && i < 8 && (signature.updates >> i & 1);
        if (!is_output && !is_update) continue;
        if (is_output && written.region != Region::kArena && written.region != Region::kOutput) {
            return "it writes memory that is not its to write";
        }
        if (is_update && written.region != Region::kState && written.region != Region::kSlots) {
            return "it updates something that is not persistent";
        }
        for (uint32_t j = 0; j < operands; ++j) {
            const Tensor& other = c.operand(j);
            if (j == i || !overlap(written, other)) continue;
            bool may_share = i == c.op.inputs && j < c.op.inputs && j < 8 && (signature.inplace >> j & 1);
            if (!may_share || !same_place(written, other)) return "its operands overlap";
        }
    }
    return nullptr;
}

// The bits of both say enough: what reaches 2^63 is beyond every limit. (An overflow check would need 128 bits, which
// not every target can multiply without a library.)
uint64_t saturating_product(uint64_t a, uint64_t b) {
    return a && b && __builtin_clzll(a) + __builtin_clzll(b) < 64 ? UINT64_MAX : a * b;
}

uint64_t amount_of_work(const Context& c, const char* formula) {
    uint64_t work = 1;
    if (*formula) {
        for (const char* p = formula; *p; ++p)
            work = saturating_product(work, is_letter(*p) ? c[*p] : uint64_t(c.attribute(uint32_t(*p - '0'))));
        return work;
    }
    for (uint32_t i = 0; i < uint32_t(c.op.inputs) + c.op.outputs; ++i) work += c.operand(i).elements;
    return work;
}

int32_t find_variable(const Model& model, const Tensor& tensor, bool trainable) {
    for (size_t i = 0; i < model.variables.size; ++i) {
        const Variable& variable = model.variables[i];
        if (tensor.region == Region::kState && variable.offset == tensor.offset && variable.bytes == tensor.bytes &&
            variable.trainable == trainable && variable.dtype == tensor.dtype) {
            return int32_t(i);
        }
    }
    return kNoVariable;
}

// What int8 training keeps beside a model: the largest values of a step, and the scales of gradients.
bool keeps_statistics_in_slots(uint16_t code) {
    switch (code) {
        case op::Q_OBSERVE:
        case op::Q_ADAPT:
        case op::G_QUANTIZE:
        case op::G_SCALE:
        case op::G_ADD:
        case op::G_LINEAR_INPUT:
        case op::G_CONV2D_INPUT:
            return true;
        default:
            return false;
    }
}

// What an operation updates is a whole variable of the right kind, or optimiser state.
const char* check_updates(const Model& model, const Context& c, const Signature& signature, Op* op) {
    for (uint32_t i = 0; i < op->inputs && i < 8; ++i) {
        if (!(signature.updates >> i & 1)) continue;
        if (c.input(i).region == Region::kSlots && keeps_statistics_in_slots(op->code)) continue;
        if (is_optimizer(op->code) && i > 0) {
            if (c.input(i).region != Region::kSlots) return "its state is not in the optimiser's slots";
            continue;
        }
        int32_t variable = find_variable(model, c.input(i), is_optimizer(op->code));
        if (variable == kNoVariable) return "it updates something that is not a variable of its kind";
        if (is_optimizer(op->code)) op->variable = variable;
    }
    return nullptr;
}

const char* check_operands(Context* c, const Signature& signature, const Rule& rule, uint32_t* culprit) {
    const char* p = rule.operands;
    *culprit = 0;
    for (uint32_t position = 0; *p && *p != '|';) {
        if (*p == ' ') {
            ++p;
        } else if (*p == '>') {
            position = signature.most_inputs;  // outputs follow
            *culprit = c->op.inputs;
            ++p;
        } else {
            bool is_input = position < signature.most_inputs;
            uint32_t index = is_input ? position : position - signature.most_inputs;
            if (index < (is_input ? c->op.inputs : c->op.outputs)) {
                *culprit = is_input ? index : c->op.inputs + index;
                if (!operand_fits(c, c->operand(*culprit), &p))
                    return "its shape or dtype does not fit the other operands";
            } else {
                while (*p != ' ' && *p) ++p;
            }
            ++position;
        }
    }
    if (*p == '|') {
        p += 2;
        for (uint32_t i = 0; p[i]; ++i) {
            *culprit = i;
            if (!attribute_fits(p[i], c->op.attributes[i])) return "attribute out of range";
        }
    }
    return nullptr;
}

void describe(const Tensor& tensor, char (&text)[128]) {
    static const char* const kDtypes[] = {"?", "float32", "int8", "uint8", "int32"};
    int length = snprintf(text, sizeof text, "%s[", kDtypes[uint8_t(tensor.dtype)]);
    for (uint32_t i = 0; i < tensor.rank; ++i) {
        length += snprintf(text + length, sizeof text - size_t(length), i ? ", %u" : "%u", tensor.dims[i]);
    }
    snprintf(text + length, sizeof text - size_t(length), tensor.batched ? "] batched" : "]");
}

constexpr uint64_t kMostWork = uint64_t(1) << 42;  // multiply-adds of one run: minutes on a phone

evensong_status verify_program(const Model& model, Program* program, Report* report) {
    uint64_t total_work = 0;
    bool updated = false;
    for (size_t number = 0; number < program->ops.size; ++number) {
        Op& op = program->ops[number];
        const Signature* signature = nullptr;
        for (const Signature& row : kSignatures) {
            if (row.code == op.code) signature = &row;
        }
        const Rule* rule = nullptr;
        for (const Rule& row : kRules) {
            if (row.code == op.code) rule = &row;
        }
        if (!signature || !rule) return report->fail(EVENSONG_PROGRAM, "operation code %u has no rule", op.code);

        Context context(*program, op);
        uint32_t culprit;
        if (const char* wrong = check_operands(&context, *signature, *rule, &culprit)) {
            char shape[128] = "";
            if (wrong[0] == 'i') describe(context.operand(culprit), shape);
            return report->fail(EVENSONG_PROGRAM, "%s (operation %zu of '%s'), operand %u: %s; got %s", signature->name,
                                number, program->name, culprit, wrong, shape);
        }
        const char* wrong = rule->check ? rule->check(context) : nullptr;
        if (!wrong) wrong = check_memory(context, *signature);
        if (!wrong) wrong = check_updates(model, context, *signature, &op);
        if (!wrong && rule->workspace && rule->workspace(context) > program->workspace_bytes)
            wrong = "its workspace is too small";
        if (!wrong && updated && is_loss(op.code)) wrong = "a loss stands after an update";
        if (wrong)
            return report->fail(EVENSONG_PROGRAM, "%s (operation %zu of '%s'): %s", signature->name, number,
                                program->name, wrong);

        updated = updated || is_optimizer(op.code);
        uint64_t work = amount_of_work(context, rule->work);
        if (work > kMostWork - total_work)
            return report->fail(EVENSONG_PROGRAM, "'%s' takes too long to run", program->name);
        total_work += work;
    }
    program->work = total_work;
    return EVENSONG_OK;
}

}  // namespace

bool overlap(const Tensor& a, const Tensor& b) {
    if (a.region != b.region) return false;
    if (a.region >= Region::kInput) return a.offset == b.offset;
    return a.offset < b.end() && b.offset < a.end();
}

bool is_optimizer(uint16_t code) {
    return code == op::SGD || code == op::ADAM || code == op::LINEAR_UPDATE || code == op::G_LINEAR_UPDATE ||
           code == op::G_CONV2D_UPDATE;
}
bool is_loss(uint16_t code) { return code >= op::CROSS_ENTROPY && code <= op::BCE_WITH_LOGITS; }

evensong_status verify(Model* model, Report* report) {
    for (Program& program : model->programs) {
        if (evensong_status status = verify_program(*model, &program, report)) return status;
    }
    return EVENSONG_OK;
}

}  // namespace evensong
