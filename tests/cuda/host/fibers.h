// Runs the threads of CUDA blocks as fibers of one host thread, so that barriers mean what they mean on a GPU.
//
// A thread runs until it meets a barrier that others have not reached; then another goes on. Threads that
// never wait share one fiber and cost no switch. A barrier that can never open ends the process with a
// message, as a GPU would hang. The order in which threads run can be turned around, which brings a
// missing barrier to light.
#pragma once

#include <ucontext.h>
#include <csetjmp>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace fibers {

// What AddressSanitizer must be told where one stack is left, and where the other is reached.
#ifdef __SANITIZE_ADDRESS__
inline void leave_for(const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(nullptr, stack, bytes); }
inline void arrive(const void** from, size_t* bytes) { __sanitizer_finish_switch_fiber(nullptr, from, bytes); }
#else
inline void leave_for(const void*, size_t) {}
inline void arrive(const void**, size_t*) {}
#endif

struct Barrier {
    int expected = 0, arrived = 0;
    unsigned generation = 0;
};

struct Thread {
    const Barrier* waits_for = nullptr;
    unsigned generation = 0;
    bool started = false, done = false;
    int fiber = -1;

    bool can_run() const { return !done && (waits_for == nullptr || waits_for->generation != generation); }
};

class Scheduler {
public:
    // Calls body(0 .. count - 1), each as a thread of its own.
    void run(int count, bool backwards, std::function<void(int)> body) {
        threads_.assign(static_cast<size_t>(count), Thread{});
        backwards_ = backwards;
        body_ = std::move(body);
        finished_ = 0;
        current_ = first();
        enter(current_);
        body_ = nullptr;
    }

    int current() const { return current_; }

    void wait(Barrier& barrier) {
        if (++barrier.arrived == barrier.expected) {
            barrier.arrived = 0;
            ++barrier.generation;
            return;
        }
        Thread& thread = threads_[static_cast<size_t>(current_)];
        thread.waits_for = &barrier;
        thread.generation = barrier.generation;
        int self = current_;
        go_on(next());
        current_ = self;
        thread.waits_for = nullptr;
    }

private:
    static constexpr size_t kStackBytes = 128 * 1024;

    // Entered by its context the first time and by a jump from then on, which costs no system call.
    struct Fiber {
        ucontext_t context;
        jmp_buf where;
        std::unique_ptr<char[]> stack{new char[kStackBytes]};
    };

    int count() const { return static_cast<int>(threads_.size()); }
    int first() const { return backwards_ ? count() - 1 : 0; }
    int after(int thread) const { return (thread + (backwards_ ? count() - 1 : 1)) % count(); }

    int next() const {
        for (int i = 0, candidate = after(current_); i < count(); ++i, candidate = after(candidate)) {
            if (threads_[static_cast<size_t>(candidate)].can_run()) return candidate;
        }
        std::fprintf(stderr, "CUDA on the host: %d of %d threads wait at a barrier that the others never reach\n",
                     count() - finished_, count());
        std::abort();
    }

    int free_fiber() {
        if (free_.empty()) {
            fibers_.push_back(std::make_unique<Fiber>());
            free_.push_back(static_cast<int>(fibers_.size()) - 1);
        }
        int fiber = free_.back();
        free_.pop_back();
        return fiber;
    }

    // A new fiber that starts with `thread`.
    ucontext_t* begin(int thread) {
        int index = free_fiber();
        threads_[static_cast<size_t>(thread)].fiber = index;
        Fiber& fiber = *fibers_[static_cast<size_t>(index)];
        leave_for(fiber.stack.get(), kStackBytes);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        auto self = reinterpret_cast<uintptr_t>(this);
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Scheduler::main), 2, static_cast<unsigned>(self),
                    static_cast<unsigned>(self >> 32));
        return &fiber.context;
    }

    void enter(int thread) {
        entering_ = true;
        if (_setjmp(caller_) == 0) setcontext(begin(thread));
        arrive(nullptr, nullptr);
    }

    // Leaves the current fiber, which waits, for that of `thread`.
    void go_on(int thread) {
        Fiber& from = *fibers_[static_cast<size_t>(threads_[static_cast<size_t>(current_)].fiber)];
        current_ = thread;
        if (_setjmp(from.where) == 0) resume(thread);
        arrive(nullptr, nullptr);
    }

    void resume(int thread) {
        const Thread& to = threads_[static_cast<size_t>(thread)];
        if (!to.started) setcontext(begin(thread));
        Fiber& fiber = *fibers_[static_cast<size_t>(to.fiber)];
        leave_for(fiber.stack.get(), kStackBytes);
        _longjmp(fiber.where, 1);
    }

    static void main(unsigned low, unsigned high) {
        auto* self = reinterpret_cast<Scheduler*>(static_cast<uintptr_t>(high) << 32 | low);
        arrive(self->entering_ ? &self->caller_stack_ : nullptr, self->entering_ ? &self->caller_bytes_ : nullptr);
        self->entering_ = false;
        self->loop();
    }

    // What a fiber does: threads that have not started, one after another, until it must leave for a waiting one.
    void loop() {
        for (;;) {
            Thread& thread = threads_[static_cast<size_t>(current_)];
            thread.started = true;
            body_(current_);
            thread.done = true;
            ++finished_;
            int fiber = thread.fiber;
            if (finished_ == count()) {
                free_.push_back(fiber);
                leave_for(caller_stack_, caller_bytes_);
                _longjmp(caller_, 1);
            }
            current_ = next();
            Thread& to = threads_[static_cast<size_t>(current_)];
            if (to.started) {
                free_.push_back(fiber);
                resume(current_);
            }
            to.fiber = fiber;
        }
    }

    std::vector<Thread> threads_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<int> free_;
    std::function<void(int)> body_;
    jmp_buf caller_;
    const void* caller_stack_ = nullptr;
    size_t caller_bytes_ = 0;
    bool backwards_ = false, entering_ = false;
    int current_ = 0, finished_ = 0;
};

}  // namespace fibers
