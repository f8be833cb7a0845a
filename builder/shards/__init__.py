"""What is on disk: datasets of WebDataset tar shards, each with the Parquet manifest that is its commit."""
