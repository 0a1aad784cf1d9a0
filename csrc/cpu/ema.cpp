#include "cpu/ema.h"

#include <algorithm>

#include "cpu/finite.h"
#include "cpu/shared_pool.h"

namespace fastvq::cpu {
namespace {

// Elements that take longer than waking a thread does.
constexpr int64_t kLeastElements = 1 << 17;

// In double, four chains because one addition waits for the last.
template <class T>
double total_of(const T* x, int64_t n) {
    double sums[4] = {};
    for (int64_t i = 0; i < n; ++i) sums[i % 4] += static_cast<double>(x[i]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

struct Update {
    const EmaTask& task;
    float keep = static_cast<float>(task.decay);
    float take = static_cast<float>(1.0 - task.decay);

    template <class T>
    bool usable(const T* counts) const {
        return total_of(counts, task.num_codes) > 0.0 && all_finite(task.sums, task.num_codes * task.depth);
    }

    template <class T>
    void move_sizes(const T* counts) const {
        for (int64_t k = 0; k < task.num_codes; ++k) {
            task.cluster_size[k] = keep * task.cluster_size[k] + take * static_cast<float>(counts[k]);
        }
    }

    void move_codes(int64_t begin, int64_t end, double whole) const {
        const double scale = whole / (whole + static_cast<double>(task.num_codes) * task.eps);
        for (int64_t k = begin; k < end; ++k) {
            const float size = static_cast<float>((task.cluster_size[k] + task.eps) * scale);
            const float* __restrict sums = task.sums + k * task.depth;
            float* __restrict total = task.embedding_sum + k * task.depth;
            float* __restrict code = task.embedding + k * task.depth;
            if (whole > 0.0) {
                for (int64_t d = 0; d < task.depth; ++d) {
                    total[d] = keep * total[d] + take * sums[d];
                    code[d] = total[d] / size;
                }
            } else {
                for (int64_t d = 0; d < task.depth; ++d) total[d] = keep * total[d] + take * sums[d];
            }
        }
    }
};

}  // namespace

void ema_update(const EmaTask& task, int64_t threads) {
    const Update update{task};
    if (task.skip_unusable && !(task.counts ? update.usable(task.counts) : update.usable(task.float_counts))) return;
    task.counts ? update.move_sizes(task.counts) : update.move_sizes(task.float_counts);
    const double whole = total_of(task.cluster_size, task.num_codes);
    threads = std::clamp<int64_t>(task.num_codes * task.depth / kLeastElements, 1, threads);
    run_shared_team(threads, [&](int64_t thread) {
        update.move_codes(task.num_codes * thread / threads, task.num_codes * (thread + 1) / threads, whole);
    });
}

}  // namespace fastvq::cpu
