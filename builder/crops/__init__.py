"""From photographs, boxes and labels to packed real datasets: one square crop for every box, split by patient."""
