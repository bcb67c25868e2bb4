"""The only place that knows devices: which one, in which precision, with how many threads, from which seed."""

from scionlm.parallel.runtime import Runtime, resolve_compile, start_runtime

__all__ = ["Runtime", "resolve_compile", "start_runtime"]
