#include "cuda/program_weights.h"

#include <algorithm>
#include <utility>

#include "cuda/program_tasks.h"

namespace fastvq::cuda {
namespace {

class WeightPacker {
   public:
    WeightPacker(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, const StepShape& shape,
                 Layout layout)
        : ops_(ops), terms_(terms), shape_(shape), layout_(layout) {}

    void pack(Program& program, int64_t shared_limit) const {
        int64_t size = 0;
        const int64_t room = shared_limit - program.memory.bytes;
        program.shared_bytes = program.memory.bytes;
        for (Block& block : program.blocks) {
            std::vector<int32_t> products;
            for (int32_t i = block.first_instr; i < block.last_instr; ++i) {
                if (program.instrs[i].code == Code::kAffine) products.push_back(i);
            }
            // First those that others wait for: what needs the columns before alone has the time to be streamed. Of these
            // the largest: what is left over then is small.
            const auto rank = [&](int32_t i) {
                const Instr& instr = program.instrs[i];
                return std::make_pair(ops_[instr.op].level == 0, -product_bytes(instr));
            };
            std::stable_sort(products.begin(), products.end(), [&](int32_t a, int32_t b) { return rank(a) < rank(b); });
            block.stationary_first = size;
            for (const int32_t i : products) {
                Instr& instr = program.instrs[i];
                const int64_t bytes = product_bytes(instr);
                if (block.stationary_bytes + bytes > room) continue;
                instr.stationary = 1;
                instr.weights = block.stationary_bytes;
                block.stationary_bytes += bytes;
            }
            size += block.stationary_bytes;
            program.shared_bytes = std::max(program.shared_bytes, block.stationary_bytes + program.memory.bytes);
        }
        for (Instr& instr : program.instrs) {
            if (instr.code == Code::kAffine && !instr.stationary) {
                instr.weights = size;
                size += product_bytes(instr);
            }
            for_tables(program, instr, [&](Step& step) {
                step.weights = size;
                size += table_bytes(instr, step);
            });
        }
        program.weights.assign(size, 0);
        char* weights = program.weights.data();
        for (const Block& block : program.blocks) {
            for (int32_t i = block.first_instr; i < block.last_instr; ++i) {
                const Instr& instr = program.instrs[i];
                const int64_t start = instr.stationary ? block.stationary_first : 0;
                if (instr.code == Code::kAffine) pack_product(instr, weights + start + instr.weights);
                for_tables(program, instr, [&](const Step& step) { pack_table(instr, step, weights + step.weights); });
            }
        }
    }

   private:
    template <class Work>
    static void for_tables(Program& program, const Instr& instr, const Work& work) {
        for (int32_t s = instr.first_step; s < instr.first_step + instr.num_steps; ++s) {
            if (program.steps[s].code == StepCode::kLookup) work(program.steps[s]);
        }
    }

    int64_t product_bytes(const Instr& instr) const {
        const int64_t depth = quotient_up(instr.depth, kFragment) * kFragment;
        return depth * instr.columns * (layout_ == Layout::kFloat ? sizeof(float) : sizeof(uint16_t));
    }

    int64_t table_columns(const Instr& instr, const Step& step) const {
        return int64_t{instr.count} * (ops_[step.op].paired ? 2 : 1);
    }
    int64_t table_bytes(const Instr& instr, const Step& step) const {
        return aligned(step.num_taps * shape_.num_codes * table_columns(instr, step) * sizeof(float));
    }

    // An operation's channel that a column belongs to, `half` being the channels between its halves.
    static int64_t channel(const Instr& instr, int64_t half, int64_t column) {
        return instr.first + (column < instr.count ? column : half + column - instr.count);
    }

    void pack_product(const Instr& instr, char* data) const {
        const OpSpec& op = ops_[instr.op];
        const int64_t columns = instr.count * instr.halves;
        const int64_t tiles = quotient_up(instr.depth, kFragment);
        int64_t k = 0;
        for (int64_t t = op.first_term; t < op.first_term + op.num_terms; ++t) {
            const int64_t depth = terms_[t].num_columns * ops_[terms_[t].source].channels;
            const float* weights = terms_[t].weights;
            for (int64_t last = k + depth; k < last; ++k, weights += op.channels) {
                for (int64_t c = 0; c < columns; ++c) {
                    const float w = weights[channel(instr, instr.half, c)];
                    const int64_t row = c % kFragment, column = k % kFragment;
                    const int64_t lane = row % 8 * 4 + column % 8 / 2;
                    const int64_t i = column % 2 + row / 8 * 2 + column / 8 * 4;
                    const int64_t tile = (c / kFragment * tiles + k / kFragment) * kFragment * kFragment;
                    if (layout_ == Layout::kFloat) {
                        reinterpret_cast<float*>(data)[tile + (i / 4 * 32 + lane) * 4 + i % 4] = w;
                    } else {
                        reinterpret_cast<uint16_t*>(data)[tile + lane * 8 + i] = round_to_bf16(w);
                    }
                }
            }
        }
    }

    void pack_table(const Instr& instr, const Step& step, char* data) const {
        const OpSpec& op = ops_[step.op];
        const int64_t columns = table_columns(instr, step);
        float* out = reinterpret_cast<float*>(data);
        for (int64_t row = 0; row < op.num_taps * shape_.num_codes; ++row) {
            for (int64_t c = 0; c < columns; ++c) *out++ = op.weights[row * op.channels + channel(instr, step.half, c)];
        }
    }

    const std::vector<OpSpec>& ops_;
    const std::vector<TermSpec>& terms_;
    const StepShape& shape_;
    const Layout layout_;
};

}  // namespace

void pack_weights(Program& program, const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms,
                  const StepShape& shape, int64_t shared_limit) {
    WeightPacker(ops, terms, shape, program.layout).pack(program, shared_limit);
}

}  // namespace fastvq::cuda
