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
// How many threads are worth their while for these rows.
int threads_for(const std::vector<TensorRow>& rows);

// Norms of the gradients: `row_values` receives one value per row (sum of squares or largest magnitude; may be null),
// `total` {value over all rows, number of rows with nonfinite elements}.
void reduce(const std::vector<TensorRow>& rows, bool maximum, double* row_values, double* total);

void update(const std::vector<TensorRow>& rows, const std::vector<GroupRow>& groups, const StepControl& control);

}  // namespace fused
