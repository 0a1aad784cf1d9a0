#include "cpu/shared_pool.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

#include <atomic>
#include <cstring>
#include <string>

namespace fastvq::cpu {
namespace {

// Entry points of GNU's runtime, which LLVM's and Intel's have as well.
struct Pool {
    std::string path;
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread)() = nullptr;
    int (*threads)() = nullptr;
};

#if defined(__linux__)

// The extension links no runtime of its own: that would be a second pool beside the framework's. Wheels rename theirs,
// and other packages may have brought more, so the one that lies in PyTorch's folder comes first.
int consider(dl_phdr_info* info, size_t, void* data) {
    const char* path = info->dlpi_name;
    const char* slash = path == nullptr ? nullptr : std::strrchr(path, '/');
    if (slash == nullptr) return 0;
    bool runtime = false;
    for (const char* name : {"/libgomp", "/libiomp5", "/libomp"}) {
        runtime = runtime || std::strncmp(slash, name, std::strlen(name)) == 0;
    }
    std::string& found = *static_cast<std::string*>(data);
    if (runtime && (found.empty() || std::strstr(path, "/torch") != nullptr)) found = path;
    return 0;
}

template <class Function>
void resolve(void* library, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, name));
}

Pool find_pool() {
    Pool pool;
    dl_iterate_phdr(consider, &pool.path);
    void* library = pool.path.empty() ? nullptr : dlopen(pool.path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return {};
    resolve(library, "GOMP_parallel", pool.parallel);
    resolve(library, "omp_get_thread_num", pool.thread);
    resolve(library, "omp_get_num_threads", pool.threads);
    return pool.parallel && pool.thread && pool.threads ? pool : Pool{};
}

#else

Pool find_pool() { return {}; }

#endif

struct Region {
    const Pool& pool;
    int64_t threads;
    void (*work)(void*, int64_t);
    void* data;
    std::atomic<bool> refused{false};
};

void enter(void* argument) {
    Region& region = *static_cast<Region*>(argument);
    // Work may wait for all of its threads, so with fewer none of them begins; all see the same number.
    if (region.pool.threads() != region.threads) {
        region.refused.store(true);
        return;
    }
    region.work(region.data, region.pool.thread());
}

// Looked for when first needed: a framework that calls has been loaded by then.
const Pool& loaded_pool() {
    static const Pool pool = find_pool();
    return pool;
}

std::atomic<bool> left_pool{false};

}  // namespace

const std::string& loaded_pool_path() { return loaded_pool().path; }

void leave_loaded_pool() { left_pool.store(true); }

bool run_on_loaded_pool(int64_t threads, void (*work)(void*, int64_t), void* data) {
    const Pool& pool = loaded_pool();
    if (pool.parallel == nullptr || left_pool.load()) return false;
    Region region{pool, threads, work, data};
    pool.parallel(enter, &region, static_cast<unsigned>(threads), 0);
    return !region.refused.load();
}

}  // namespace fastvq::cpu
