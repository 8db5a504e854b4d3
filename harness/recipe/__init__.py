"""The paper (arXiv 1706.02677v2): arithmetic and small torch pieces; no files, no processes."""
