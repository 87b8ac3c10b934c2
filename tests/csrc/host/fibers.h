// Runs the threads of CUDA blocks as fibers of one host thread, so that barriers mean what they mean on a GPU.
//
// A thread runs until it meets a barrier that others have not reached; then another goes on. Threads that
// never wait share one fiber and cost no switch. A barrier that can never open ends the process with a
// message, as a GPU would hang. A team, the threads of a block, goes as far as it can before another goes on,
// and the order in which threads run can be turned around: both bring a missing barrier to light.
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

// Tells AddressSanitizer that one stack is left for another, and that the other is reached.
#ifdef __SANITIZE_ADDRESS__
inline void leave_for(const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(nullptr, stack, bytes); }
inline void reached(const void** from, size_t* bytes) { __sanitizer_finish_switch_fiber(nullptr, from, bytes); }
#else
inline void leave_for(const void*, size_t) {}
inline void reached(const void**, size_t*) {}
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
    // Calls body(0 .. teams * team - 1), each as a thread of its own, `team` of them to a team.
    void run(int teams, int team, bool backwards, std::function<void(int)> body) {
        threads_.assign(static_cast<size_t>(teams * team), Thread{});
        team_ = team;
        backwards_ = backwards;
        body_ = std::move(body);
        finished_ = 0;
        current_ = first();
        enter(current_);
        body_ = nullptr;
    }

    int current() const { return current_; }

    // Arrives at a barrier and returns its generation, which ends when all have arrived.
    static unsigned arrive(Barrier& barrier) {
        const unsigned generation = barrier.generation;
        if (++barrier.arrived == barrier.expected) {
            barrier.arrived = 0;
            ++barrier.generation;
        }
        return generation;
    }

    void wait(Barrier& barrier) { wait(barrier, arrive(barrier)); }

    // Waits for the end of a generation of the barrier.
    void wait(Barrier& barrier, unsigned generation) {
        if (barrier.generation != generation) return;
        Thread& thread = threads_[static_cast<size_t>(current_)];
        thread.waits_for = &barrier;
        thread.generation = generation;
        int self = current_;
        go_on(next());
        current_ = self;
        thread.waits_for = nullptr;
    }

private:
    static constexpr size_t kStackBytes = 128 * 1024;

    // A fiber, entered by its context the first time and by a jump from then on, which costs no system call.
    struct Fiber {
        ucontext_t context;
        jmp_buf where;
        std::unique_ptr<char[]> stack{new char[kStackBytes]};
    };

    int count() const { return static_cast<int>(threads_.size()); }
    int first() const { return backwards_ ? count() - 1 : 0; }
    int after(int thread) const { return (thread + (backwards_ ? count() - 1 : 1)) % count(); }

    int next() const {
        int of_another_team = -1;
        for (int i = 0, candidate = after(current_); i < count(); ++i, candidate = after(candidate)) {
            if (!threads_[static_cast<size_t>(candidate)].can_run()) continue;
            if (candidate / team_ == current_ / team_) return candidate;
            if (of_another_team < 0) of_another_team = candidate;
        }
        if (of_another_team >= 0) return of_another_team;
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
        reached(nullptr, nullptr);
    }

    // Leaves the current fiber, which waits, for that of `thread`.
    void go_on(int thread) {
        Fiber& from = *fibers_[static_cast<size_t>(threads_[static_cast<size_t>(current_)].fiber)];
        current_ = thread;
        if (_setjmp(from.where) == 0) resume(thread);
        reached(nullptr, nullptr);
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
        reached(self->entering_ ? &self->caller_stack_ : nullptr, self->entering_ ? &self->caller_bytes_ : nullptr);
        self->entering_ = false;
        self->loop();
    }

    // Runs in a fiber: starts threads that have not started, one after another, until a waiting one must go on.
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
    int team_ = 1, current_ = 0, finished_ = 0;
};

}  // namespace fibers
