#include "cuda/program_weights.h"

#include <algorithm>

#include "cuda/program_tasks.h"

namespace fastvq::cuda {
namespace {

class WeightPacker {
   public:
    WeightPacker(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, const StepShape& shape)
        : ops_(ops), terms_(terms), shape_(shape) {}

    void pack(Program& program, int64_t shared_limit) const {
        int64_t size = 0;
        const int64_t room = shared_limit - program.work_bytes;
        program.shared_bytes = program.work_bytes;
        for (Block& block : program.blocks) {
            std::vector<int32_t> products;
            for (int32_t i = block.first_instr; i < block.last_instr; ++i) {
                if (program.instrs[i].code == Code::kAffine) products.push_back(i);
            }
            // The largest first: what is left over then is small.
            std::stable_sort(products.begin(), products.end(), [&](int32_t a, int32_t b) {
                return region_bytes(program.instrs[a]) > region_bytes(program.instrs[b]);
            });
            block.stationary_first = size;
            for (const int32_t i : products) {
                Instr& instr = program.instrs[i];
                const int64_t bytes = region_bytes(instr);
                if (block.stationary_bytes + bytes > room) continue;
                instr.stationary = 1;
                instr.weights = block.stationary_bytes;
                block.stationary_bytes += bytes;
            }
            size += block.stationary_bytes;
            program.shared_bytes = std::max(program.shared_bytes, block.stationary_bytes + program.work_bytes);
        }
        for (Instr& instr : program.instrs) {
            if (instr.stationary || region_bytes(instr) == 0) continue;
            instr.weights = size;
            size += region_bytes(instr);
        }
        program.weights.assign(size, 0);
        for (const Block& block : program.blocks) {
            for (int32_t i = block.first_instr; i < block.last_instr; ++i) {
                const Instr& instr = program.instrs[i];
                char* data = program.weights.data() + (instr.stationary ? block.stationary_first : 0) + instr.weights;
                if (instr.code == Code::kAffine) pack_product(instr, data);
                if (instr.code == Code::kLookup) pack_table(instr, data);
            }
        }
    }

   private:
    int64_t region_bytes(const Instr& instr) const {
        int64_t bytes = 0;
        if (instr.code == Code::kAffine) {
            const int64_t depth =
                instr.layout == Layout::kFragments ? quotient_up(instr.depth, kFragment) * kFragment : instr.depth;
            bytes = depth * instr.columns * (instr.layout == Layout::kFloat ? sizeof(float) : sizeof(uint16_t));
        } else if (instr.code == Code::kLookup) {
            bytes = instr.num_taps * shape_.num_codes * instr.count * instr.halves * sizeof(float);
        }
        return quotient_up(bytes, 16) * 16;
    }

    // The operation's channel that a column of an instruction belongs to.
    static int64_t channel(const Instr& instr, int64_t column) {
        return instr.first + (column < instr.count ? column : instr.half + column - instr.count);
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
                    const float w = weights[channel(instr, c)];
                    if (instr.layout == Layout::kFloat) {
                        reinterpret_cast<float*>(data)[k * instr.columns + c] = w;
                        continue;
                    }
                    int64_t place = k * instr.columns + c;
                    if (instr.layout == Layout::kFragments) {
                        const int64_t row = c % kFragment, column = k % kFragment;
                        const int64_t lane = row % 8 * 4 + column % 8 / 2;
                        const int64_t i = column % 2 + row / 8 * 2 + column / 8 * 4;
                        place = ((c / kFragment * tiles + k / kFragment) * 32 + lane) * 8 + i;
                    }
                    reinterpret_cast<uint16_t*>(data)[place] = round_to_bf16(w);
                }
            }
        }
    }

    void pack_table(const Instr& instr, char* data) const {
        const OpSpec& op = ops_[instr.op];
        const int64_t columns = instr.count * instr.halves;
        float* out = reinterpret_cast<float*>(data);
        for (int64_t row = 0; row < op.num_taps * shape_.num_codes; ++row) {
            for (int64_t c = 0; c < columns; ++c) *out++ = op.weights[row * op.channels + channel(instr, c)];
        }
    }

    const std::vector<OpSpec>& ops_;
    const std::vector<TermSpec>& terms_;
    const StepShape& shape_;
};

}  // namespace

void pack_weights(Program& program, const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms,
                  const StepShape& shape, int64_t shared_limit) {
    WeightPacker(ops, terms, shape).pack(program, shared_limit);
}

}  // namespace fastvq::cuda
