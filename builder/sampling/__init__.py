"""From a seed to an image: noise, conditioning, schedule, guidance, decoding."""
