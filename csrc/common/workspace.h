// Memory that the kernels of a CPU work in.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "common/sizes.h"

namespace dd {

// Workspace that starts on a cache line. A thread keeps one of each use for its next call, as large as the largest yet:
// the pages of fresh memory take a twentieth of a convolution's time.
class Workspace {
public:
    enum Use { input, other_input, filters, scratch, uses };

    // Memory of `count` floats, whose content is undefined.
    static float* of(Use use, int64_t count) {
        thread_local Workspace kept[uses];
        return kept[use].at_least(count);
    }

private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };

    float* at_least(int64_t count) {
        if (count > count_) {
            count_ = 0;
            memory_.reset();
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(round_up(count * 4, 64)))));
            if (memory_ == nullptr) throw std::bad_alloc();
            count_ = count;
        }
        return memory_.get();
    }

    std::unique_ptr<float[], Free> memory_;
    int64_t count_ = 0;
};

}  // namespace dd
