"""The only place that knows devices: which one, in which precision, with how many threads, from which seed."""
