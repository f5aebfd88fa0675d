// Products of matrices in bfloat16 with a few vectors in float32 on CPUs.
//
// Weights w[N, K] are bfloat16, a row for each output, and activations x[M, K] float32; y[M, N] is float32. A bfloat16 is
// the upper half of a float32, so a shift widens it, and every product is added in float32 by a fused multiply-add. XLA
// would make a float32 copy of all weights for each product: ten bytes of memory's traffic a weight instead of two.

#include <cstdint>

#include "blocks.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

inline float widened(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// The part [begin, K) of each row: all of it, or what is left behind whole vectors.
template <int R, int M>
void add_half_scalar(const uint16_t* w, const float* x, int64_t begin, int64_t K, float* dots) {
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++)
      for (int64_t k = begin; k < K; k++) dots[r * M + m] += widened(w[r * K + k]) * x[m * K + k];
}

template <int R, int M>
void half_scalar(const uint16_t* w, const float* x, int64_t K, float* dots) {
  for (int j = 0; j < R * M; j++) dots[j] = 0;
  add_half_scalar<R, M>(w, x, 0, K, dots);
}

#if defined(__x86_64__)

template <int R, int M>
__attribute__((target("avx512f"))) void half_avx512(const uint16_t* w, const float* x, int64_t K, float* dots) {
  __m512 sums[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = _mm512_setzero_ps();
  const int64_t whole = K / 16 * 16;
  for (int64_t k = 0; k < whole; k += 16)
    for (int r = 0; r < R; r++) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + r * K + k));
      const __m512 values = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
      for (int m = 0; m < M; m++) sums[r][m] = _mm512_fmadd_ps(values, _mm512_loadu_ps(x + m * K + k), sums[r][m]);
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) dots[r * M + m] = _mm512_reduce_add_ps(sums[r][m]);
  add_half_scalar<R, M>(w, x, whole, K, dots);
}

template <int R, int M>
__attribute__((target("avx2,fma"))) void half_avx2(const uint16_t* w, const float* x, int64_t K, float* dots) {
  __m256 sums[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = _mm256_setzero_ps();
  const int64_t whole = K / 8 * 8;
  for (int64_t k = 0; k < whole; k += 8)
    for (int r = 0; r < R; r++) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + r * K + k));
      const __m256 values = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
      for (int m = 0; m < M; m++) sums[r][m] = _mm256_fmadd_ps(values, _mm256_loadu_ps(x + m * K + k), sums[r][m]);
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float lanes[8];
      _mm256_storeu_ps(lanes, sums[r][m]);
      dots[r * M + m] = 0;
      for (float lane : lanes) dots[r * M + m] += lane;
    }
  add_half_scalar<R, M>(w, x, whole, K, dots);
}

#elif defined(__aarch64__)

template <int R, int M>
void half_neon(const uint16_t* w, const float* x, int64_t K, float* dots) {
  float32x4_t sums[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = vdupq_n_f32(0);
  const int64_t whole = K / 4 * 4;
  for (int64_t k = 0; k < whole; k += 4)
    for (int r = 0; r < R; r++) {
      const float32x4_t values = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(w + r * K + k), 16));
      for (int m = 0; m < M; m++) sums[r][m] = vfmaq_f32(sums[r][m], values, vld1q_f32(x + m * K + k));
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) dots[r * M + m] = vaddvq_f32(sums[r][m]);
  add_half_scalar<R, M>(w, x, whole, K, dots);
}

#endif

using HalfProduct = Product<uint16_t, float, float>;
using HalfVariant = Variant<uint16_t, float, float>;

// The fastest first; the last one runs everywhere.
const HalfVariant kHalfVariants[] = {
#if defined(__x86_64__)
    {"avx512", [] { return bool(__builtin_cpu_supports("avx512f")); }, TILES(half_avx512)},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, TILES(half_avx2)},
#elif defined(__aarch64__)
    {"neon", [] { return true; }, TILES(half_neon)},
#endif
    {"scalar", [] { return true; }, TILES(half_scalar)},
};
constexpr int kHalfVariantCount = sizeof(kHalfVariants) / sizeof(HalfVariant);

float nothing(const float*, int64_t) { return 0; }

namespace ffi = xla::ffi;

ffi::Error handle_half(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> w, ffi::Buffer<ffi::F32> x,
                       ffi::ResultBuffer<ffi::F32> y) {
  const int64_t N = w.dimensions()[0], K = w.dimensions()[1], M = x.dimensions()[0];
  if (x.dimensions()[1] != K) return ffi::Error::InvalidArgument("activations and weights differ in width");
  static const HalfVariant& fastest = first_that_runs(kHalfVariants);
  const auto* bits = static_cast<const uint16_t*>(w.untyped_data());
  const HalfProduct product{fastest, bits, x.typed_data(), y->typed_data(), M, N, K, K, nothing};
  multiply(product, pool.num_threads() - 1, [&pool](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(half_product, handle_half,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

// For tests, as those of ternary_product.cc.
extern "C" const char* half_variant_name(int i) { return i < kHalfVariantCount ? kHalfVariants[i].name : nullptr; }
extern "C" int half_variant_runs_here(int i) { return kHalfVariants[i].runs_here(); }
extern "C" void half_variant_product(int i, const uint16_t* w, const float* x, float* y, int64_t M, int64_t N, int64_t K) {
  HalfProduct{kHalfVariants[i], w, x, y, M, N, K, K, nothing}.rows(0, N);
}
