"""The kernels of the counterfactual. Imported as `cammask_fast.kernels`; imports nothing of cammask_fast."""
