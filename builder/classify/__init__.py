"""Does synthetic data help a classifier? Real and synthetic crops at several ratios, judged on held-out patients."""
