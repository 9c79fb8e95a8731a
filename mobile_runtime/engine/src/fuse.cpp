// Which weight gradients need no memory: a LINEAR_GRAD_WEIGHT whose result only one plain SGD reads can run in that
// SGD's place and update the weight directly. The gradient of a large layer then never travels through the caches.
#include "model.hpp"
#include "opcodes.h"

namespace evensong {
namespace {

constexpr size_t kMostApart = 8;  // operations between the two

bool is_plain_sgd(const Op& op) { return op.code == op::SGD && op.inputs == 2 && op.attributes[1].f == 0.0f; }

// Nothing between the two touches dw, or overwrites dy or x, which are then read later than written in the program.
bool may_wait(const Program& program, size_t first, size_t last) {
    const Op& gradient = program.ops[first];
    const Tensor &dy = program.tensors[gradient.operands[0]], &x = program.tensors[gradient.operands[1]];
    const Tensor& dw = program.tensors[gradient.operands[2]];
    for (size_t i = first + 1; i < last; ++i) {
        const Op& op = program.ops[i];
        for (uint32_t k = 0; k < uint32_t(op.inputs) + op.outputs; ++k) {
            const Tensor& other = program.tensors[op.operands[k]];
            if (overlap(other, dw)) return false;
            if (k >= op.inputs && (overlap(other, dy) || overlap(other, x))) return false;
        }
    }
    const Tensor& w = program.tensors[program.ops[last].operands[0]];
    return dw.region == Region::kArena && !overlap(w, dy) && !overlap(w, x);
}

}  // namespace

bool fuse(Block* block, Model* model) {
    for (Program& program : model->programs) {
        const size_t bytes = program.tensors.size * sizeof(uint32_t);
        uint32_t* readers = static_cast<uint32_t*>(block->scratch(bytes));
        if (!readers) return false;
        memset(readers, 0, bytes);
        for (const Op& op : program.ops) {
            for (uint32_t k = 0; k < op.inputs; ++k) ++readers[op.operands[k]];
        }
        for (size_t last = 0; last < program.ops.size; ++last) {
            Op& update = program.ops[last];
            if (!is_plain_sgd(update) || readers[update.operands[1]] != 1) continue;
            for (size_t first = last; first-- > 0 && last - first <= kMostApart + 1;) {
                Op& gradient = program.ops[first];
                if (gradient.code != op::LINEAR_GRAD_WEIGHT || gradient.operands[2] != update.operands[1]) continue;
                if (may_wait(program, first, last)) {
                    gradient.partner = int32_t(last);
                    update.partner = int32_t(first);
                }
                break;
            }
        }
        memset(readers, 0, bytes);  // whoever takes this memory next expects zeros
    }
    return true;
}

}  // namespace evensong
