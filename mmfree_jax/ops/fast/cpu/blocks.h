// How a product is divided among the threads of a pool.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace {

// Shares blocks out among the caller and the threads of a pool. Whoever is free takes the next block, so the caller never
// waits for a thread that has not begun: a pool whose threads are all busy cannot block it.
template <typename Schedule, typename Work>
void share(int64_t blocks, int64_t helpers, const Schedule& schedule, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto take = [shared, blocks, work] {
    for (int64_t block; (block = shared->next.fetch_add(1)) < blocks; shared->done.fetch_add(1)) work(block);
  };
  for (int64_t i = 0; i < helpers && i < blocks - 1; i++) schedule(take);
  take();
  for (int spins = 0; shared->done.load() < blocks; spins++)
    if (spins > 1000) std::this_thread::yield();
}

constexpr int64_t kBlockBytes = 32 << 10;  // weights of a block: some microseconds of work

// Computes rows [begin, end) of a matrix of N rows of so many bytes, block by block. rows(begin, end) does one; a block has
// a multiple of `unit` rows.
template <typename Schedule, typename Rows>
void in_blocks(int64_t N, int64_t row_bytes, int64_t unit, int64_t helpers, const Schedule& schedule, const Rows& rows) {
  const int64_t bytes = row_bytes > 0 ? row_bytes : 1;
  const int64_t size = (kBlockBytes + bytes - 1) / bytes / unit * unit + unit;
  share((N + size - 1) / size, helpers, schedule, [N, size, rows](int64_t block) {
    const int64_t begin = block * size, end = begin + size;
    rows(begin, end < N ? end : N);
  });
}

}  // namespace
