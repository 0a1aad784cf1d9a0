// The CUDA engine on random plans, for the sanitizers: every result of every operation against the reference of
// tests/native, and the same bits under every schedule.
//
//     engine_test NUMBER_OF_PLANS [SITE]    SITE: a place at which nobody stops, which has to be found
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../native/plan_case.h"
#include "../native/reference.h"
#include "control.h"
#include "cuda/engine.h"

namespace {

using fastvq::cpu::testing::Buffer;
using fastvq::cpu::testing::check_row;
using fastvq::cpu::testing::expect;
using fastvq::cpu::testing::Memory;
using fastvq::cpu::testing::PlanCase;
using fastvq::cpu::testing::random_plan;
using fastvq::cpu::testing::same_bits;
using fastvq::cuda::DeviceView;
using fastvq::cuda::StepEngine;

// Every column of a vector that has any has a place, and the others lie still.
template <class View>
void add_views(std::vector<DeviceView>& views, const std::vector<View>& from) {
    for (const View& view : from) {
        views.push_back({view.data, view.batch_stride, view.column_stride, view.column_stride == 0 ? 0 : -1});
    }
}

struct Filled {
    std::vector<float> kept, scratch, codes;
};

struct Way {
    int blocks;
    bool in_turn;  // vectors of the current position alone have two places, and what nobody else reads has none
    bool check;
};

Filled fill(const PlanCase& plan, uint64_t seed, const Way& way) {
    fastvq::cuda::EngineSettings settings{0, plan.bf16, way.blocks, 0};
    auto engine = std::make_unique<StepEngine>(plan.ops, plan.terms, plan.output, plan.shape, settings);
    if (seed % 3 == 0) {  // half of the weights are streamed
        settings.shared_limit = engine->shared_bytes() - engine->stationary_bytes() / engine->blocks() / 2;
        engine = std::make_unique<StepEngine>(plan.ops, plan.terms, plan.output, plan.shape, settings);
    }
    Memory memory(plan, seed);
    Filled filled;
    unsigned long long status = ~0ull;
    for (int64_t row = 0; row < plan.height; ++row) {
        memory.begin_row(row);
        std::vector<DeviceView> views;
        add_views(views, memory.values);
        add_views(views, memory.starts);
        for (std::size_t index = 0; way.in_turn && index < memory.scratch.size(); ++index) {
            if (!memory.scratch[index].data.empty()) views[index].column_mask = 1;
        }
        const int64_t first = row * plan.shape.width, stride = plan.height * plan.shape.width;
        engine->run_row({row, views.data(), views.data(), memory.codes.data() + first, stride,
                         memory.uniforms.data() + first, stride, memory.known.data() + first, stride, memory.draw,
                         &status, nullptr});
        expect(status == ~0ull, "a position could not be drawn");
        if (way.check) check_row(memory);
        const auto add = [](std::vector<float>& to, const std::vector<Buffer>& buffers) {
            for (const Buffer& buffer : buffers) to.insert(to.end(), buffer.data.begin(), buffer.data.end());
        };
        add(filled.kept, memory.kept);
        add(filled.scratch, memory.scratch);
    }
    filled.codes.assign(memory.codes.begin(), memory.codes.end());
    return filled;
}

void choose(uint64_t seed, int site) {
    emulation::Settings settings;
    settings.seed = seed;
    settings.multiprocessors = 8;
#if !defined(EMULATION_TSAN)  // hidden stores pass between fibers unseen
    settings.hide_stores = seed % 2 == 1;
#endif
    if (site >= 0) settings.disabled = {site};
    emulation::configure(settings);
}

}  // namespace

int main(int argc, char** argv) {
    const int plans = argc > 1 ? std::atoi(argv[1]) : 0, site = argc > 2 ? std::atoi(argv[2]) : -1;
    emulation::register_kernel<fastvq::cuda::StepArgs>(fastvq::cuda::step_kernel());
    for (int seed = 0; seed < plans; ++seed) {
        try {
            const PlanCase plan = random_plan(static_cast<uint64_t>(seed));
            const int blocks = 1 + seed % 5;
            choose(static_cast<uint64_t>(seed), site);
            // In bfloat16 what weights multiply is rounded too, which it is not in the reference.
            const bool check = !plan.bf16;
            const auto number = static_cast<uint64_t>(seed);
            const Filled found = fill(plan, number, {blocks, false, check});
            choose(number + 13, site);
            const Filled again = fill(plan, number, {blocks, false, false});
            expect(same_bits(again.kept, found.kept) && same_bits(again.scratch, found.scratch) &&
                       same_bits(again.codes, found.codes),
                   "other bits under another schedule");
            choose(number + 29, site);
            const Filled in_turn = fill(plan, number, {blocks, true, false});
            expect(same_bits(in_turn.kept, found.kept) && same_bits(in_turn.codes, found.codes),
                   "other bits with vectors in turn");
        } catch (const std::exception& error) {
            std::printf("FAILED: plan %d: %s\n", seed, error.what());
            return 1;
        }
    }
    std::printf("passed %d plans\n", plans);
    return 0;
}
