"""The paper's figures and tables, and comparisons on real data, one file each; `ibaml reproduce` runs them."""
