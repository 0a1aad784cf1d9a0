#include "cuda/program_steps.h"

#include <algorithm>
#include <utility>

namespace fastvq::cuda {
namespace {

StepCode code_of(Kind kind) {
    switch (kind) {
        case Kind::kLookup: return StepCode::kLookup;
        case Kind::kAffine: return StepCode::kSum;
        case Kind::kElu: return StepCode::kElu;
        case Kind::kConcatElu: return StepCode::kConcatElu;
        case Kind::kRelu: return StepCode::kRelu;
        case Kind::kAdd: return StepCode::kAdd;
        case Kind::kGlu: return StepCode::kGlu;
        case Kind::kTanh: return StepCode::kTanh;
        case Kind::kStoreKeys: return StepCode::kStoreKeys;
        default: throw std::invalid_argument("unknown kind");
    }
}

// Halves of its source that an operation reads, and the channels between them.
std::pair<int32_t, int64_t> read_halves(const OpSpec& op) {
    switch (op.kind) {
        case Kind::kGlu:
        case Kind::kTanh: return {2, op.channels};
        case Kind::kConcatElu: return {1, 0};
        default: return {op.paired ? 2 : 1, half_width(op)};
    }
}

// Steps whose results are values numbered as they come; planes are given to the values at the end.
class ChainMaker {
   public:
    ChainMaker(const std::vector<OpSpec>& ops, const std::vector<Stores>& stores) : ops_(ops), stores_(stores) {}

    Chain run(const std::vector<int64_t>& group) {
        for (const int64_t index : group) add(index);
        chain_.steps.insert(chain_.steps.begin(), loads_.begin(), loads_.end());
        give_planes();
        forward();
        return std::move(chain_);
    }

   private:
    struct Value {
        int64_t op;
        bool starts, computed;
        int32_t halves;
        int64_t half;
    };

    static Step blank(StepCode code, int64_t op) {
        Step step{};
        step.code = code;
        step.op = static_cast<int32_t>(op);
        step.planes[0] = step.planes[1] = -1;
        for (auto& source : step.sources) source[0] = source[1] = -1;
        return step;
    }

    int32_t computed(int64_t op) const {
        const auto found = std::find_if(values_.begin(), values_.end(),
                                        [&](const Value& value) { return value.computed && value.op == op; });
        return found == values_.end() ? -1 : static_cast<int32_t>(found - values_.begin());
    }

    int32_t load(int64_t op, bool starts, int32_t halves, int64_t half) {
        for (std::size_t v = 0; v < values_.size(); ++v) {
            const Value& value = values_[v];
            if (!value.computed && value.op == op && value.starts == starts && value.halves == halves &&
                value.half == half) {
                return static_cast<int32_t>(v);
            }
        }
        Step step = blank(StepCode::kLoad, op);
        step.starts = starts;
        step.half = static_cast<int32_t>(half);
        step.planes[0] = static_cast<int32_t>(values_.size());
        values_.push_back({op, starts, false, halves, half});
        loads_.push_back(step);
        return step.planes[0];
    }

    // Until planes are given, the first entries of planes and sources are numbers of values.
    void add(int64_t index) {
        const OpSpec& op = ops_[index];
        Step step = blank(code_of(op.kind), index);
        step.half = static_cast<int32_t>(half_width(op));
        step.stores = stores_[index];
        step.num_taps = static_cast<int32_t>(op.num_taps);
        const int32_t halves = op.paired ? 2 : 1;
        if (has_start(op)) {
            step.sources[0][0] = load(index, true, halves, half_width(op));
        }
        for (int s = 0; s < num_sources(op); ++s) {
            const auto [read, distance] = read_halves(op);
            const int32_t known = computed(op.sources[s]);
            step.sources[s][0] = known >= 0 ? known : load(op.sources[s], false, read, read == 2 ? distance : 0);
        }
        if (op.kind != Kind::kStoreKeys) {
            step.planes[0] = static_cast<int32_t>(values_.size());
            values_.push_back({index, false, true, halves, half_width(op)});
        }
        chain_.steps.push_back(step);
    }

    // A plane is free again after the last step that reads it.
    void give_planes() {
        std::vector<std::size_t> last(values_.size());
        for (std::size_t s = 0; s < chain_.steps.size(); ++s) {
            const Step& step = chain_.steps[s];
            if (step.planes[0] >= 0) last[step.planes[0]] = s;
            for (const auto& source : step.sources) {
                if (source[0] >= 0) last[source[0]] = s;
            }
        }
        std::vector<std::pair<int32_t, int32_t>> planes(values_.size());
        std::vector<int32_t> free;
        const auto take = [&] {
            if (free.empty()) return chain_.planes++;
            const int32_t plane = free.back();
            free.pop_back();
            return plane;
        };
        for (std::size_t s = 0; s < chain_.steps.size(); ++s) {
            Step& step = chain_.steps[s];
            std::vector<int32_t> done;
            for (auto& source : step.sources) {
                const int32_t value = source[0];
                if (value < 0) continue;
                source[0] = planes[value].first;
                source[1] = planes[value].second;
                if (last[value] == s && std::find(done.begin(), done.end(), value) == done.end()) done.push_back(value);
            }
            if (step.planes[0] >= 0) {
                const int32_t value = step.planes[0];
                planes[value].first = step.planes[0] = take();
                planes[value].second = step.planes[1] = values_[value].halves == 2 ? take() : -1;
                if (last[value] == s) done.push_back(value);
            }
            for (const int32_t value : done) {
                free.push_back(planes[value].first);
                if (planes[value].second >= 0) free.push_back(planes[value].second);
            }
        }
    }

    void forward() {
        for (std::size_t s = loads_.size() + 1; s < chain_.steps.size(); ++s) {
            const Step& before = chain_.steps[s - 1];
            Step& step = chain_.steps[s];
            const int32_t(&source)[2] = step.sources[0];
            step.forwarded = before.planes[0] >= 0 && source[0] == before.planes[0] &&
                             (source[1] < 0 || source[1] == before.planes[1]);
        }
    }

    const std::vector<OpSpec>& ops_;
    const std::vector<Stores>& stores_;
    std::vector<Value> values_;
    std::vector<Step> loads_;
    Chain chain_{};
};

}  // namespace

std::vector<Stores> stores_of(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t output,
                              const TaskLists& lists, bool rounding) {
    std::vector<std::pair<std::size_t, std::size_t>> group_of(ops.size());
    for (std::size_t u = 0; u < lists.units.size(); ++u) {
        for (std::size_t g = 0; g < lists.units[u].groups.size(); ++g) {
            for (const int64_t index : lists.units[u].groups[g]) group_of[index] = {u, g};
        }
    }
    std::vector<bool> multiplied(ops.size()), read(ops.size());
    read[output] = true;
    for (int64_t index = 0; index < static_cast<int64_t>(ops.size()); ++index) {
        const OpSpec& op = ops[index];
        if (op.level < 0) continue;
        for (int64_t t = op.first_term; op.kind == Kind::kAffine && t < op.first_term + op.num_terms; ++t) {
            (terms[t].is_direct() ? multiplied : read)[terms[t].source] = true;
        }
        for (int s = 0; s < num_sources(op); ++s) {
            const int64_t source = op.sources[s];
            if (op.kind == Kind::kAttend || group_of[source] != group_of[index]) read[source] = true;
        }
    }
    std::vector<Stores> stores(ops.size(), Stores::kRows);
    for (std::size_t index = 0; index < ops.size(); ++index) {
        if (ops[index].level < 0) continue;
        const bool floats = !rounding || ops[index].kind == Kind::kAttend;
        if (read[index] || (multiplied[index] && floats)) {
            stores[index] = Stores::kFloats;
        } else if (multiplied[index]) {
            stores[index] = Stores::kRounded;
        }
    }
    return stores;
}

Chain make_chain(const std::vector<OpSpec>& ops, const std::vector<int64_t>& group, const std::vector<Stores>& stores) {
    return ChainMaker(ops, stores).run(group);
}

}  // namespace fastvq::cuda
