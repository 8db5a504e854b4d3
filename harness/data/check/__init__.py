"""`harness data check`: what training refuses, leaves out or trips over."""
