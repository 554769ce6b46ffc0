"""Fig. 1 and Theorems 1 and 2: how far hypergradients are from the exact one."""
