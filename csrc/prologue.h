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

FUSED_HD StepDecision decide(const StepControl& control) {
  double factor = control.grad_multiplier;
  if (control.grad_scale != nullptr) factor /= double(*control.grad_scale);
  bool skip = control.found_inf != nullptr && *control.found_inf != 0.0f;
  if (control.norm_total != nullptr) {
    const double raw = control.norm_is_max ? control.norm_total[0] : sqrt(control.norm_total[0]);
    const double norm = raw * (factor < 0.0 ? -factor : factor);
    if (control.grad_norm != nullptr) *control.grad_norm = float(norm);
    skip = skip || (control.skip_nonfinite && control.norm_total[1] != 0.0);
    if (control.max_norm >= 0.0) {
      const double clip = control.max_norm / (norm + 1e-6);  // torch.nn.utils.clip_grad_norm_
      factor *= clip < 1.0 || clip != clip ? clip : 1.0;
    }
  }
  if (control.skipped != nullptr) *control.skipped = skip ? 1.0f : 0.0f;
  return {factor, skip};
}

}  // namespace fused
