"""How fast, how lean and how accurate the meta-gradients are, beside a plain loop and beside other libraries."""
