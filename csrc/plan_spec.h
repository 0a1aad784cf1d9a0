// A plan as both engines take it: operations, their weights, and what makes them a plan. The Python side fills in arrays
// of these structs (fastvq/sampling/engines/step_tables.py) and checks sizes, offsets and names against those here.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastvq {

// Kinds by the names that the Python side uses.
#define FASTVQ_KINDS(X)         \
    X(kLookup, "lookup")         \
    X(kAffine, "affine")         \
    X(kElu, "elu")               \
    X(kConcatElu, "concat_elu")  \
    X(kRelu, "relu")             \
    X(kAdd, "add")               \
    X(kGlu, "glu")               \
    X(kTanh, "tanh")             \
    X(kStoreKeys, "store_keys")  \
    X(kAttend, "attention")      \
    X(kStatic, "static")

#define FASTVQ_KIND(name, text) name,
enum class Kind : int64_t { FASTVQ_KINDS(FASTVQ_KIND) };
#undef FASTVQ_KIND

// One operation. Vectors of paired operations have two halves of which a thread (or block) owns the same part each, so
// that gates find both of their inputs where they run.
//
// What can be worked out before the position itself comes up is done before: `once` for a whole grid if it is the same at
// all positions, `above` when a row or a tile of it begins. The rest is the step phase.
struct OpSpec {
    Kind kind;
    int64_t channels;
    int64_t level;       // order within a position; -1 for what is known before
    int64_t paired;      // whether it is
    int64_t sources[3];  // add: 2; attention: query, key cache (a kStoreKeys operation), value; others: 1
    int64_t heads;
    int64_t inclusive;      // whether attention reads its own position
    int64_t first_term;     // affine: a range of TermSpec, of the step phase
    int64_t num_terms;
    int64_t num_taps;       // lookup: table [num_taps][num_codes][channels], taps at columns -num_taps .. -1
    const float* weights;   // lookup: the table
    int64_t num_weights;    // floats at weights
    // What the engine for whole grids needs beside the step phase.
    int64_t above_level = -1;  // order of what is done before a tile's steps; -1 for an operation without such a part
    int64_t uniform = 0;       // whether it is the same at all positions
    int64_t first_once = 0, num_once = 0;    // affine: terms
    int64_t first_above = 0, num_above = 0;  // affine: terms; lookup: terms of one row and column, whose source is -1
    const float* bias = nullptr;             // [channels]; of lookups and affine operations
};

// A window of one source times a matrix [num_rows * num_columns * channels of the source][channels of the operation].
struct TermSpec {
    int64_t source;
    int64_t first_column;  // relative to the current one
    int64_t num_columns;
    const float* weights;
    int64_t num_weights;  // floats at weights
    int64_t first_row = 0;  // relative to the current one
    int64_t num_rows = 1;

    // Whether it reads the current position alone.
    bool is_direct() const { return first_row == 0 && num_rows == 1 && first_column == 0 && num_columns == 1; }
};

struct StepShape {
    int64_t batch, width, positions, num_codes;
    int64_t key_stride;  // positions, padded
};

constexpr int64_t kMaxSegments = 16;  // terms of an affine operation

// Throws std::invalid_argument that names the operation, unless the condition holds.
inline void require(bool condition, int64_t op, const char* what) {
    if (!condition) throw std::invalid_argument("operation " + std::to_string(op) + ": " + what);
}

// Throws std::invalid_argument if the operations do not form a plan.
void check_plan(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t output,
                const StepShape& shape);

inline bool has_start(const OpSpec& op) { return op.kind == Kind::kAffine || op.kind == Kind::kLookup; }

// Number of OpSpec::sources that are read.
inline int num_sources(const OpSpec& op) {
    return op.kind == Kind::kAttend ? 3 : op.kind == Kind::kAdd ? 2 : has_start(op) ? 0 : 1;
}

// Channels of one half of a vector, or of the whole vector if it is not paired.
inline int64_t half_width(const OpSpec& op) { return op.paired ? op.channels / 2 : op.channels; }

// Rows of an affine operation's weights, all terms together.
int64_t affine_depth(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, const OpSpec& op);

// The upper half of a float, to nearest, ties to even.
uint16_t round_to_bf16(float x);

// Throws std::invalid_argument if a view that would be read or written leads nowhere. Arrays are indexed by operation.
template <class View>
void check_views(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, const View* values,
                 const View* starts) {
    for (int64_t index = 0; index < static_cast<int64_t>(ops.size()); ++index) {
        const OpSpec& op = ops[index];
        if (op.level < 0) continue;
        require(values[index].data != nullptr, index, "no memory for its values");
        require(!has_start(op) || starts[index].data != nullptr, index, "no start from the rows above");
        for (int64_t t = op.first_term; op.kind == Kind::kAffine && t < op.first_term + op.num_terms; ++t) {
            const TermSpec& term = terms[t];
            const int64_t stride = values[term.source].column_stride;
            require(values[term.source].data != nullptr, index, "no values of a source");
            require(term.num_columns == 1 || stride == ops[term.source].channels, index, "columns lie apart");
            require(term.first_column == 0 || stride != 0, index, "columns of a source are not kept");
        }
        for (int s = 0; s < num_sources(op); ++s) {
            require(values[op.sources[s]].data != nullptr, index, "no values of a source");
        }
    }
}

}  // namespace fastvq
