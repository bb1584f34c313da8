// What is decided once per step, before the update: the norm, the clip factor, whether the step is skipped.
#pragma once

#include <cmath>

#include "rules.h"
#include "table.h"

namespace fused {

struct StepDecision {
  double grad_factor;  // multiplies every gradient: unscale, average and clip
  bool skip;
};

// torch.nn.utils.clip_grad_norm_, but with an infinite limit gradients are left alone whatever their norm.
FUSED_HD double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  const bool leave = factor >= 1.0 || max_norm == INFINITY;
  return leave ? 1.0 : factor;  // NaN stays
}

FUSED_HD StepDecision decide(const StepControl& control) {
  double factor = control.grad_multiplier;
  if (control.grad_scale != nullptr) factor /= double(*control.grad_scale);
  if (control.unscale != nullptr) *control.unscale = factor;
  bool skip = control.found_inf != nullptr && *control.found_inf != 0.0f;
  if (control.norm_total != nullptr) {
    const double raw = control.norm_is_max ? control.norm_total[0] : sqrt(control.norm_total[0]);
    const double norm = raw * (factor < 0.0 ? -factor : factor);
    if (control.grad_norm != nullptr) *control.grad_norm = float(norm);
    skip = skip || (control.skip_nonfinite && control.norm_total[1] != 0.0);
    if (control.max_norm >= 0.0) factor *= clip_factor(norm, control.max_norm);
  }
  if (control.skipped != nullptr) *control.skipped = skip ? 1.0f : 0.0f;
  return {factor, skip};
}

}  // namespace fused
