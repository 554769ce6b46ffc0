"""The study from which the library's defaults follow: one setting at a time, judged on validation tasks."""
