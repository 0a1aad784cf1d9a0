#include "plan_spec.h"

#include <algorithm>
#include <cstring>

namespace fastvq {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 31;

// Whether count == a * b * c, for positive factors of any size.
bool is_product(int64_t count, int64_t a, int64_t b, int64_t c) {
    return count > 0 && count % a == 0 && count / a % b == 0 && count / a / b == c;
}

void check_op(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t index,
              const StepShape& shape) {
    const OpSpec& op = ops[index];
    const int64_t num_ops = static_cast<int64_t>(ops.size());
    if (op.level < 0) return;  // worked out before the row starts
    require(op.level < num_ops, index, "its level is beyond the number of operations");
    const auto source = [&](int which) -> const OpSpec& {
        const int64_t at = op.sources[which];
        require(at >= 0 && at < num_ops, index, "a source does not exist");
        return ops[at];
    };
    const auto same = [&](const OpSpec& from, int64_t channels) {
        require(from.channels == channels, index, "channels of a source do not fit");
    };
    // Within a level a thread goes on with the channels it has computed itself; all others are known a level later.
    const auto known = [&](int which, bool split_alike) {
        const OpSpec& from = source(which);
        const bool own = split_alike && from.kind != Kind::kAttend && op.sources[which] < index;
        require(from.level < op.level || (from.level == op.level && own), index, "a source is not known at its level");
    };
    switch (op.kind) {
        case Kind::kLookup:
            require(op.num_taps >= 1 && op.weights != nullptr &&
                        is_product(op.num_weights, op.channels, shape.num_codes, op.num_taps),
                    index, "a lookup needs taps and a table of their size");
            break;
        case Kind::kAffine:
            require(op.first_term >= 0 && op.num_terms >= 1 && op.num_terms <= kMaxSegments &&
                        op.first_term <= static_cast<int64_t>(terms.size()) - op.num_terms,
                    index, "terms do not exist");
            for (int64_t t = op.first_term; t < op.first_term + op.num_terms; ++t) {
                const TermSpec& term = terms[t];
                require(term.source >= 0 && term.source < num_ops, index, "a source does not exist");
                const OpSpec& from = ops[term.source];
                require(term.num_columns >= 1 && term.first_column > -kMaxSize &&
                            term.first_column <= 1 - term.num_columns,
                        index, "a term reads columns that are not known yet");
                require(term.first_column <= -term.num_columns || from.level < op.level, index,
                        "a source is not known at its level");
                require(term.weights != nullptr &&
                            is_product(term.num_weights, op.channels, from.channels, term.num_columns),
                        index, "a term needs weights of its size");
            }
            break;
        case Kind::kElu:
        case Kind::kRelu:
            same(source(0), op.channels);
            known(0, source(0).paired == op.paired);
            break;
        case Kind::kConcatElu:
            same(source(0), op.channels / 2);
            require(op.paired, index, "concatenated halves must be paired");
            known(0, !source(0).paired);
            break;
        case Kind::kAdd:
            for (int which = 0; which < 2; ++which) {
                same(source(which), op.channels);
                known(which, source(which).paired == op.paired);
            }
            break;
        case Kind::kGlu:
        case Kind::kTanh:
            same(source(0), 2 * op.channels);
            require(!op.paired, index, "what a gate gives cannot be paired");
            known(0, source(0).paired);
            break;
        case Kind::kStoreKeys:
            same(source(0), op.channels);
            known(0, source(0).paired == op.paired);
            break;
        case Kind::kAttend:
            require(op.heads >= 1 && source(0).channels == source(1).channels && source(2).channels == op.channels &&
                        op.channels % op.heads == 0 && source(0).channels % op.heads == 0 &&
                        source(1).kind == Kind::kStoreKeys && source(1).level >= 0,
                    index, "attention needs query, stored keys and values of fitting widths");
            for (int which = 0; which < (op.inclusive ? 3 : 1); ++which) known(which, false);
            // Keys are loaded by whole vectors, so even where the own position does not count nobody may be writing it.
            require(source(1).level != op.level, index, "keys are stored at the level that reads them");
            break;
        default:
            require(false, index, "unknown kind");
    }
}

}  // namespace

void check_plan(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t output,
                const StepShape& shape) {
    if (shape.batch < 1 || shape.width < 1 || shape.num_codes < 1 || shape.positions < shape.width ||
        shape.key_stride < shape.positions || shape.key_stride % 16 != 0 ||
        std::max({shape.batch, shape.num_codes, shape.key_stride}) >= kMaxSize) {
        throw std::invalid_argument("shape: expected positive sizes and key rows padded to a multiple of 16");
    }
    const int64_t num_ops = static_cast<int64_t>(ops.size());
    // Of all operations before any other check, because terms may read later ones.
    for (int64_t index = 0; index < num_ops; ++index) {
        const OpSpec& op = ops[index];
        require(op.channels >= 1 && op.channels < kMaxSize && (!op.paired || op.channels % 2 == 0), index,
                "bad number of channels");
    }
    for (int64_t index = 0; index < num_ops; ++index) check_op(ops, terms, index, shape);
    if (output < 0 || output >= num_ops || ops[output].channels != shape.num_codes || ops[output].level < 0) {
        throw std::invalid_argument("output: expected an operation of the step phase with a logit per code");
    }
}

int64_t affine_depth(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, const OpSpec& op) {
    int64_t depth = 0;
    for (int64_t t = op.first_term; t < op.first_term + op.num_terms; ++t) {
        depth += terms[t].num_columns * ops[terms[t].source].channels;
    }
    return depth;
}

uint16_t round_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

}  // namespace fastvq
