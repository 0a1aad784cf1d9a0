// Which work goes to which block of a program.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/program.h"

namespace fastvq::cuda {

constexpr int64_t kFragment = 16;  // columns and rows of a tile of weights

inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Unit {
    int64_t level = 0;
    std::vector<int64_t> ops;  // none: the draw; attention may be followed by an activation of its result
    std::vector<std::vector<int64_t>> groups;  // the same by instruction, in the order in which they run
    bool jobs = false;         // `width` counts jobs instead of channels of a half
    int64_t width = 0;
    int64_t step = 1;          // slices are whole multiples of it
    int64_t most = 0;          // and where there are weights, at most as wide as this
    int64_t cost = 0;          // of one channel or job: products per sample, roughly
    bool weighty = false;      // has weights that stay with a block
    bool late = false;         // waits for the draw of the last column
};

struct Task {
    int64_t unit, first, count;
};

struct Part {
    std::vector<Task> tasks;
    int64_t cost = 0;
};

// Units, and their tasks shared out among at most `num_blocks` blocks. Unit numbers are those of counters.
class TaskLists {
   public:
    TaskLists(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, const StepShape& shape,
              int64_t num_blocks);

    std::vector<Unit> units;                // the draw is the last
    std::vector<int64_t> unit_of;           // by operation, -1 for those of the row phase
    std::vector<int64_t> num_tasks;         // by unit
    std::vector<std::vector<Task>> blocks;  // those with work, each in the order in which it is done

   private:
    int64_t num_ops() const { return static_cast<int64_t>(ops_.size()); }

    // Operations linked by reading each other's channels within a level, and last the draw.
    void make_units();
    // By operation, the attention whose result it activates, which is all that happens to it at its level; or -1.
    std::vector<int64_t> activated() const;
    void measure(Unit& unit);
    // What does not need the last draw comes first, and what follows from a product is computed with it.
    void group(Unit& unit, const std::vector<bool>& late) const;
    void assign();
    // All of a level's weights are shared out at once, so that many units give each block a few wide slices.
    void cut_weighty(const std::vector<int64_t>& which, std::vector<Part>& parts) const;
    void cut_light(int64_t u, std::vector<Part>& parts) const;
    // The costliest first, each to the block that has least to do at this level, then in all.
    void give(std::vector<Part>& parts, bool keeps_weights);

    const std::vector<OpSpec>& ops_;
    const std::vector<TermSpec>& terms_;
    const StepShape& shape_;
    const int64_t num_blocks_;
    std::vector<int64_t> level_cost_, total_cost_;  // by block
};

}  // namespace fastvq::cuda
