"""Weights in and out. One mapping table per foreign format, read in both directions; numpy only, no torch."""
