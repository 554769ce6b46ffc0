"""The figures and tables of the paper and studies on real data: one folder each, with its run, report and picture."""
