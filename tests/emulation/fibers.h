// Stacks of their own on one thread of the operating system, and the switch between them.
#pragma once

#include <cstddef>
#include <memory>

namespace emulation {

// A place where execution can go on. Switching tells AddressSanitizer and ThreadSanitizer about it; for the latter it is
// no synchronisation, so what one fiber does is ordered against another only by happens_before and happens_after.
class Fiber {
   public:
    // The calling thread as it runs now, so that others can switch back to it.
    Fiber();
    // A stack on which entry(argument) begins at the first switch. `entry` must not return.
    Fiber(void (*entry)(void*), void* argument, std::size_t index);
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // Begin anew. What was on the stack is dropped without being destroyed.
    void restart(void (*entry)(void*), void* argument);
    // Leave `from`, which is running, and go on in `to`.
    static void switch_between(Fiber& from, Fiber& to);
    // To be called first in an entry.
    void entered();

   private:
    struct Platform;
    std::unique_ptr<Platform> platform_;
};

// What was done before happens_before(x) is visible after a later happens_after(x). Known to ThreadSanitizer alone.
void happens_before(void* object);
void happens_after(void* object);

}  // namespace emulation
