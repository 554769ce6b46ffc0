"""Fig. 2: what one hypergradient costs in time and memory."""
