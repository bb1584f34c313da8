// One struct per optimizer rule: the arithmetic on one element, in registers.
//
// A rule knows nothing of dtypes, master weights, loss scaling, clipping, pointers or launches; drivers know all of those
// and no optimizer. The same text is compiled by the host compiler and by nvcc, so the CPU tests exercise the arithmetic
// that the GPU runs. Every build disables floating-point contraction and asks for a fused multiply-add by name where one
// is wanted: results are then the same to the bit for every instruction set and on the GPU.
//
//   Hyper      indices into the group row's hyperparameters, in the order of fused/rules.py
//   Constants  what the rule needs per tensor and step, derived in float64 once
//   apply      one element: parameter and states are updated in place
#pragma once

#include <cfloat>
#include <cmath>

#if defined(__CUDACC__)
#define FUSED_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
#define FUSED_HD inline __attribute__((always_inline))
#else
#define FUSED_HD inline
#endif

namespace fused {

FUSED_HD float fma_(float a, float b, float c) { return fmaf(a, b, c); }
FUSED_HD double fma_(double a, double b, double c) { return fma(a, b, c); }
FUSED_HD float sqrt_(float x) { return sqrtf(x); }
FUSED_HD double sqrt_(double x) { return sqrt(x); }

// start + weight * (end - start) in the form that is exact at both ends, as torch.lerp computes it.
template <class T>
FUSED_HD T lerp(T start, T end, T weight) {
  const bool low = weight < T(0.5);
  return fma_(low ? weight : weight - T(1), end - start, low ? start : end);
}

// Larger of two, NaN if either is (torch.maximum).
template <class T>
FUSED_HD T max_nan(T a, T b) {
  return (a > b || a != a) ? a : b;
}

// x / divisor, by the inverse of a divisor that many x share. A GPU has no instruction that divides: the three here take the
// place of twelve. The product's remainder is exact, and its correction rounds correctly (Markstein, IBM J. Res. Dev. 34(1),
// 1990), unless it underflows, which it cannot where x is a square root. Infinity leaves no remainder that is a number.
// A CPU divides while it does other things, and is no faster this way; tests have it do so by FUSED_GPU_ARITHMETIC.
FUSED_HD float quotient(float x, float divisor, float inverse) {
#if defined(__CUDACC__) || defined(FUSED_GPU_ARITHMETIC)
  const float first = x * inverse;
  return fma_(fmaxf(fma_(-first, divisor, x), -FLT_MAX), inverse, first);
#else
  return (void)inverse, x / divisor;
#endif
}
FUSED_HD double quotient(double x, double divisor, double) { return x / divisor; }

// Sign with sign(0) = 0 and sign(NaN) = NaN.
template <class T>
FUSED_HD T sign(T x) {
  return x > T(0) ? T(1) : (x < T(0) ? T(-1) : x);
}

// `value` is the same for all elements.
template <class T>
FUSED_HD T if_nonzero(T value, T a, T b) {
  return value != T(0) ? a : b;
}

// L2 penalty added to the gradient. Skipped at zero, so that an infinite parameter does not turn the gradient into NaN.
template <class T>
FUSED_HD T add_l2(T g, T p, T l2) {
  return if_nonzero(l2, fma_(l2, p, g), g);
}

// Adam (arXiv:1412.6980) and AdamW (arXiv:1711.05101); states exp_avg, exp_avg_sq[, max_exp_avg_sq].
template <bool AMSGRAD>
struct Adam {
  static constexpr int kStates = AMSGRAD ? 3 : 2;
  enum Hyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kDecoupled, kHypers };

  template <class T>
  struct Constants {
    T decay, l2, weight1, beta2, weight2, correction2_sqrt, correction2_inverse, eps, neg_step_size;
  };

  template <class T>
  static FUSED_HD Constants<T> constants(const double* h, double step) {
    const double correction1 = 1.0 - pow(h[kBeta1], step);
    const double correction2 = 1.0 - pow(h[kBeta2], step);
    const bool decoupled = h[kDecoupled] != 0.0;
    Constants<T> c;
    c.decay = T(decoupled ? 1.0 - h[kLr] * h[kWeightDecay] : 1.0);
    c.l2 = T(decoupled ? 0.0 : h[kWeightDecay]);
    c.weight1 = T(1.0 - h[kBeta1]);
    c.beta2 = T(h[kBeta2]);
    c.weight2 = T(1.0 - h[kBeta2]);
    c.correction2_sqrt = T(sqrt(correction2));
    c.correction2_inverse = T(1) / c.correction2_sqrt;
    c.eps = T(h[kEps]);
    c.neg_step_size = T(-(h[kLr] / correction1));
    return c;
  }

  template <class T>
  static FUSED_HD void apply(T& p, T g, T (&s)[kStates], const Constants<T>& c) {
    g = add_l2(g, p, c.l2);
    p *= c.decay;
    s[0] = lerp(s[0], g, c.weight1);
    s[1] = fma_(c.weight2 * g, g, c.beta2 * s[1]);
    T second = s[1];
    if constexpr (AMSGRAD) {
      s[2] = max_nan(s[2], s[1]);
      second = s[2];
    }
    const T denominator = quotient(sqrt_(second), c.correction2_sqrt, c.correction2_inverse) + c.eps;
    p += c.neg_step_size * s[0] / denominator;
  }
};

// Lion (arXiv:2302.06675), state exp_avg.
struct Lion {
  static constexpr int kStates = 1;
  enum Hyper { kLr, kBeta1, kBeta2, kWeightDecay, kHypers };

  template <class T>
  struct Constants {
    T decay, beta1, weight1, beta2, weight2, neg_lr;
  };

  template <class T>
  static FUSED_HD Constants<T> constants(const double* h, double) {
    return {T(1.0 - h[kLr] * h[kWeightDecay]), T(h[kBeta1]), T(1.0 - h[kBeta1]), T(h[kBeta2]), T(1.0 - h[kBeta2]), T(-h[kLr])};
  }

  template <class T>
  static FUSED_HD void apply(T& p, T g, T (&s)[kStates], const Constants<T>& c) {
    const T direction = sign(c.beta1 * s[0] + c.weight1 * g);
    p *= c.decay;
    p += c.neg_lr * direction;
    s[0] = c.beta2 * s[0] + c.weight2 * g;
  }
};

// Stochastic gradient descent, state momentum_buffer if MOMENTUM. The buffer starts as the first gradient, undampened:
// step <= 1 marks the first update (a missing step count means that the buffer holds history).
template <bool MOMENTUM>
struct SGD {
  static constexpr int kStates = MOMENTUM ? 1 : 0;
  enum Hyper { kLr, kMomentum, kDampening, kWeightDecay, kNesterov, kHypers };

  template <class T>
  struct Constants {
    T l2, momentum, weight, nesterov, neg_lr;
  };

  template <class T>
  static FUSED_HD Constants<T> constants(const double* h, double step) {
    const double weight = step <= 1.0 ? 1.0 : 1.0 - h[kDampening];
    return {T(h[kWeightDecay]), T(h[kMomentum]), T(weight), T(h[kNesterov]), T(-h[kLr])};
  }

  template <class T>
  static FUSED_HD void apply(T& p, T g, T (&s)[kStates ? kStates : 1], const Constants<T>& c) {
    g = add_l2(g, p, c.l2);
    if constexpr (MOMENTUM) {
      s[0] = fma_(c.weight, g, c.momentum * s[0]);
      g = if_nonzero(c.nesterov, fma_(c.momentum, s[0], g), s[0]);
    }
    p = fma_(c.neg_lr, g, p);
  }
};

// RMSprop (Tieleman and Hinton 2012; centered: arXiv:1308.0850), states square_avg[, grad_avg][, momentum_buffer].
template <bool CENTERED, bool MOMENTUM>
struct RMSprop {
  static constexpr int kStates = 1 + CENTERED + MOMENTUM;
  enum Hyper { kLr, kAlpha, kEps, kWeightDecay, kMomentum, kHypers };

  template <class T>
  struct Constants {
    T l2, alpha, weight, eps, momentum, neg_lr;
  };

  template <class T>
  static FUSED_HD Constants<T> constants(const double* h, double) {
    return {T(h[kWeightDecay]), T(h[kAlpha]), T(1.0 - h[kAlpha]), T(h[kEps]), T(h[kMomentum]), T(-h[kLr])};
  }

  template <class T>
  static FUSED_HD void apply(T& p, T g, T (&s)[kStates], const Constants<T>& c) {
    g = add_l2(g, p, c.l2);
    s[0] = fma_(c.weight * g, g, c.alpha * s[0]);
    T average = s[0];
    if constexpr (CENTERED) {
      s[1] = lerp(s[1], g, c.weight);
      average = fma_(-s[1], s[1], average);
    }
    average = sqrt_(average) + c.eps;
    if constexpr (MOMENTUM) {
      T& buffer = s[kStates - 1];
      buffer = c.momentum * buffer + g / average;
      p = fma_(c.neg_lr, buffer, p);
    } else {
      p += c.neg_lr * g / average;
    }
  }
};

// Adagrad (Duchi et al. 2011, JMLR 12), state sum.
struct Adagrad {
  static constexpr int kStates = 1;
  enum Hyper { kLr, kLrDecay, kWeightDecay, kEps, kHypers };

  template <class T>
  struct Constants {
    T l2, eps, neg_lr;
  };

  template <class T>
  static FUSED_HD Constants<T> constants(const double* h, double step) {
    return {T(h[kWeightDecay]), T(h[kEps]), T(-(h[kLr] / (1.0 + (step - 1.0) * h[kLrDecay])))};
  }

  template <class T>
  static FUSED_HD void apply(T& p, T g, T (&s)[kStates], const Constants<T>& c) {
    g = add_l2(g, p, c.l2);
    s[0] = fma_(g, g, s[0]);
    p += c.neg_lr * g / (sqrt_(s[0]) + c.eps);
  }
};

// Adadelta (arXiv:1212.5701), states square_avg, acc_delta.
struct Adadelta {
  static constexpr int kStates = 2;
  enum Hyper { kLr, kRho, kEps, kWeightDecay, kHypers };

  template <class T>
  struct Constants {
    T l2, rho, weight, eps, neg_lr;
  };

  template <class T>
  static FUSED_HD Constants<T> constants(const double* h, double) {
    return {T(h[kWeightDecay]), T(h[kRho]), T(1.0 - h[kRho]), T(h[kEps]), T(-h[kLr])};
  }

  template <class T>
  static FUSED_HD void apply(T& p, T g, T (&s)[kStates], const Constants<T>& c) {
    g = add_l2(g, p, c.l2);
    s[0] = fma_(c.weight * g, g, c.rho * s[0]);
    const T delta = sqrt_(s[1] + c.eps) / sqrt_(s[0] + c.eps) * g;
    s[1] = fma_(c.weight * delta, delta, c.rho * s[1]);
    p = fma_(c.neg_lr, delta, p);
  }
};

// Every rule once, in the order of fused/rules.py: X(name, type).
#define FUSED_COMMA ,
#define FUSED_RULES(X)                                        \
  X(adam, Adam<false>)                                        \
  X(adam_amsgrad, Adam<true>)                                 \
  X(lion, Lion)                                               \
  X(sgd, SGD<false>)                                          \
  X(sgd_momentum, SGD<true>)                                  \
  X(rmsprop, RMSprop<false FUSED_COMMA false>)                \
  X(rmsprop_momentum, RMSprop<false FUSED_COMMA true>)        \
  X(rmsprop_centered, RMSprop<true FUSED_COMMA false>)        \
  X(rmsprop_centered_momentum, RMSprop<true FUSED_COMMA true>) \
  X(adagrad, Adagrad)                                         \
  X(adadelta, Adadelta)

}  // namespace fused
