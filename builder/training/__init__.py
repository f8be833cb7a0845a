"""Training of a generator on packed crops: data, the two objectives, and a loop that resumes exactly."""
