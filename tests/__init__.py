"""The tests, and the scripts beside them that are run as `python -m tests.…`."""
