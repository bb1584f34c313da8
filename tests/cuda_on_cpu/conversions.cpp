// csrc/cuda/blocks8_warp.h and remainders.h against csrc/blocks8.h and formats.h: whole tensors of every content that is dealt
// with apart, and divisions of every operand that matters with every reciprocal that a device may give. Prints what differs, and
// ends with the first check that finds something.
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/blocks8_warp.h"
#include "cuda/remainders.h"

namespace {

using namespace fused;
using namespace fused::cuda;

constexpr int kMostUlps = 2;  // one more than is promised
constexpr int kShown = 5;

bool same(float a, float b) { return bits_of(a) == bits_of(b); }

// Calls check(report) for every error of reciprocals, or for one; report(ok, ...) counts.
template <class Check>
bool run(const char* name, Check check, int from = -kMostUlps, int to = kMostUlps) {
  long wrong = 0, tried = 0;
  for (int ulps = from; ulps <= to; ++ulps) {
    cuda_on_cpu::reciprocal_ulps = ulps;
    check([&](bool ok, unsigned a, unsigned b) {
      ++tried;
      if (!ok && ++wrong <= kShown) std::printf("%s: differs at %#x, %#x with reciprocals off by %d ulp\n", name, a, b, ulps);
    });
  }
  std::printf("%s: %ld of %ld differ\n", name, wrong, tried);
  return wrong != 0 || tried == 0;
}

// Every code with this scale, each in another of a thread's places.
template <class Block, class Report>
void decode_all(unsigned scale, const Block& block, Report report) {
  for (unsigned first = 0; first < 256u; first += kVector) {
    uint8_t bytes[kVector];
    for (unsigned j = 0; j < unsigned(kVector); ++j) bytes[j] = uint8_t(first + (j + scale + scale / 64u) % unsigned(kVector));
    Codes code;
    float x[kVector];
    std::memcpy(code, bytes, sizeof code);
    if constexpr (std::is_same_v<Block, Block8Signed>) decode_signed(code, uint16_t(scale), x);
    else decode_unsigned(code, uint16_t(scale), x);
    for (int j = 0; j < kVector; ++j) report(same(x[j], block8_decode(bytes[j], block)), scale, bytes[j]);
  }
}

// Scales of blocks are 0 or at least that of the smallest magnitude that is not raised.
template <class Report>
void decode_signed_all(Report report) {
  constexpr unsigned kFirst = kSmallestScale >> 23 << 8;
  for (unsigned scale = 0; scale < 0xff00u; scale += scale == 0u ? kFirst : 1u)
    decode_all(scale, block8_signed(uint16_t(scale)), report);
}

template <class Report>
void decode_unsigned_all(Report report) {
  for (unsigned scale = 0; scale < 0x10000u; ++scale) decode_all(scale, block8_unsigned(uint16_t(scale)), report);
}

// The code that a block of scale 1 would give a magnitude whose multiple by the gain is z, as it is before roots are taken.
uint32_t portable_level(float z, const Curve8& curve) { return block8_encode(z, Block8Signed{curve, 1.0f, 1.0f}); }

uint32_t level_of(float z, uint32_t curve) {
  const float most = float(kSignedLevels), y = ratio(reach_of(curve) * z, 1.0f + z);
  return bits_of((y < most ? y : most) + 0x1.8p23f) & 0x7fu;
}

// Levels, for z around every place where one ends and the next begins. Further away a quotient may be wrong in its last bits.
template <class Report>
void levels_near_their_ends(Report report) {
  constexpr int kAround = 200;
  for (const uint32_t curve : {0u, 1u, 2u}) {
    Curve8 portable = curve8(curve);
    portable.halvings = portable.bias = 0u;
    for (int level = 0; level < kSignedLevels; ++level) {
      const double y = level + 0.5;
      const uint32_t middle = bits_of(float(y / (double(portable.reach) - y)));
      for (int around = -kAround; around <= kAround; ++around) {
        const float z = float_of(middle + uint32_t(around));
        report(level_of(z, curve) == portable_level(z, portable), curve, bits_of(z));
      }
    }
  }
}

template <class Report>
void gains(Report report) {
  for (unsigned scale = kSmallestScale >> 23 << 8; scale <= bits_of(kHuge) >> 15; ++scale) {
    const uint32_t curve = curve_of(uint16_t(scale));
    report(same(signed_gain(top_of(uint16_t(scale), curve), curve), block8_signed(uint16_t(scale)).gain), scale, curve);
  }
}

// Every mantissa of a block's largest magnitude, in an octave and at both ends: its scale, and no level above the last.
template <class Report>
void largest_magnitudes(Report report) {
  for (const uint32_t octave : {1u, 33u, 34u, 35u, 127u, 226u}) {
    for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += octave == 127u ? 1u : 61u) {
      const uint32_t largest = (octave << 23) | mantissa;
      for (uint32_t curve = 0; curve < kCurves; ++curve) {
        const SignedScale scale = signed_scale(largest, curve);
        float z = float_of(largest) * signed_gain(scale.top, curve);
        if (curve >= 2u) z = float_of((bits_of(z) >> root_of(curve).halvings) + root_of(curve).bias);
        report(scale.word == block8_scale_signed(largest, curve) && same(scale.top, top_of(scale.word, curve)), largest, curve);
        report(reach_of(curve) * z / (1.0f + z) < float(kSignedLevels) + 0.5f, largest, curve);
      }
    }
  }
}

template <class Report>
void unsigned_steps(Report report) {
  for (unsigned index = 0; index < 64u; ++index) {
    const float inverse = ratio(1.0f, float_of((index + kSmallestStep) << kStepShift));
    report(same(inverse, block8_unsigned(uint16_t(index)).inverse), index, bits_of(inverse));
  }
}

// ---- whole tensors ----

using Random = std::mt19937;

float uniform(Random& random) { return float(random() >> 8) * 0x1p-24f; }
bool one_in(Random& random, unsigned n) { return random() % n == 0u; }

// Magnitudes over so many octaves below `top`.
float below(Random& random, float top, float octaves) { return top * std::exp2(-octaves * uniform(random)); }

// The value with index i of a tensor. Contents change from one block to the next, or from one run of blocks to the next.
using Contents = float (*)(Random&, unsigned i);

// Every curve: from blocks of one magnitude to some that are spread over 20 octaves.
float curves(Random& random, unsigned i) { return below(random, 0x1p-12f, float(i / kBlock8 % 21u)); }
float zeros(Random& random, unsigned i) { return one_in(random, 1u + i / kBlock8 % 5u) ? 0.0f : below(random, 1.0f, 5.0f); }
float few_zeros(Random& random, unsigned) { return one_in(random, 100u) ? 0.0f : below(random, 1.0f, 5.0f); }
float nothing(Random&, unsigned) { return 0.0f; }
float tiny(Random& random, unsigned i) { return float_of(random() >> (4u + i / kBlock8 % 28u)); }
float huge(Random& random, unsigned i) { return below(random, float_of(kInfinity - 1u), float(i / kBlock8 % 60u)); }
float at_the_limits(Random& random, unsigned i) {
  const uint32_t limit[] = {kSmallestScale, kLargestScale, bits_of(0x1p100f), kInfinity, 4u << kLowShift, kWidestRange};
  return float_of(limit[i / kBlock8 % 6u] + random() % 5u - 2u);
}
float wide(Random& random, unsigned) { return float_of(random() % kInfinity); }
float any(Random& random, unsigned) { return float_of(random() & kMagnitude); }
float rarely_nan(Random& random, unsigned) {
  return one_in(random, 500u) ? float_of(kInfinity + random() % 3u) : below(random, 1.0f, 9.0f);
}
float equal(Random&, unsigned i) { return float_of((i / kBlock8 + 100u) << 20); }
// From the lower end of a range to 253, or so, of its largest steps.
float full_range(Random& random, unsigned i) {
  const uint32_t step = (8u + i / kBlock8 % 8u) << (11u + i / kBlock8 / 8u % 8u), levels = 250u + i / kBlock8 % 5u;
  return float_of((300u << kLowShift) + step * (random() % (levels + 1u)) - (one_in(random, 9u) ? 0u : random() % 2u));
}
// On both sides of the means at which one curve takes over from another, and on them.
float ends_of_curves(Random&, unsigned i) {
  const uint32_t mean[] = {uint32_t(kSteeper), uint32_t(kSquareRoot), uint32_t(kFourthRoot)};
  const uint32_t block = i / kBlock8, lane = i % kBlock8, others = kBlock8 - 1u;
  const uint32_t total = mean[block % 3u] * kBlock8 + block / 3u % 3u - 1u;
  const uint32_t deficit = lane == 0u ? 0u : total * lane / others - total * (lane - 1u) / others;
  return float_of(((120u << 7) - deficit) << 16);
}

struct Encoded {
  std::vector<uint8_t> code;
  std::vector<uint16_t> scale;

  explicit Encoded(unsigned n) : code(n), scale((n + kBlock8 - 1) / kBlock8) {}
};

// By csrc/blocks8.h alone.
Encoded defined(const std::vector<float>& x, bool with_sign, uint32_t step) {
  const unsigned n = unsigned(x.size());
  Encoded result(n);
  for (unsigned first = 0; first < n; first += kBlock8) {
    const unsigned end = first + kBlock8 < n ? first + kBlock8 : n, number = first / kBlock8;
    uint32_t largest = 0, smallest = kMagnitude;
    int32_t deficit = 0, nonzero = 0;
    for (unsigned i = first; i < end; ++i) {
      const uint32_t a = block8_magnitude(x[i]);
      largest = larger(largest, a);
      if (a != 0u) smallest = smaller(smallest, a);
    }
    for (unsigned i = first; i < end; ++i) {
      deficit += block8_deficit(block8_magnitude(x[i]) >> 16, largest >> 16);
      nonzero += block8_magnitude(x[i]) >> 16 != 0u;
    }
    const uint16_t scale = with_sign ? block8_scale_signed(largest, block8_curve(deficit, nonzero))
                                     : block8_scale_unsigned(smallest, largest);
    const uint32_t phase = block8_phase(number, step), narrow = block8_narrow(step);
    result.scale[number] = scale;
    for (unsigned i = first; i < end; ++i)
      result.code[i] = with_sign ? block8_encode(x[i], block8_signed(scale))
                                 : block8_encode(x[i], block8_unsigned(scale), block8_threshold(phase, narrow, i - first));
  }
  return result;
}

Encoded encoded(const std::vector<float>& values, bool with_sign, uint32_t step) {
  const int64_t n = int64_t(values.size());
  Encoded result{unsigned(n)};
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kThreads);
  config.gridDim = dim3(unsigned(n / (kThreads * kVector) + 1));
  const auto thread = [&] {
    const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVector;
    const Place at = {first < n ? first : 0, int(n - first < 0 ? 0 : n - first < kVector ? n - first : kVector)};
    float x[kVector];
    for (int j = 0; j < kVector; ++j) x[j] = j < at.count ? values[size_t(at.begin + j)] : 1e6f;
    Codes code;
    const uint16_t scale = with_sign ? encode_signed(at, x, code) : encode_unsigned(at, x, code, step);
    if (at.count > 0 && at.begin % kBlock8 == 0) result.scale[size_t(at.begin / kBlock8)] = scale;
    for (int j = 0; j < at.count; ++j) result.code[size_t(at.begin + j)] = uint8_t(byte_of(code, j));
  };
  if (cuda_on_cpu::enqueue(config, thread) != cudaSuccess) std::printf("%s\n", cudaGetErrorString(cudaErrorLaunchFailure));
  return result;
}

template <class Report>
void tensors(Report report) {
  Random random(1);
  unsigned which = 0;
  for (const Contents contents : {curves, zeros, few_zeros, nothing, tiny, huge, at_the_limits, wide, any, rarely_nan, equal,
                                  full_range, ends_of_curves}) {
    for (const unsigned n : {2u * kThreads * unsigned(kVector), 4099u, 40u, 3u}) {
      for (const bool with_sign : {true, false}) {
        for (const uint32_t step : {0u, 1u, 7u, 31u, 32u, 1000000u}) {
          std::vector<float> x(n);
          for (unsigned i = 0; i < n; ++i) {
            const float a = contents(random, i);
            // Second moments have no sign, but what they are read from may.
            const bool negative = with_sign ? one_in(random, 2u) : step == 7u && one_in(random, 1000u);
            x[i] = negative ? -a : a;
          }
          const Encoded expected = defined(x, with_sign, step), ours = encoded(x, with_sign, step);
          report(expected.scale == ours.scale, which, n);
          report(expected.code == ours.code, which, n);
        }
      }
    }
    ++which;
  }
}

// A block that spans exactly 253 steps, at a step of the optimizer whose threshold for the last value is all but 2: rounded, their
// sum is that of a level above the last.
template <class Report>
void level_above_the_last(Report report) {
  constexpr uint32_t kNearly = (1u << 23) - 16u;
  for (unsigned index = 0; index < 64u; ++index) {
    const uint32_t lane = index % kBlock8, low = 300u << kLowShift;
    uint32_t step = 32;
    while (((block8_phase(0, step) + lane * kLanePhase) >> 9) < kNearly) ++step;
    std::vector<float> x(kWarp * kVector, float_of(low));  // whole vectors in all lanes that decide together
    x[lane] = float_of(low + 253u * uint32_t(block8_unsigned(uint16_t(index)).step));
    const Encoded expected = defined(x, false, step), ours = encoded(x, false, step);
    report(expected.scale == ours.scale && expected.code == ours.code, index, step);
  }
}

// ---- remainders ----

bool is_nan(float x) { return (bits_of(x) & kMagnitude) > kInfinity; }

// Patterns at random: among all of them, or none that is NaN; zeros among the parameters, and infinities.
uint32_t pattern(Random& random, bool finite) {
  const uint32_t u = random();
  if (one_in(random, 50u)) return (u & 0x80000000u) | kInfinity;
  return finite && is_nan(float_of(u)) ? u ^ 0x40000000u : u;
}

template <class Remainder, class Report>
void remainders(Report report) {
  Random random(2);
  for (unsigned turn = 0; turn < 200000u; ++turn) {
    uint16_t param[kVector];
    typename Remainder::Low low[kVector];
    uint32_t high_words[kPairs], low_words[Remainder::kWords];
    float x[kVector];
    for (int j = 0; j < kVector; ++j) {
      param[j] = uint16_t(turn % 3u == 0u && one_in(random, 5u) ? random() & 0x8000u : pattern(random, turn % 2u == 0u) >> 16);
      low[j] = typename Remainder::Low(random());
    }
    std::memcpy(high_words, param, sizeof param);
    std::memcpy(low_words, low, sizeof low);
    join_bf16<Remainder>(high_words, low_words, x);
    for (int j = 0; j < kVector; ++j) report(same(x[j], Remainder::join(param[j], low[j])), param[j], unsigned(low[j]));
    for (float& value : x) value = float_of(pattern(random, turn % 2u == 0u));
    split_bf16<Remainder>(x, high_words, low_words);
    std::memcpy(param, high_words, sizeof param);
    std::memcpy(low, low_words, sizeof low);
    for (int j = 0; j < kVector; ++j) {
      const auto parts = Remainder::split(x[j]);
      report(parts.param == param[j] && parts.remainder == low[j], bits_of(x[j]), param[j]);
    }
  }
}

}  // namespace

int main() {
  constexpr int kAny = cuda_on_cpu::kAnyUlp;
  const bool differs = run("tensors", [](auto report) { tensors(report); }, kAny, kAny) ||
                       run("remainders in bytes", [](auto report) { remainders<Bytes>(report); }, 0, 0) ||
                       run("remainders in halves", [](auto report) { remainders<Halves>(report); }, 0, 0) ||
                       run("level_above_the_last", [](auto report) { level_above_the_last(report); }, 0, 0) ||
                       run("unsigned_steps", [](auto report) { unsigned_steps(report); }) ||
                       run("gains", [](auto report) { gains(report); }) ||
                       run("levels_near_their_ends", [](auto report) { levels_near_their_ends(report); }) ||
                       run("decode_signed", [](auto report) { decode_signed_all(report); }) ||
                       run("decode_unsigned", [](auto report) { decode_unsigned_all(report); }, 0, 0) ||
                       run("largest_magnitudes", [](auto report) { largest_magnitudes(report); }, 0, 0);
  return differs;
}
