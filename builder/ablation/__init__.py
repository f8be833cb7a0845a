"""The prompt study, repeatable: train and score a grid of settings, and see what of pretraining shows in the images."""
