// What products of few vectors share: variants for kinds of CPUs, tiles, and blocks for the threads of a pool.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace {

constexpr int kRows = 4, kVectors = 4;  // of the largest tile: 16 sums in registers

// A tile multiplies R rows of weights with M vectors of activations: dots[r * M + m]. The stride is that of the rows.
template <typename W, typename X, typename Y>
using Tile = void (*)(const W* w, const X* x, int64_t stride, Y* dots);

template <typename W, typename X, typename Y>
struct Variant {
  const char* name;
  bool (*runs_here)();
  Tile<W, X, Y> tiles[kVectors], row[kVectors];  // by the number of vectors: for kRows rows, and for one
};

#define TILES(tile) {tile<kRows, 1>, tile<kRows, 2>, tile<kRows, 3>, tile<kRows, 4>}, {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>}

// The first of the variants that runs on this CPU; the last one runs everywhere.
template <typename V>
const V& first_that_runs(const V* variants) {
  while (!variants->runs_here()) variants++;
  return *variants;
}

template <typename W, typename X, typename Y>
struct Product {
  const Variant<W, X, Y>& variant;
  const W* w;  // [N, stride]
  const X* x;  // [M, K]
  Y* y;        // [M, N]
  int64_t M, N, K, stride;
  Y (*excess)(const X* x, int64_t K);  // what every dot with a vector is too large by

  // Rows [begin, end) of the weights, with all vectors.
  void rows(int64_t begin, int64_t end) const {
    for (int64_t m = 0; m < M; m += kVectors) {
      const int vectors = int(M - m < kVectors ? M - m : kVectors);
      const X* x_m = x + m * K;
      Y sums[kVectors] = {};
      for (int v = 0; v < vectors; v++) sums[v] = excess(x_m + v * K, K);
      for (int64_t n = begin; n < end;) {
        const int count = end - n >= kRows ? kRows : 1;
        Y dots[kRows * kVectors];
        (count == kRows ? variant.tiles : variant.row)[vectors - 1](w + n * stride, x_m, stride, dots);
        for (int r = 0; r < count; r++)
          for (int v = 0; v < vectors; v++) y[(m + v) * N + n + r] = dots[r * vectors + v] - sums[v];
        n += count;
      }
    }
  }
};

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

// Computes a product block by block.
template <typename P, typename Schedule>
void multiply(const P& product, int64_t helpers, const Schedule& schedule) {
  const int64_t row_bytes = product.stride * sizeof(*product.w), bytes = row_bytes > 0 ? row_bytes : 1;
  const int64_t size = (kBlockBytes + bytes - 1) / bytes / kRows * kRows + kRows;
  share((product.N + size - 1) / size, helpers, schedule, [product, size](int64_t block) {
    const int64_t begin = block * size, end = begin + size;
    product.rows(begin, end < product.N ? end : product.N);
  });
}

}  // namespace
