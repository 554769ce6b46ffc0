"""Grouped tables: predictions of a new group beside a mixed-effects model."""
