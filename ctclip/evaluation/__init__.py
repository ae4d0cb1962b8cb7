"""Predictions and labels in; metrics, intervals, calibration, thresholds and the report out."""
