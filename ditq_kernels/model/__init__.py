"""A whole model: watched, calibrated, planned, smoothed and converted."""
