"""Sinusoid regression: errors and predictive intervals."""
