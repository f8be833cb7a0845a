"""Scores of a set of images: distances, precision and recall, diversity, what gives it away."""
