// Products of ternary weights, stored in 2 bits, with int8 activations on CPUs.
//
// Weights w[N, K / 4]: byte i of row n holds the weights k = i + p * K / 4 for p = 0..3 in the bits 2p and 2p + 1, as
// code + 1 in {0, 1, 2}. In this planar layout a shift and a mask of one vector of bytes give four vectors of weights,
// each of which meets contiguous activations. Activations q[M, K] are int8 in [-127, 127]. The result y[M, N] is int32 and
// exact (|y| <= 127 K), so every variant below gives the same integers.
//
// Instructions multiply unsigned with signed bytes, so tiles compute sum (code + 1) q; the sum of q is then subtracted.
// With one vector of activations the product is limited by memory: each byte of weights is read once, in order.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "blocks.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace {

// The part [begin, quarter) of each plane: all of a row, or what is left behind whole vectors.
template <int R, int M>
void add_scalar(const uint8_t* w, const int8_t* q, int64_t begin, int64_t quarter, int32_t* dots) {
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++)
      for (int p = 0; p < 4; p++)
        for (int64_t i = begin; i < quarter; i++)
          dots[r * M + m] += ((w[r * quarter + i] >> 2 * p) & 3) * q[(4 * m + p) * quarter + i];
}

template <int R, int M>
void tile_scalar(const uint8_t* w, const int8_t* q, int64_t quarter, int32_t* dots) {
  for (int j = 0; j < R * M; j++) dots[j] = 0;
  add_scalar<R, M>(w, q, 0, quarter, dots);
}

#if defined(__x86_64__)

// dpbusd adds four products of bytes to each 32-bit sum. Masked loads read zeros behind the end of a plane.
template <int R, int M>
__attribute__((target("avx512f,avx512bw,avx512vnni"))) void tile_avx512vnni(const uint8_t* w, const int8_t* q,
                                                                            int64_t quarter, int32_t* dots) {
  __m512i sums[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = _mm512_setzero_si512();
  const __m512i two_bits = _mm512_set1_epi8(3);
  for (int64_t i = 0; i < quarter; i += 64) {
    const __mmask64 inside = quarter - i >= 64 ? ~0ull : (1ull << (quarter - i)) - 1;
    __m512i bytes[R];
    for (int r = 0; r < R; r++) bytes[r] = _mm512_maskz_loadu_epi8(inside, w + r * quarter + i);
    for (int p = 0; p < 4; p++) {
      for (int m = 0; m < M; m++) {
        const __m512i values = _mm512_maskz_loadu_epi8(inside, q + (4 * m + p) * quarter + i);
        for (int r = 0; r < R; r++)
          sums[r][m] = _mm512_dpbusd_epi32(sums[r][m], _mm512_and_si512(bytes[r], two_bits), values);
      }
      for (int r = 0; r < R; r++) bytes[r] = _mm512_srli_epi16(bytes[r], 2);
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) dots[r * M + m] = _mm512_reduce_add_epi32(sums[r][m]);
}

// maddubs adds pairs of products in 16 bits. Four planes add up to at most 4 * 2 * 2 * 128 = 2048, far from overflow.
template <int R, int M>
__attribute__((target("avx2"))) void tile_avx2(const uint8_t* w, const int8_t* q, int64_t quarter, int32_t* dots) {
  __m256i sums[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = _mm256_setzero_si256();
  const __m256i two_bits = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  const int64_t whole = quarter / 32 * 32;
  for (int64_t i = 0; i < whole; i += 32)
    for (int r = 0; r < R; r++) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + r * quarter + i));
      const __m256i planes[4] = {_mm256_and_si256(bytes, two_bits),
                                 _mm256_and_si256(_mm256_srli_epi16(bytes, 2), two_bits),
                                 _mm256_and_si256(_mm256_srli_epi16(bytes, 4), two_bits),
                                 _mm256_and_si256(_mm256_srli_epi16(bytes, 6), two_bits)};
      for (int m = 0; m < M; m++) {
        __m256i pairs = _mm256_setzero_si256();
        for (int p = 0; p < 4; p++) {
          const int8_t* values = q + (4 * m + p) * quarter + i;
          pairs = _mm256_add_epi16(
              pairs, _mm256_maddubs_epi16(planes[p], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))));
        }
        sums[r][m] = _mm256_add_epi32(sums[r][m], _mm256_madd_epi16(pairs, ones));
      }
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      int32_t lanes[8];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sums[r][m]);
      dots[r * M + m] = 0;
      for (int32_t lane : lanes) dots[r * M + m] += lane;
    }
  add_scalar<R, M>(w, q, whole, quarter, dots);
}

#elif defined(__aarch64__)

// Products of four planes add up to at most 4 * 2 * 128 = 1024 in 16 bits.
template <int R, int M>
void tile_neon(const uint8_t* w, const int8_t* q, int64_t quarter, int32_t* dots) {
  int32x4_t sums[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = vdupq_n_s32(0);
  const uint8x16_t two_bits = vdupq_n_u8(3);
  const int64_t whole = quarter / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16)
    for (int r = 0; r < R; r++) {
      const uint8x16_t bytes = vld1q_u8(w + r * quarter + i);
      const int8x16_t planes[4] = {vreinterpretq_s8_u8(vandq_u8(bytes, two_bits)),
                                   vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(bytes, 2), two_bits)),
                                   vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(bytes, 4), two_bits)),
                                   vreinterpretq_s8_u8(vshrq_n_u8(bytes, 6))};
      for (int m = 0; m < M; m++) {
        int16x8_t low = vdupq_n_s16(0), high = low;
        for (int p = 0; p < 4; p++) {
          const int8x16_t values = vld1q_s8(q + (4 * m + p) * quarter + i);
          low = vmlal_s8(low, vget_low_s8(planes[p]), vget_low_s8(values));
          high = vmlal_high_s8(high, planes[p], values);
        }
        sums[r][m] = vpadalq_s16(vpadalq_s16(sums[r][m], low), high);
      }
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) dots[r * M + m] = vaddvq_s32(sums[r][m]);
  add_scalar<R, M>(w, q, whole, quarter, dots);
}

// sdot adds four products of bytes to each 32-bit sum, as dpbusd does.
template <int R, int M>
__attribute__((target("arch=armv8.2-a+dotprod"))) void tile_dotprod(const uint8_t* w, const int8_t* q, int64_t quarter,
                                                                    int32_t* dots) {
  int32x4_t sums[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = vdupq_n_s32(0);
  const uint8x16_t two_bits = vdupq_n_u8(3);
  const int64_t whole = quarter / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    uint8x16_t bytes[R];
    for (int r = 0; r < R; r++) bytes[r] = vld1q_u8(w + r * quarter + i);
    for (int p = 0; p < 4; p++) {
      for (int m = 0; m < M; m++) {
        const int8x16_t values = vld1q_s8(q + (4 * m + p) * quarter + i);
        for (int r = 0; r < R; r++)
          sums[r][m] = vdotq_s32(sums[r][m], vreinterpretq_s8_u8(vandq_u8(bytes[r], two_bits)), values);
      }
      for (int r = 0; r < R; r++) bytes[r] = vshrq_n_u8(bytes[r], 2);
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) dots[r * M + m] = vaddvq_s32(sums[r][m]);
  add_scalar<R, M>(w, q, whole, quarter, dots);
}

#endif

using TernaryProduct = Product<uint8_t, int8_t, int32_t>;
using TernaryVariant = Variant<uint8_t, int8_t, int32_t>;

// The fastest first; the last one runs everywhere.
const TernaryVariant kVariants[] = {
#if defined(__x86_64__)
    {"avx512vnni", [] { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw"); },
     TILES(tile_avx512vnni)},
    {"avx2", [] { return bool(__builtin_cpu_supports("avx2")); }, TILES(tile_avx2)},
#elif defined(__aarch64__)
#if defined(__linux__)
    {"dotprod", [] { return bool(getauxval(AT_HWCAP) & HWCAP_ASIMDDP); }, TILES(tile_dotprod)},
#elif defined(__ARM_FEATURE_DOTPROD)
    {"dotprod", [] { return true; }, TILES(tile_dotprod)},
#endif
    {"neon", [] { return true; }, TILES(tile_neon)},
#endif
    {"scalar", [] { return true; }, TILES(tile_scalar)},
};
constexpr int kVariantCount = sizeof(kVariants) / sizeof(TernaryVariant);

// Tiles compute sum (code + 1) q: the sum of q too much.
int32_t sum_of(const int8_t* q, int64_t K) {
  int32_t sum = 0;
  for (int64_t k = 0; k < K; k++) sum += q[k];
  return sum;
}

namespace ffi = xla::ffi;

ffi::Error handle(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> w, ffi::Buffer<ffi::S8> q,
                  ffi::ResultBuffer<ffi::S32> y) {
  const int64_t N = w.dimensions()[0], K = 4 * w.dimensions()[1], M = q.dimensions()[0];
  if (q.dimensions()[1] != K) return ffi::Error::InvalidArgument("activations and weights differ in width");
  static const TernaryVariant& fastest = first_that_runs(kVariants);
  const TernaryProduct product{fastest, w.typed_data(), q.typed_data(), y->typed_data(), M, N, K, K / 4, sum_of};
  multiply(product, pool.num_threads() - 1, [&pool](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ternary_product, handle,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

// For tests: the name of a variant (null behind the last), whether it runs on this CPU, and its product in one thread.
extern "C" const char* variant_name(int i) { return i < kVariantCount ? kVariants[i].name : nullptr; }
extern "C" int variant_runs_here(int i) { return kVariants[i].runs_here(); }
extern "C" void variant_product(int i, const uint8_t* w, const int8_t* q, int32_t* y, int64_t M, int64_t N, int64_t K) {
  TernaryProduct{kVariants[i], w, q, y, M, N, K, K / 4, sum_of}.rows(0, N);
}

// Reads `bytes` of memory in as many threads, and returns the bytes a second: what a product cannot exceed.
extern "C" double read_rate(const uint64_t* data, int64_t bytes, int threads) {
  std::atomic<uint64_t> kept{0};
  const auto began = std::chrono::steady_clock::now();
  std::vector<std::thread> readers;
  const int64_t words = bytes / 8;
  for (int t = 0; t < threads; t++)
    readers.emplace_back([=, &kept] {
      uint64_t sums[8] = {};
      const int64_t end = words * (t + 1) / threads;
      for (int64_t i = words * t / threads; i + 8 <= end; i += 8)
        for (int j = 0; j < 8; j++) sums[j] += data[i + j];
      for (uint64_t sum : sums) kept += sum;
    });
  for (auto& reader : readers) reader.join();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
  return double(bytes) / seconds.count();
}
