#include "fibers.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATION_ASAN 1
#endif
#endif
#if defined(EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATION_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_SWITCH 1
// Saves what a function has to keep for its caller, and returns into the other stack. swapcontext asks the kernel for
// the signal mask each time, which takes longer than everything else a fiber does between two switches.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, . - emulation_switch
)");
#else
#include <ucontext.h>
#endif

namespace emulation {
namespace {

#if defined(EMULATION_ASAN) || defined(EMULATION_TSAN)
constexpr std::size_t kStackBytes = 256 << 10;
#else
constexpr std::size_t kStackBytes = 64 << 10;
#endif

}  // namespace

struct Fiber::Platform {
    void* mapped = nullptr;
    std::size_t mapped_bytes = 0;
    char* bottom = nullptr;
    std::size_t bytes = 0;
#if defined(EMULATION_ASAN)
    void* fake_stack = nullptr;
#endif
#if defined(EMULATION_TSAN)
    void* tsan = nullptr;
#endif
    void (*entry)(void*) = nullptr;
    void* argument = nullptr;
#if defined(EMULATION_SWITCH)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif

    static void start(unsigned low, unsigned high) {
        auto* self = reinterpret_cast<Platform*>((static_cast<uintptr_t>(high) << 32) | low);
        self->entry(self->argument);
    }
};

#if defined(EMULATION_SWITCH)
// The first switch "returns" to here with the fiber's platform in a register that functions keep for their callers.
extern "C" void emulation_start();
extern "C" __attribute__((used, visibility("hidden"))) void emulation_enter(void (*entry)(void*), void* argument) {
    entry(argument);
}
asm(R"(
.text
.hidden emulation_start
.globl emulation_start
.type emulation_start, @function
emulation_start:
    .cfi_startproc
    .cfi_undefined rip
    movq %r12, %rdi
    movq %r13, %rsi
    call emulation_enter
    ud2
    .cfi_endproc
.size emulation_start, . - emulation_start
)");
#endif

Fiber::Fiber() : platform_(new Platform) {
    pthread_attr_t attributes;
    void* bottom = nullptr;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
        pthread_attr_getstack(&attributes, &bottom, &platform_->bytes);
        pthread_attr_destroy(&attributes);
    }
    platform_->bottom = static_cast<char*>(bottom);
#if defined(EMULATION_TSAN)
    platform_->tsan = __tsan_get_current_fiber();
#endif
}

Fiber::Fiber(void (*entry)(void*), void* argument, std::size_t index) : platform_(new Platform) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    // Stacks that begin at the same place of a page share the same few lines of the cache.
    const std::size_t shift = index % 61 * 128;
    Platform& p = *platform_;
    p.mapped_bytes = kStackBytes + 3 * page;
    p.mapped = mmap(nullptr, p.mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p.mapped == MAP_FAILED) throw std::bad_alloc();
    mprotect(p.mapped, page, PROT_NONE);
    p.bottom = static_cast<char*>(p.mapped) + page;
    p.bytes = kStackBytes + 2 * page - shift;
#if defined(EMULATION_TSAN)
    p.tsan = __tsan_create_fiber(0);
#endif
    restart(entry, argument);
}

Fiber::~Fiber() {
    if (platform_->mapped == nullptr) return;
#if defined(EMULATION_TSAN)
    __tsan_destroy_fiber(platform_->tsan);
#endif
    munmap(platform_->mapped, platform_->mapped_bytes);
}

void Fiber::restart(void (*entry)(void*), void* argument) {
    Platform& p = *platform_;
    p.entry = entry;
    p.argument = argument;
#if defined(EMULATION_ASAN)
    __asan_unpoison_memory_region(p.bottom, p.bytes);
    p.fake_stack = nullptr;
#endif
#if defined(EMULATION_SWITCH)
    // As emulation_switch leaves it: r15, r14, r13, r12, rbx, rbp, then where to return to. A function expects its
    // stack pointer to be 8 below a multiple of 16.
    auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(p.bottom + p.bytes) / 16 * 16);
    *--top = nullptr;
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&emulation_start);
    *--top = nullptr;                          // rbp
    *--top = nullptr;                          // rbx
    *--top = reinterpret_cast<void*>(entry);   // r12
    *--top = argument;                         // r13
    *--top = nullptr;                          // r14
    *--top = nullptr;                          // r15
    p.stack_pointer = top;
#else
    getcontext(&p.context);
    p.context.uc_stack.ss_sp = p.bottom;
    p.context.uc_stack.ss_size = p.bytes;
    p.context.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(&p);
    makecontext(&p.context, reinterpret_cast<void (*)()>(&Platform::start), 2, static_cast<unsigned>(address),
                static_cast<unsigned>(static_cast<uint64_t>(address) >> 32));
#endif
}

void Fiber::switch_between(Fiber& from, Fiber& to) {
#if defined(EMULATION_ASAN)
    __sanitizer_start_switch_fiber(&from.platform_->fake_stack, to.platform_->bottom, to.platform_->bytes);
#endif
#if defined(EMULATION_TSAN)
    constexpr unsigned kNoSynchronisation = 1;
    __tsan_switch_to_fiber(to.platform_->tsan, kNoSynchronisation);
#endif
#if defined(EMULATION_SWITCH)
    emulation_switch(&from.platform_->stack_pointer, to.platform_->stack_pointer);
#else
    swapcontext(&from.platform_->context, &to.platform_->context);
#endif
    from.entered();
}

void Fiber::entered() {
#if defined(EMULATION_ASAN)
    __sanitizer_finish_switch_fiber(platform_->fake_stack, nullptr, nullptr);
#endif
}

#if defined(EMULATION_TSAN)
void happens_before(void* object) { __tsan_release(object); }
void happens_after(void* object) { __tsan_acquire(object); }
#else
void happens_before(void*) {}
void happens_after(void*) {}
#endif

}  // namespace emulation
