// The step on the CPU: one parallel region for the whole model.
#pragma once

#include <string>
#include <vector>

#include "../table.h"

namespace fused {

// Instruction set in use; `select_isa` takes one of the names that were built, or "" for the best this processor has.
const char* isa();
void select_isa(const std::string& name);
int max_threads();

// Norms of the gradients: `row_values` receives one value per row (sum of squares or largest magnitude; may be null),
// `total` {value over all rows, number of rows with nonfinite elements}.
void reduce(const std::vector<TensorRow>& rows, bool maximum, double* row_values, double* total);

void update(const std::vector<TensorRow>& rows, const std::vector<GroupRow>& groups, const StepControl& control);

}  // namespace fused
