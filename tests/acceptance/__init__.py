"""Measurements that take minutes: run on demand (`make chaos`, `make bench`, `python -m tests.acceptance.NAME`)."""
