// A plan with packed weights, run for whole grids in one call, draws included.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/draw.h"
#include "cpu/kernels.h"
#include "cpu/places.h"
#include "cpu/product.h"
#include "plan_spec.h"

namespace fastvq::cpu {

struct GridShape {
    int64_t height, width, num_codes;

    int64_t positions() const { return height * width; }
    // Keys lie channel by channel, in rows of whole vectors.
    int64_t key_stride() const { return (positions() + 15) / 16 * 16; }
};

// What is known beforehand of a static operation: vectors by sample, row and column; strides in floats, 0 where one
// vector serves all.
struct StaticInput {
    const float* data;
    int64_t sample_stride, row_stride, column_stride;
};

// What one call works on. Grids are [batch][height][width] without gaps.
struct GridTask {
    int64_t batch;
    int64_t tile, offset;  // of the front
    int64_t threads;       // of the part above; those of a position are no more than `step_threads`
    int64_t step_threads;
    const StaticInput* statics;  // by operation
    int64_t* codes;              // read where known, else written
    const float* uniforms;
    const uint8_t* known;  // keep the code that is there
    float* logits;         // [batch][height][width][codes], or null
    DrawOptions draw;
    // Asked by the calling thread now and then, and whenever rows have become complete.
    bool (*keep_going)(void* context, int64_t complete_rows);
    void* context;
};

enum class Outcome { kDone, kStopped, kNotDrawable };

struct GridResult {
    Outcome outcome = Outcome::kDone;
    int64_t sample = -1, row = -1, column = -1;  // with kNotDrawable: a position whose logits are not finite
    double above_seconds = 0.0, step_seconds = 0.0;
};

class GridPlan {
   public:
    // Copies all weights. Throws std::invalid_argument if the operations do not form a plan.
    GridPlan(std::vector<OpSpec> specs, std::vector<TermSpec> terms, int64_t output, GridShape shape, bool bf16,
             const Kernels& kernels);
    ~GridPlan();

    GridPlan(const GridPlan&) = delete;
    GridPlan& operator=(const GridPlan&) = delete;

    // Fills grids. Safe to call from several threads at once on different tasks. Codes depend neither on the front nor
    // on threads, nor those of a sample on the others. Throws std::invalid_argument if the front is not one along which
    // this plan can be sampled.
    GridResult run(const GridTask& task) const;

    // What `run` allocates.
    int64_t memory_bytes(int64_t batch, int64_t tile, int64_t offset) const;
    int64_t weight_bytes() const { return weight_bytes_; }
    const char* kernels_name() const { return kernels_.name; }
    bool fused() const { return kernels_.gathered.fused; }
    const GridShape& shape() const { return shape_; }
    int64_t num_ops() const { return static_cast<int64_t>(specs_.size()); }
    bool reads_static(int64_t op) const { return specs_[op].kind == Kind::kStatic; }

   private:
    // What has been made of an operation. A product is null where there is nothing to multiply.
    struct Op {
        std::unique_ptr<PackedProduct> once, above, step;
        std::vector<float> bias;
        std::vector<float> above_table, step_table;  // of lookups: [taps][codes][channels]
    };
    // What of an operation's past is read.
    struct Past {
        bool kept = false;
        int64_t above = 0, left = 0, right = 0;
    };
    class Memory;
    class Grid;
    class Worker;

    void check() const;
    Front front_of(int64_t tile, int64_t offset) const;
    std::unique_ptr<PackedProduct> pack(const OpSpec& op, int64_t first, int64_t count);

    std::vector<OpSpec> specs_;
    std::vector<TermSpec> terms_;
    std::vector<Op> ops_;
    std::vector<Past> pasts_;
    std::vector<bool> values_;  // whether attention reads an operation as values
    std::vector<int64_t> once_;
    std::vector<std::vector<int64_t>> above_levels_, levels_;  // at least one above, where sides of rings are cleared
    int64_t output_;
    GridShape shape_;
    bool bf16_;
    const Kernels& kernels_;
    int64_t weight_bytes_ = 0;
};

}  // namespace fastvq::cpu
