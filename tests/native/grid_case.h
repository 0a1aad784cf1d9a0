// Grids to fill along a plan, and the slow way to fill them.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/grid_plan.h"
#include "plan_case.h"

namespace fastvq::cpu::testing {

struct Grids {
    std::vector<int64_t> codes;  // [batch][height][width]
    std::vector<float> logits;   // [batch][height][width][codes]

    bool operator==(const Grids& other) const {
        return codes == other.codes && same_bits(logits, other.logits);
    }
};

// What the grids of a micro-batch are filled from. Codes that are not known are numbers that cannot be read unnoticed.
struct GridCase {
    GridCase(const PlanCase& plan, int64_t batch, uint64_t seed);
    GridCase(const GridCase&) = delete;  // its statics point into itself

    GridShape shape() const { return {plan.height, plan.shape.width, plan.shape.num_codes}; }
    GridPlan build(const Kernels& kernels) const;
    // Raster order on one thread, unless that is changed.
    GridTask task(Grids& grids) const;
    // One of the samples alone.
    GridTask task_of(int64_t sample, Grids& grids) const;
    Grids begin() const;
    void forget_codes();

    // Position by position in raster order, each operation one multiply-add after the other in the order that engines
    // keep to: bias, terms that are the same everywhere, those above, those of steps. The kernels are those of the
    // engine, which have tests of their own.
    Grids fill_slowly(const Kernels& kernels) const;

    const PlanCase& plan;
    const int64_t batch;
    std::vector<std::vector<float>> inputs;  // by operation, of those that are static
    std::vector<StaticInput> statics;
    std::vector<int64_t> codes;
    std::vector<float> uniforms;
    std::vector<uint8_t> known;
    DrawOptions draw{};
};

// Whether what is `right` columns to the right in the row `above` above is done whenever a tile begins; tile by tile.
bool reaches_slowly(const Front& front, int64_t above, int64_t right);

// The least offset along which a plan can be sampled in such tiles.
int64_t least_offset(const PlanCase& plan, int64_t tile);

}  // namespace fastvq::cpu::testing
