#include "cuda/program_tasks.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace fastvq::cuda {
namespace {

// Channels times samples that are worth a block of their own where there are no weights.
constexpr int64_t kLightWork = kManyItems * kThreads;

// Cuts units one after the other into at most `blocks` parts whose greatest cost is as small as possible, if parts are
// taken from the sequence in order. `take` gets the steps of a unit that go into the current part, and whether another
// part begins before them.
template <class Take>
int64_t cut(const std::vector<Unit>& units, const std::vector<int64_t>& which, int64_t limit, Take take) {
    int64_t parts = 0, room = 0;
    for (const int64_t u : which) {
        const Unit& unit = units[u];
        const int64_t cost = unit.cost * unit.step;
        int64_t done = 0;
        const int64_t steps = quotient_up(unit.width, unit.step);
        while (done < steps) {
            const bool fresh = parts == 0 || room < cost;
            if (fresh) {
                ++parts;
                room = limit;
            }
            const int64_t count = std::min(steps - done, room / cost);
            take(u, done, count, fresh);
            room -= count * cost;
            done += count;
        }
    }
    return parts;
}

}  // namespace

TaskLists::TaskLists(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, const StepShape& shape,
                     int64_t num_blocks)
    : ops_(ops), terms_(terms), shape_(shape), num_blocks_(num_blocks) {
    make_units();
    assign();
}

std::vector<int64_t> TaskLists::activated() const {
    std::vector<int64_t> result(num_ops(), -1);
    std::vector<bool> followed(num_ops());
    for (int64_t index = 0; index < num_ops(); ++index) {
        const OpSpec& op = ops_[index];
        if (op.kind != Kind::kElu && op.kind != Kind::kConcatElu && op.kind != Kind::kRelu) continue;
        const int64_t source = op.sources[0];
        const bool alone = std::none_of(ops_.begin(), ops_.end(), [&](const OpSpec& other) {
            return other.level == op.level && std::count(other.sources, other.sources + num_sources(other), index) > 0;
        });
        const bool whole = op.paired == (op.kind == Kind::kConcatElu);
        if (op.level < 0 || !alone || !whole || followed[source] || ops_[source].kind != Kind::kAttend) continue;
        followed[source] = true;
        result[index] = source;
    }
    return result;
}

void TaskLists::make_units() {
    std::vector<int64_t> leader(num_ops());
    std::iota(leader.begin(), leader.end(), 0);
    const auto find = [&](int64_t index) {
        while (leader[index] != index) index = leader[index] = leader[leader[index]];
        return index;
    };
    const std::vector<int64_t> attention = activated();
    for (int64_t index = 0; index < num_ops(); ++index) {
        const OpSpec& op = ops_[index];
        if (attention[index] >= 0) leader[index] = attention[index];
        if (op.level < 0 || op.kind == Kind::kAttend || attention[index] >= 0) continue;
        for (int s = 0; s < num_sources(op); ++s) {
            if (ops_[op.sources[s]].level != op.level) continue;
            const int64_t a = find(index), b = find(op.sources[s]);
            leader[std::max(a, b)] = std::min(a, b);
        }
    }
    unit_of.assign(num_ops(), -1);
    int64_t num_levels = 0;
    for (int64_t index = 0; index < num_ops(); ++index) {
        if (ops_[index].level < 0) continue;
        const int64_t first = find(index);
        if (first == index) {
            unit_of[index] = static_cast<int64_t>(units.size());
            units.emplace_back();
            units.back().level = ops_[index].level;
            num_levels = std::max(num_levels, ops_[index].level + 1);
        }
        unit_of[index] = unit_of[first];
        units[unit_of[index]].ops.push_back(index);
    }
    for (Unit& unit : units) measure(unit);
    Unit draw;
    draw.level = num_levels;
    draw.jobs = true;
    draw.width = shape_.batch;
    draw.cost = quotient_up(8 * shape_.num_codes, shape_.batch);
    units.push_back(draw);
}

void TaskLists::measure(Unit& unit) {
    const OpSpec& first = ops_[unit.ops.front()];
    if (first.kind == Kind::kAttend) {
        unit.jobs = true;
        unit.groups = {unit.ops};
        unit.width = shape_.batch * first.heads;
        const int64_t widths = (ops_[first.sources[0]].channels + first.channels) / first.heads;
        unit.cost = quotient_up(shape_.positions * widths, 2 * shape_.batch);
        return;
    }
    unit.width = half_width(first);
    int64_t halves = 1;  // the fewest and most of its products
    bool whole = false;
    std::vector<bool> late(num_ops());
    for (const int64_t index : unit.ops) {
        const OpSpec& op = ops_[index];
        unit.cost += 8;
        late[index] = op.kind == Kind::kLookup;
        for (int s = 0; s < num_sources(op); ++s) late[index] = late[index] || late[op.sources[s]];
        unit.late = unit.late || late[index];
        if (op.kind != Kind::kAffine) continue;
        unit.weighty = true;
        unit.cost += affine_depth(ops_, terms_, op) * (op.paired ? 2 : 1);
        halves = std::max<int64_t>(halves, op.paired ? 2 : 1);
        whole = whole || !op.paired;
    }
    group(unit, late);
    unit.most = kMostColumns / halves / kSliceStep * kSliceStep;
    unit.step = std::min<int64_t>(unit.most, whole ? kFragment : kSliceStep);
    unit.most = unit.most / unit.step * unit.step;
}

void TaskLists::group(Unit& unit, const std::vector<bool>& late) const {
    std::vector<bool> left(num_ops());
    for (const int64_t index : unit.ops) left[index] = true;
    const auto ready = [&](int64_t index) {
        const OpSpec& op = ops_[index];
        return std::none_of(op.sources, op.sources + num_sources(op), [&](int64_t source) { return left[source]; });
    };
    for (const bool now : {false, true}) {
        const auto next = [&](bool product) {
            const auto found = std::find_if(unit.ops.begin(), unit.ops.end(), [&](int64_t index) {
                return left[index] && late[index] == now && (ops_[index].kind == Kind::kAffine) == product &&
                       ready(index);
            });
            return found == unit.ops.end() ? -1 : *found;
        };
        for (;;) {
            int64_t index = next(true);
            if (index < 0) index = next(false);
            if (index < 0) break;
            unit.groups.emplace_back();
            for (; index >= 0; index = next(false)) {
                unit.groups.back().push_back(index);
                left[index] = false;
            }
        }
    }
}

void TaskLists::assign() {
    blocks.resize(num_blocks_);
    num_tasks.assign(units.size(), 0);
    total_cost_.assign(num_blocks_, 0);
    for (int64_t level = 0; level <= units.back().level; ++level) {
        std::vector<int64_t> weighty;
        std::vector<Part> parts, light;
        for (int64_t u = 0; u < static_cast<int64_t>(units.size()); ++u) {
            if (units[u].level != level) continue;
            if (units[u].weighty) {
                weighty.push_back(u);
            } else {
                cut_light(u, light);
            }
        }
        cut_weighty(weighty, parts);
        level_cost_.assign(num_blocks_, 0);
        give(parts, true);
        give(light, false);
    }
    blocks.erase(std::remove_if(blocks.begin(), blocks.end(), [](const auto& tasks) { return tasks.empty(); }),
                 blocks.end());
    for (std::vector<Task>& tasks : blocks) {
        // Products of columns that are known already run while the last column's codes are being drawn.
        std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) {
            const Unit &p = units[a.unit], &q = units[b.unit];
            return std::make_pair(p.level, p.late) < std::make_pair(q.level, q.late);
        });
    }
}

void TaskLists::cut_weighty(const std::vector<int64_t>& which, std::vector<Part>& parts) const {
    if (which.empty()) return;
    int64_t least = 1, most = 0;
    for (const int64_t u : which) {
        least = std::max(least, units[u].cost * units[u].step);
        most += units[u].cost * units[u].step * quotient_up(units[u].width, units[u].step);
    }
    const auto nothing = [](int64_t, int64_t, int64_t, bool) {};
    while (least < most) {
        const int64_t middle = least + (most - least) / 2;
        if (cut(units, which, middle, nothing) <= num_blocks_) {
            most = middle;
        } else {
            least = middle + 1;
        }
    }
    cut(units, which, least, [&](int64_t u, int64_t step, int64_t count, bool fresh) {
        if (fresh) parts.emplace_back();
        const Unit& unit = units[u];
        const int64_t end = std::min(unit.width, (step + count) * unit.step);
        for (int64_t first = step * unit.step; first < end; first += unit.most) {
            const int64_t width = std::min(unit.most, end - first);
            parts.back().tasks.push_back({u, first, width});
            parts.back().cost += width * unit.cost;
        }
    });
}

void TaskLists::cut_light(int64_t u, std::vector<Part>& parts) const {
    const Unit& unit = units[u];
    const int64_t steps = quotient_up(unit.width, unit.step);
    const int64_t wanted = unit.jobs ? steps : quotient_up(unit.width * shape_.batch, kLightWork);
    const int64_t pieces = std::min({steps, wanted, num_blocks_});
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = steps * piece / pieces * unit.step;
        const int64_t last = std::min(unit.width, steps * (piece + 1) / pieces * unit.step);
        parts.push_back({{{u, first, last - first}}, (last - first) * unit.cost});
    }
}

void TaskLists::give(std::vector<Part>& parts, bool keeps_weights) {
    std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.cost > b.cost; });
    for (const Part& part : parts) {
        int64_t best = 0;
        for (int64_t b = 1; b < num_blocks_; ++b) {
            if (std::make_pair(level_cost_[b], total_cost_[b]) <
                std::make_pair(level_cost_[best], total_cost_[best])) {
                best = b;
            }
        }
        level_cost_[best] += part.cost;
        if (keeps_weights) total_cost_[best] += part.cost;
        for (const Task& task : part.tasks) {
            blocks[best].push_back(task);
            ++num_tasks[task.unit];
        }
    }
}

}  // namespace fastvq::cuda
