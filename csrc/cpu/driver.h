// The step on the CPU: one parallel region for the whole model.
#pragma once

#include <string>
#include <vector>

#include "../table.h"
#include "kernels.h"

namespace fused {

// Instruction set in use; `select_isa` takes one of the names that were built, or "" for the best this processor has.
const char* isa();
void select_isa(const std::string& name);
int max_threads();

const Kernels& active_kernels();
// How many threads are worth their while for this many elements.
int threads_for(int64_t elements);

// Norms of the gradients: `row_values` receives {sum of squares or largest magnitude, 1 where an element is not finite} per
// row (may be null), `total` {value over all rows, number of rows with nonfinite elements}.
void reduce(const std::vector<TensorRow>& rows, bool maximum, double* row_values, double* total);

// In place on the gradients. `scale` returns whether one of the old values was not finite.
bool scale(const std::vector<TensorRow>& rows, double factor);
void clamp(const std::vector<TensorRow>& rows, double limit);

// Adds every row's gradient to the float32 or float64 tensor at `param`, or stores it there where `overwrite` says so.
void accumulate(const std::vector<TensorRow>& rows, const std::vector<uint8_t>& overwrite);

void update(const std::vector<TensorRow>& rows, const std::vector<GroupRow>& groups, const StepControl& control);

}  // namespace fused
