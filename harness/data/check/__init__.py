"""`harness data check`: find files that training refuses, skips or fails on."""
