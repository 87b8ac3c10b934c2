// Measures the peak rate of fused multiply-adds: each thread runs independent chains of them on registers.

#include <chrono>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kChains = 12;  // more than the latency of an operation times the operations per cycle

// Returns a value that depends on every chain, so that the compiler removes none.
static float chains(long rounds) {
    Vector sums[kChains], factor = {}, term = {};
    for (auto& sum : sums) sum = term;
    factor += 0.999f;
    term += 1e-3f;
    for (long round = 0; round < rounds; ++round)
        for (auto& sum : sums) sum = sum * factor + term;
    float total = 0;
    for (const auto& sum : sums) total += sum[0];
    return total;
}

// Returns operations per second, a multiply-add counted as two.
extern "C" double fma_peak(int threads, long rounds) {
    std::vector<std::thread> running;
    std::vector<float> totals(threads);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < threads; ++i) running.emplace_back([&, i] { totals[i] = chains(rounds); });
    for (auto& thread : running) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double lanes = kBytes / sizeof(float);
    return 2.0 * lanes * kChains * static_cast<double>(rounds) * threads / seconds.count() + (totals[0] == -1.0f);
}
