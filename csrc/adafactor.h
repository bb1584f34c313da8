// Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) and its published variants: the arithmetic on one element and on
// one tensor's scalars, for host and device. Which elements, and in which order sums are taken, is the drivers' business.
//
// With R and C the averaged row and column means of g^2 and m the mean of R, the second moment is R C / m and an update is
// u = g min(sqrt(m / R) / sqrt(C), limit): no root per element.
#pragma once

#include <cmath>

#include "rules.h"
#include "table.h"

namespace fused {

struct Adafactor {
  // Indices into the group row's hyperparameters, in the order of fused/factored.py. None arrives as NaN.
  enum Hyper { kLr, kBeta2Decay, kEps1, kEps2, kThreshold, kWeightDecay, kBeta1, kBeta2Cap, kHypers };

  // Bits of FactoredRow::flags, numbered as in fused/factored.py.
  enum Flag : uint32_t {
    kRelativeStep = 1,    // the step size is at most 1 / sqrt(t)
    kWarmup = 2,          // ... and at most 1e-6 t
    kScaleParameter = 4,  // the step size is multiplied by the parameter's root mean square, at least eps2
    kAddEps = 8,          // eps1 is added to g^2; else it bounds the estimate from below
    kDecayByStep = 16,    // weight decay is multiplied by the step size
    kDecayPlain = 32,     // weight decay is multiplied by nothing; neither: by lr
    kMomentOfUpdate = 64  // the first moment averages updates before they are multiplied by the step size
  };

  // What a tensor's second moment needs in one step.
  struct Moments {
    double weight;      // of the new square: 1 - beta2
    double added;       // to every square
    double least_mean;  // lower bound of a matrix's mean
    double limit;       // upper bound of the inverse root
  };

  // What a tensor's parameters need in one step.
  struct Step {
    double decay;    // factor of the parameter
    double into;     // factor of an update on its way into the first moment
    double beta1;    // decay of the first moment
    double neg_out;  // factor of the first moment, or of the update, on its way into the parameter
  };

  static FUSED_HD bool clips(const double* h) { return h[kThreshold] == h[kThreshold]; }
  static FUSED_HD bool has_moment(const double* h) { return h[kBeta1] == h[kBeta1]; }

  // `wide`: float64 arithmetic, whose eps is the default of eps1.
  static FUSED_HD Moments moments(const double* h, uint32_t flags, double t, bool wide) {
    const double eps1 = h[kEps1] == h[kEps1] ? h[kEps1] : (wide ? 0x1p-52 : 0x1p-23);
    const double weight = pow(t, h[kBeta2Decay]), least_weight = 1.0 - h[kBeta2Cap];
    // Finite, so that a zero gradient over a zero estimate is a zero update.
    const double largest = wide ? 1.7976931348623157e308 : 3.4028234663852886e38;
    Moments c;
    c.weight = weight > least_weight ? weight : least_weight;
    c.added = (flags & kAddEps) != 0 ? eps1 : 0.0;
    c.least_mean = (flags & kAddEps) != 0 ? 0.0 : eps1;
    const double limit = 1.0 / eps1;
    c.limit = (flags & kAddEps) != 0 || !(limit < largest) ? largest : limit;
    return c;
  }

  // `rms_param`, `rms_update`: root mean squares over the whole tensor, 0 where they do not matter.
  static FUSED_HD Step step(const double* h, uint32_t flags, double t, double rms_param, double rms_update) {
    double rho = h[kLr];
    if ((flags & kRelativeStep) != 0) rho = rho < 1.0 / sqrt(t) ? rho : 1.0 / sqrt(t);
    if ((flags & kWarmup) != 0) rho = rho < 1e-6 * t ? rho : 1e-6 * t;
    const double scale = (flags & kScaleParameter) == 0 ? 1.0 : (rms_param > h[kEps2] ? rms_param : h[kEps2]);
    const double size = rho * scale;
    const double ratio = clips(h) ? rms_update / h[kThreshold] : 0.0;
    const double clipped = ratio > 1.0 ? 1.0 / ratio : 1.0;
    const double decay_scale = (flags & kDecayPlain) != 0 ? 1.0 : ((flags & kDecayByStep) != 0 ? size : h[kLr]);
    Step s;
    s.decay = 1.0 - decay_scale * h[kWeightDecay];
    s.beta1 = has_moment(h) ? h[kBeta1] : 0.0;
    const bool early = (flags & kMomentOfUpdate) != 0;
    s.into = (1.0 - s.beta1) * clipped * (early ? 1.0 : size);
    s.neg_out = has_moment(h) ? (early ? -size : -1.0) : -size * clipped;
    return s;
  }

  // A row's share of the inverse root: sqrt(m / R). Infinite over an empty row, where the limit takes over.
  template <class T>
  static FUSED_HD T row_factor(T mean, T row) {
    return row == T(0) ? T(INFINITY) : sqrt_(mean / row);
  }

  // A column's share, and the whole inverse root of an element that is not factored.
  template <class T>
  static FUSED_HD T inverse_root(T second) {
    return T(1) / sqrt_(second);
  }

  // NaN passes.
  template <class T>
  static FUSED_HD T bounded(T factor, T limit) {
    return factor > limit ? limit : factor;
  }

  template <class T>
  static FUSED_HD void apply(T& p, T update, T decay, T neg_out) {
    p = fma_(neg_out, update, p * decay);
  }

  template <class T>
  static FUSED_HD T first_moment(T moment, T update, T beta1, T into) {
    return fma_(into, update, beta1 * moment);
  }
};

}  // namespace fused
