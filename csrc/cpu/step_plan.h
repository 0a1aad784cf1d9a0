// The step phase of a plan: operations with packed weights, run for all positions of a row in one call.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/draw.h"
#include "cpu/kernels.h"
#include "step_spec.h"

namespace fastvq::cpu {

// Where an operation's vectors lie: sample b, column c at data + b * batch_stride + c * column_stride.
struct View {
    float* data;
    int64_t batch_stride;
    int64_t column_stride;
};

// What one call works on. Arrays of views are indexed by operation.
struct RowTask {
    int64_t row;
    const View* values;  // what operations write and others read
    const View* starts;  // lookups and affine operations: what rows above contribute
    int64_t* codes;      // [batch][width] of this row, strides below; read and written
    int64_t code_stride;
    const float* uniforms;  // [batch][width]
    int64_t uniform_stride;
    const uint8_t* known;  // [batch][width]: keep the code that is there
    int64_t known_stride;
    DrawOptions draw;
    bool (*keep_going)(void*);  // asked now and then by the calling thread
    void* context;
};

enum class Outcome { kDone, kStopped, kNotDrawable };

class StepPlan {
   public:
    // Copies all weights. Throws std::invalid_argument if the operations do not form a plan.
    StepPlan(std::vector<OpSpec> specs, std::vector<TermSpec> terms, int64_t output, StepShape shape, bool bf16,
             int64_t threads, const Kernels& kernels);

    StepPlan(const StepPlan&) = delete;
    StepPlan& operator=(const StepPlan&) = delete;

    // Fills one row. Safe to call from several threads at once on different tasks. With kNotDrawable, *bad is
    // sample * width + column of a position whose logits are not finite.
    Outcome run_row(const RowTask& task, int64_t* bad) const;

    // Throws std::invalid_argument if a view that would be read or written leads nowhere.
    void check_views(const View* values, const View* starts) const;

    const char* kernels_name() const { return kernels_.name; }
    const StepShape& shape() const { return shape_; }
    int64_t num_ops() const { return static_cast<int64_t>(ops_.size()); }
    int64_t weight_bytes() const { return weight_bytes_; }

   private:
    // The part of an affine operation that one thread computes.
    struct Share {
        std::vector<int64_t> columns, widths;
        std::unique_ptr<char[]> storage;
        void* weights = nullptr;
    };
    struct Op {
        int64_t depth = 0;
        std::vector<float> table;
        std::vector<Share> shares;
    };
    struct Range {
        int64_t first, last;
    };
    class Worker;

    void pack(int64_t index);
    Range owned(const OpSpec& op, int64_t thread) const;

    std::vector<OpSpec> specs_;
    std::vector<TermSpec> terms_;
    std::vector<Op> ops_;  // what has been made of them
    std::vector<std::vector<int64_t>> levels_;
    int64_t output_;
    StepShape shape_;
    bool bf16_;
    int64_t threads_;
    const Kernels& kernels_;
    int64_t weight_bytes_ = 0;
};

}  // namespace fastvq::cpu
