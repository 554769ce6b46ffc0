"""Files with data: where they are found, what is kept of them, and pickles read without running code."""
